"""Products with every block format, against decoded rows times inputs in numpy."""

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import gguf
import llvmlite.binding
import numba
import numpy as np
import pytest
from block_rows import random_rows, whole_activations

from edge_moe.errors import FormatError, ShapeError
from edge_moe.formats import FORMATS
from edge_moe.kernels import products
from edge_moe.kernels.launch import first_of_unit

# The subprocesses of the last test check chosen formats only.
_CHOSEN = os.environ.get("EDGE_MOE_TEST_FORMATS")
FORMATS_HERE = [f for f in FORMATS if _CHOSEN is None or f.name in _CHOSEN.split(",")]
BY_NAME = {f.name: f for f in FORMATS}
every_format = pytest.mark.parametrize("fmt", FORMATS_HERE, ids=lambda f: f.name)


def decoded(fmt, data):
    return gguf.dequantize(data, gguf.GGMLQuantizationType(fmt.ggml_type)).astype(np.float64)


def assert_close(found, x, weights):
    """Equal to x @ weights.T up to the rounding of float sums."""
    x = x.astype(np.float64)
    bound = 3e-6 * (np.abs(x) @ np.abs(weights).T)
    assert found.dtype == np.float32
    assert (np.abs(found - x @ weights.T) <= bound).all()


def columns(fmt):
    return {1: (1, 40, 203, 576), 32: (32, 96, 128, 1408), 256: (256, 512, 768, 1280, 2048)}[fmt.block_size]


@every_format
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 7, 48])
def test_linear(fmt, n_tokens):
    rng = np.random.default_rng(n_tokens)
    for n_cols in columns(fmt):
        for n_rows in (1, 37):
            data = random_rows(fmt, n_rows, n_cols, rng)
            x = whole_activations((n_tokens, n_cols), fmt.activation_group, rng)
            (found,) = products.linear(x, [(fmt, data.ctypes.data, n_rows)])
            assert_close(found, x, decoded(fmt, data))


@every_format
def test_linear_of_any_floats(fmt):
    """With inputs that int8 does not hold exactly: the error of rounding to 8 bits, none for float weights."""
    rng = np.random.default_rng(0)
    n_cols = columns(fmt)[-1]
    data = random_rows(fmt, 64, n_cols, rng)
    for n_tokens in (1, 5):
        x = rng.standard_normal((n_tokens, n_cols)).astype(np.float32)
        (found,) = products.linear(x, [(fmt, data.ctypes.data, 64)])
        expected = x @ decoded(fmt, data).T
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error < (3e-6 if fmt.block_size == 1 else 0.015)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="this system cannot protect pages")
@every_format
def test_nothing_is_read_beyond_the_last_row(fmt):
    """A matrix at the end of a file has nothing behind it: here the next page may not be read."""
    rng = np.random.default_rng(1)
    for n_cols in columns(fmt):
        _check_at_the_end_of_a_page(fmt, n_cols, rng)


def _check_at_the_end_of_a_page(fmt, n_cols, rng):
    data = random_rows(fmt, 5, n_cols, rng)
    size = -(-data.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    start = memory.ctypes.data + size - data.nbytes
    memory[size - data.nbytes : size] = data.reshape(-1)
    no_access = 0
    end_page = ctypes.c_void_p(memory.ctypes.data + size)
    assert ctypes.CDLL(None).mprotect(end_page, ctypes.c_size_t(mmap.PAGESIZE), no_access) == 0
    for n_tokens in (1, 9):
        x = whole_activations((n_tokens, n_cols), fmt.activation_group, rng)
        assert_close(products.linear(x, [(fmt, start, 5)])[0], x, decoded(fmt, data))
    found = products.decode_rows(fmt, start, np.arange(5), n_cols)
    np.testing.assert_allclose(found, decoded(fmt, data), rtol=1e-5, atol=1e-6)


def test_linear_of_several_formats():
    rng = np.random.default_rng(2)
    x = (rng.integers(-127, 128, (6, 512)) * 2.0**-6).astype(np.float32)
    x[:, ::32] = 127 * 2.0**-6  # exact in groups of 32 and of 256
    shapes = [("Q4_K", 40), ("F32", 3), ("Q6_K", 17), ("Q4_K", 64), ("Q8_0", 16)]
    weights = [(BY_NAME[name], random_rows(BY_NAME[name], n_rows, 512, rng)) for name, n_rows in shapes]
    found = products.linear(x, [(fmt, data.ctypes.data, len(data)) for fmt, data in weights])
    for y, (fmt, data) in zip(found, weights, strict=True):
        assert_close(y, x, decoded(fmt, data))


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K"])
def test_grouped_linear(name):
    fmt, rng = BY_NAME[name], np.random.default_rng(3)
    counts = [3, 0, 1, 20, 0, 6]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    data = [random_rows(fmt, 21, 256, rng) for _ in counts]
    x = whole_activations((11, 256), fmt.activation_group, rng)
    rows = rng.integers(0, 11, offsets[-1])
    addresses = np.array([d.ctypes.data for d in data])
    found = products.grouped_linear(x, rows, offsets, fmt, addresses, 21)
    for g, d in enumerate(data):
        part = slice(offsets[g], offsets[g + 1])
        assert_close(found[part], x[rows[part]], decoded(fmt, d))


def test_grouped_linear_of_two_matrices_a_group():
    """As gate and up of each expert: the same as one after the other."""
    fmt, rng = BY_NAME["Q8_0"], np.random.default_rng(10)
    data = random_rows(fmt, 6 * 20, 64, rng).reshape(2, 3, 20, -1)
    addresses = data.ctypes.data + np.arange(6).reshape(2, 3) * data[0, 0].nbytes
    x, rows, offsets = (
        rng.standard_normal((4, 64)).astype(np.float32),
        np.array([0, 1, 2, 3, 0]),
        np.array([0, 1, 1, 5]),
    )
    both = products.grouped_linear(x, rows, offsets, fmt, addresses, 20)
    for found, places in zip(both, addresses, strict=True):
        assert (found == products.grouped_linear(x, rows, offsets, fmt, places, 20)).all()


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K", "IQ4_XS"])
def test_grouped_linear_transposed(name):
    fmt, rng = BY_NAME[name], np.random.default_rng(4)
    counts = [2, 0, 5]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    for n_cols in (40, 300) if fmt.block_size == 1 else (32, 352) if fmt.block_size == 32 else (256, 768):
        data = [random_rows(fmt, 24, n_cols, rng) for _ in counts]
        x = rng.standard_normal((7, 24)).astype(np.float32)
        addresses = np.array([d.ctypes.data for d in data])
        found = products.grouped_linear_transposed(x, offsets, fmt, addresses, 24, n_cols)
        for g, d in enumerate(data):
            part = slice(offsets[g], offsets[g + 1])
            assert_close(found[part], x[part], decoded(fmt, d).T)


@every_format
def test_decode_rows(fmt):
    rng = np.random.default_rng(5)
    for n_cols in columns(fmt):
        data = random_rows(fmt, 9, n_cols, rng)
        ids = np.array([8, 0, 3, 3])
        found = products.decode_rows(fmt, data.ctypes.data, ids, n_cols)
        np.testing.assert_allclose(found, decoded(fmt, data)[ids], rtol=1e-5, atol=1e-6)


def test_units_run_through_small_matrices():
    """Many matrices of an odd number of rows, with a few tokens each, as those of a token's experts."""
    rng, n_rows = np.random.default_rng(8), 237
    for name, n_cols in (("Q4_K", 1280), ("Q5_0", 256), ("Q8_0", 96), ("F32", 40)):
        fmt = BY_NAME[name]
        data = [random_rows(fmt, n_rows, n_cols, rng) for _ in range(9)]
        counts = np.array([1, 0, 2, 3, 0, 0, 1, 1, 3])
        offsets = np.concatenate([[0], np.cumsum(counts)])
        x = whole_activations((int(offsets[-1]), n_cols), fmt.activation_group, rng)
        addresses = np.array([d.ctypes.data for d in data])
        found = products.grouped_linear(x, np.arange(len(x)), offsets, fmt, addresses, n_rows)
        for d, begin, end in zip(data, offsets, offsets[1:], strict=False):
            assert_close(found[begin:end], x[begin:end], decoded(fmt, d))


@pytest.mark.parametrize(
    ("name", "n_cols"),
    [*((name, 128) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q8_0")), ("Q4_K", 512), ("Q5_K", 512)],
)
def test_long_runs_of_short_rows(name, n_cols):
    """More rows of few blocks than are multiplied in one run, times some tokens; in groups, runs end anywhere."""
    fmt, rng = BY_NAME[name], np.random.default_rng(11)
    data = [random_rows(fmt, 1039, n_cols, rng) for _ in range(3)]
    x = whole_activations((3, n_cols), fmt.activation_group, rng)
    addresses = np.array([d.ctypes.data for d in data])
    for offsets in ([0, 3, 3, 3], [0, 1, 2, 3], [0, 0, 2, 3]):
        found = products.grouped_linear(x, np.arange(3), np.array(offsets), fmt, addresses, 1039)
        for d, begin, end in zip(data, offsets, offsets[1:], strict=False):
            assert_close(found[begin:end], x[begin:end], decoded(fmt, d))


@pytest.mark.parametrize(
    ("name", "n_cols"), [("F16", 768), ("Q5_0", 128), ("Q5_0", 768), ("Q6_K", 768), ("Q4_K", 512), ("Q4_K", 1280)]
)
def test_thread_count_changes_nothing(name, n_cols):
    fmt, rng = BY_NAME[name], np.random.default_rng(6)
    data = random_rows(fmt, 701, n_cols, rng)
    threads = numba.get_num_threads()
    for n_tokens in (1, 3, 30):
        x = rng.standard_normal((n_tokens, n_cols)).astype(np.float32)
        results = []
        for n in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(n)
            results.append(products.linear(x, [(fmt, data.ctypes.data, 701)])[0])
        numba.set_num_threads(threads)
        assert all((r == results[0]).all() for r in results)


@pytest.mark.parametrize(("name", "n_cols"), [("Q5_0", 128), ("Q5_1", 128), ("Q4_K", 512), ("Q5_K", 512)])
def test_a_row_as_among_others(name, n_cols):
    """Rows taken two or four at a time give the same bits, however many there are and wherever one begins."""
    fmt, rng = BY_NAME[name], np.random.default_rng(8)
    data = random_rows(fmt, 8, n_cols, rng)
    x = rng.standard_normal((1, n_cols)).astype(np.float32)
    together = products.linear(x, [(fmt, data.ctypes.data, 8)])[0]
    for begin in range(8):
        for end in range(begin + 1, 9):
            found = products.linear(x, [(fmt, data.ctypes.data + begin * data.nbytes // 8, end - begin)])[0]
            assert (found == together[:, begin:end]).all()


@every_format
def test_one_token_as_among_many(fmt):
    rng = np.random.default_rng(7)
    n_cols = columns(fmt)[-1]
    data = random_rows(fmt, 33, n_cols, rng)
    x = rng.standard_normal((20, n_cols)).astype(np.float32)
    together = products.linear(x, [(fmt, data.ctypes.data, 33)])[0]
    alone = np.concatenate([products.linear(x[i : i + 1], [(fmt, data.ctypes.data, 33)])[0] for i in range(20)])
    assert np.abs(together - alone).max() <= 2e-6 * np.abs(alone).max() * np.sqrt(n_cols)


@pytest.mark.parametrize("n_cols", [32, 96, 128, 1408])
@pytest.mark.parametrize("n_rows", [1, 3, 37])
def test_two_tokens_as_one_by_one(n_rows, n_cols):
    """Blocks of 8 bits are read once for two records: the same bits as for each alone."""
    fmt, rng = BY_NAME["Q8_0"], np.random.default_rng(n_cols)
    data = random_rows(fmt, n_rows, n_cols, rng)
    weights = [(fmt, data.ctypes.data, n_rows)]
    x = rng.standard_normal((2, n_cols)).astype(np.float32)
    together = products.linear(x, weights)[0]
    assert (together == np.concatenate([products.linear(x[i : i + 1], weights)[0] for i in range(2)])).all()


def test_zeros_and_no_tokens():
    fmt = BY_NAME["Q4_K"]
    data = random_rows(fmt, 8, 256, np.random.default_rng(8))
    weights = [(fmt, data.ctypes.data, 8)]
    assert (products.linear(np.zeros((5, 256), np.float32), weights)[0] == 0).all()
    assert products.linear(np.zeros((0, 256), np.float32), weights)[0].shape == (0, 8)


def test_wrong_arrays_are_named():
    fmt = BY_NAME["Q4_K"]
    data = random_rows(fmt, 8, 256, np.random.default_rng(9))
    address = data.ctypes.data
    x = np.zeros((2, 256), np.float32)
    with pytest.raises(ShapeError, match="float64"):
        products.linear(x.astype(np.float64), [(fmt, address, 8)])
    with pytest.raises(ShapeError, match="two dimensions"):
        products.linear(x[0], [(fmt, address, 8)])
    with pytest.raises((ShapeError, FormatError), match="300"):
        products.linear(np.zeros((2, 300), np.float32), [(fmt, address, 8)])
    places = np.array([address])
    with pytest.raises(ShapeError, match="must rise"):
        products.grouped_linear(x, np.arange(2), np.array([0, 1]), fmt, places, 8)
    with pytest.raises(ShapeError, match="rows be"):
        products.grouped_linear(x, np.array([0, 2]), np.array([0, 2]), fmt, places, 8)
    with pytest.raises(ShapeError, match="whole numbers"):
        products.grouped_linear(x, np.zeros(2), np.array([0, 2]), fmt, places, 8)
    with pytest.raises(TypeError):
        products.linear(x, [(fmt, float(address), 8)])
    with pytest.raises(ShapeError, match="columns"):
        products.grouped_linear_transposed(x, np.array([0, 2]), fmt, places, 8, 256)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="this CPU is no x86-64")
@pytest.mark.parametrize(
    ("cpu", "needs", "formats"),
    [
        ("x86-64", (), "F16,Q8_0,Q5_0,Q4_K,Q6_K,IQ4_XS"),
        ("x86-64-v2", (), "F16,Q8_0,Q5_0,Q4_K,Q6_K,IQ4_XS"),
        ("cascadelake", ("avx512vnni", "avx512bw", "avx512vl", "avx512dq"), "Q5_0,Q4_K,Q6_K"),
    ],
)
def test_other_cpus(cpu, needs, formats):
    """The kernels for older CPUs, compiled and run in a process that numba is told to compile so."""
    if not all(llvmlite.binding.get_host_cpu_features().get(feature) for feature in needs):
        pytest.skip(f"this CPU cannot run code for {cpu}")
    env = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "EDGE_MOE_TEST_FORMATS": formats}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    chosen = ["-k", "test_linear and not several or decode_rows"]
    done = subprocess.run(command + chosen, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@numba.njit
def _first_of_unit(unit, n_items, shares, least):
    return first_of_unit(unit, n_items, shares, least)


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
@pytest.mark.parametrize(("n_items", "least"), [(1, 1), (7, 1), (16, 16), (64, 2), (16896, 14), (100_003, 7)])
def test_units_are_long_runs_first(n_items, shares, least):
    """Each item is in one unit, units get shorter down to the least, and the first of all threads are half of it."""
    firsts = [0]
    while firsts[-1] < n_items:
        firsts.append(_first_of_unit(len(firsts), n_items, shares, least))
    lengths = np.diff(firsts)
    assert (lengths >= least).all()
    assert (np.diff(lengths) <= 0).all()
    if n_items >= 8 * shares * least:
        assert n_items / 2 - shares <= firsts[shares] <= n_items / 2
        assert lengths[-1] <= 2 * least
