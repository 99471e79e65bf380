"""A weight row times one token's activations four blocks or four superblocks at a time, for CPUs with long registers.

What the blocks have besides their codes, scales and minimums, is then taken out of all four at once.
"""

from numba import types

from edge_moe.kernels import wide_blocks  # noqa: F401 (its methods of the formats)
from edge_moe.kernels.activations import nibbles_offset, scales_offset, sums_offset
from edge_moe.kernels.blocks import BlockFormat, FormatTag, SuperblockFormat
from edge_moe.kernels.dots import add_dot, add_pair_dot, packed_sums, pair_dot
from edge_moe.kernels.file_numbers import from_half
from edge_moe.kernels.folds import quarter_sums, quarters
from edge_moe.kernels.jit import inlined_method
from edge_moe.kernels.simd import (
    convert,
    f32x4,
    f32x16,
    fma,
    hidden,
    i8x64,
    i16x32,
    i32x16,
    join,
    lanes_from,
    load,
    picker,
    prefetch_once,
    splat,
    u8x64,
)
from edge_moe.kernels.target import TARGET


def is_wide(fmt: FormatTag) -> bool:
    """Whether rows of a format are multiplied so: where it was measured to be faster."""
    if TARGET.dot != "avx512vnni":
        return False
    if isinstance(fmt, BlockFormat):
        return TARGET.has_vbmi and fmt.nibbles > 0
    return isinstance(fmt, SuperblockFormat) and fmt.group == 32 and fmt.has_dmin


# ---- superblocks of eight groups of 32

# Of four superblocks' d and dmin one d in all lanes; all dmins. Stored and loaded instead, one in all lanes would be a
# little cheaper: but the CPU may then take loads of weights for loads of what is stored, depending on where the code
# happens to lie, and let them wait for it, which made rows up to 8 % slower from memory.
_d_0, _d_1, _d_2, _d_3 = (picker([2 * k] * 16) for k in range(4))
_four_dmins = picker([2 * (i // 4) + 1 for i in range(16)])
# Of four superblocks with 8 scales and 8 minimums each the minimums; of 64 sums each those of 16 columns.
_minimums = picker([16 * k + 8 + i for k in range(4) for i in range(8)])
_even, _odd = picker(range(0, 64, 2)), picker(range(1, 64, 2))
# Of two superblocks' scales those of the packed sums of two chunks: four sums of the one, then four of the other, for
# each 16 columns; the chunks are in the order of nibbles, groups 0 and 2, then 1 and 3.
_a_01, _a_23, _b_01, _b_23 = (
    picker([16 * s + 4 * p + i % 8 // 4 + i // 16 * 2 for i in range(32)]) for s in range(2) for p in range(2)
)


@inlined_method(SuperblockFormat, "wide_sums_of_one")
def _wide_sums_of_one(fmt, block, x, scales_01, scales_23):
    def wide_sums_of_one(fmt, block, x, scales_01, scales_23):
        """A superblock times 256 columns, its chunks' scales i16x32 for two each: f32x16, without its minimums."""
        none = splat(i32x16, types.int32(0))
        sums_0 = add_dot(none, fmt.nibble_codes(block, 0), load(i8x64, x))
        sums_1 = add_dot(none, fmt.nibble_codes(block, 1), load(i8x64, x + 64))
        sums_2 = add_dot(none, fmt.nibble_codes(block, 2), load(i8x64, x + 128))
        sums_3 = add_dot(none, fmt.nibble_codes(block, 3), load(i8x64, x + 192))
        total = add_pair_dot(none, packed_sums(sums_0, sums_1), scales_01)
        return convert(f32x16, add_pair_dot(total, packed_sums(sums_2, sums_3), scales_23))

    return wide_sums_of_one


@inlined_method(SuperblockFormat, "wide_row_total")
def _superblock_wide_row_total(fmt, row, x, n_cols, ahead):
    size = fmt.block_bytes

    def wide_row_total(fmt, row, x, n_cols, ahead):
        """For four superblocks or more; at a row's end, those that were there already once more, times zero."""
        scales, sums, codes = x + scales_offset(n_cols), x + sums_offset(n_cols, 256), x + nibbles_offset(n_cols)
        even = odd = minimums = splat(f32x16, types.float32(0.0))
        n_blocks = n_cols // 256
        for step in range(0, n_blocks, 4):
            i = min(step, n_blocks - 4)
            block, x_i = row + i * size, codes + 256 * i
            for line in range(0, 4 * size, 64):
                prefetch_once(ahead + step * size + line)
            ab, cd = fmt.scales_of_four(block)
            factors = hidden(fmt.factors_of_four(block, lanes_from(step - i, load(f32x4, scales + 4 * i))))
            total = fmt.wide_sums_of_one(block, x_i, _a_01(ab), _a_23(ab))
            even = fma(total, _d_0(factors), even)
            total = fmt.wide_sums_of_one(block + size, x_i + 256, _b_01(ab), _b_23(ab))
            odd = fma(total, _d_1(factors), odd)
            total = fmt.wide_sums_of_one(block + 2 * size, x_i + 512, _a_01(cd), _a_23(cd))
            even = fma(total, _d_2(factors), even)
            total = fmt.wide_sums_of_one(block + 3 * size, x_i + 768, _b_01(cd), _b_23(cd))
            odd = fma(total, _d_3(factors), odd)
            both = join(load(i16x32, sums + 32 * i), load(i16x32, sums + 32 * i + 64))
            weighted = pair_dot(_minimums(join(ab, cd)), _even(both) + _odd(both))
            minimums = fma(convert(f32x16, weighted), _four_dmins(factors), minimums)
        return (even + odd) - minimums

    return wide_row_total


@inlined_method(SuperblockFormat, "wide_totals_of_two")
def _wide_totals_of_two(fmt, a, b, x, x_scales, x_sums):
    size = fmt.block_bytes

    def wide_totals_of_two(fmt, a, b, x, x_scales, x_sums):
        """Of two rows of two superblocks f32x16 each, without their minimums; and those f32x16, 8 lanes for each row.

        x: codes in the order of nibbles; x_scales: f32x4, the two once more; x_sums: i16x32 of each 32 columns, too.
        """
        ab, cd = fmt.scales_of_two_pairs(a, b)
        factors = hidden(fmt.factors_of_two_pairs(a, b, x_scales))
        first = fmt.wide_sums_of_one(a, x, _a_01(ab), _a_23(ab)) * _d_0(factors)
        second = fmt.wide_sums_of_one(a + size, x + 256, _b_01(ab), _b_23(ab))
        total_a = fma(second, _d_1(factors), first)
        first = fmt.wide_sums_of_one(b, x, _a_01(cd), _a_23(cd)) * _d_2(factors)
        second = fmt.wide_sums_of_one(b + size, x + 256, _b_01(cd), _b_23(cd))
        total_b = fma(second, _d_3(factors), first)
        weighted = pair_dot(_minimums(join(ab, cd)), x_sums)
        return total_a, total_b, convert(f32x16, weighted) * _four_dmins(factors)

    return wide_totals_of_two


# ---- blocks of 32

_first_two, _last_two = picker([i // 8 for i in range(16)]), picker([2 + i // 8 for i in range(16)])


@inlined_method(BlockFormat, "add_four_blocks")
def _add_four_blocks(fmt, total, minimums, block, x_01, x_23, scales, sums, start_01, start_23):
    has_minimum = fmt.offset is None

    def add_four_blocks(fmt, total, minimums, block, x_01, x_23, scales, sums, start_01, start_23):
        """(f32x16, f32x4) plus a row's four blocks times 128 columns, whose scales and sums are f32x4.

        start_01, start_23: i32x16 that the products are added to.
        """
        first, second, own, lowest = fmt.codes_of_four(block)
        factors = from_half(own) * scales
        total = fma(convert(f32x16, add_dot(start_01, first, x_01)), _first_two(factors), total)
        total = fma(convert(f32x16, add_dot(start_23, second, x_23)), _last_two(factors), total)
        if has_minimum:
            minimums = fma(from_half(lowest), sums, minimums)
        return total, minimums

    return add_four_blocks


@inlined_method(BlockFormat, "wide_sums")
def _block_wide_sums(fmt, row, row_bytes, n_rows, x, n_cols, ahead):
    size, has_minimum, offset = fmt.block_bytes, fmt.offset is None, fmt.offset or 0

    def wide_sums(fmt, row, row_bytes, n_rows, x, n_cols, ahead):
        """Up to four rows of a number of blocks that is a multiple of four: f32x4."""
        scales, sums = x + scales_offset(n_cols), x + sums_offset(n_cols, 32)
        last = row + (n_rows - 1) * row_bytes
        a, b, c, d = row, min(row + row_bytes, last), min(row + 2 * row_bytes, last), min(row + 3 * row_bytes, last)
        total_a = total_b = total_c = total_d = splat(f32x16, types.float32(0.0))
        low_a = low_b = low_c = low_d = splat(f32x4, types.float32(0.0))
        none, offsets = splat(i32x16, types.int32(0)), splat(u8x64, types.uint8(offset))
        for i in range(0, n_cols // 32, 4):
            at = i * size
            for line in range(0, 16 * size, 64):
                prefetch_once(ahead + 4 * at + line)
            x_01, x_23 = load(i8x64, x + 32 * i), load(i8x64, x + 32 * i + 64)
            s, m = load(f32x4, scales + 4 * i), load(f32x4, sums + 4 * i)
            y_01 = y_23 = none  # what all codes are too large by, taken off the whole sums of all four rows
            if offset:
                y_01, y_23 = none - add_dot(none, offsets, x_01), none - add_dot(none, offsets, x_23)
            total_a, low_a = fmt.add_four_blocks(total_a, low_a, a + at, x_01, x_23, s, m, y_01, y_23)
            total_b, low_b = fmt.add_four_blocks(total_b, low_b, b + at, x_01, x_23, s, m, y_01, y_23)
            total_c, low_c = fmt.add_four_blocks(total_c, low_c, c + at, x_01, x_23, s, m, y_01, y_23)
            total_d, low_d = fmt.add_four_blocks(total_d, low_d, d + at, x_01, x_23, s, m, y_01, y_23)
        totals = quarters(total_a, total_b, total_c, total_d)
        if has_minimum:
            totals = totals + join(join(low_a, low_b), join(low_c, low_d))
        return quarter_sums(totals)

    return wide_sums
