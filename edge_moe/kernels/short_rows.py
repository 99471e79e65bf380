"""Rows of four blocks or two superblocks, as those to and from a latent have, for CPUs with long registers.

All that depends on the activations alone is found once for a run of rows. Of rows of two superblocks two are multiplied
at a time, as four superblocks of a longer row are.
"""

from numba import types

from edge_moe.kernels.activations import (
    nibbles_offset,
    scales_offset,
    sums_of_32_offset,
    sums_offset,
    twice_scales_offset,
    words_offset,
)
from edge_moe.kernels.blocks import BlockFormat, FormatTag, SuperblockFormat
from edge_moe.kernels.folds import quarter_sums, quarters
from edge_moe.kernels.jit import kernel_method
from edge_moe.kernels.picks import picker
from edge_moe.kernels.rows import ROWS_AT_ONCE, store_sums
from edge_moe.kernels.simd import f32x4, f32x16, hidden, i16x16, join, load, splat
from edge_moe.kernels.wide_rows import is_wide

RUN_BYTES = 24576  # of rows that stay in the first level of the cache for all of a unit's tokens

_even_32, _odd_32 = picker(range(0, 32, 2)), picker(range(1, 32, 2))


def _columns(fmt: FormatTag) -> int:
    """How many columns short rows have: what latents and what comes out of them have, in the models there are."""
    return 128 if isinstance(fmt, BlockFormat) else 512


@kernel_method(BlockFormat, "multiply_run")
def _multiply_run_of_blocks(fmt, row, n_rows, x, ahead, out):
    n_cols, row_bytes = _columns(fmt), 4 * fmt.block_bytes

    def multiply_run(fmt, row, n_rows, x, ahead, out):
        """n_rows rows of four blocks times one token's record -> f32[n_rows] at `out`."""
        words, scales, sums = x + words_offset(n_cols), x + scales_offset(n_cols), x + sums_offset(n_cols, 32)
        none, last = splat(f32x16, types.float32(0.0)), row + (n_rows - 1) * row_bytes
        for r in range(0, n_rows, ROWS_AT_ONCE):
            b, c, d = min(row + row_bytes, last), min(row + 2 * row_bytes, last), min(row + 3 * row_bytes, last)
            totals, minimums = fmt.add_words(row, b, c, d, words, scales, sums, none, none, ahead, row)
            store_sums(out + 4 * r, fmt.rows_of_words(totals, minimums), n_rows - r)
            row += ROWS_AT_ONCE * row_bytes
            ahead += ROWS_AT_ONCE * row_bytes

    return multiply_run


@kernel_method(SuperblockFormat, "multiply_run")
def _multiply_run_of_superblocks(fmt, row, n_rows, x, ahead, out):
    n_cols, row_bytes = _columns(fmt), 2 * fmt.block_bytes

    def multiply_run(fmt, row, n_rows, x, ahead, out):
        """n_rows rows of two superblocks times one token's record -> f32[n_rows] at `out`."""
        codes, two_scales = x + nibbles_offset(n_cols), load(f32x4, x + twice_scales_offset(n_cols))
        two_sums = load(i16x16, x + sums_of_32_offset(n_cols))
        x_scales, x_sums = join(two_scales, two_scales), hidden(join(two_sums, two_sums))
        last = row + (n_rows - 1) * row_bytes
        for r in range(0, n_rows, ROWS_AT_ONCE):
            b, c, d = min(row + row_bytes, last), min(row + 2 * row_bytes, last), min(row + 3 * row_bytes, last)
            total_a, total_b, low = fmt.wide_totals_of_two(row, b, codes, x_scales, x_sums, ahead)
            total_c, total_d, high = fmt.wide_totals_of_two(c, d, codes, x_scales, x_sums, ahead + 2 * row_bytes)
            minimums = join(low, high)
            totals = quarters(total_a, total_b, total_c, total_d) - (_even_32(minimums) + _odd_32(minimums))
            store_sums(out + 4 * r, quarter_sums(totals), n_rows - r)
            row += ROWS_AT_ONCE * row_bytes
            ahead += ROWS_AT_ONCE * row_bytes

    return multiply_run


@kernel_method(FormatTag, "multiply_short_rows")
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
