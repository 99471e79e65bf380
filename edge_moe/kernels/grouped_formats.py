"""Keys and values of grouped-query attention as they are kept: the methods of its formats, bf16, f32 and 8 bits.

The cache of a head is its keys, in blocks of BLOCK tokens beside each other [columns][BLOCK], then its values, a row
for each token, and for 8 bits the scales of all keys, then those of all values. Columns are the dims, and zeros to a
multiple of 16.
"""

import numpy as np
from numba import types
from numba.extending import models, register_model

from edge_moe.kernels import attention_rows  # noqa: F401 (how its formats store floats)
from edge_moe.kernels.blocks import TAGS, FloatFormat, FormatTag
from edge_moe.kernels.elementwise import to_bf16
from edge_moe.kernels.functions import codes_of, inverse_of
from edge_moe.kernels.jit import inline_kernel, kernel_method
from edge_moe.kernels.simd import (
    absolute,
    convert,
    f32x16,
    i8x16,
    i32x16,
    larger,
    load,
    reduce_max,
    splat,
    store,
)

MAX_CODE = 127
BLOCK = 16
WHOLE = 2 * BLOCK  # there is memory for so many tokens or a multiple


class ByteRows(FormatTag):
    """Codes with a sign, and a scale of each key and each value."""


register_model(ByteRows)(models.OpaqueModel)
INT8 = ByteRows("INT8", 1)

# How keys and values are kept, by name.
FORMATS: dict[str, FormatTag] = {"bf16": TAGS["BF16"], "int8": INT8, "f32": TAGS["F32"]}


@inline_kernel
def columns(dim):
    """Numbers of a key or value as it is kept."""
    return (dim + 15) & ~15


@kernel_method(FloatFormat, "row_bytes")
@kernel_method(ByteRows, "row_bytes")
def _row_bytes(fmt, dim):
    """Bytes of a key or value."""
    size = fmt.block_bytes
    return lambda fmt, dim: columns(dim) * size


@kernel_method(FloatFormat, "number_bytes")
@kernel_method(ByteRows, "number_bytes")
def _number_bytes(fmt):
    size = fmt.block_bytes
    return lambda fmt: size


@kernel_method(ByteRows, "load")
def _load_codes(fmt, address):
    return lambda fmt, address: convert(f32x16, convert(i32x16, load(i8x16, address)))


@kernel_method(FloatFormat, "store_key")
def _store_float_key(fmt, place, scale, values, dim):
    size = fmt.block_bytes

    def store_key(fmt, place, scale, values, dim):
        """Keep a key, dim floats at an address, one of BLOCK side by side; its scale goes to another address."""
        for i in range(dim):
            value = load(types.float32, values + 4 * i)
            if size == 4:
                store(place + BLOCK * size * i, value)
            else:
                store(place + BLOCK * size * i, to_bf16(value))

    return store_key


@kernel_method(FloatFormat, "store_value")
def _store_float_value(fmt, place, scale, values, dim):
    def store_value(fmt, place, scale, values, dim):
        """Keep a value, dim floats at an address, as a row; its scale goes to another address."""
        fmt.store_numbers(place, values, dim)

    return store_value


@inline_kernel
def _scale_of(values, dim):
    """What codes of dim floats at an address are multiplied with."""
    zero = types.float32(0.0)
    tops, wrong = splat(f32x16, zero), zero
    for i in range(0, dim - 15, 16):
        tops = larger(absolute(load(f32x16, values + 4 * i)), tops)
    top = reduce_max(tops)
    for i in range(dim):
        value = load(types.float32, values + 4 * i)
        wrong += value * zero  # what is infinite or not a number must show
        top = max(top, abs(value))
    return top * types.float32(1 / MAX_CODE) + wrong


@kernel_method(ByteRows, "store_key")
def _store_code_key(fmt, place, scale, values, dim):
    def store_key(fmt, place, scale, values, dim):
        step = _scale_of(values, dim)
        inverse = inverse_of(step)
        for i in range(dim):
            store(place + BLOCK * i, types.int8(np.rint(load(types.float32, values + 4 * i) * inverse)))
        store(scale, step)

    return store_key


@kernel_method(ByteRows, "store_value")
def _store_code_value(fmt, place, scale, values, dim):
    def store_value(fmt, place, scale, values, dim):
        step = _scale_of(values, dim)
        inverse = inverse_of(step)
        for i in range(0, dim - 15, 16):
            store(place + i, convert(i8x16, codes_of(values + 4 * i, inverse)))
        for i in range(dim & ~15, dim):
            store(place + i, types.int8(np.rint(load(types.float32, values + 4 * i) * inverse)))
        store(scale, step)

    return store_value


@kernel_method(FloatFormat, "scaled")
def _scaled_floats(fmt, numbers, scales):
    return lambda fmt, numbers, scales: numbers


@kernel_method(ByteRows, "scaled")
def _scaled_codes(fmt, numbers, scales):
    """f32x16 of 16 tokens times the tokens' scales at an address."""
    return lambda fmt, numbers, scales: numbers * load(f32x16, scales)


def head_bytes(fmt: FormatTag, context_length: int, dim: int) -> int:
    """Bytes of one head's keys and values in one layer."""
    return -(-context_length // WHOLE) * WHOLE * token_bytes(fmt, dim)


def token_bytes(fmt: FormatTag, dim: int) -> int:
    """Bytes of a key and a value, scales and zeros with them."""
    return 2 * (-(-dim // 16) * 16 * fmt.block_bytes + (4 if fmt is INT8 else 0))
