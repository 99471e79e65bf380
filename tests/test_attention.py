"""The latent cache and attention to it, each kind against a slow numpy twin."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types

from edge_moe.config import KV_KINDS
from edge_moe.errors import OptionError, ShapeError
from edge_moe.kernels.attention import FORMATS
from edge_moe.kernels.attention_tiles import BY_BYTES, HEADS, MAX_HIGH, MAX_PROBABILITY, MAX_QUERY, to_bfloat
from edge_moe.kernels.blocks import TAGS
from edge_moe.kernels.dots import SIGN_BIAS
from edge_moe.kernels.functions import exp2
from edge_moe.kernels.launch import compiled_address, launch
from edge_moe.kernels.simd import f32x16, load, store
from edge_moe.latent_cache import LatentCache, latent_cache_bytes

every_kind = pytest.mark.parametrize("kind", KV_KINDS)
# Of the largest value: sums of floats; for int8 also probabilities in whole numbers, and queries that lie in the middle
# between two codes, to be rounded either way.
TOLERANCE = {"f32": 2e-6, "bf16": 2e-6, "int8": 16 / MAX_PROBABILITY + 1 / 8 / MAX_QUERY}
TOLERANCE["int4"] = TOLERANCE["int8"]


def config(rank, rope, n_layers=1, longest=100_000):
    return SimpleNamespace(
        kv_lora_rank=rank, qk_rope_head_dim=rope, num_hidden_layers=n_layers, max_position_embeddings=longest
    )


def bf16(x):
    """Nearest bf16, ties to even, by numpy's own rounding of an 8-bit mantissa."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def quantized(x, most, group=128):
    """Each row's groups in whole steps of its largest magnitude / most -> (codes, steps)."""
    codes, steps = np.zeros_like(x), np.zeros((*x.shape[:-1], -(-x.shape[-1] // group)), np.float32)
    for g in range(steps.shape[-1]):
        part = x[..., group * g : group * (g + 1)]
        steps[..., g] = np.abs(part).max(-1) * np.float32(1 / most)
        codes[..., group * g : group * (g + 1)] = np.rint(part * inverse_of(steps[..., g : g + 1]))
    return codes, steps


def inverse_of(x):
    return np.divide(np.float32(1), x, where=x > 0, out=np.zeros_like(x))


def rounded(x, most, group=128):
    codes, steps = quantized(x, most, group)
    return codes.astype(np.float64) * np.repeat(steps, group, -1)[..., : x.shape[-1]]


def in_four_bits(x):
    """Groups of 32 as middle + step * (code - 8), steps and middles in 8 bits of the row's largest -> f64."""
    groups = [x[:, first : first + 32] for first in range(0, x.shape[1], 32)]
    steps = np.stack([(part.max(1) - part.min(1)) * np.float32(1 / 15) for part in groups], axis=1)
    middles = np.stack([part.min(1) for part in groups], axis=1) + np.float32(8) * steps
    step_unit = steps.max(1, keepdims=True) * np.float32(1 / 255)
    middle_unit = np.abs(middles).max(1, keepdims=True) * np.float32(1 / 127)
    steps = np.minimum(np.ceil(steps * inverse_of(step_unit)), np.float32(255)) * step_unit
    middles = np.rint(middles * inverse_of(middle_unit)) * middle_unit
    out = []
    for g, part in enumerate(groups):
        codes = np.clip(np.rint((part - middles[:, g, None]) * inverse_of(steps[:, g, None])), -8, 7)
        out.append(middles[:, g, None].astype(np.float64) + codes * steps[:, g, None].astype(np.float64))
    return np.concatenate(out, axis=1)


def kept(kind, c_kv, k_pe):
    """What a cache makes of latents and rope keys, f64."""
    latents = {"f32": np.asarray, "bf16": bf16, "int8": lambda x: rounded(x, 127), "int4": in_four_bits}[kind](c_kv)
    keys = {"f32": np.asarray, "bf16": bf16}.get(kind, lambda x: rounded(x, 4095, x.shape[-1]))(k_pe)
    return latents.astype(np.float64), keys.astype(np.float64)


def slow_attention(kind, tokens, start, scale):
    """Softmax over all visible positions at once. Of all tokens the queries from `start` on -> f64[T,H,R]."""
    q_latent, q_pe, c_kv, k_pe = tokens
    latents, keys = kept(kind, c_kv, k_pe)
    if kind in ("int8", "int4"):
        q_latent = rounded(q_latent, MAX_QUERY, 128 if kind == "int8" else 32)
        rope = q_pe.shape[-1]
        q_pe = rounded(q_pe, min(32767, (2**31 - 1) // (4095 * rope)), rope)  # sums of products fit 32 bits
    out = np.empty((len(c_kv) - start, *q_latent.shape[1:]))
    for t in range(start, len(c_kv)):
        for h in range(q_latent.shape[1]):
            scores = (latents[: t + 1] @ q_latent[t, h] + keys[: t + 1] @ q_pe[t, h].astype(np.float64)) * scale
            p = np.exp(scores - scores.max())
            out[t - start, h] = (p / p.sum()) @ latents[: t + 1]
    return out


def attention_in_one_byte(tokens, start, scale):
    """The same for an int8 cache, where probabilities in one byte are enough: f64[T,H,R], and what may be in doubt.

    Of each 256 tokens, where the sums of all heads of a tile are at least sixteen times the largest probability: those
    times the latents' steps, in 1/255ths of the largest step, cut to whole numbers behind a fixed pattern of fractions.
    """
    q_latent, q_pe, c_kv, k_pe = tokens
    latents, keys = kept("int8", c_kv, k_pe)
    codes, steps = quantized(c_kv, 127)
    rope, (n_heads, rank) = q_pe.shape[-1], q_latent.shape[1:]
    q_latent, q_pe = rounded(q_latent, MAX_QUERY), rounded(q_pe, min(32767, (2**31 - 1) // (4095 * rope)), rope)
    fractions = np.array([1, 15, 29, 11, 25, 7, 21, 3, 17, 31, 13, 27, 9, 23, 5, 19]) / 32
    out, doubt = np.zeros((2, len(c_kv) - start, n_heads, rank))
    for t in range(start, len(c_kv)):
        scores = (q_latent[t] @ latents[: t + 1].T + q_pe[t] @ keys[: t + 1].T) * scale
        tops, totals = scores.max(1), np.exp(scores - scores.max(1, keepdims=True)).sum(1)
        for first in range(0, t + 1, 256):
            seen = slice(first, min(t + 1, first + 256))
            largest = scores[:, seen].max(1)
            p = np.exp(scores[:, seen] - largest[:, None])
            for tile in range(0, n_heads, HEADS):
                heads = slice(tile, min(n_heads, tile + HEADS))
                share = (np.exp(largest[heads] - tops[heads]) / totals[heads])[:, None]
                if p[heads].sum(1).min() < 16 * 255 // MAX_HIGH:
                    out[t - start, heads] += share * (p[heads] @ latents[seen])
                    continue
                for dim in range(0, rank, 128):
                    step, part = steps[seen, dim // 128].astype(np.float64), codes[seen, dim : dim + 128]
                    unit = step.max() / MAX_HIGH
                    weights = p[heads] * step * (1 / unit if unit else 0) + np.resize(fractions, p.shape[1])
                    is_near = np.abs(weights - np.rint(weights)) < 2e-3
                    out[t - start, heads, dim : dim + 128] += share * (np.floor(weights) @ part) * unit
                    doubt[t - start, heads, dim : dim + 128] += share * (is_near @ np.abs(part)) * unit
    return out, doubt


def random_tokens(rng, n, n_heads, rank, rope):
    """q_latent f32[n,H,R], q_pe f32[n,H,P], c_kv f32[n,R], k_pe f32[n,P]; rope keys are larger, as in real models."""
    shapes = (n, n_heads, rank), (n, n_heads, rope), (n, rank), (n, rope)
    factors = (1, 1, 1, 4)
    tokens = [
        rng.standard_normal(shape).astype(np.float32) * factor for shape, factor in zip(shapes, factors, strict=True)
    ]
    # Latents and queries in the middle between two codes may be rounded either way, which weighs more than all else.
    for row in (*tokens[2], *tokens[0].reshape(-1, rank)):
        for first in range(0, rank, 128):
            part = row[first : first + 128]
            step = np.abs(part).max() / 127
            part[np.abs(np.abs(part / step) % 1 - 0.5) < 1e-4] += np.float32(step * 1e-3)
    for row in tokens[2]:
        while is_undecided(row):
            row += rng.standard_normal(rank).astype(np.float32) * np.float32(1e-3)
    return tokens


def is_undecided(row):
    """Whether one of the numbers that a latent is kept as, in 8 or in 4 bits, may be rounded either way."""
    steps = np.array([np.ptp(row[i : i + 32]) / 15 for i in range(0, len(row), 32)], np.float64)
    middles = np.array([row[i : i + 32].min() for i in range(0, len(row), 32)], np.float64) + 8 * steps
    step_unit, middle_unit = steps.max() / 255 or 1, np.abs(middles).max() / 127 or 1
    kept_steps, kept_middles = (
        np.ceil(steps / step_unit - 1e-9) * step_unit,
        np.rint(middles / middle_unit) * middle_unit,
    )
    ratios = [middles / middle_unit]
    for g, i in enumerate(range(0, len(row), 32)):
        if kept_steps[g]:
            ratios.append((row[i : i + 32] - kept_middles[g]) / kept_steps[g])
    ratios += [127 * row[i : i + 128] / (np.abs(row[i : i + 128]).max() or 1) for i in range(0, len(row), 128)]
    between = np.abs(np.concatenate(ratios) % 1 - 0.5) < 1e-4
    whole = np.abs(steps / step_unit - np.rint(steps / step_unit)) < 1e-4
    return between.any() or (whole & (steps > 0) & (steps < steps.max())).any()


def attend(cache, tokens, sizes, scale, layer=0, n_threads=1):
    """The cache's answer when the tokens arrive in parts of the given sizes -> f32[T,H,R]."""
    outputs, start = [], 0
    for size in sizes:
        part = [array[start : start + size] for array in tokens]
        outputs.append(cache.attend(layer, *part, scale, n_threads))
        cache.advance(size)
        start += size
    return np.concatenate(outputs)


def assert_near(found, expected, kind):
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= TOLERANCE[kind] * np.abs(expected).max()


def assert_is_attention(found, kind, tokens, start, scale):
    """Each token's answer is that of the slow twin."""
    expected, doubt = slow_attention(kind, tokens, start, scale), 0.0
    if kind == "int8" and BY_BYTES:
        expected, doubt = attention_in_one_byte(tokens, start, scale)
    assert found.dtype == np.float32
    assert (np.abs(found - expected) <= TOLERANCE[kind] * np.abs(expected).max() + doubt).all()


@every_kind
@pytest.mark.parametrize(
    ("rank", "rope", "n_heads", "sizes"),
    [
        (512, 64, 16, [3, 1, 1]),
        (48, 16, 3, [1, 19, 1, 7, 300, 1, 1]),
        (256, 32, 5, [255, 1, 1, 1]),
        (200, 8, 9, [40, 1]),
        (16, 4, 2, [1] * 40),
        (7, 2, 1, [10, 7, 2]),
    ],
)
def test_attention(kind, rank, rope, n_heads, sizes):
    tokens = random_tokens(np.random.default_rng(0), sum(sizes), n_heads, rank, rope)
    cache = LatentCache(config(rank, rope), sum(sizes), kind)
    scale = 2.0 / np.sqrt(rank + 16 * rope)
    assert_is_attention(attend(cache, tokens, sizes, scale), kind, tokens, 0, scale)
    assert cache.length == sum(sizes)
    assert cache.free == 0


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KV_KINDS),
    rank=st.integers(1, 290),
    rope=st.integers(1, 35),
    n_heads=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_attention_of_any_shape(kind, rank, rope, n_heads, sizes, seed):
    tokens = random_tokens(np.random.default_rng(seed), sum(sizes), n_heads, rank, rope)
    cache = LatentCache(config(rank, rope), sum(sizes), kind)
    scale = 1.0 / np.sqrt(rank + 16 * rope)
    assert_is_attention(attend(cache, tokens, sizes, scale), kind, tokens, 0, scale)


@numba.njit
def _small_functions(fmt, plan):
    """Plan: x f32[16], its exp2 f32[16], its bf16 bits u16[16]."""
    x = load(f32x16, load(types.int64, plan))
    store(load(types.int64, plan + 8), exp2(x))
    store(load(types.int64, plan + 16), to_bfloat(x))
    return 0


def small_functions(x):
    """-> 2**x f32[16], x as bf16 f32[16]."""
    power, bits = np.empty(16, np.float32), np.empty(16, np.uint16)
    plan = np.array([x.ctypes.data, power.ctypes.data, bits.ctypes.data])
    launch(compiled_address(_small_functions, TAGS["F32"]), plan.ctypes.data, 1, 0, 1)
    return power, (bits.astype(np.uint32) << 16).view(np.float32)


def test_exp2():
    for x in -np.random.default_rng(12).random((200, 16), np.float32) * 10.0 ** np.arange(-14, 2).astype(np.float32):
        np.testing.assert_allclose(small_functions(x)[0], np.exp2(x.astype(np.float64)), rtol=3e-7)
    ends = np.array(
        [0, -1, -125.5, -126, -127, -1e30, -np.inf, np.nan, 1, 3.5, 126, 127, 1e30, np.inf, -0.0, 10], np.float32
    )
    expected = [1, 0.5, 2**-125.5, *[2.0**-126] * 4, np.nan, 2, 2**3.5, *[2.0**126] * 4, 1, 1024]
    np.testing.assert_allclose(small_functions(ends)[0], expected, rtol=3e-7)


def test_to_bfloat():
    """Ties go to even; what is infinite or not a number stays so."""
    x = np.float32(
        [0, -0.0, 1, 1.00390625, 1.01171875, -1.01171876, 3e38, 3.4e38, np.inf, -np.inf, np.nan, 1e-37, 7, 0.1]
    )
    x = np.concatenate([x, np.random.default_rng(13).standard_normal(18, np.float32)])
    for part in (x[:16], x[16:]):
        found = small_functions(part)[1]
        usual = np.abs(part) < 3.39e38
        np.testing.assert_array_equal(found[usual], bf16(part[usual]).astype(np.float32))
        np.testing.assert_array_equal(
            found[~usual], np.where(np.abs(part[~usual]) > 3.39e38, np.copysign(np.inf, part[~usual]), np.nan)
        )


@every_kind
def test_sharp_scores(kind):
    """Scores hundreds apart, ever larger: the parts before must be scaled down to nothing."""
    rng = np.random.default_rng(1)
    tokens = random_tokens(rng, 600, 2, 32, 8)
    tokens[2] *= np.linspace(1, 40, 600, dtype=np.float32)[:, None]
    cache = LatentCache(config(32, 8), 600, kind)
    found = attend(cache, tokens, [599, 1], 1.0)[-1:]
    assert_is_attention(found, kind, tokens, 599, 1.0)


@every_kind
def test_one_token_draws_most_of_the_attention(kind):
    """What is spread thin over the others must not be rounded away, as it would be with 8 bits for a probability."""
    n, rank = 256, 128
    tokens = random_tokens(np.random.default_rng(2), n, 4, rank, 2)
    q_latent, q_pe, c_kv, k_pe = tokens
    q_latent[:], q_pe[:], k_pe[:] = 0, 0, 0
    q_pe[:, :, 0], k_pe[0, 0] = 1, np.log(2500)  # ten times as much as all others together, each 1/2500 of it
    c_kv[1:] += 3
    cache = LatentCache(config(rank, 2), n, kind)
    found = attend(cache, tokens, [n - 1, 1], 1.0)[-1:]
    expected = slow_attention(kind, tokens, n - 1, 1.0)
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


@every_kind
def test_zeros_and_huge_numbers(kind):
    tokens = random_tokens(np.random.default_rng(3), 20, 2, 40, 6)
    for array in tokens:
        array[:5] = 0
    tokens[2][10:] *= 1e15
    tokens[0][10:] *= 1e-15
    found = attend(LatentCache(config(40, 6), 20, kind), tokens, [20], 0.1)
    for t in range(20):
        assert_is_attention(found[t : t + 1], kind, [array[: t + 1] for array in tokens], t, 0.1)


@every_kind
def test_thread_count_changes_nothing(kind):
    tokens = random_tokens(np.random.default_rng(4), 903, 8, 160, 16)
    results = []
    for n_threads in (1, 2):
        cache = LatentCache(config(160, 16), 903, kind)
        results.append(attend(cache, tokens, [880, 20, 1, 2], 0.05, n_threads=n_threads))
    np.testing.assert_array_equal(*results)


@every_kind
@pytest.mark.parametrize("n", [513, 1400, 4096, 4800])
def test_parts_of_a_long_context(kind, n):
    """Parts are joined two by two, in the same order whoever does it; some have no neighbour to be joined with."""
    tokens = random_tokens(np.random.default_rng(n), n, 9, 24, 4)
    results = []
    for n_threads in (1, 2):
        cache = LatentCache(config(24, 4), n, kind)
        results.append(attend(cache, tokens, [n - 6, 1, 4, 1], 0.1, n_threads=n_threads)[-6:])
    np.testing.assert_array_equal(*results)
    assert_is_attention(results[0], kind, tokens, n - 6, 0.1)


@every_kind
def test_truncated_cache_is_as_a_new_one(kind):
    rng = np.random.default_rng(5)
    first, second = (random_tokens(rng, 90, 3, 140, 8) for _ in range(2))
    for array in first[2:]:
        array *= 1000  # larger scales, which must leave no trace
    reused, fresh = (LatentCache(config(140, 8), 90, kind) for _ in range(2))
    attend(reused, first, [90], 0.1)
    reused.truncate(0)
    np.testing.assert_array_equal(attend(reused, second, [37, 1, 5], 0.1), attend(fresh, second, [37, 1, 5], 0.1))
    reused.truncate(20)
    fresh.truncate(20)
    np.testing.assert_array_equal(attend(reused, first, [9, 1], 0.1), attend(fresh, first, [9, 1], 0.1))
    with pytest.raises(OptionError, match="holds 30"):
        reused.truncate(31)


@every_kind
def test_together_as_one_by_one(kind):
    tokens = random_tokens(np.random.default_rng(6), 300, 3, 48, 8)
    together, alone = (LatentCache(config(48, 8), 300, kind) for _ in range(2))
    one_by_one = attend(alone, tokens, [1] * 300, 0.1)
    assert_near(attend(together, tokens, [300], 0.1), one_by_one, "f32")


@every_kind
def test_steps_are_run_again_for_each_token(kind):
    """The plans are made once; only the buffers' content and the cache's length change."""
    rank, rope, n_heads, n = 72, 12, 5, 290
    tokens = random_tokens(np.random.default_rng(7), n, n_heads, rank, rope)
    expected = attend(LatentCache(config(rank, rope), n, kind), tokens, [1] * n, 0.1)
    cache = LatentCache(config(rank, rope), n, kind)
    query = np.empty((1, n_heads, 10 + rope), np.float32)  # the rope query is a part of something wider
    q_latent, c_kv = np.empty((1, n_heads, rank), np.float32), np.empty((1, rank), np.float32)
    k_pe, out = np.empty((1, rope), np.float32), np.empty((1, n_heads, rank), np.float32)
    buffers = [q_latent, query[..., 10:], c_kv, k_pe]
    scratch = cache.attention_scratch(1, n_heads)
    steps = cache.attention_steps(0, *buffers, out, scratch, 0.1)
    for t in range(n):
        for buffer, array in zip(buffers, tokens, strict=True):
            buffer[:] = array[t]
        for step in steps:
            step.plan[0] = 0
            code = compiled_address(step.function, step.fmt)
            launch(code, step.plan.ctypes.data, step.n_units, step.operations, 2)
        cache.advance(1)
        np.testing.assert_array_equal(out[0], expected[t])


@every_kind
def test_layers_do_not_touch_each_other(kind):
    rng = np.random.default_rng(8)
    n, shape = 21, (3, 20, 6)
    layers = [random_tokens(rng, n, *shape) for _ in range(3)]
    cache = LatentCache(config(20, 6, n_layers=3), n, kind)
    outputs: list[list[np.ndarray]] = [[], [], []]
    for t in range(n):
        for layer in (2, 0, 1):
            outputs[layer].append(cache.attend(layer, *(array[t : t + 1] for array in layers[layer]), 0.1, 1))
        cache.advance(1)
    for layer, tokens in enumerate(layers):
        alone = attend(LatentCache(config(20, 6), n, kind), tokens, [1] * n, 0.1)
        np.testing.assert_array_equal(np.concatenate(outputs[layer]), alone)


@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (130, 6), (7, 3)])
def test_int8_layout(rank, rope):
    """Blocks of 16 tokens: codes [rank / 4][16][4], rope keys [rope / 2][16][2] in 13 bits, scales [groups + 1][16]."""
    n = 40
    tokens = random_tokens(np.random.default_rng(9), n, 1, rank, rope)
    cache = LatentCache(config(rank, rope), n, "int8")
    cache.attend(0, *tokens, 0.1, 1)
    quads, pairs, groups = -(-rank // 4), -(-rope // 2), -(-rank // 128)
    assert cache.n_bytes == 3 * 64 * (quads + pairs + groups + 1)
    start = -cache._memory.ctypes.data % 64
    blocks = cache._memory[start : start + cache.n_bytes].reshape(3, -1)
    codes, keys, scales = np.split(blocks, [64 * quads, 64 * (quads + pairs)], axis=1)
    codes = codes.reshape(3, quads, 16, 4).transpose(0, 2, 1, 3).reshape(48, -1)[:n, :rank] - np.uint8(SIGN_BIAS)
    expected_scales = quantized(tokens[2], 127)[1]
    scales = np.ascontiguousarray(scales).view(np.float32).reshape(3, -1, 16).transpose(0, 2, 1).reshape(48, -1)
    np.testing.assert_allclose(scales[:n, :-1], expected_scales, rtol=1e-6)
    assert np.abs(codes.view(np.int8) - tokens[2] / np.repeat(expected_scales, 128, -1)[:, :rank]).max() < 0.5001
    assert np.abs(codes.view(np.int8)).max() == 127
    codes = np.ascontiguousarray(keys).view(np.int16).reshape(3, pairs, 16, 2).transpose(0, 2, 1, 3).reshape(48, -1)
    key_scale = quantized(tokens[3], 4095, rope)[1]
    np.testing.assert_allclose(scales[:n, -1:], key_scale, rtol=1e-6)
    assert np.abs(codes[:n, :rope] - tokens[3] / key_scale).max() < 0.501
    assert np.abs(codes).max() == 4095


def hadamard(n):
    """Sylvester's matrix in blocks of the largest power of 2 in n, by its definition: signs of common bits."""
    block, i = n & -n, np.arange(n)
    bits = np.array([[bin(a & b).count("1") for b in range(block)] for a in range(block)])
    signs = (1 - 2 * (bits % 2)) / np.sqrt(block)
    return np.where(i[:, None] // block == i // block, np.tile(signs, (n // block, n // block)), 0.0)


@pytest.mark.parametrize(
    ("rank", "n_heads", "sizes"), [(64, 3, [40, 1]), (96, 2, [1, 1, 20]), (20, 5, [17, 1]), (7, 1, [4])]
)
def test_rotated_latents(rank, n_heads, sizes):
    """Without loss nothing changes; in 4 bits the latents without gains, rotated, are what is rounded."""
    rng = np.random.default_rng(14)
    tokens = random_tokens(rng, sum(sizes), n_heads, rank, 4)
    gains = np.exp(rng.standard_normal((1, rank))).astype(np.float32)
    exact = LatentCache(config(rank, 4), sum(sizes), "f32", gains)
    found = attend(exact, tokens, sizes, 0.1)
    expected = slow_attention("f32", tokens, 0, 0.1)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    h, (q_latent, q_pe, c_kv, k_pe) = hadamard(rank), tokens
    inner = (q_latent * gains[0]) @ h, q_pe, (c_kv / gains[0]) @ h, k_pe
    expected = slow_attention("int4", [array.astype(np.float32) for array in inner], 0, 0.1) @ h * gains[0]
    found = attend(LatentCache(config(rank, 4), sum(sizes), "int4", gains), tokens, sizes, 0.1)
    # what lies between two codes may be rounded either way
    assert np.median(np.abs(found - expected)) < 1e-3 * np.abs(expected).max()
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_gains_of_zero_and_of_another_shape():
    tokens = random_tokens(np.random.default_rng(15), 9, 2, 32, 4)
    gains = np.ones((1, 32), np.float32)
    gains[0, 5] = tokens[2][:, 5] = 0
    found = attend(LatentCache(config(32, 4), 9, "f32", gains), tokens, [9], 0.1)
    expected = slow_attention("f32", tokens, 0, 0.1)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    with pytest.raises(ShapeError, match="gains"):
        LatentCache(config(32, 4), 9, "f32", gains[:, :31])


def test_int4_layout():
    """Blocks of 16 tokens: codes [rank / 8][16][4], rope keys, scales f32 [3][16], steps and middles [groups][16]."""
    n, rank, rope = 20, 72, 6
    tokens = random_tokens(np.random.default_rng(16), n, 1, rank, rope)
    cache = LatentCache(config(rank, rope), n, "int4")
    cache.attend(0, *tokens, 0.1, 1)
    octets, pairs, groups = 9, 3, 3
    assert cache.n_bytes == 2 * 64 * (octets + pairs + 3 + 2)
    start = -cache._memory.ctypes.data % 64
    blocks = cache._memory[start : start + cache.n_bytes].reshape(2, -1)
    codes, _, units, steps, middles, _ = np.split(blocks, np.cumsum([64 * octets, 64 * pairs, 192, 48, 48]), axis=1)
    codes = codes.reshape(2, octets, 16, 1, 4) >> np.array([0, 4], np.uint8)[:, None] & 15
    codes = codes.transpose(0, 2, 1, 3, 4).reshape(32, rank)[:n].astype(np.float64) - 8
    units = np.ascontiguousarray(units).view(np.float32).reshape(2, 3, 16).transpose(0, 2, 1).reshape(32, 3)[:n]
    steps, middles = (
        each.reshape(2, groups, 16).transpose(0, 2, 1).reshape(32, groups)[:n].astype(np.float64) * units[:, i, None]
        for i, each in enumerate((steps, middles.view(np.int8)))
    )
    restored = np.repeat(middles, 32, 1)[:, :rank] + codes * np.repeat(steps, 32, 1)[:, :rank]
    np.testing.assert_allclose(restored, in_four_bits(tokens[2]), atol=1e-5)
    assert np.abs(restored - tokens[2]).max() < 0.8 * steps.max()


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_rows_layout(kind):
    """One row of a token, filled up with zeros to a multiple of 16 numbers."""
    tokens = random_tokens(np.random.default_rng(10), 9, 1, 21, 6)
    cache = LatentCache(config(21, 6), 9, kind)
    cache.attend(0, *tokens, 0.1, 1)
    start = -cache._memory.ctypes.data % 64
    rows = cache._memory[start : start + cache.n_bytes]
    if kind == "bf16":
        rows = (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    expected = np.concatenate([*kept(kind, *tokens[2:]), np.zeros((9, 5))], axis=1)
    np.testing.assert_array_equal(rows.view(np.float32).reshape(9, 32), expected)


@every_kind
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize(("rank", "place"), [(48, 3), (20, 18)])
def test_what_is_not_a_number_stays_so(kind, wrong, rank, place):
    """Damaged weights must show in the logits, not hide behind rounding."""
    for array in (0, 2):
        tokens = random_tokens(np.random.default_rng(11), 3, 1, rank, 16)
        tokens[array][1, ..., place] = wrong
        cache = LatentCache(config(rank, 16), 3, kind)
        found = cache.attend(0, *tokens, 0.1, 1)
        assert np.isfinite(found[0]).all()
        assert not np.isfinite(found[1]).all()


def test_bytes_of_a_token():
    lite = config(512, 64, n_layers=27)
    per_token = {kind: latent_cache_bytes(lite, 4096, kind) / (27 * 4096) for kind in KV_KINDS}
    assert per_token == {"bf16": 1152, "int8": 512 + 128 + 20, "int4": 256 + 128 + 44, "f32": 2304}
    for kind in KV_KINDS:
        assert LatentCache(lite, 32, kind).n_bytes == latent_cache_bytes(lite, 32, kind)


def test_wrong_uses_are_named():
    assert set(FORMATS) == set(KV_KINDS)
    with pytest.raises(OptionError, match="--kv q4: expected one of bf16, int8, int4, f32"):
        LatentCache(config(16, 4), 8, "q4")
    with pytest.raises(OptionError, match="--kv q4"):
        latent_cache_bytes(config(16, 4), 8, "q4")
    for context_length in (0, 101):
        with pytest.raises(OptionError, match="1 to 100"):
            LatentCache(config(16, 4, longest=100), context_length)
    cache = LatentCache(config(16, 4), 8)
    with pytest.raises(ShapeError, match="room for 8"):
        cache.attend(0, *random_tokens(np.random.default_rng(0), 9, 1, 16, 4), 0.1, 1)
    q_latent, q_pe, c_kv, k_pe = random_tokens(np.random.default_rng(0), 5, 2, 16, 4)
    for wrong in (
        (q_latent[..., :15], q_pe, c_kv[:, :15], k_pe),
        (q_latent, q_pe[:, :1], c_kv, k_pe),
        (q_latent, q_pe, c_kv[:4], k_pe),
        (q_latent, q_pe, c_kv, k_pe.astype(np.float64)),
    ):
        with pytest.raises(ShapeError, match=r"expected float32|queries of 15"):
            cache.attend(0, *wrong, 0.1, 1)
    with pytest.raises(ShapeError, match="scratch"):
        cache.attention_steps(0, q_latent, q_pe, c_kv, k_pe, q_latent, cache.attention_scratch(4, 2), 0.1)


AVX512 = "avx2,f16c,fma,ssse3,avx512f,avx512bw,avx512vl,avx512dq"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("triple", "cpu", "features", "pattern"),
    [
        ("x86_64-unknown-linux-gnu", "znver4", f"{AVX512},avx512vnni", r"vpdpbusd\s.*%zmm"),
        ("x86_64-unknown-linux-gnu", "skylake-avx512", AVX512, r"vpmaddwd\s.*%zmm"),
        ("x86_64-unknown-linux-gnu", "alderlake", "avx2,f16c,fma,ssse3,avxvnni", r"vpdpbusd\s.*%ymm"),
        ("x86_64-unknown-linux-gnu", "haswell", "avx2,f16c,fma,ssse3", r"vpmaddwd\s.*%ymm"),
        ("aarch64-unknown-linux-gnu", "generic", "neon,dotprod,fullfp16", r"\tsdot\tv\d+\.4s, v\d+\.16b, v\d+\.16b"),
        ("aarch64-unknown-linux-gnu", "generic", "neon,dotprod,i8mm", r"\tusdot\tv\d+\.4s, v\d+\.16b, v\d+\.16b"),
    ],
    ids=["avx512vnni", "avx512", "avxvnni", "avx2", "sdot", "usdot"],
)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_assembly(triple, cpu, features, pattern, kind):
    """Scores and values are whole-number products of the CPU's own: for each head of a tile, of keys and of values."""
    if kind == "int4" and cpu != "znver4":
        pytest.skip("its codes are bytes by then, and multiplied as those of int8 are")
    try:
        llvm.initialize_all_targets()
        llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this LLVM does not know {triple}")
    script = Path(__file__).with_name("product_assembly.py")
    command = [sys.executable, str(script), kind, triple, cpu, features]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(pattern, done.stdout)) >= 16


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="this CPU is no x86-64")
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v2"])
def test_other_cpus(cpu):
    """The kernels for older CPUs, compiled and run in a process that numba is told to compile so.

    The plainest takes the way of CPUs with dot products of bytes.
    """
    env = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-m", "not slow"]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
