"""Four weight rows at a time times one token's activations: what depends on the token alone is made once for four.

For CPUs whose registers hold all that four rows need at a time; others go row by row.
"""

from numba import types
from numba.extending import overload_method

from edge_moe.kernels.activations import scales_offset, sums_offset
from edge_moe.kernels.blocks import BlockFormat, FloatFormat, FormatTag, SuperblockFormat
from edge_moe.kernels.dots import add_dot, add_scaled_pairs, packed_sums, pair_dot
from edge_moe.kernels.jit import inline_kernel, inlined_method
from edge_moe.kernels.simd import (
    convert,
    f32x4,
    f32x16,
    first_lane,
    fma,
    from_half,
    high_half,
    i8x32,
    i8x64,
    i16x8,
    i16x16,
    i16x32,
    i32x16,
    join,
    load,
    low_half,
    picker,
    prefetch,
    splat,
    store,
    u8x64,
)
from edge_moe.kernels.target import TARGET

ROWS = 4
_next_of_4 = picker([1, 2, 3, 0])
_even_32, _odd_32 = picker(range(0, 32, 2)), picker(range(1, 32, 2))
_even_16, _odd_16 = picker(range(0, 16, 2)), picker(range(1, 16, 2))
_even_8, _odd_8 = picker(range(0, 8, 2)), picker(range(1, 8, 2))
_factor_0, _factor_1, _factor_2, _factor_3 = (picker([2 * r] * 16) for r in range(4))
_minimum_factors = picker([2 * (i // 4) + 1 for i in range(16)])
_pairs_even, _pairs_odd = picker(range(0, 16, 2)), picker(range(1, 16, 2))
_four_times = picker([i % 8 for i in range(32)])


def has_quads(fmt: FormatTag) -> bool:
    """Whether four rows at a time are worth it."""
    if isinstance(fmt, SuperblockFormat):
        return TARGET.dot == "avx512vnni" and fmt.order is not None
    return TARGET.has_vbmi and TARGET.dot == "avx512vnni" and isinstance(fmt, BlockFormat) and fmt.nibbles > 0


def _rows_at_once(fmt):
    n = ROWS if has_quads(fmt) else 1
    return lambda fmt: n


def _rows_dot(fmt, row, row_bytes, n_rows, x, n_cols, out, ahead):
    if not has_quads(fmt):

        def one(fmt, row, row_bytes, n_rows, x, n_cols, out, ahead):
            store(out, fmt.row_dot(row, x, n_cols, ahead))

        return one

    whole = 128 if isinstance(fmt, BlockFormat) else 1

    def four(fmt, row, row_bytes, n_rows, x, n_cols, out, ahead):
        if n_cols % whole:
            for i in range(min(n_rows, ROWS)):
                store(out + 4 * i, fmt.row_dot(row + i * row_bytes, x, n_cols, ahead + i * row_bytes))
            return
        last = row + (n_rows - 1) * row_bytes
        b, c, d = min(row + row_bytes, last), min(row + 2 * row_bytes, last), min(row + 3 * row_bytes, last)
        sums = fmt.four_rows_dot(row, b, c, d, x, n_cols, ahead)
        if n_rows >= ROWS:
            store(out, sums)
        else:
            for i in range(n_rows):
                store(out + 4 * i, first_lane(sums))
                sums = _next_of_4(sums)

    return four


for _family in (FloatFormat, BlockFormat, SuperblockFormat):
    overload_method(_family, "rows_at_once", jit_options={"forceinline": True})(_rows_at_once)
    overload_method(_family, "rows_dot", jit_options={"forceinline": True})(_rows_dot)


@inline_kernel
def _row(fmt, block, x_0, x_1, x_2, x_3, scales_0, scales_1):
    """A superblock times 256 columns, f32x16."""
    none = splat(i32x16, types.int32(0))
    a, b = fmt.code_pair(block, 0)
    c, d = fmt.code_pair(block, 1)
    first = packed_sums(add_dot(none, a, x_0), add_dot(none, b, x_1))
    second = packed_sums(add_dot(none, c, x_2), add_dot(none, d, x_3))
    return convert(f32x16, add_scaled_pairs(add_scaled_pairs(none, first, scales_0), second, scales_1))


@inline_kernel
def _halves(a, b):
    return join(load(i8x32, a), load(i8x32, b))


@inlined_method(SuperblockFormat, "four_rows_dot")
def _superblock_four_rows_dot(fmt, a, b, c, d, x, n_cols, ahead):
    size = fmt.block_bytes
    (h0, h1), (h2, h3), (h4, h5), (h6, h7) = fmt.order
    scales_of = [picker([16 * (r % 2) + fmt.scale_order[k][i] for i in range(32)]) for r in range(2) for k in range(2)]
    s00, s01, s10, s11 = scales_of

    def four_rows_dot(fmt, a, b, c, d, x, n_cols, ahead):
        scales, sums = x + scales_offset(n_cols), x + sums_offset(n_cols, 256)
        total_a = total_b = total_c = total_d = minimums = splat(f32x16, types.float32(0.0))
        for i in range(n_cols // 256):
            at = i * size
            for line in range(0, 4 * size, 64):
                prefetch(ahead + 4 * at + line)
            columns = x + 256 * i
            x_0, x_1 = _halves(columns + h0, columns + h1), _halves(columns + h2, columns + h3)
            x_2, x_3 = _halves(columns + h4, columns + h5), _halves(columns + h6, columns + h7)
            scales_ab, scales_cd, m, halves = fmt.scales_of_four(a + at, b + at, c + at, d + at)
            factors = halves * load(types.float32, scales + 4 * i)
            total_a = fma(_row(fmt, a + at, x_0, x_1, x_2, x_3, s00(scales_ab), s01(scales_ab)), _factor_0(factors), total_a)
            total_b = fma(_row(fmt, b + at, x_0, x_1, x_2, x_3, s10(scales_ab), s11(scales_ab)), _factor_1(factors), total_b)
            total_c = fma(_row(fmt, c + at, x_0, x_1, x_2, x_3, s00(scales_cd), s01(scales_cd)), _factor_2(factors), total_c)
            total_d = fma(_row(fmt, d + at, x_0, x_1, x_2, x_3, s10(scales_cd), s11(scales_cd)), _factor_3(factors), total_d)
            s = load(i16x16, sums + 32 * i)
            weighted = convert(f32x16, pair_dot(m, _four_times(_pairs_even(s) + _pairs_odd(s))))
            minimums = fma(weighted, _minimum_factors(factors), minimums)
        ab = join(low_half(total_a), low_half(total_b)) + join(high_half(total_a), high_half(total_b))
        cd = join(low_half(total_c), low_half(total_d)) + join(high_half(total_c), high_half(total_d))
        abcd = join(ab, cd)
        quads = _even_32(abcd) + _odd_32(abcd) - minimums
        pairs = _even_16(quads) + _odd_16(quads)
        return _even_8(pairs) + _odd_8(pairs)

    return four_rows_dot


_first_two, _last_two = picker([i // 8 for i in range(16)]), picker([2 + i // 8 for i in range(16)])


@inlined_method(BlockFormat, "four_rows_dot")
def _block_four_rows_dot(fmt, a, b, c, d, x, n_cols, ahead):
    size, offset = fmt.block_bytes, fmt.offset

    @inline_kernel
    def add(fmt, total, minimums, block, x_01, x_23, scales, sums):
        none = splat(i32x16, types.int32(0))
        first, second, own, lowest = fmt.codes_of_four(block)
        own = from_half(own)
        factors = own * scales
        total = fma(convert(f32x16, add_dot(none, first, x_01)), _first_two(factors), total)
        total = fma(convert(f32x16, add_dot(none, second, x_23)), _last_two(factors), total)
        if offset is None:
            minimums = fma(from_half(lowest), sums, minimums)
        elif offset:
            minimums = fma(own, sums, minimums)
        return total, minimums

    def four_rows_dot(fmt, a, b, c, d, x, n_cols, ahead):
        """Four blocks of each row at a time."""
        scales, sums = x + scales_offset(n_cols), x + sums_offset(n_cols, 32)
        total_a = total_b = total_c = total_d = splat(f32x16, types.float32(0.0))
        low_a = low_b = low_c = low_d = splat(f32x4, types.float32(0.0))
        for i in range(0, n_cols // 32, 4):
            at = i * size
            for line in range(0, 16 * size, 64):
                prefetch(ahead + 4 * at + line)
            x_01, x_23 = load(i8x64, x + 32 * i), load(i8x64, x + 32 * i + 64)
            own, own_sums = load(f32x4, scales + 4 * i), load(f32x4, sums + 4 * i)
            total_a, low_a = add(fmt, total_a, low_a, a + at, x_01, x_23, own, own_sums)
            total_b, low_b = add(fmt, total_b, low_b, b + at, x_01, x_23, own, own_sums)
            total_c, low_c = add(fmt, total_c, low_c, c + at, x_01, x_23, own, own_sums)
            total_d, low_d = add(fmt, total_d, low_d, d + at, x_01, x_23, own, own_sums)
        ab = join(low_half(total_a), low_half(total_b)) + join(high_half(total_a), high_half(total_b))
        cd = join(low_half(total_c), low_half(total_d)) + join(high_half(total_c), high_half(total_d))
        abcd = join(ab, cd)
        quads = _even_32(abcd) + _odd_32(abcd)
        minimums = join(join(low_a, low_b), join(low_c, low_d))
        if offset is None:
            quads = quads + minimums
        elif offset:
            quads = quads - minimums * types.float32(offset)
        pairs = _even_16(quads) + _odd_16(quads)
        return _even_8(pairs) + _odd_8(pairs)

    return four_rows_dot
