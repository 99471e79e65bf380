"""Attention in expanded form: against a plain twin in f64, of any shape, in parts, through whole models."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import set_num_threads
from test_attention import config, hadamard, random_tokens, rounded, slow_attention
from test_goldens import GOLDEN

import edge_moe
from edge_moe.backends import cpu
from edge_moe.config import KV_KINDS
from edge_moe.errors import ShapeError
from edge_moe.kernels.attention_expanded import ExpandedAttention
from edge_moe.kernels.attention_tiles import MAX_QUERY
from edge_moe.latent_cache import LatentCache


def slow(q_nope, q_pe, key_matrix, value_matrix, latents, keys_pe, start, scale):
    """All keys and values, one softmax for each query. f64[T,H,V]."""
    keys, values = (np.einsum("hnr,tr->htn", m.astype(np.float64), latents) for m in (key_matrix, value_matrix))
    out = np.empty((*q_nope.shape[:2], value_matrix.shape[1]))
    for t in range(len(q_nope)):
        seen = slice(0, start + t + 1)
        for h in range(q_nope.shape[1]):
            scores = (
                keys[h, seen] @ q_nope[t, h].astype(np.float64) + keys_pe[seen] @ q_pe[t, h].astype(np.float64)
            ) * scale
            p = np.exp(scores - scores.max())
            out[t, h] = (p / p.sum()) @ values[h, seen]
    return out


def random_arrays(seed, n_queries, start, n_heads, nope, rope, value, rank):
    rng = np.random.default_rng(seed)
    n = start + n_queries
    shapes = (
        (n_queries, n_heads, nope), (n_queries, n_heads, rope), (n_heads, nope, rank), (n_heads, value, rank),
        (n, rank), (n, rope),
    )  # fmt: skip
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def expanded(arrays, start, scale, block):
    *queries, latents, keys_pe = arrays
    attention = ExpandedAttention(*queries, start, scale)
    for first in range(0, len(latents), block):
        attention.add(first, latents[first : first + block], keys_pe[first : first + block])
    return attention.result()


@settings(deadline=None, max_examples=30)
@given(
    n_queries=st.integers(1, 40),
    start=st.integers(0, 330),
    n_heads=st.integers(1, 3),
    nope=st.integers(1, 20),
    rope=st.integers(1, 10),
    value=st.integers(1, 35),
    rank=st.integers(1, 40),
    block=st.sampled_from([16, 48, 512]),
    seed=st.integers(0, 1000),
)
def test_of_any_shape(n_queries, start, n_heads, nope, rope, value, rank, block, seed):
    arrays = random_arrays(seed, n_queries, start, n_heads, nope, rope, value, rank)
    scale = 1 / np.sqrt(nope * rank + rope)
    found, expected = expanded(arrays, start, scale, block), slow(*arrays, start, scale)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_sharp_scores_and_zeros():
    arrays = random_arrays(1, 20, 300, 2, 16, 8, 16, 32)
    arrays[4] *= np.linspace(0, 30, 320, dtype=np.float32)[:, None]
    found, expected = expanded(arrays, 300, 1.0, 64), slow(*arrays, 300, 1.0)
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()  # scores of thousands, in f32
    for array in arrays[:4]:
        array[:] = 0
    assert (expanded(arrays, 300, 1.0, 64) == 0).all()


def test_thread_count_changes_nothing():
    arrays = random_arrays(2, 70, 600, 4, 32, 16, 32, 64)
    results = []
    try:
        for n_threads in (1, 2):
            set_num_threads(n_threads)
            results.append(expanded(arrays, 600, 0.1, 512))
    finally:
        set_num_threads(2)
    np.testing.assert_array_equal(*results)


def test_wrong_shapes_are_named():
    arrays = random_arrays(3, 4, 0, 2, 8, 4, 8, 16)
    with pytest.raises(ShapeError, match="do not fit matrices"):
        ExpandedAttention(arrays[0], arrays[1], arrays[2][:1], arrays[3], 0, 1.0)
    attention = ExpandedAttention(*arrays[:4], 0, 1.0)
    with pytest.raises(ShapeError, match="do not fit the queries"):
        attention.add(0, arrays[4][:, :15], arrays[5])


@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize("rotated", [False, True])
def test_what_the_cache_gives_back(kind, rotated):
    """The latents that attention in the other form goes by: equal queries get equal answers from both.

    The scale draws it to few tokens, so that probabilities are not rounded to one byte.
    """
    rank, rope, n, scale = 72, 6, 70, 0.5
    tokens = random_tokens(np.random.default_rng(4), n, 2, rank, rope)
    gains = np.exp(np.random.default_rng(5).standard_normal((2, rank))).astype(np.float32) if rotated else None
    cache = LatentCache(config(rank, rope, n_layers=2), 100, kind, gains)
    cache.store(1, *(array[:50] for array in tokens[2:]), 1)
    cache.advance(50)
    cache.store(1, *(array[50:] for array in tokens[2:]), 1)
    latents, keys = cache.latents(1, 0, n)
    np.testing.assert_array_equal(latents[32:], cache.latents(1, 32, n)[0])
    cache.truncate(0)
    found = cache.attend(1, *tokens, scale, 1)
    q_latent = tokens[0]
    if kind in (
        "int8",
        "int4",
    ):  # queries are whole numbers of as many bits as the CPU multiplies, rotated as latents are
        h, gain = (hadamard(rank), gains[1]) if rotated else (np.eye(rank), 1)
        whole = rounded(((q_latent * gain) @ h).astype(np.float32), MAX_QUERY, 128 if kind == "int8" else 32)
        q_latent = (whole @ h) / gain
    expected = slow_attention("f32", [q_latent, tokens[1], latents, keys], 0, scale)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    with pytest.raises(ShapeError, match="tokens 8 to 20"):
        cache.latents(1, 8, 20)
    with pytest.raises(ShapeError, match="of a cache of 100"):
        cache.latents(1, 96, 101)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.gguf")), ids=lambda path: path.stem)
def test_models_answer_alike_in_both_forms(path, monkeypatch):
    model = edge_moe.load(path, kv="f32", threads=2)
    ids = np.random.default_rng(6).integers(0, model.config.vocab_size, 90)

    def logits():
        cache = model.new_cache(90)
        return np.concatenate(
            [model.forward(ids[:60], cache, all_logits=True), model.forward(ids[60:], cache, all_logits=True)]
        )

    absorbed = logits()
    calls = []
    whole = cpu.CpuBackend.expanded_attention
    monkeypatch.setattr(cpu.CpuBackend, "expanded_attention", lambda *a: calls.append(1) or whole(*a))
    monkeypatch.setattr(cpu, "EXPANDED_QUERIES", 1)
    monkeypatch.setattr(cpu, "EXPANDED_CONTEXT", 1)
    found = logits()
    assert len(calls) == 2 * model.config.num_hidden_layers
    edge_moe.load(path, kv="int8").logits(ids[:20].tolist())  # whole numbers are as fast in absorbed form
    assert len(calls) == 2 * model.config.num_hidden_layers
    assert np.abs(found - absorbed).max() < 1e-4 * np.ptp(absorbed)
