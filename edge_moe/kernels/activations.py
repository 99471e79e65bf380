"""The int8 form in which activations meet quantized weights, one record for each token.

A record holds the codes int8[columns], a float scale for each group of columns, and the codes' sums, which meet the
weights' minimums: for groups of 256 int16 sums of each 16 codes, for groups of 32 float sums, already scaled. Columns
are filled up with zeros to a multiple of 64, so that a pair of blocks always fits; scales and sums to those of four
groups of 32, or two of 256. For panels, the records of a few tokens are interleaved to a tile.

What rounding leaves of a row can be had, too, for a second record: the two together have the precision of 15 bits.
"""

import numpy as np
from numba import types

from edge_moe.kernels.dots import MAX_ACTIVATION
from edge_moe.kernels.jit import both_sides, inline_kernel, kernel
from edge_moe.kernels.simd import (
    absolute,
    address_of,
    convert,
    f32x16,
    fetch_add,
    i8x16,
    i32x16,
    larger,
    load,
    reduce_add,
    reduce_max,
    rounded,
    splat,
    store,
)
from edge_moe.kernels.tiles import TILE_TOKENS, interleave

QUANTIZE_ROWS = 8


@both_sides
def padded_columns(n_cols):
    """Columns of a record: a multiple of 64."""
    return (n_cols + 63) & ~63


@both_sides
def _summed_columns(n_cols, group):
    """Columns for which there are scales and sums."""
    most = 127 if group == 32 else 511
    return (n_cols + most) & ~most


@both_sides
def scales_offset(n_cols):
    """Where in a record the scales start, in bytes."""
    return padded_columns(n_cols)


@both_sides
def sums_offset(n_cols, group):
    """Where in a record the sums start, in bytes."""
    return padded_columns(n_cols) + _summed_columns(n_cols, group) // group * 4


@both_sides
def record_bytes(n_cols, group):
    """Bytes from one token's record to the next, a multiple of 64."""
    return (sums_offset(n_cols, group) + _summed_columns(n_cols, group) // 8 + 63) & ~63


@inline_kernel
def _quantize_row(x, record, residual, n_cols, group):
    """x f32[n_cols] at an address -> its record, and at `residual`, if that is not 0, f32[n_cols] that are left."""
    scales, sums = record + scales_offset(n_cols), record + sums_offset(n_cols, group)
    for start in range(0, n_cols, group):
        largest = splat(f32x16, types.float32(0.0))
        for i in range(start, start + group, 16):
            largest = larger(absolute(load(f32x16, x + 4 * i)), largest)
        scale = reduce_max(largest) / types.float32(MAX_ACTIVATION)
        inverse = types.float32(1.0) / scale if scale > types.float32(0.0) else types.float32(0.0)
        group_sum = types.int32(0)
        for i in range(start, start + group, 16):
            values = load(f32x16, x + 4 * i)
            whole = rounded(values * inverse)
            if residual:
                store(residual + 4 * i, values - whole * scale)
            codes = convert(i32x16, whole)
            store(record + i, convert(i8x16, codes))
            part = reduce_add(codes)
            group_sum += part
            if group == 256:
                store(sums + i // 8, types.int16(part))
        store(scales + start // group * 4, scale)
        if group == 32:
            store(sums + start // 8, types.float32(group_sum) * scale)
    _store_zeros(record + n_cols, padded_columns(n_cols) - n_cols)
    missing = _summed_columns(n_cols, group) - n_cols
    _store_zeros(scales + n_cols // group * 4, missing // group * 4)
    _store_zeros(sums + n_cols // 8, missing // 8)


@inline_kernel
def _store_zeros(address, n_bytes):
    """Clear memory, in steps of 4 bytes."""
    for i in range(0, n_bytes, 4):
        store(address + i, types.int32(0))


@kernel
def quantize_units(fmt, plan):
    """Quantize rows as long as the plan has some.

    Plan: i64 counter, n_rows, x, records, record_bytes, n_cols, group, is_fine. If fine, the records of what is left of
    the rows lie behind those of all rows.
    """
    n_rows, x, records = load(types.int64, plan + 8), load(types.int64, plan + 16), load(types.int64, plan + 24)
    stride, n_cols, group = load(types.int64, plan + 32), load(types.int64, plan + 40), load(types.int64, plan + 48)
    is_fine = load(types.int64, plan + 56)
    memory = np.empty(n_cols if is_fine else 0, np.float32)
    residual = address_of(memory) if is_fine else 0
    while True:
        start = fetch_add(plan, QUANTIZE_ROWS)
        if start >= n_rows:
            return memory.size  # the memory must live until here
        for i in range(start, min(start + QUANTIZE_ROWS, n_rows)):
            row, record = x + i * n_cols * 4, records + i * stride
            if group == 32:  # constants make faster loops
                _quantize_row(row, record, residual, n_cols, 32)
                if is_fine:
                    _quantize_row(residual, record + n_rows * stride, 0, n_cols, 32)
            else:
                _quantize_row(row, record, residual, n_cols, 256)
                if is_fine:
                    _quantize_row(residual, record + n_rows * stride, 0, n_cols, 256)


@kernel
def interleave_units(fmt, plan):
    """Interleave tiles as long as the plan has some: i64 counter, n_tiles, table, n_bytes, tiles, tile_bytes."""
    n_tiles, table, n_bytes = load(types.int64, plan + 8), load(types.int64, plan + 16), load(types.int64, plan + 24)
    tiles, tile_bytes = load(types.int64, plan + 32), load(types.int64, plan + 40)
    while True:
        i = fetch_add(plan, 1)
        if i >= n_tiles:
            return 0
        records, tile = table + 8 * TILE_TOKENS * i, tiles + tile_bytes * i
        whole = n_bytes & ~15
        for offset in range(0, whole, 16):
            interleave(records, offset, tile + TILE_TOKENS * offset)
        for offset in range(whole, n_bytes, 4):
            for t in range(TILE_TOKENS):
                number = load(types.int32, load(types.int64, records + 8 * t) + offset)
                store(tile + TILE_TOKENS * offset + 4 * t, number)
