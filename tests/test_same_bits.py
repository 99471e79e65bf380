"""Kernels give the same bits whatever lies beside their buffers, and whether they were just compiled or loaded."""

import os
import subprocess
import sys

import numpy as np
import pytest

from edge_moe.kernels import steps
from edge_moe.kernels.blocks import TAGS
from edge_moe.kernels.jit import kernel
from edge_moe.kernels.launch import compiled_address, float_bits, launch
from edge_moe.kernels.routing import route_row

OUT, NEAR = 20000, 600  # where the output lies in memory, and how far on both sides others are moved to


def run(function, plan):
    plan = np.array(plan, np.int64)
    launch(compiled_address(function, TAGS["F32"]), plan.ctypes.data, 1, 0, 1)


def results(call, arrays, n_out):
    """All results of call(addresses of the arrays, address of the output) with one array at a time near the output."""
    memory, found = np.zeros(100_000, np.uint8), set()
    first = -memory.ctypes.data % 64

    def part(at, size):
        return memory[first + at : first + at + 4 * size].view(np.float32)

    out = part(OUT, n_out)
    for moved in range(len(arrays)):
        for at in range(OUT - 4 * arrays[moved].size - NEAR, OUT + 4 * n_out + NEAR, 4):
            if OUT - 4 * arrays[moved].size < at < OUT + 4 * n_out:
                continue  # they would overlap
            places = [at if i == moved else 40_000 + 10_000 * i for i in range(len(arrays))]
            parts = [part(place, array.size) for place, array in zip(places, arrays, strict=True)]
            for target, array in zip(parts, arrays, strict=True):
                target[:] = array
            call([each.ctypes.data for each in parts], out.ctypes.data)
            found.add(out.tobytes())
    return found


@pytest.mark.parametrize("n", [8, 32, 48, 576])
def test_norm(n):
    rng = np.random.default_rng(n)
    arrays = [rng.standard_normal(n).astype(np.float32) for _ in range(2)]
    eps = float_bits(1e-5)

    def norm(addresses, out):
        run(steps.norm_units, [0, 1, n, *addresses, eps, out])

    assert len(results(norm, arrays, n)) == 1


@pytest.mark.parametrize(("n_heads", "n_pairs"), [(4, 4), (2, 10), (3, 32)])
def test_rope(n_heads, n_pairs):
    rng = np.random.default_rng(n_pairs)
    x, cos, sin = (rng.standard_normal(n).astype(np.float32) for n in (2 * n_heads * n_pairs, n_pairs, n_pairs))

    def rope(addresses, out):
        run(steps.rope_units, [0, 1, n_heads, n_pairs, addresses[0], 0, 8 * n_pairs, *addresses[1:], out])

    assert len(results(rope, [x, cos, sin], x.size)) == 1


@kernel
def _route(logits, bias, sigmoid, scratch, ids, weights):
    route_row(logits, bias, sigmoid, (1, 1, 1), True, 1.5, scratch, ids, weights)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("n", [16, 64])
def test_route(n, sigmoid):
    """Wherever its scratch lies, which each thread takes anew for each token."""
    memory, n_scratch, found = np.zeros(8192, np.float32), 2 * n, set()
    bias, ids, weights = np.zeros(n, np.float32), np.empty(6, np.int64), np.empty(6, np.float32)
    for at in range(2000, 4000):
        if 3000 - n_scratch < at < 3000 + n:
            continue  # they would overlap
        logits, scratch = memory[3000 : 3000 + n], memory[at : at + n_scratch].reshape(2, n)
        logits[:] = np.random.default_rng(n).standard_normal(n) * 3
        _route(logits, bias, sigmoid, scratch, ids, weights)
        found.add(ids.tobytes() + weights.tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("n", [8, 40])
def test_activation_and_weighted_sum(n):
    rng = np.random.default_rng(n)
    gate, up, weights = (rng.standard_normal(size).astype(np.float32) for size in (n, n, 2))
    positions = np.arange(2)

    def silu(addresses, out):
        run(steps.silu_units, [0, 1, n, *addresses, out])

    def weighted_sum(addresses, out):
        plan = [0, 1, 2, 2, n, addresses[0], positions.ctypes.data, addresses[1], out]
        run(steps.weighted_sum_units, plan)

    assert len(results(silu, [gate, up], n)) == 1
    assert len(results(weighted_sum, [np.concatenate([gate, up]), weights], n)) == 1


NORM_AND_ROPE = """
import numpy as np
from edge_moe.kernels.steps import rms_norm, rope_pairs
rng = np.random.default_rng(0)
x, cos, sin = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 4, 8), (32, 4), (32, 4)))
norm = rms_norm(x.reshape(32, 32), cos.reshape(-1)[:32], 1e-5)
print(rope_pairs(x, cos, sin).tobytes().hex(), norm.tobytes().hex())
"""
# All kinds in one process: a kernel's helpers are what the first kernel with them was given.
GROUPED_ATTENTION = """
from types import SimpleNamespace
import numpy as np
from edge_moe.kv_cache import KvCache
rng = np.random.default_rng(0)
config = SimpleNamespace(
    num_key_value_heads=3, head_dim=64, sliding_window=None, num_hidden_layers=1, max_position_embeddings=512
)
q, k, v = (rng.standard_normal((256, n, 64)).astype(np.float32) for n in (9, 3, 3))
for kind in ("bf16", "int8", "f32"):
    cache = KvCache(config, 512, kind)
    print(cache.attend(0, q, k, v, 0.125, 1).tobytes().hex())
"""


@pytest.mark.parametrize("script", [NORM_AND_ROPE, GROUPED_ATTENTION])
def test_what_was_just_compiled_rounds_as_what_is_loaded(script, tmp_path):
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"EDGE_MOE_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            check=True,
        ).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1
