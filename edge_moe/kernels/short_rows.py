"""Rows of few columns, as those to and from a latent have, for CPUs with long registers.

All that depends on the activations alone is loaded once for a run of rows. Of rows of four blocks of 32 four are
multiplied at a time, and a lane is one block of one row: what they have for the same four columns of each block is
brought together, since the sum of a register's lanes would cost as much as the products. Of rows of two superblocks two
are multiplied at a time, as four superblocks of a longer row are.
"""

from typing import Any

from numba import types
from numba.extending import overload_method

from edge_moe.kernels.activations import (
    nibble_sums_offset,
    nibbles_offset,
    scales_offset,
    sums_offset,
    twice_scales_offset,
)
from edge_moe.kernels.blocks import BlockFormat, FormatTag, SuperblockFormat, iq4_value, nibbles_of
from edge_moe.kernels.dots import add_dot, stored_sign
from edge_moe.kernels.fetches import fetch_pages, fetcher
from edge_moe.kernels.file_numbers import adder_of_bits, from_half
from edge_moe.kernels.folds import quarter_sums, quarters
from edge_moe.kernels.rows import ROWS_AT_ONCE, store_sums
from edge_moe.kernels.simd import (
    convert,
    f32x4,
    f32x16,
    fma,
    hidden,
    high_half,
    i8x64,
    i16x16,
    i32x16,
    join,
    load,
    low_half,
    picker,
    splat,
    u8x64,
    u16x64,
    u32x16,
    view,
)
from edge_moe.kernels.wide_rows import is_wide

RUN_BYTES = 24576  # of rows that stay in the first level of the cache for all of a unit's tokens

# ---- rows of four blocks of 32: a register's four parts of 128 bits are the blocks, the lanes of each part four rows


def _of_each_part(*lanes: int) -> Any:
    """Make an operation that picks lanes of each part of two registers; those of the second count from 16."""
    return picker([4 * part + lane for part in range(4) for lane in lanes])


# What is in the lower and in the upper half of each part: words of both in turn; two words of one, then of the other.
_lower_words, _upper_words = _of_each_part(0, 16, 1, 17), _of_each_part(2, 18, 3, 19)
_lower_pairs, _upper_pairs = _of_each_part(0, 1, 16, 17), _of_each_part(2, 3, 18, 19)
# Of 128 activations in the order of columns four of each block, in four lanes: those of one word of each block's codes.
_x_0, _x_1, _x_2, _x_3, _x_4, _x_5, _x_6, _x_7 = (picker([8 * (i // 4) + word for i in range(16)]) for word in range(8))
_for_all_rows = picker([i // 4 for i in range(16)])
# Of 32 bits in each lane one byte, four times; of such a byte the bits of one word's codes.
_octet_0, _octet_1, _octet_2, _octet_3 = (picker([i & ~3 | octet for i in range(64)]) for octet in range(4))
_add_lower_bits, _add_upper_bits = adder_of_bits(range(4)), adder_of_bits(range(4, 8))
# Of the lower words of heads, rows 0 and 1 in one register and 2 and 3 in another, the scales; the minimums.
_scales = picker([8 * p + half for p in range(4) for half in (4, 6, 36, 38)])
_minimums = picker([8 * p + half for p in range(4) for half in (5, 7, 37, 39)])


@overload_method(BlockFormat, "short_row")
def _short_row(fmt, row):
    size, nibbles, bits = fmt.block_bytes, fmt.nibbles, fmt.bits
    back = 4 * size - 64  # as in `codes_of_four`
    blocks = [0, size, 64 + 2 * size - back, 64 + 3 * size - back]
    nibbles_of_row = picker([block + nibbles + i for block in blocks for i in range(16)])
    head = (*range(bits, bits + 4), *range(4)) * 2
    heads_of_row = picker([block + i for block in blocks for i in head])

    def short_row(fmt, row):
        """Of each block its nibbles; and its fifth bits, where it has such, then its scale and minimum: u32x16."""
        both = join(load(u8x64, row), load(u8x64, row + back))
        return view(u32x16, nibbles_of_row(both)), view(u32x16, heads_of_row(both))

    return short_row


@overload_method(BlockFormat, "short_codes")
def _short_codes(fmt, nibbles, shift):
    is_table = fmt.signed

    def short_codes(fmt, nibbles, shift):
        """The codes in the lower or the upper nibbles, without their fifth bits."""
        codes = nibbles_of(view(u8x64, nibbles), shift)
        return stored_sign(iq4_value(codes)) if is_table else hidden(codes)

    return short_codes


@overload_method(BlockFormat, "multiply_run")
def _multiply_run_of_blocks(fmt, row, n_rows, x, ahead, out):
    n_cols, row_bytes = _columns(fmt), 4 * fmt.block_bytes
    fetch = fetcher(0, ROWS_AT_ONCE * row_bytes)
    bits, has_minimum, offset = fmt.bits, fmt.offset is None, fmt.offset or 0

    def multiply_run(fmt, row, n_rows, x, ahead, out):
        """n_rows rows of four blocks times one token's record -> f32[n_rows] at `out`."""
        columns = join(load(u32x16, x), load(u32x16, x + 64))
        x_0, x_1, x_2, x_3 = _x_0(columns), _x_1(columns), _x_2(columns), _x_3(columns)
        x_4, x_5, x_6, x_7 = _x_4(columns), _x_5(columns), _x_6(columns), _x_7(columns)
        x_0, x_1, x_2, x_3 = view(i8x64, x_0), view(i8x64, x_1), view(i8x64, x_2), view(i8x64, x_3)
        x_4, x_5, x_6, x_7 = view(i8x64, x_4), view(i8x64, x_5), view(i8x64, x_6), view(i8x64, x_7)
        x_scales = _for_all_rows(load(f32x4, x + scales_offset(n_cols)))
        x_sums = _for_all_rows(load(f32x4, x + sums_offset(n_cols, 32)))
        none, offsets = splat(i32x16, types.int32(0)), splat(u8x64, types.uint8(offset))
        start = none  # what all codes are too large by, taken off
        if offset:
            low = add_dot(add_dot(add_dot(add_dot(none, offsets, x_0), offsets, x_1), offsets, x_2), offsets, x_3)
            both = add_dot(add_dot(add_dot(add_dot(low, offsets, x_4), offsets, x_5), offsets, x_6), offsets, x_7)
            start = none - both
        last = row + (n_rows - 1) * row_bytes
        for r in range(0, n_rows, ROWS_AT_ONCE):
            fetch_pages(ahead, ROWS_AT_ONCE * row_bytes)
            fetch(ahead, row)
            nibbles_a, head_a = fmt.short_row(row)
            nibbles_b, head_b = fmt.short_row(min(row + row_bytes, last))
            nibbles_c, head_c = fmt.short_row(min(row + 2 * row_bytes, last))
            nibbles_d, head_d = fmt.short_row(min(row + 3 * row_bytes, last))
            ab, cd = join(nibbles_a, nibbles_b), join(nibbles_c, nibbles_d)
            lower, upper = join(_lower_words(ab), _lower_words(cd)), join(_upper_words(ab), _upper_words(cd))
            n_0, n_1, n_2, n_3 = _lower_pairs(lower), _upper_pairs(lower), _lower_pairs(upper), _upper_pairs(upper)
            heads = join(_lower_words(join(head_a, head_b)), _lower_words(join(head_c, head_d)))
            c_0, c_1, c_2 = fmt.short_codes(n_0, 0), fmt.short_codes(n_1, 0), fmt.short_codes(n_2, 0)
            c_3, c_4, c_5 = fmt.short_codes(n_3, 0), fmt.short_codes(n_0, 4), fmt.short_codes(n_1, 4)
            c_6, c_7 = fmt.short_codes(n_2, 4), fmt.short_codes(n_3, 4)
            if bits:
                words = hidden(view(u8x64, _lower_pairs(heads)))
                first, second = hidden(_octet_0(words)), hidden(_octet_1(words))
                c_0, c_1 = _add_lower_bits(c_0, first, 16), _add_upper_bits(c_1, first, 16)
                c_2, c_3 = _add_lower_bits(c_2, second, 16), _add_upper_bits(c_3, second, 16)
                third, fourth = hidden(_octet_2(words)), hidden(_octet_3(words))
                c_4, c_5 = _add_lower_bits(c_4, third, 16), _add_upper_bits(c_5, third, 16)
                c_6, c_7 = _add_lower_bits(c_6, fourth, 16), _add_upper_bits(c_7, fourth, 16)
            even = add_dot(add_dot(add_dot(add_dot(start, c_0, x_0), c_2, x_2), c_4, x_4), c_6, x_6)
            odd = add_dot(add_dot(add_dot(add_dot(none, c_1, x_1), c_3, x_3), c_5, x_5), c_7, x_7)
            halves = view(u16x64, heads)
            totals = convert(f32x16, even + odd) * (from_half(_scales(halves)) * x_scales)
            if has_minimum:
                totals = fma(from_half(_minimums(halves)), x_sums, totals)
            sums = low_half(totals) + high_half(totals)
            store_sums(out + 4 * r, low_half(sums) + high_half(sums), n_rows - r)
            row += ROWS_AT_ONCE * row_bytes
            ahead += ROWS_AT_ONCE * row_bytes

    return multiply_run


# ---- rows of two superblocks

_even_32, _odd_32 = picker(range(0, 32, 2)), picker(range(1, 32, 2))


@overload_method(SuperblockFormat, "multiply_run")
def _multiply_run_of_superblocks(fmt, row, n_rows, x, ahead, out):
    n_cols, row_bytes = _columns(fmt), 2 * fmt.block_bytes
    fetch = fetcher(0, ROWS_AT_ONCE * row_bytes)

    def multiply_run(fmt, row, n_rows, x, ahead, out):
        """n_rows rows of two superblocks times one token's record -> f32[n_rows] at `out`."""
        codes, two_scales = x + nibbles_offset(n_cols), load(f32x4, x + twice_scales_offset(n_cols))
        two_sums = load(i16x16, x + nibble_sums_offset(n_cols))
        x_scales, x_sums = join(two_scales, two_scales), hidden(join(two_sums, two_sums))
        last = row + (n_rows - 1) * row_bytes
        for r in range(0, n_rows, ROWS_AT_ONCE):
            fetch_pages(ahead, ROWS_AT_ONCE * row_bytes)
            fetch(ahead, row)
            b, c, d = min(row + row_bytes, last), min(row + 2 * row_bytes, last), min(row + 3 * row_bytes, last)
            total_a, total_b, low = fmt.wide_totals_of_two(row, b, codes, x_scales, x_sums)
            total_c, total_d, high = fmt.wide_totals_of_two(c, d, codes, x_scales, x_sums)
            minimums = join(low, high)
            totals = quarters(total_a, total_b, total_c, total_d) - (_even_32(minimums) + _odd_32(minimums))
            store_sums(out + 4 * r, quarter_sums(totals), n_rows - r)
            row += ROWS_AT_ONCE * row_bytes
            ahead += ROWS_AT_ONCE * row_bytes

    return multiply_run


# ---- both


def _columns(fmt: FormatTag) -> int:
    """How many columns short rows have: what latents and what comes out of them have, in the models there are."""
    return 128 if isinstance(fmt, BlockFormat) else 512


@overload_method(FormatTag, "multiply_short_rows")
def _multiply_short_rows(fmt, row, n_rows, n_cols, tokens, begin, end, out, stride, ahead):
    n_short = _columns(fmt)
    row_bytes = (4 if isinstance(fmt, BlockFormat) else 2) * fmt.block_bytes
    run = RUN_BYTES // row_bytes // ROWS_AT_ONCE * ROWS_AT_ONCE

    def multiply_short_rows(fmt, row, n_rows, n_cols, tokens, begin, end, out, stride, ahead):
        """n_rows rows times records begin:end at addresses i64[] -> f32[:, stride]; False if rows are not short.

        What is `ahead` bytes behind the rows is fetched meanwhile.
        """
        if n_cols != n_short:
            return False
        for r in range(0, n_rows, run):
            address = row + r * row_bytes
            for m in range(begin, end):
                x, n = load(types.int64, tokens + 8 * m), min(n_rows - r, run)
                fmt.multiply_run(address, n, x, address + ahead, out + 4 * (m * stride + r))
        return True

    def no_short_rows(fmt, row, n_rows, n_cols, tokens, begin, end, out, stride, ahead):
        return False

    return multiply_short_rows if is_wide(fmt) else no_short_rows
