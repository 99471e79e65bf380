"""Tests of the block formats: sizes and decoded values equal to the gguf package's, bit for bit."""

import copy
import pickle

import gguf
import numpy as np
import pytest

from edge_moe.errors import FormatError, ShapeError
from edge_moe.formats import FORMATS, FORMATS_BY_GGML_TYPE, BlockFormat

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=repr)


def oracle(data: np.ndarray, fmt: BlockFormat) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.dequantize(data, gguf.GGMLQuantizationType[fmt.name])


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit patterns; where the expected value is NaN, any NaN is right (its payload is the processor's choice)."""
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def random_blocks(fmt: BlockFormat, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, size=(*shape[:-1], shape[-1] * fmt.block_bytes), dtype=np.uint8)


def test_the_formats_are_those_the_package_promises():
    expected = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS"
    assert " ".join(fmt.name for fmt in FORMATS) == expected
    assert all(FORMATS_BY_GGML_TYPE[fmt.ggml_type] is fmt for fmt in FORMATS)
    assert len(FORMATS_BY_GGML_TYPE) == len(FORMATS)


@each_format
def test_sizes_are_those_of_ggml(fmt):
    ggml_type = gguf.GGMLQuantizationType[fmt.name]
    assert fmt.ggml_type == ggml_type.value
    assert (fmt.block_size, fmt.block_bytes) == gguf.GGML_QUANT_SIZES[ggml_type]
    assert fmt.activation_group == (0 if fmt.name in ("F32", "F16", "BF16") else fmt.block_size)


@each_format
@pytest.mark.parametrize("shape", [(1,), (4096,), (2, 2), (4, 3), (3, 2, 4), (2, 1, 1), (5, 16)], ids=str)
def test_random_bytes_decode_as_in_gguf(fmt, shape):
    data = random_blocks(fmt, shape, seed=sum(shape))
    assert_same_bits(fmt.decode(data), oracle(data, fmt))


@each_format
def test_every_byte_value_at_every_place_decodes_as_in_gguf(fmt):
    place = np.arange(fmt.block_bytes)
    data = (np.arange(256)[:, None] + 37 * place).astype(np.uint8)  # row r, place p: every byte value once per place
    assert_same_bits(fmt.decode(data), oracle(data, fmt))


@each_format
@pytest.mark.parametrize("byte", [0x00, 0x80, 0xFF, 0x7C, 0x7F])
def test_constant_bytes_decode_as_in_gguf(fmt, byte):
    data = np.full((2, 3 * fmt.block_bytes), byte, dtype=np.uint8)
    assert_same_bits(fmt.decode(data), oracle(data, fmt))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_weights_come_back_close(name):
    fmt = next(fmt for fmt in FORMATS if fmt.name == name)
    weights = np.random.default_rng(1).standard_normal((8, 256)).astype(np.float32)
    decoded = fmt.decode(gguf.quantize(weights, gguf.GGMLQuantizationType[name]))
    bits = int(name[1])
    assert np.abs(decoded - weights).max() < 8.0 / 2**bits


@each_format
def test_decode_takes_strided_and_read_only_views_and_returns_a_new_array(fmt):
    data = random_blocks(fmt, (6, 2), seed=5)
    data.flags.writeable = False
    decoded = fmt.decode(data[::2])
    assert_same_bits(decoded, oracle(np.ascontiguousarray(data[::2]), fmt))
    decoded[:] = 0  # writable, and not the data's memory
    assert_same_bits(fmt.decode(data), oracle(data, fmt))


@each_format
def test_no_rows_decode_to_no_rows(fmt):
    assert fmt.decode(np.zeros((0, 2 * fmt.block_bytes), np.uint8)).shape == (0, 2 * fmt.block_size)
    assert fmt.decode(np.zeros((3, 0), np.uint8)).shape == (3, 0)


@each_format
def test_row_bytes(fmt):
    assert fmt.row_bytes(0) == 0
    assert fmt.row_bytes(7 * fmt.block_size) == 7 * fmt.block_bytes
    if fmt.block_size > 1:
        with pytest.raises(FormatError, match=f"row of {fmt.block_size + 1} elements cannot be {fmt.name}"):
            fmt.row_bytes(fmt.block_size + 1)


@each_format
def test_decode_refuses_what_is_not_whole_blocks_of_bytes(fmt):
    with pytest.raises(ShapeError, match="uint8"):
        fmt.decode(np.zeros(fmt.block_bytes, np.int8))
    with pytest.raises(ShapeError, match="uint8"):
        fmt.decode(np.array(0, np.uint8))
    if fmt.block_bytes > 1:
        with pytest.raises(ShapeError, match=f"whole {fmt.block_bytes}-byte blocks"):
            fmt.decode(np.zeros((2, fmt.block_bytes + 1), np.uint8))


@each_format
def test_copies_and_pickles_are_the_same_object(fmt):
    assert copy.deepcopy(fmt) is fmt
    assert pickle.loads(pickle.dumps(fmt)) is fmt
