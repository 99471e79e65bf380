"""A weight row times one token's activations four blocks or four superblocks at a time, for CPUs with long registers.

What the blocks have besides their codes, scales and minimums, is then taken out of all four at once.
"""

from numba import types

from edge_moe.kernels import wide_blocks  # noqa: F401 (its methods of the formats)
from edge_moe.kernels.activations import (
    last_scales_offset,
    nibbles_offset,
    scales_offset,
    sums_of_32_offset,
    sums_offset,
    twice_scales_offset,
    words_offset,
)
from edge_moe.kernels.blocks import BlockFormat, FormatTag, SuperblockFormat
from edge_moe.kernels.dots import add_dot, packed_sums, pair_dot
from edge_moe.kernels.fetches import fetchers
from edge_moe.kernels.file_numbers import from_half
from edge_moe.kernels.folds import quarter_sums
from edge_moe.kernels.jit import inline_kernel, inlined_method
from edge_moe.kernels.picks import picker, widener
from edge_moe.kernels.simd import (
    convert,
    f32x4,
    f32x8,
    f32x16,
    fma,
    hidden,
    i8x16,
    i8x64,
    i16x32,
    i32x16,
    in_turn,
    join,
    load,
    splat,
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
# Of four superblocks with 8 scales and 8 minimums each the minimums; one's scales for its packed sums: for each 32
# columns of nibbles those of groups 0, 4, 1 and 5, then 2, 6, 3 and 7, each twice.
_minimums = widener([16 * k + 8 + i for k in range(4) for i in range(8)])
_of_sums = [first + group for first in (0, 0, 2, 2) for group in (0, 0, 4, 4, 1, 1, 5, 5)]
_a, _b, _c, _d = (widener([16 * s + group for group in _of_sums]) for s in range(4))


def _of_superblock(which: int) -> None:
    """Add the method for a superblock at that place of those one behind the other.

    Each asks for the lines that begin in it: 9 in four of Q4_K, where four times the same would ask for 12.
    """

    @inlined_method(SuperblockFormat, f"wide_sums_{which}")
    def _wide_sums(fmt, first, x, scales, ahead):
        size = fmt.block_bytes
        fetch_0, fetch_1, fetch_2, fetch_3 = fetchers(4 * size, 16)[4 * which : 4 * which + 4]

        def wide_sums(fmt, first, x, scales, ahead):
            """A superblock times 256 columns, with scales i16x32 of its sums: f32x16, without its minimums.

            `first`: the address of the first superblock; from `ahead` on as much is fetched.
            """
            none = splat(i32x16, types.int32(0))
            fetch_0(ahead, first)
            c_0, c_1, c_2, c_3 = fmt.nibble_codes(first + which * size)
            low = in_turn(add_dot(none, c_0, load(i8x64, x)))
            fetch_1(ahead, first)
            low = in_turn(add_dot(low, c_1, load(i8x64, x + 64)))
            fetch_2(ahead, first)
            high = in_turn(add_dot(none, c_2, load(i8x64, x + 128)))
            fetch_3(ahead, first)
            high = add_dot(high, c_3, load(i8x64, x + 192))
            return convert(f32x16, pair_dot(packed_sums(low, high), scales))

        return wide_sums


for _which in range(4):
    _of_superblock(_which)


@inlined_method(SuperblockFormat, "add_four")
def _add_four(fmt, block, x, x_scales, sums, ahead, even, odd, minimums):
    def add_four(fmt, block, x, x_scales, sums, ahead, even, odd, minimums):
        """Partial sums f32x16 plus four superblocks times what a record has of as many; even and odd ones, minimums."""
        scales = fmt.scales_of_four(block)
        factors = hidden(fmt.factors_of_four(block, load(f32x8, x_scales)))
        total = fmt.wide_sums_0(block, x, _a(scales), ahead)
        even = hidden(fma(total, _d_0(factors), even))
        total = fmt.wide_sums_1(block, x + 256, _b(scales), ahead)
        odd = hidden(fma(total, _d_1(factors), odd))
        total = fmt.wide_sums_2(block, x + 512, _c(scales), ahead)
        even = hidden(fma(total, _d_2(factors), even))
        total = fmt.wide_sums_3(block, x + 768, _d(scales), ahead)
        odd = fma(total, _d_3(factors), odd)
        weighted = pair_dot(_minimums(scales), load(i16x32, sums))
        return even, odd, fma(convert(f32x16, weighted), _four_dmins(factors), minimums)

    return add_four


@inlined_method(SuperblockFormat, "wide_row_total")
def _superblock_wide_row_total(fmt, row, x, n_cols, ahead):
    size = fmt.block_bytes

    def wide_row_total(fmt, row, x, n_cols, ahead):
        """For four superblocks or more; at a row's end, those that were there already once more, times zero."""
        codes, sums = x + nibbles_offset(n_cols), x + sums_of_32_offset(n_cols)
        x_scales, last_scales = x + twice_scales_offset(n_cols), x + last_scales_offset(n_cols)
        even = odd = minimums = splat(f32x16, types.float32(0.0))
        n_blocks = n_cols // 256
        for i in range(0, n_blocks & ~3, 4):
            block, own, c, s, later = row + i * size, x_scales + 8 * i, codes + 256 * i, sums + 16 * i, ahead + i * size
            even, odd, minimums = fmt.add_four(block, c, own, s, later, even, odd, minimums)
        if n_blocks & 3:
            i = n_blocks - 4
            block, c, s, later = row + i * size, codes + 256 * i, sums + 16 * i, ahead + i * size
            even, odd, minimums = fmt.add_four(block, c, last_scales, s, later, even, odd, minimums)
        return (even + odd) - minimums

    return wide_row_total


@inlined_method(SuperblockFormat, "wide_totals_of_two")
def _wide_totals_of_two(fmt, a, b, x, x_scales, x_sums, ahead):
    size = fmt.block_bytes

    def wide_totals_of_two(fmt, a, b, x, x_scales, x_sums, ahead):
        """Of two rows of two superblocks f32x16 each, without their minimums; and those f32x16, 8 lanes for each row.

        x: codes in the order of nibbles; x_scales: f32x8, x_sums: i16x32, what a record has of two blocks, each twice.
        """
        scales = fmt.scales_of_two_pairs(a, b)
        factors = hidden(fmt.factors_of_two_pairs(a, b, x_scales))
        first = fmt.wide_sums_0(a, x, _a(scales), ahead) * _d_0(factors)
        second = fmt.wide_sums_1(a, x + 256, _b(scales), ahead)
        total_a = fma(second, _d_1(factors), first)
        first = fmt.wide_sums_0(b, x, _c(scales), ahead + 2 * size) * _d_2(factors)
        second = fmt.wide_sums_1(b, x + 256, _d(scales), ahead + 2 * size)
        total_b = fma(second, _d_3(factors), first)
        weighted = pair_dot(_minimums(scales), x_sums)
        return total_a, total_b, convert(f32x16, weighted) * _four_dmins(factors)

    return wide_totals_of_two


# ---- blocks of 32


@inline_kernel
def _in_all_parts(kind, address):
    """16 bytes at an address, in each part of 128 bits."""
    part = load(kind, address)
    half = join(part, part)
    return join(half, half)


@inlined_method(BlockFormat, "add_words")
def _add_words(fmt, a, b, c, d, words, x_scales, x_sums, totals, minimums, ahead, here):
    has_minimum = fmt.offset is None
    fetch_0, fetch_1, fetch_2, fetch_3, fetch_4, fetch_5, fetch_6, fetch_7 = fetchers(16 * fmt.block_bytes, 8)

    def add_words(fmt, a, b, c, d, words, x_scales, x_sums, totals, minimums, ahead, here):
        """Partial sums f32x16 plus four blocks of four rows times what a record has of 128 columns; a lane is a block.

        Minimums, or factors of what all codes are too large by, times the columns' sums are apart. As many blocks are
        fetched from `ahead` on.
        """
        (c_0, c_1, c_2, c_3, c_4, c_5, c_6, c_7), own, lowest = fmt.words_of_rows(a, b, c, d)
        none = splat(i32x16, types.int32(0))
        fetch_0(ahead, here)
        even = in_turn(add_dot(none, c_0, _in_all_parts(i8x16, words)))
        fetch_1(ahead, here)
        odd = in_turn(add_dot(none, c_1, _in_all_parts(i8x16, words + 16)))
        fetch_2(ahead, here)
        even = in_turn(add_dot(even, c_2, _in_all_parts(i8x16, words + 32)))
        fetch_3(ahead, here)
        odd = in_turn(add_dot(odd, c_3, _in_all_parts(i8x16, words + 48)))
        fetch_4(ahead, here)
        even = in_turn(add_dot(even, c_4, _in_all_parts(i8x16, words + 64)))
        fetch_5(ahead, here)
        odd = in_turn(add_dot(odd, c_5, _in_all_parts(i8x16, words + 80)))
        fetch_6(ahead, here)
        even = in_turn(add_dot(even, c_6, _in_all_parts(i8x16, words + 96)))
        fetch_7(ahead, here)
        odd = add_dot(odd, c_7, _in_all_parts(i8x16, words + 112))
        factors = from_half(own)
        totals = fma(convert(f32x16, even + odd), factors * _in_all_parts(f32x4, x_scales), totals)
        of_sums = from_half(lowest) if has_minimum else factors
        return totals, fma(of_sums, _in_all_parts(f32x4, x_sums), minimums)

    return add_words


@inlined_method(BlockFormat, "rows_of_words")
def _rows_of_words(fmt, totals, minimums):
    too_large_by = types.float32(1.0 if fmt.offset is None else -fmt.offset)

    def rows_of_words(fmt, totals, minimums):
        """The sums of four rows: f32x4."""
        return quarter_sums(fma(minimums, splat(f32x16, too_large_by), totals))

    return rows_of_words


@inlined_method(BlockFormat, "wide_sums")
def _block_wide_sums(fmt, row, row_bytes, n_rows, x, n_cols, ahead):
    size = fmt.block_bytes

    def wide_sums(fmt, row, row_bytes, n_rows, x, n_cols, ahead):
        """Up to four rows of a number of blocks that is a multiple of four: f32x4."""
        words, scales, sums = x + words_offset(n_cols), x + scales_offset(n_cols), x + sums_offset(n_cols, 32)
        last = row + (n_rows - 1) * row_bytes
        b, c, d = min(row + row_bytes, last), min(row + 2 * row_bytes, last), min(row + 3 * row_bytes, last)
        totals = minimums = splat(f32x16, types.float32(0.0))
        for i in range(0, n_cols // 32, 4):
            at = i * size
            totals, minimums = fmt.add_words(
                row + at,
                b + at,
                c + at,
                d + at,
                words + 32 * i,
                scales + 4 * i,
                sums + 4 * i,
                totals,
                minimums,
                ahead + 1024 + 4 * at,  # farther, as what is read lies in four places
                c + 4 * at,
            )
        return fmt.rows_of_words(totals, minimums)

    return wide_sums
