"""The cache of keys and values and grouped-query attention to it, each kind against a slow numpy twin."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.errors import OptionError, ShapeError
from edge_moe.kv_cache import KINDS, KvCache, kv_cache_bytes

every_kind = pytest.mark.parametrize("kind", KINDS)


def config(n_kv_heads, dim, window=None, n_layers=1, longest=100_000):
    return SimpleNamespace(
        num_key_value_heads=n_kv_heads,
        head_dim=dim,
        sliding_window=window,
        num_hidden_layers=n_layers,
        max_position_embeddings=longest,
    )


def kept(kind, x):
    """What a cache makes of keys or values f32[T,K,N] -> f64."""
    if kind == "f32":
        return x.astype(np.float64)
    if kind == "bf16":  # an 8-bit mantissa, ties to even
        mantissa, exponent = np.frexp(x.astype(np.float64))
        return np.ldexp(np.rint(mantissa * 256) / 256, exponent)
    step = np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127)
    inverse = np.divide(np.float32(1), step, where=step > 0, out=np.zeros_like(step))
    return np.rint(x * inverse).astype(np.float64) * step


def slow_attention(kind, q, k, v, scale, window):
    """Softmax over all positions that each token sees -> f64[T,H,N]."""
    keys, values = kept(kind, k), kept(kind, v)
    out = np.empty(q.shape)
    for t in range(len(q)):
        first = max(0, t + 1 - window) if window else 0
        for h in range(q.shape[1]):
            shared = h * k.shape[1] // q.shape[1]
            scores = keys[first : t + 1, shared] @ q[t, h].astype(np.float64) * scale
            p = np.exp(scores - scores.max())
            out[t, h] = (p / p.sum()) @ values[first : t + 1, shared]
    return out


def random_tokens(rng, n, n_heads, n_kv_heads, dim):
    """q f32[n,H,N], k and v f32[n,K,N], none of them in the middle between two codes of 8 bits."""
    q = rng.standard_normal((n, n_heads, dim)).astype(np.float32)
    k, v = (rng.standard_normal((n, n_kv_heads, dim)).astype(np.float32) * size for size in (3, 1))
    for part in (k, v):
        step = np.abs(part).max(-1, keepdims=True) / 127
        part[np.abs(np.abs(part / step) % 1 - 0.5) < 1e-4] += 1e-3 * np.float32(step.min())
    return q, k, v


def attend(cache, tokens, sizes, scale, n_threads=1, layer=0):
    """The cache's answer when the tokens arrive in parts of the given sizes -> f32[T,H,N]."""
    outputs, start = [], 0
    for size in sizes:
        outputs.append(cache.attend(layer, *(array[start : start + size] for array in tokens), scale, n_threads))
        cache.advance(size)
        start += size
    return np.concatenate(outputs)


SHAPES = [  # n_heads, n_kv_heads, dim, window, sizes
    (9, 3, 64, None, [3, 1, 1, 20, 1]),
    (4, 1, 128, None, [255, 1, 1, 1]),
    (6, 6, 20, None, [1, 7, 300, 1, 1]),
    (8, 2, 16, 5, [1, 2, 40, 1, 1]),
    (5, 1, 7, 300, [600, 1, 1, 9]),
    (4, 2, 16, 256, [700, 1, 7]),
    (4, 1, 80, 300, [560, 1, 1, 7, 1]),
    (2, 2, 2, 1, [9, 1]),
]


@every_kind
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "dim", "window", "sizes"), SHAPES)
def test_attention(kind, n_heads, n_kv_heads, dim, window, sizes):
    n = sum(sizes)
    tokens = random_tokens(np.random.default_rng(dim), n, n_heads, n_kv_heads, dim)
    found = attend(KvCache(config(n_kv_heads, dim, window), n, kind), tokens, sizes, dim**-0.5)
    expected = slow_attention(kind, *tokens, dim**-0.5, window)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 3e-6 * np.abs(expected).max()


@given(
    group=st.integers(1, 9),
    n_kv_heads=st.integers(1, 3),
    dim=st.integers(1, 40),
    window=st.one_of(st.none(), st.integers(1, 30)),
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=5),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=40, deadline=None)
def test_attention_of_any_shape(group, n_kv_heads, dim, window, sizes, kind):
    tokens = random_tokens(np.random.default_rng(1), sum(sizes), group * n_kv_heads, n_kv_heads, dim)
    found = attend(KvCache(config(n_kv_heads, dim, window), sum(sizes), kind), tokens, sizes, 0.3)
    expected = slow_attention(kind, *tokens, 0.3, window)
    assert np.abs(found - expected).max() <= 3e-6 * np.abs(expected).max()


def test_keys_far_out_of_the_window_do_not_matter():
    """Not even where all that a token sees scores far below what it does not see."""
    q, k, v = random_tokens(np.random.default_rng(2), 600, 2, 1, 16)
    k[:500] *= 1000
    v[:500] *= 1e6
    found = attend(KvCache(config(1, 16, 20), 600, "f32"), (q, k, v), [590, 1, 9], 0.25)[530:]
    expected = slow_attention("f32", q, k, v, 0.25, 20)[530:]
    assert np.abs(found - expected).max() <= 3e-6 * np.abs(expected).max()


@every_kind
def test_what_is_not_a_number_shows(kind):
    for bad in (np.nan, np.inf):
        q, k, v = random_tokens(np.random.default_rng(3), 40, 2, 1, 20)
        v[30, 0, 3] = bad
        found = attend(KvCache(config(1, 20), 40, kind), (q, k, v), [40], 0.2)
        assert np.isfinite(found[:30]).all()
        assert not np.isfinite(found[30:, :, 3]).any()


@every_kind
def test_threads_and_layers_change_nothing(kind):
    tokens = random_tokens(np.random.default_rng(4), 700, 6, 2, 48)
    results = []
    for n_threads in (1, 2):
        cache = KvCache(config(2, 48, n_layers=3), 700, kind)
        for layer in range(3):
            cache.truncate(0)
            results.append(attend(cache, tokens, [690, 1, 9], 0.2, n_threads, layer))
    for each in results[1:]:
        np.testing.assert_array_equal(each, results[0])


def test_sizes():
    """Llama-3-8B: 128 KiB a token in bf16; 8 bits take little more than half. There is room for 32 tokens at a time."""
    llama = config(8, 128, n_layers=32)
    for n_tokens, room in ((96, 96), (97, 128)):
        assert kv_cache_bytes(llama, n_tokens) == room * 128 * 1024 == KvCache(llama, n_tokens).n_bytes
        assert kv_cache_bytes(llama, n_tokens, "int8") == room * 32 * 8 * (2 * 128 + 8)
        assert kv_cache_bytes(llama, n_tokens, "f32") == 2 * room * 128 * 1024


def test_bad_arguments():
    with pytest.raises(OptionError, match="one of bf16, int8, f32"):
        kv_cache_bytes(config(1, 16), 10, "q4")
    with pytest.raises(OptionError, match="1 to 50"):
        KvCache(config(1, 16, longest=50), 51)
    cache = KvCache(config(2, 16), 8)
    q, k, v = random_tokens(np.random.default_rng(5), 9, 4, 2, 16)
    with pytest.raises(ShapeError, match="room for 8"):
        cache.attend(0, q, k, v, 1.0, 1)
    with pytest.raises(ShapeError, match="heads"):
        cache.attend(0, q[:4], k[:4, :1], v[:4, :1], 1.0, 1)
    with pytest.raises(ShapeError, match="multiple"):
        cache.attend(0, q[:4, :3], k[:4], v[:4], 1.0, 1)
    with pytest.raises(ShapeError, match="float32"):
        cache.attend(0, q[:4], k[:4], v[:3], 1.0, 1)
    with pytest.raises(OptionError, match="cannot cut"):
        cache.truncate(1)
