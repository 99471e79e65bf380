"""The int8 form in which activations meet quantized weights, one record for each token.

A record holds the codes int8[columns], a float scale for each group of columns, and the codes' sums, which meet the
weights' minimums: for groups of 256 int16 sums of each 16 codes and of each 32, for groups of 32 float sums, already
scaled. Columns are filled up with zeros to a multiple of 64, so that a pair of blocks always fits; scales and sums to
those of four groups of 32, or two of 256. For panels, the records of a few tokens are interleaved to a tile.

What follows is for rows on long registers. For groups of 256 there are, as four superblocks of nibbles take them, the
codes in the order of nibbles (`_store_in_nibbles`) and the scales, each twice; then those of the last four groups, with
zeros for what fours before have had. For groups of 32 the codes are in words of four columns: of each four groups the
first words, then the second ones, and so on.

What rounding leaves of a row can be had, too, for a second record: the two together have the precision of 15 bits.
"""

import numpy as np
from numba import types

from edge_moe.kernels.dots import MAX_ACTIVATION
from edge_moe.kernels.folds import four_maxima, quarter_sums, quarters
from edge_moe.kernels.functions import codes_of, inverse_of
from edge_moe.kernels.jit import both_sides, inline_kernel, kernel
from edge_moe.kernels.picks import picker
from edge_moe.kernels.simd import (
    absolute,
    address_of,
    convert,
    f32x2,
    f32x4,
    f32x16,
    fetch_add,
    high_half,
    i8x16,
    i16x4,
    i16x16,
    i32x16,
    join,
    larger,
    load,
    low_half,
    reduce_add,
    reduce_max,
    splat,
    store,
    u32x16,
    where_positive,
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
def sums_of_32_offset(n_cols):
    """Where in a record for groups of 256 the sums of each 32 codes start, in bytes."""
    return sums_offset(n_cols, 256) + _summed_columns(n_cols, 256) // 8


@both_sides
def tiled_bytes(n_cols, group):
    """Bytes of a record that tiles hold, a multiple of 64."""
    if group == 256:
        return (sums_of_32_offset(n_cols) + n_cols // 16 + 63) & ~63
    return (sums_offset(n_cols, group) + _summed_columns(n_cols, group) // 8 + 63) & ~63


@both_sides
def nibbles_offset(n_cols):
    """Where in a record for groups of 256 the codes are once more, in bytes."""
    return tiled_bytes(n_cols, 256)


@both_sides
def twice_scales_offset(n_cols):
    """Where in a record for groups of 256 the scales start that are there twice, in bytes."""
    return nibbles_offset(n_cols) + padded_columns(n_cols)


@both_sides
def last_scales_offset(n_cols):
    """Where in a record for groups of 256 those of the last four start, in bytes."""
    return twice_scales_offset(n_cols) + n_cols // 32


@both_sides
def words_offset(n_cols):
    """Where in a record for groups of 32 the codes are once more in the order of words, in bytes."""
    return tiled_bytes(n_cols, 32)


@both_sides
def record_bytes(n_cols, group):
    """Bytes from one token's record to the next, a multiple of 64."""
    return (last_scales_offset(n_cols) + 32 + 63) & ~63 if group == 256 else words_offset(n_cols) + (n_cols & ~127)


# Of the parts of 128 bits of two registers the lower halves, of each in turn; the upper ones.
lower_of_parts, upper_of_parts = (
    picker([4 * part + half + i + register for part in range(4) for register in (0, 16) for i in (0, 1)])
    for half in (0, 2)
)


@inline_kernel
def _store_in_nibbles(codes, place):
    """256 codes at an address -> in the order of nibbles at another.

    A superblock's nibbles are two registers: of each 64 columns the first 32 are in lower nibbles, the others in upper
    ones. The lower halves of all parts of 128 bits, of the one register and the other in turn, are the first 64 places,
    with their lower nibbles; the upper halves are the next; then both with their upper nibbles.
    """
    both = join(load(u32x16, codes), load(u32x16, codes + 128))
    more = join(load(u32x16, codes + 64), load(u32x16, codes + 192))
    lower, more_lower = lower_of_parts(both), lower_of_parts(more)
    upper, more_upper = upper_of_parts(both), upper_of_parts(more)
    store(place, join(low_half(lower), low_half(more_lower)))
    store(place + 64, join(low_half(upper), low_half(more_upper)))
    store(place + 128, join(high_half(lower), high_half(more_lower)))
    store(place + 192, join(high_half(upper), high_half(more_upper)))


@inline_kernel
def _quantize_256(x, record, n_cols):
    """Codes, scales and sums of groups of 256."""
    scales, sums = record + scales_offset(n_cols), record + sums_offset(n_cols, 256)
    in_nibbles, scales_twice = record + nibbles_offset(n_cols), record + twice_scales_offset(n_cols)
    sums_of_32 = record + sums_of_32_offset(n_cols)
    for start in range(0, n_cols, 256):
        a = b = c = d = splat(f32x16, types.float32(0.0))
        for i in range(start, start + 256, 64):
            at = x + 4 * i
            a, b = larger(absolute(load(f32x16, at)), a), larger(absolute(load(f32x16, at + 64)), b)
            c, d = larger(absolute(load(f32x16, at + 128)), c), larger(absolute(load(f32x16, at + 192)), d)
        scale = reduce_max(larger(larger(a, b), larger(c, d))) / types.float32(MAX_ACTIVATION)
        inverse = inverse_of(scale)
        store(scales + start // 256 * 4, scale)
        store(scales_twice + start // 256 * 8, splat(f32x2, scale))
        for i in range(start, start + 256, 64):
            at = x + 4 * i
            p, q = codes_of(at, inverse), codes_of(at + 64, inverse)
            r, s = codes_of(at + 128, inverse), codes_of(at + 192, inverse)
            low, high = join(convert(i8x16, p), convert(i8x16, q)), join(convert(i8x16, r), convert(i8x16, s))
            store(record + i, join(low, high))
            store(sums + i // 8, convert(i16x4, quarter_sums(quarters(p, q, r, s))))
        _store_in_nibbles(record + start, in_nibbles + start)
        both = load(i16x16, sums + start // 8)
        store(sums_of_32 + start // 16, _even(both) + _odd(both))
    n_blocks = n_cols // 256
    for i in range(4):
        scale = types.float32(0.0)
        if n_blocks >= 4 and i >= -n_blocks % 4:
            scale = load(types.float32, scales + 4 * (n_blocks - 4 + i))
        store(record + last_scales_offset(n_cols) + 8 * i, splat(f32x2, scale))


_even, _odd = picker(range(0, 16, 2)), picker(range(1, 16, 2))
# Of four blocks of 8 words the first words of all, then the second ones.
_lower_words, _upper_words = (picker([8 * (i % 4) + half + i // 4 for i in range(16)]) for half in (0, 4))
_lane_0, _lane_1, _lane_2, _lane_3 = (picker([k] * 16) for k in range(4))


@inline_kernel
def _quantize_32(x, record, n_cols):
    """Those of groups of 32: four at a time, then those that are left."""
    scales, sums = record + scales_offset(n_cols), record + sums_offset(n_cols, 32)
    zero, one = splat(f32x4, types.float32(0.0)), splat(f32x4, types.float32(1.0))
    for start in range(0, n_cols & ~127, 128):
        at, to = x + 4 * start, record + start
        a, b, c, d = _largest_of_32(at), _largest_of_32(at + 128), _largest_of_32(at + 256), _largest_of_32(at + 384)
        scale = four_maxima(a, b, c, d) / splat(f32x4, types.float32(MAX_ACTIVATION))
        inverse = where_positive(scale, one / scale, zero)
        store(scales + start // 8, scale)
        p, q = _store_32(at, _lane_0(inverse), to), _store_32(at + 128, _lane_1(inverse), to + 32)
        r, s = _store_32(at + 256, _lane_2(inverse), to + 64), _store_32(at + 384, _lane_3(inverse), to + 96)
        store(sums + start // 8, convert(f32x4, quarter_sums(quarters(p, q, r, s))) * scale)
        columns = join(load(u32x16, to), load(u32x16, to + 64))
        store(record + words_offset(n_cols) + start, _lower_words(columns))
        store(record + words_offset(n_cols) + start + 64, _upper_words(columns))
    for start in range(n_cols & ~127, n_cols, 32):
        scale = reduce_max(_largest_of_32(x + 4 * start)) / types.float32(MAX_ACTIVATION)
        store(scales + start // 8, scale)
        total = reduce_add(_store_32(x + 4 * start, splat(f32x16, inverse_of(scale)), record + start))
        store(sums + start // 8, types.float32(total) * scale)


@inline_kernel
def _largest_of_32(x):
    """The largest magnitudes of 32 floats in 16 lanes; what is not a number counts for none."""
    first = larger(absolute(load(f32x16, x)), splat(f32x16, types.float32(0.0)))
    return larger(absolute(load(f32x16, x + 64)), first)


@inline_kernel
def _store_32(x, inverse, record):
    """The codes of 32 columns, stored; and their sums in 16 lanes."""
    a, b = codes_of(x, inverse), codes_of(x + 64, inverse)
    store(record, join(convert(i8x16, a), convert(i8x16, b)))
    return a + b


@inline_kernel
def _quantize(x, record, n_cols, group):
    """x f32[n_cols] at an address -> its record at another."""
    if group == 32:
        _quantize_32(x, record, n_cols)
    else:
        _quantize_256(x, record, n_cols)
    _store_zeros(record + n_cols, padded_columns(n_cols) - n_cols)
    missing = _summed_columns(n_cols, group) - n_cols
    _store_zeros(record + scales_offset(n_cols) + n_cols // group * 4, missing // group * 4)
    _store_zeros(record + sums_offset(n_cols, group) + n_cols // 8, missing // 8)


@inline_kernel
def _store_rest(x, record, rest, n_cols, group):
    """What the codes of a record leave of x, f32[n_cols] to an address."""
    scales = record + scales_offset(n_cols)
    for start in range(0, n_cols, group):
        scale = splat(f32x16, load(types.float32, scales + start // group * 4))
        for i in range(start, start + group, 16):
            coded = convert(f32x16, convert(i32x16, load(i8x16, record + i))) * scale
            store(rest + 4 * i, load(f32x16, x + 4 * i) - coded)


@inline_kernel
def _store_zeros(address, n_bytes):
    """Clear memory, in steps of 4 bytes."""
    for i in range(0, n_bytes, 4):
        store(address + i, types.int32(0))


@inline_kernel
def quantize_row(x, record, rest_record, rest, n_cols, group):
    """x f32[n_cols] at an address -> its record at another, and a record of what rounding leaves if there is a place.

    rest: scratch f32[n_cols].
    """
    _quantize(x, record, n_cols, group)
    if rest_record:
        _store_rest(x, record, rest, n_cols, group)
        _quantize(rest, rest_record, n_cols, group)


@kernel
def quantize_units(fmt, plan):
    """Quantize rows as long as the plan has some.

    Plan: i64 counter, n_rows, x, records, record_bytes, n_cols, group, is_fine, bytes from row to row. If fine, the
    records of what is left of the rows lie behind those of all rows.
    """
    n_rows, x, records = load(types.int64, plan + 8), load(types.int64, plan + 16), load(types.int64, plan + 24)
    stride, n_cols, group = load(types.int64, plan + 32), load(types.int64, plan + 40), load(types.int64, plan + 48)
    is_fine, x_stride = load(types.int64, plan + 56), load(types.int64, plan + 64)
    memory = np.empty(n_cols if is_fine else 0, np.float32)
    while True:
        start = fetch_add(plan, QUANTIZE_ROWS)
        if start >= n_rows:
            return memory.size  # the memory must live until here
        for i in range(start, min(start + QUANTIZE_ROWS, n_rows)):
            rest_record = records + (n_rows + i) * stride if is_fine else types.int64(0)
            quantize_row(x + i * x_stride, records + i * stride, rest_record, address_of(memory), n_cols, group)


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
