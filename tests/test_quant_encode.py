"""The encoders: blocks that others read as we do, the nearest codes, and less error than ggml's encoders."""

import ctypes
from itertools import product

import gguf
import llama_cpp._ggml
import numpy as np
import pytest
from edge_moe_quant.encode import encode_rows
from edge_moe_quant.lanes import half_bits, half_value
from numba import njit

from edge_moe import formats
from edge_moe.errors import FormatError, ShapeError

NAMES = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
each_format = pytest.mark.parametrize("fmt", [getattr(formats, name) for name in NAMES], ids=repr)

# What every byte of a field can be, so that an element's code takes all of its values.
FIELD_BYTES = {
    "nibbles": [17 * n for n in range(16)], "crumbs": [85 * n for n in range(4)], "fifth_bits": [0, -1],
    "third_bits": [0, 255], "quants": list(range(-127, 128)),
}  # fmt: skip


def weights(kind, shape=(4, 512)):
    rng = np.random.default_rng(sum(map(ord, kind)))
    x = 0.02 * {
        "normal": lambda: rng.standard_normal(shape),
        "heavy": lambda: rng.standard_t(3, shape),
        "shifted": lambda: rng.standard_normal(shape) + 2,
        "sparse": lambda: rng.standard_normal(shape) * (rng.random(shape) < 0.1),
    }[kind]()  # fmt: skip
    return np.ascontiguousarray(x, np.float32)


def importance(n_cols):
    return np.random.default_rng(n_cols).gamma(0.7, 1, n_cols).astype(np.float32) + np.float32(1e-3)


def ggml_encode(x, fmt, qw=None):
    encode = llama_cpp._ggml.libggml.ggml_quantize_chunk
    encode.restype = ctypes.c_size_t
    encode.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    out = np.empty((len(x), fmt.row_bytes(x.shape[1])), np.uint8)
    n_bytes = encode(fmt.ggml_type, x.ctypes.data, out.ctypes.data, 0, *x.shape, None if qw is None else qw.ctypes.data)
    assert n_bytes == out.nbytes
    return out


def error(x, data, fmt, qw):
    return float((np.square(fmt.decode(data).astype(np.float64) - x) * (1 if qw is None else qw)).sum())


def nearest(x, data, fmt):
    """The values nearest to x that the scales of the encoded blocks allow."""
    blocks = data.reshape(-1).view(fmt.layout)
    fields = [name for name in fmt.layout.names if name in FIELD_BYTES]
    best = np.full(x.shape, np.inf)
    for values in product(*(FIELD_BYTES[name] for name in fields)):
        trial = blocks.copy()
        for name, value in zip(fields, values, strict=True):
            trial[name] = np.array(value).astype(fmt.layout[name].base)
        best = np.minimum(best, np.abs(fmt.decode(trial.view(np.uint8)).reshape(x.shape) - x))
    return best


@each_format
@pytest.mark.parametrize("kind", ["normal", "sparse", "shifted"])
def test_every_code_is_the_nearest_and_others_read_the_same(fmt, kind):
    x = weights(kind)
    data = encode_rows(x, fmt)
    decoded = fmt.decode(data)
    np.testing.assert_array_equal(decoded, gguf.dequantize(data, gguf.GGMLQuantizationType[fmt.name]))
    np.testing.assert_allclose(np.abs(decoded - x), nearest(x, data, fmt), rtol=0, atol=2e-6 * np.abs(x).max())


@each_format
@pytest.mark.parametrize("with_importance", [False, True])
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted", "sparse"])
def test_less_error_than_ggml(fmt, kind, with_importance):
    x = weights(kind, (16, 512))
    qw = importance(512) if with_importance else None
    assert error(x, encode_rows(x, fmt, qw), fmt, qw) <= error(x, ggml_encode(x, fmt, qw), fmt, qw)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "IQ4_NL"])
def test_scales_are_near_the_best_of_all(name):
    """Every f16 scale that could serve is tried, for a few blocks."""
    fmt = getattr(formats, name)
    x, qw = weights("normal", (1, 256)), importance(256)
    largest = {"Q4_0": 8, "Q5_0": 16, "IQ4_NL": 127}[name]
    found = best = 0.0
    for i in range(0, 256, 32):
        block, w = x[:, i : i + 32], qw[i : i + 32]
        center = np.abs(block).max() / largest
        scales = np.unique(np.linspace(0.7 * center, 1.5 * center, 3000).astype(np.float16))
        trials = np.zeros(2 * len(scales), fmt.layout)
        trials["scale"] = np.concatenate([scales, -scales])
        errors = np.zeros(len(trials))
        errors += (np.square(nearest(np.repeat(block, len(trials), 0), trials.view(np.uint8), fmt)) * w).sum(axis=1)
        best += errors.min()
        found += error(block, encode_rows(block, fmt, w), fmt, w)
    assert best * 0.9999 <= found <= 1.01 * best


@each_format
def test_odd_weights(fmt):
    """Zeros, a constant, a single outlier, the smallest and the largest that f16 scales can hold."""
    x = np.zeros((7, 256), np.float32)
    x[1], x[2, 17], x[3], x[4], x[5] = 0.5, -3.0, 1e-9, 1e-38, np.linspace(-3e4, 3e4, 256)
    x[6, ::2] = -1
    decoded = fmt.decode(encode_rows(x, fmt))
    assert np.isfinite(decoded).all()
    np.testing.assert_array_equal(decoded[0], 0)
    assert np.abs(decoded[1:3] - x[1:3]).max() < 0.05
    assert np.abs(decoded[3:5]).max() < 1e-6
    assert np.square(decoded[5] - x[5]).mean() < 0.03 * np.square(x[5]).mean()
    assert np.abs(decoded[6] - x[6]).max() < 0.05


@each_format
def test_beyond_f16_stays_finite(fmt):
    x = np.full((1, 256), 3e38, np.float32)
    x[0, ::3] = -3e38
    assert np.isfinite(fmt.decode(encode_rows(x, fmt))).all()


def test_the_importance_is_obeyed():
    x, qw = weights("normal", (8, 256)), np.ones(256, np.float32)
    qw[::16] = 1000
    plain, weighted = (formats.Q4_K.decode(encode_rows(x, formats.Q4_K, w)) for w in (None, qw))
    assert np.square(weighted - x)[:, ::16].mean() < 0.5 * np.square(plain - x)[:, ::16].mean()


def test_bad_arguments():
    with pytest.raises(FormatError, match="infinite or not a number"):
        encode_rows(np.full((1, 256), np.nan, np.float32), formats.Q4_K)
    with pytest.raises(FormatError, match="row of 288 elements cannot be Q4_K"):
        encode_rows(np.zeros((1, 288), np.float32), formats.Q4_K)
    with pytest.raises(ShapeError, match=r"shape \(32,\), expected \(256,\)"):
        encode_rows(np.zeros((1, 256), np.float32), formats.Q4_K, np.ones(32, np.float32))


def test_half_precision_is_numpys():
    @njit
    def both(values, bits, back):
        for i in range(len(values)):
            bits[i] = half_bits(values[i])
            back[i] = half_value(bits[i])

    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (every[1:] + every[:-1]) / 2
    rng = np.random.default_rng(0)
    values = np.concatenate([every, between, between * np.float32(1.0000001), rng.standard_normal(1000), [70000, 3e38]])
    values = np.concatenate([values, -values]).astype(np.float32)
    bits, back = np.empty(len(values), np.int64), np.empty(len(values), np.float32)
    both(values, bits, back)
    with np.errstate(over="ignore"):
        expected = np.clip(values, -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(bits, expected.view(np.uint16))
    np.testing.assert_array_equal(back, expected.astype(np.float32))
