"""One token's recorded pass, replayed, gives what the same operations give one by one."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numba
import numpy as np
import pytest

import edge_moe
from edge_moe.backends.cpu import CpuBackend
from edge_moe.backends.recorder import Program, Recorder
from edge_moe.errors import ShapeError
from edge_moe.kernels.activations import quantize_units
from edge_moe.kernels.blocks import TAGS
from edge_moe.kernels.elementwise import set_threads
from edge_moe.kernels.launch import compiled_address, launch
from edge_moe.kernels.steps import gated_units
from edge_moe.models.deepseek2 import DeepseekV2, load_weights

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.gguf"))


class OneByOne(CpuBackend):
    """The operations as they are run for many tokens, for each single token."""

    def run(self, compute, token_ids, cache, all_logits):
        return compute(self, token_ids, cache, all_logits)


def passes(path, threads):
    """The same model with recorded passes, and without."""
    model = edge_moe.load(path, threads=threads)
    config, weights = model.config, load_weights(model.checkpoint)
    return model, DeepseekV2(config, weights, CpuBackend(threads)), DeepseekV2(config, weights, OneByOne(threads))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_replay_equals_operations(name, threads):
    model, recorded, plain = passes(GOLDEN / f"{name}.gguf", threads)
    caches = [model.new_cache(24), model.new_cache(24)]
    for token_id in np.random.default_rng(1).integers(0, model.config.vocab_size, 24):
        ids = np.array([token_id])
        np.testing.assert_array_equal(recorded.forward(ids, caches[0]), plain.forward(ids, caches[1]))


def test_threads_share_the_work_of_a_larger_model():
    """The embedded model has steps that are shared: results stay the same, over and over."""
    results = []
    for threads in (1, 2):
        model, recorded, _ = passes(None, threads)
        cache = model.new_cache(128)
        recorded.forward(np.arange(40), cache)
        results.append([recorded.forward(np.array([i]), cache) for i in range(60)])
    np.testing.assert_array_equal(results[0], results[1])


MANY_THREADS = """
import numpy as np, edge_moe
logits = []
for threads in (1, 8):
    model = edge_moe.load(threads=threads)
    cache = model.new_cache(64)
    logits.append([model.forward(np.array([i]), cache) for i in range(40)])
np.testing.assert_array_equal(logits[0], logits[1])
"""


def test_more_threads_than_cores():
    """Threads that wait for their turn on a core neither hang nor change a result."""
    subprocess.run(
        [sys.executable, "-c", MANY_THREADS], env=os.environ | {"NUMBA_NUM_THREADS": "8"}, check=True, timeout=120
    )


def test_caches_are_forgotten_and_cut():
    model, recorded, _ = passes(GOLDEN / f"{NAMES[0]}.gguf", 1)
    one, other = model.new_cache(16), model.new_cache(16)
    first = [recorded.forward(np.array([i]), one) for i in (3, 5, 7)]
    again = [recorded.forward(np.array([i]), other) for i in (3, 5, 7)]
    np.testing.assert_array_equal(first, again)
    one.truncate(1)
    np.testing.assert_array_equal(recorded.forward(np.array([5]), one), first[1])
    assert not np.array_equal(recorded.forward(np.array([4]), one), first[2])

    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None, "a recorded pass must not keep its cache"


def test_logits_of_different_tokens_are_different_arrays():
    model, recorded, _ = passes(GOLDEN / f"{NAMES[0]}.gguf", 1)
    cache = model.new_cache(4)
    first = recorded.forward(np.array([3]), cache)
    kept = first.copy()
    recorded.forward(np.array([9]), cache)
    np.testing.assert_array_equal(first, kept)


def test_a_pass_that_computes_by_itself_is_noticed():
    """The test of replay can fail: numpy between the operations is baked into the recorded pass."""
    model, recorded, _ = passes(GOLDEN / f"{NAMES[0]}.gguf", 1)

    def compute(ops, token_ids, cache, all_logits):
        return ops.embed(recorded.weights.embed_tokens, token_ids + 1)

    cache = model.new_cache(4)
    program = Program(compute, cache, 1)
    wrong = [program.run(i, 0) for i in (1, 2)]
    assert np.array_equal(wrong[0], wrong[1])


def test_a_replayed_token_sets_the_threads_of_the_calling_thread():
    _, recorded, _ = passes(GOLDEN / f"{NAMES[0]}.gguf", 1)
    cache = recorded.new_cache(4)
    recorded.forward(np.array([3]), cache)
    set_threads(2)
    recorded.forward(np.array([5]), cache)
    assert numba.get_num_threads() == 1


def test_rotations_of_any_position():
    inv_freq = 10000.0 ** (-np.arange(16) / 16)
    cache = passes(GOLDEN / f"{NAMES[0]}.gguf", 1)[1].new_cache(4)
    recorder, backend = Recorder(1), CpuBackend(1)
    found = recorder.rotations(cache, 1, inv_freq, 1.25)
    for position in (0, 255, 256, 3, 4095):
        recorder.rotate[0](position)
        cache._length[0] = position
        np.testing.assert_array_equal(found, backend.rotations(cache, 1, inv_freq, 1.25))


@pytest.mark.parametrize("ids", [[], [-1], [10**9], [1] * 5])
def test_forward_refuses_what_would_leave_its_memory(ids):
    model = edge_moe.load(GOLDEN / f"{NAMES[0]}.gguf", threads=1)
    cache = model.new_cache(4)
    with pytest.raises(ShapeError):
        model.forward(np.array(ids, np.int64), cache)
    model.forward(np.array([1, 2, 3, 4]), cache)
    with pytest.raises(ShapeError, match="room for 1 to 0"):
        model.forward(np.array([1]), cache)


def test_buffers_are_given_again():
    """Memory of a result that nobody holds, not even a part of it, is that of the next one of its size."""
    recorder = Recorder(threads=1)
    x = np.zeros((1, 64), np.float32)
    first = recorder.add(x, x)
    place = first.ctypes.data
    part = first[:, 3:5]
    del first
    assert recorder.add(x, x).ctypes.data != place
    del part
    assert recorder.add(x, x).ctypes.data == place


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize(("n_rows", "n_cols", "group"), [(1, 256, 256), (6, 512, 256), (3, 96, 32), (7, 1408, 32)])
def test_gated_rows(n_rows, n_cols, group, n_threads):
    """Records of silu(gate) * up: each number to half a step, with the records of what is left to half of theirs."""
    rng = np.random.default_rng(n_cols)
    gate, up = (3 * rng.standard_normal((n_rows, n_cols)).astype(np.float32) for _ in range(2))
    expected = (silu(gate.astype(np.float64)) * up).reshape(n_rows, -1, group)
    stride = -(-n_cols * 4 // 64) * 64  # more than enough
    memory = np.zeros((2 * n_rows, stride), np.uint8)
    plan = [0, n_rows, gate.ctypes.data, up.ctypes.data, memory.ctypes.data, stride, n_cols, group, 1]
    plan = np.array(plan, np.int64)
    launch(compiled_address(gated_units, TAGS["F32"]), plan.ctypes.data, n_rows, 10**9, n_threads)
    codes = memory[:, :n_cols].view(np.int8).reshape(2, n_rows, -1, group).astype(np.float64)
    first = -(-n_cols // 64) * 64  # scales follow the codes, which are filled up to a multiple of 64
    scales = np.ascontiguousarray(memory[:, first : first + n_cols // group * 4]).view(np.float32)
    steps = scales.reshape(2, n_rows, -1, 1).astype(np.float64)
    assert (np.abs(codes[0]).max(-1) == 127).all()
    rounding = 1e-6 * np.abs(expected).max()
    assert (np.abs(codes[0] * steps[0] - expected) <= 0.5 * steps[0] + rounding).all()
    assert (np.abs((codes * steps).sum(0) - expected) <= 0.5 * steps[1] + rounding).all()
    assert steps[1].max() < steps[0].max() / 200


def test_an_input_is_rounded_once():
    """However many products take it, in each form that they want."""
    weights = load_weights(edge_moe.load().checkpoint)
    layer = next(each for each in weights.layers if hasattr(each.mlp, "experts"))
    shared, recorder = layer.mlp.shared_experts, Recorder(1)
    x, other = (np.zeros((1, shared.gate_proj.shape[1]), np.float32) for _ in range(2))
    rounds = compiled_address(quantize_units, TAGS["F32"])

    def rounded(call):
        before = len(recorder.steps)
        call()
        return sum(step[0] == rounds for step in recorder.steps[before:])

    assert rounded(lambda: recorder.linear(x, shared.gate_proj)) == 1
    assert rounded(lambda: recorder.linear(x, shared.up_proj)) == 0
    assert rounded(lambda: recorder.linear(x, fine=(shared.up_proj,))) == 1
    assert rounded(lambda: recorder.linear(other, shared.gate_proj)) == 1
    assert rounded(lambda: recorder.linear(x, shared.gate_proj)) == 1  # its records may have been given away
