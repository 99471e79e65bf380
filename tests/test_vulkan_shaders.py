"""Each shader against its numpy twin; all of them pass validation."""

import re
from importlib import resources
from itertools import product

import numpy as np
import pytest
from block_rows import random_rows
from vulkan_device import Bench, adapter_or_skip, config, weight_of

from edge_moe.backends.vulkan.arrays import Allocator
from edge_moe.backends.vulkan.cache import DeviceCache
from edge_moe.backends.vulkan.device import shader_source
from edge_moe.errors import DeviceError, ShapeError
from edge_moe.formats import F16, F32, FORMATS, Q4_0, Q8_0

BLOCKS = [f"blocks_{fmt.name.lower()}" for fmt in FORMATS]
BY_FORMAT = [("TOKENS=1", "product"), ("TOKENS=8", "product"), ("transposed",), ("rows",)]
PIPELINES = [
    *[(*names[:-1], "blocks", blocks, names[-1]) for names, blocks in product(BY_FORMAT, BLOCKS)],
    *product(("cache_bf16", "cache_f32"), ("store", "attention")),
    *[(name,) for name in ("norm", "add", "silu", "rope", "route", "weighted_sum", "merge")],
]


@pytest.fixture(scope="module")
def adapter():
    return adapter_or_skip()


@pytest.fixture(scope="module")
def bench(adapter):
    return Bench(adapter)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def close(found, expected, tolerance=1e-5):
    """Within rounding of f32, sums in another order."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def test_every_shader_is_valid(bench):
    for names in PIPELINES:
        bench.device.pipeline(*names)
    files = {path.name.removesuffix(".wgsl") for path in (resources.files("edge_moe.backends") / "shaders").iterdir()}
    assert files == {name for names in PIPELINES for name in names if "=" not in name}


def test_workgroups_need_no_more_than_every_device_has():
    """The defaults of WebGPU: 16 kB of workgroup memory, 256 invocations."""
    sizes = {"u32": 4, "f32": 4}
    for names in PIPELINES:
        source = shader_source(names)
        constants = dict(re.findall(r"const (\w+) = (\d+)u;", source))
        total = 0
        for kind in re.findall(r"var<workgroup> \w+: ([^;]+);", source):
            element, *count = re.findall(r"\w+", kind.removeprefix("array"))
            words = [constants.get(word, word).removesuffix("u") for word in count]
            total += sizes[element] * np.prod([int(word) for word in words], dtype=int)
        assert total <= 16384, names
        assert all(int(n) <= 256 for n in re.findall(r"@workgroup_size\((\d+)\)", source))


def test_a_wrong_shader_is_refused(bench):
    with pytest.raises(DeviceError, match="unit_of"):  # validation is at work: this one lacks its format
        bench.device.pipeline("TOKENS=1", "blocks", "product")


@pytest.mark.parametrize("n_tokens", [1, 11])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_products(bench, rng, fmt, n_tokens):
    n_rows, n_cols = 37, 768 if fmt.block_size > 1 else 75
    data = random_rows(fmt, n_rows, n_cols, rng)
    x = rng.standard_normal((n_tokens, n_cols)).astype(np.float32)
    weight = weight_of(fmt, data, n_rows, n_cols)
    found = bench.run(lambda ops, ids, cache, x: ops.linear(x, weight)[0], x, n_tokens=n_tokens)
    close(found, x.astype(np.float64) @ fmt.decode(data).astype(np.float64).T)


def test_scales_too_small_for_a_normal_f16(bench, rng):
    data = random_rows(Q4_0, 8, 64, rng)
    data.reshape(8, 2, 18)[:, :, :2] = np.float16(3e-7).reshape(1).view(np.uint8)
    weight, x = weight_of(Q4_0, data, 8, 64), np.full((1, 64), 1e4, np.float32)
    expected = x @ Q4_0.decode(data).T
    assert np.abs(expected).max() > 1e-2
    close(bench.run(lambda ops, ids, cache, x: ops.linear(x, weight)[0], x), expected, 1e-7)


def test_f16_infinities_and_signs(bench):
    values = np.array([[1, -1, 65504, -65504, 6e-8, -6e-5, np.inf, 0]], np.float16)
    weight = weight_of(F16, values.view(np.uint8), 1, 8)
    found = bench.run(lambda ops, ids, cache: ops.embed(weight, ids))
    np.testing.assert_array_equal(found, values.astype(np.float32))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rows(bench, rng, fmt):
    n_cols = 512 if fmt.block_size > 1 else 75
    data = random_rows(fmt, 9, n_cols, rng)
    weight = weight_of(fmt, data, 9, n_cols)
    found = bench.run(lambda ops, ids, cache: ops.embed(weight, ids), n_tokens=3, ids=[8, 0, 5])
    close(found, fmt.decode(data)[[8, 0, 5]], 1e-6)


def test_a_matrix_in_several_buffers(adapter, rng):
    bench = Bench(adapter, max_binding_bytes=8192)  # as a vocabulary's is, for shaders that see too little at once
    data = random_rows(Q8_0, 100, 128, rng)
    weight, x = weight_of(Q8_0, data, 100, 128), rng.standard_normal((3, 128)).astype(np.float32)
    assert len(bench.weights.parts(weight)) == 2
    close(bench.run(lambda ops, ids, cache, x: ops.linear(x, weight)[0], x, n_tokens=3), x @ Q8_0.decode(data).T)
    rows = bench.run(lambda ops, ids, cache: ops.embed(weight, ids), n_tokens=4, ids=[0, 57, 58, 99])
    close(rows, Q8_0.decode(data)[[0, 57, 58, 99]])
    stack = weight_of(Q8_0, data, 4, 25, 128)
    with pytest.raises(DeviceError, match="use --backend cpu"):
        bench.run(lambda ops, ids, cache, x: ops.per_head(x, stack), np.zeros((1, 4, 128), np.float32))


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_per_head(bench, rng, n_tokens):
    """Of a fused stack, whose matrices do not lie one behind the other, and of a part of the input."""
    data = random_rows(Q8_0, 3 * 20, 64, rng).reshape(3, 20, -1)
    _, weight = weight_of(Q8_0, data, 3, 20, 64).split_rows(7, 13)
    x = rng.standard_normal((n_tokens, 3, 80)).astype(np.float32)
    found = bench.run(lambda ops, ids, cache, x: ops.per_head(x[..., 16:], weight), x, n_tokens=n_tokens)
    close(found, np.einsum("thc,hrc->thr", x[..., 16:], Q8_0.decode(data)[:, 7:]))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_per_head_transposed(bench, rng, fmt):
    n_cols = 512 if fmt.block_size > 1 else 75
    data = random_rows(fmt, 3 * 20, n_cols, rng).reshape(3, 20, -1)
    weight, _ = weight_of(fmt, data, 3, 20, n_cols).split_rows(13, 7)
    x = rng.standard_normal((2, 3, 13)).astype(np.float32)
    found = bench.run(lambda ops, ids, cache, x: ops.per_head_transposed(x, weight), x, n_tokens=2)
    close(found, np.einsum("thr,hrc->thc", x, fmt.decode(data)[:, :13]))


def test_elementwise(bench, rng):
    a, b = rng.standard_normal((2, 7, 300)).astype(np.float32) * 10
    close(bench.run(lambda ops, ids, cache, a, b: ops.add(a, b), a, b), a + b, 0)
    silu = bench.run(lambda ops, ids, cache, a, b: ops._elementwise("silu", a, b), a, b)
    close(silu, a / (1 + np.exp(-a.astype(np.float64))) * b, 1e-6)


@pytest.mark.parametrize("n_cols", [5, 256, 1000])
def test_norm(bench, rng, n_cols):
    x, gain = rng.standard_normal((3, n_cols + 9)).astype(np.float32), rng.standard_normal(n_cols).astype(np.float32)
    found = bench.run(lambda ops, ids, cache, x: ops.norm(x[:, 9:], gain, 1e-2), x)
    part = x[:, 9:].astype(np.float64)
    close(found, part / np.sqrt((part**2).mean(-1, keepdims=True) + 1e-2) * gain)


def test_rotations_and_rope(bench, rng):
    """Far into a context, where an angle in f32 would be off by a hundredth."""
    x, frequencies, position = rng.standard_normal((3, 2, 14)).astype(np.float32), 2.0 ** -np.arange(4), 150_001

    def operations(ops, ids, cache, x):
        cos, sin = ops.rotations(cache, 3, frequencies, 1.5)
        return ops.rope(x[..., 6:], cos, sin)

    found = bench.run(operations, x, n_tokens=3, position=position)
    turns = 1.5 * np.exp(1j * (position + np.arange(3))[:, None] * frequencies)[:, None]
    turned = (x[..., 6::2] + 1j * x[..., 7::2]) * turns
    close(found, np.stack([turned.real, turned.imag], -1).reshape(3, 2, 8), 1e-6)


ROUTERS = [
    {"sigmoid": False, "n_group": 1, "topk_group": 1, "group_score_experts": 1, "norm": False, "scale": 1.0},
    {"sigmoid": False, "n_group": 8, "topk_group": 3, "group_score_experts": 1, "norm": False, "scale": 16.0},
    {"sigmoid": True, "n_group": 8, "topk_group": 4, "group_score_experts": 2, "norm": True, "scale": 2.5},
]


def chosen_experts(logits, bias, sigmoid, n_group, topk_group, group_score_experts, norm, scale, top_k):
    """One token's experts by sorting; of equals the first."""
    probs = (
        1 / (1 + np.exp(-logits)) if sigmoid else np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    )
    groups = (probs + bias).reshape(n_group, -1)
    score = np.sort(groups, axis=1)[:, -group_score_experts:].sum(1)
    kept = np.argsort(-score, kind="stable")[:topk_group]
    selection = np.full_like(groups, -np.inf)
    selection[kept] = groups[kept]
    ids = np.argsort(-selection.ravel(), kind="stable")[:top_k]
    return ids, probs[ids] * scale / (probs[ids].sum() if norm else 1)


@pytest.mark.parametrize("rules", ROUTERS)
@pytest.mark.parametrize("n_experts", [16, 72, 256])
def test_route(bench, rng, rules, n_experts):
    logits = 3 * rng.standard_normal((5, n_experts)).astype(np.float32)
    logits[1] = np.round(logits[1])  # many ties
    logits[2] = 0
    bias = (0.3 * rng.standard_normal(n_experts)).astype(np.float32) if rules["sigmoid"] else np.zeros(n_experts, "f4")

    def operations(ops, ids, cache, logits, which):
        chosen, weights = ops.route(logits, bias, top_k=4, **rules)
        if which == "weights":
            return weights
        eye = weight_of(F32, np.eye(n_experts, dtype=np.float32).view(np.uint8), n_experts, n_experts)
        return ops.embed(eye, chosen.reshape(-1))

    weights = bench.run(lambda *a: operations(*a, "weights"), logits, n_tokens=5)
    ids = bench.run(lambda *a: operations(*a, "ids"), logits, n_tokens=5).argmax(-1).reshape(5, 4)
    for t in range(5):
        expected = chosen_experts(logits[t].astype(np.float64), bias, top_k=4, **rules)
        if t != 1:  # ties of f32 and f64 probabilities may differ: see below
            np.testing.assert_array_equal(ids[t], expected[0])
        assert len(set(ids[t].tolist())) == 4
        close(weights[t], expected[1], 1e-5)


@pytest.mark.parametrize("max_binding_bytes", [None, 4096])
@pytest.mark.parametrize("n_slots", [8, 3])
def test_experts_by_slots(adapter, rng, n_slots, max_binding_bytes):
    """Whole stacks and parts of them, in one buffer or in several."""
    bench = Bench(adapter, max_binding_bytes)
    gate, up, down = (random_rows(Q4_0, 8 * rows, cols, rng) for rows, cols in ((32, 64), (32, 64), (64, 32)))
    stacks = tuple(
        weight_of(Q4_0, data, 8, *shape) for data, shape in ((gate, (32, 64)), (up, (32, 64)), (down, (64, 32)))
    )
    decoded = [Q4_0.decode(data).reshape(stack.shape) for data, stack in zip((gate, up, down), stacks, strict=True)]
    logits, x = rng.standard_normal((1, 8)).astype(np.float32), rng.standard_normal((1, 64)).astype(np.float32)

    def operations(ops, ids, cache, logits, x):
        rules = ROUTERS[0] | {"top_k": 3}
        chosen, weights = ops.route(logits, np.zeros(8, np.float32), **rules)
        ops.request(chosen, stacks[2])
        return ops.experts(x, chosen, weights, *stacks)

    found = bench.run(operations, logits, x, stacks=[stacks], n_slots=n_slots)
    ids, weights = chosen_experts(logits[0], np.zeros(8), top_k=3, **ROUTERS[0])
    expected = np.zeros(64)
    for expert, weight in zip(ids, weights, strict=True):
        g, u = decoded[0][expert] @ x[0], decoded[1][expert] @ x[0]
        expected += weight * (decoded[2][expert] @ (g / (1 + np.exp(-g)) * u))
    close(found[0], expected)


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def to_bf16(x):
    """Rounded to the nearest, ties to even."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("sizes", [[1, 3, 1], [40, 100, 1], [300, 1]])
def test_latent_attention(bench, rng, kind, sizes):
    """Appended in parts, attended in one or several splits."""
    n, n_heads, rank, rope_dims = sum(sizes), 3, 70, 10
    q = rng.standard_normal((n, n_heads, rank + rope_dims)).astype(np.float32)
    kv = rng.standard_normal((n, rank + rope_dims)).astype(np.float32)
    cache = DeviceCache(config(), 1024, kind, rank + rope_dims)
    found, first = [], 0
    for size in sizes:
        part = slice(first, first + size)

        def operations(ops, ids, cache, q, kv):
            c_kv, k_pe = kv[:, :rank], kv[:, rank:]
            return ops.latent_attention(q[..., :rank], q[..., rank:], c_kv, k_pe, cache, 0, 0.2)

        found.append(bench.run(operations, q[part], kv[part], n_tokens=size, position=first, cache=cache))
        first += size
    kept = to_bf16(kv) if kind == "bf16" else kv
    scores = 0.2 * np.einsum("thd,sd->ths", q, kept)
    scores[np.triu(np.ones((n, n), bool), 1)[:, None].repeat(n_heads, 1)] = -np.inf
    close(np.concatenate(found), np.einsum("ths,sr->thr", softmax(scores), kept[:, :rank]), 1e-5)


@pytest.mark.parametrize("window", [0, 5, 90])
def test_grouped_attention(bench, rng, window):
    n, n_heads, n_keys, dims = 121, 6, 2, 16
    q, k, v = (rng.standard_normal((n, h, dims)).astype(np.float32) for h in (n_heads, n_keys, n_keys))
    cache = DeviceCache(config(), 512, "f32", 2 * n_keys * dims, window)
    found = [
        bench.run(
            lambda ops, ids, cache, q, k, v: ops.grouped_attention(q, k, v, cache, 0, 0.25),
            *(each[first:end] for each in (q, k, v)),
            n_tokens=end - first,
            position=first,
            cache=cache,
        )
        for first, end in ((0, 100), (100, 120), (120, 121))
    ]
    keys, values = (each.repeat(n_heads // n_keys, 1) for each in (k, v))
    scores = 0.25 * np.einsum("thd,shd->ths", q, keys)
    ahead = np.arange(n)[None] - np.arange(n)[:, None]
    hidden = (ahead > 0) | ((ahead <= -window) if window else False)
    scores[hidden[:, None].repeat(n_heads, 1)] = -np.inf
    close(np.concatenate(found), np.einsum("ths,shd->thd", softmax(scores), values), 1e-5)


def test_places_are_given_again():
    places = Allocator()
    a, b = places.take(100), places.take(3, 100)
    ats = a.at, b.at
    part = b[1:, 10:]
    assert part.at == b.at + 110
    assert part.strides == (100, 1)
    assert b.reshape(5, 60)[1].at == b.at + 60
    with pytest.raises(ShapeError, match="cannot be seen"):
        part.reshape(180)
    del a, b
    again = places.take(100)
    assert again.at == ats[0]  # free again
    assert places.take(3, 100).at > ats[1]  # not free while a part of it is named
    del part
    assert places.take(200).at == ats[1]
