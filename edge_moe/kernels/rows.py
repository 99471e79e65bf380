"""Weight rows straight from the file's blocks: their products with one token's activations, or their decoded numbers.

A row's product is first a register of partial sums (`row_total`); four rows' registers are added up together. While
a row is read, what lies at another address is fetched: what comes next, as far ahead as the caller likes. No line may
be left out: one in seventeen that was made rows of Q8_0 wait for the memory a third of their time.
"""

from numba import types

from edge_moe.kernels.activations import nibbles_offset, record_bytes, scales_offset, sums_offset, words_offset
from edge_moe.kernels.blocks import BlockFormat, FloatFormat, FormatTag, SuperblockFormat
from edge_moe.kernels.dots import MAX_ACTIVATION, SIGN_BIAS, add_dot, add_scaled_dot, dot, packed_sums, pair_dot
from edge_moe.kernels.fetches import fetcher, fetchers, prefetch
from edge_moe.kernels.file_numbers import from_half, load_halves
from edge_moe.kernels.folds import quarter_sums, quarters
from edge_moe.kernels.jit import inline_kernel, inlined_method, kernel_method
from edge_moe.kernels.picks import picker, whole_picker
from edge_moe.kernels.simd import (
    convert,
    f32x2,
    f32x4,
    f32x16,
    first_lane,
    fma,
    high_half,
    i8x16,
    i8x32,
    i8x64,
    i16x32,
    i32x16,
    in_turn,
    join,
    load,
    low_half,
    splat,
    store,
    u8x16,
    u8x32,
    u16x4,
    view,
)
from edge_moe.kernels.target import TARGET
from edge_moe.kernels.wide_rows import is_wide

_first_two, _last_two = picker([i // 8 for i in range(16)]), picker([2 + i // 8 for i in range(16)])
_each_twice, _first_to_all, _third_to_all = picker([0, 0, 1, 1]), picker([0] * 16), picker([2] * 16)
_second_and_fourth = picker([1 + i // 8 * 2 for i in range(16)])
_in_first_quarter, _first_lane_only = picker([0, 1, 2, 3] + [4] * 12), picker([0] + [4] * 15)

# Registers turned, so that what comes next is always in the first lanes.
_next_lane = picker([(i + 1) % 16 for i in range(16)])
_next_16 = picker([(i + 16) % 64 for i in range(64)])
_first_16 = picker(range(16))


@inlined_method(FloatFormat, "row_total")
def _float_row_total(fmt, row, x, n_cols, ahead):
    size = fmt.block_bytes
    fetch_0, fetch_1, fetch_2, fetch_3 = fetchers(64 * size, 4)

    def row_total(fmt, row, x, n_cols, ahead):
        a = b = c = d = splat(f32x16, types.float32(0.0))
        for i in range(0, n_cols - 63, 64):
            fetch_0(ahead + i * size, row + i * size)
            a = fma(fmt.load(row + i * size), load(f32x16, x + 4 * i), a)
            fetch_1(ahead + i * size, row + i * size)
            b = fma(fmt.load(row + (i + 16) * size), load(f32x16, x + 4 * i + 64), b)
            fetch_2(ahead + i * size, row + i * size)
            c = fma(fmt.load(row + (i + 32) * size), load(f32x16, x + 4 * i + 128), c)
            fetch_3(ahead + i * size, row + i * size)
            d = fma(fmt.load(row + (i + 48) * size), load(f32x16, x + 4 * i + 192), d)
        for i in range(n_cols & ~63, n_cols & ~15, 16):
            a = fma(fmt.load(row + i * size), load(f32x16, x + 4 * i), a)
        rest = types.float32(0.0)
        for i in range(n_cols & ~15, n_cols):
            rest += fmt.load_one(row + i * size) * load(types.float32, x + 4 * i)
        last = join(splat(f32x4, rest), splat(f32x4, types.float32(0.0)))
        return _first_lane_only(last) + ((a + b) + (c + d))

    return row_total


@inline_kernel
def _add_pair(fmt, first, second, x, scales, total):
    """total f32x16 + a pair of blocks times 64 columns, with scales f32x16."""
    products = dot(fmt, fmt.codes(first, second), load(i8x64, x))
    return fma(convert(f32x16, products), scales, total)


@inlined_method(BlockFormat, "add_quartet")
def _add_quartet(fmt, a, b, c, d, x, i, n_cols, even, odd, minimums):
    offset = fmt.offset

    def add_quartet(fmt, a, b, c, d, x, i, n_cols, even, odd, minimums):
        """Partial sums plus four blocks times a record's columns from 32 i on."""
        own = load_halves(a, b, c, d)
        both = own * load(f32x4, x + scales_offset(n_cols) + 4 * i)
        even = _add_pair(fmt, a, b, x + 32 * i, _first_two(both), even)
        odd = _add_pair(fmt, c, d, x + 32 * i + 64, _last_two(both), odd)
        sums = x + sums_offset(n_cols, 32) + 4 * i
        if offset is None:
            minimums = fma(load_halves(a + 2, b + 2, c + 2, d + 2), load(f32x4, sums), minimums)
        elif offset:
            minimums = fma(own, load(f32x4, sums), minimums)
        return even, odd, minimums

    return add_quartet


@inlined_method(BlockFormat, "quartet")
def _quartet(fmt, row, i, ahead):
    size, fetch = fmt.block_bytes, fetcher(0, 4 * fmt.block_bytes)

    def quartet(fmt, row, i, ahead):
        """Where block i and the next three of a row are. As many are fetched ahead."""
        a = row + i * size
        fetch(ahead + i * size, a)
        return a, a + size, a + 2 * size, a + 3 * size

    return quartet


@inlined_method(BlockFormat, "last_quartet")
def _last_quartet(fmt, row, n_blocks, ahead):
    size, fetch = fmt.block_bytes, fetcher(0, 4 * fmt.block_bytes)

    def last_quartet(fmt, row, n_blocks, ahead):
        """Where the last one, two or three of a row's blocks are; behind its end, its last. As many are fetched."""
        whole = (n_blocks & ~3) * size
        a, last = row + whole, row + (n_blocks - 1) * size
        fetch(ahead + whole, a)
        return a, min(a + size, last), min(a + 2 * size, last), last

    return last_quartet


@inlined_method(BlockFormat, "total_of")
def _total_of(fmt, even, odd, minimums):
    offset = fmt.offset

    def total_of(fmt, even, odd, minimums):
        if offset is not None:
            minimums = minimums * types.float32(-offset)
        return even + odd + _in_first_quarter(join(minimums, splat(f32x4, types.float32(0.0))))

    return total_of


@inlined_method(BlockFormat, "row_total")
def _block_row_total(fmt, row, x, n_cols, ahead):
    def row_total(fmt, row, x, n_cols, ahead):
        """Four blocks at a time; those that a row's end lacks are its last once more, times scales of zero."""
        even = odd = splat(f32x16, types.float32(0.0))
        minimums = splat(f32x4, types.float32(0.0))
        n_blocks = n_cols // 32
        for i in range(0, n_blocks & ~3, 4):
            a, b, c, d = fmt.quartet(row, i, ahead)
            even, odd, minimums = fmt.add_quartet(a, b, c, d, x, i, n_cols, even, odd, minimums)
        if n_blocks & 3:
            a, b, c, d = fmt.last_quartet(row, n_blocks, ahead)
            even, odd, minimums = fmt.add_quartet(a, b, c, d, x, n_blocks & ~3, n_cols, even, odd, minimums)
        return fmt.total_of(even, odd, minimums)

    return row_total


@inlined_method(BlockFormat, "row_totals_of_two")
def _row_totals_of_two(fmt, row, x, y, n_cols, ahead):
    def row_totals_of_two(fmt, row, x, y, n_cols, ahead):
        """`row_total` of two records, the blocks read once."""
        even_x = odd_x = even_y = odd_y = splat(f32x16, types.float32(0.0))
        minimums_x = minimums_y = splat(f32x4, types.float32(0.0))
        n_blocks = n_cols // 32
        for i in range(0, n_blocks & ~3, 4):
            a, b, c, d = fmt.quartet(row, i, ahead)
            even_x, odd_x, minimums_x = fmt.add_quartet(a, b, c, d, x, i, n_cols, even_x, odd_x, minimums_x)
            even_y, odd_y, minimums_y = fmt.add_quartet(a, b, c, d, y, i, n_cols, even_y, odd_y, minimums_y)
        if n_blocks & 3:
            i = n_blocks & ~3
            a, b, c, d = fmt.last_quartet(row, n_blocks, ahead)
            even_x, odd_x, minimums_x = fmt.add_quartet(a, b, c, d, x, i, n_cols, even_x, odd_x, minimums_x)
            even_y, odd_y, minimums_y = fmt.add_quartet(a, b, c, d, y, i, n_cols, even_y, odd_y, minimums_y)
        return fmt.total_of(even_x, odd_x, minimums_x), fmt.total_of(even_y, odd_y, minimums_y)

    return row_totals_of_two


def _is_packed(fmt: FormatTag) -> bool:
    """Whether sums of four products are scaled in 16 bits, of two chunks at once: one step for each register less."""
    return TARGET.dot == "avx512vnni" and not fmt.signed and 4 * MAX_ACTIVATION * fmt.max_code < 1 << 15


def _of_superblock(which: int) -> None:
    """Add the method for the first or the second of two superblocks, whose scales lie one behind the other."""
    first = 16 * which
    s_0, s_1, s_2, s_3 = (whole_picker([first + 4 * chunk + i // 8 for i in range(32)]) for chunk in range(4))
    # of packed sums each part of 128 bits has one of each chunk's groups
    s_01, s_23 = (whole_picker([first + c + i // 8 + i // 4 % 2 * 4 for i in range(32)]) for c in (0, 8))

    @inlined_method(SuperblockFormat, f"superblock_sums_{which}")
    def _superblock_sums(fmt, block, x, scales, ahead):
        fetch_0, fetch_1, fetch_2, fetch_3 = fetchers(fmt.block_bytes, 4)

        def superblock_sums(fmt, block, x, scales, ahead):
            """A superblock times 256 columns with its scales, among i16x32 of two: f32x16, without its minimums.

            As much is fetched from `ahead` on.
            """
            total = splat(i32x16, types.int32(0))
            fetch_0(ahead, block)
            total = in_turn(add_scaled_dot(fmt, total, fmt.codes(block, 0), load(i8x64, x), s_0(scales)))
            fetch_1(ahead, block)
            total = in_turn(add_scaled_dot(fmt, total, fmt.codes(block, 1), load(i8x64, x + 64), s_1(scales)))
            fetch_2(ahead, block)
            total = in_turn(add_scaled_dot(fmt, total, fmt.codes(block, 2), load(i8x64, x + 128), s_2(scales)))
            fetch_3(ahead, block)
            total = add_scaled_dot(fmt, total, fmt.codes(block, 3), load(i8x64, x + 192), s_3(scales))
            return convert(f32x16, total)

        def packed_sums_of_superblock(fmt, block, x, scales, ahead):
            none = splat(i32x16, types.int32(0))
            fetch_0(ahead, block)
            a, b = fmt.codes(block, 0), fmt.codes(block, 1)  # before the dots, so that what both need is read once
            low = in_turn(add_dot(none, a, load(i8x64, x)))
            fetch_1(ahead, block)
            high = in_turn(add_dot(none, b, load(i8x64, x + 64)))
            total = pair_dot(packed_sums(low, high), s_01(scales))
            fetch_2(ahead, block)
            a, b = fmt.codes(block, 2), fmt.codes(block, 3)
            low = in_turn(add_dot(none, a, load(i8x64, x + 128)))
            fetch_3(ahead, block)
            high = add_dot(none, b, load(i8x64, x + 192))
            return convert(f32x16, total + pair_dot(packed_sums(low, high), s_23(scales)))

        return packed_sums_of_superblock if _is_packed(fmt) else superblock_sums


for _which in range(2):
    _of_superblock(_which)


@kernel_method(SuperblockFormat, "factors_of_two")
def _factors_of_two(fmt, a, b):
    d_offset, has_dmin = fmt.d_offset, fmt.has_dmin

    def factors_of_two(fmt, a, b):
        """d and dmin of two superblocks: f32x4."""
        if has_dmin:
            low, high = load(types.uint32, a + d_offset), load(types.uint32, b + d_offset)
            return from_half(view(u16x4, types.uint64(low) | (types.uint64(high) << types.uint64(32))))
        return load_halves(a + d_offset, a + d_offset, b + d_offset, b + d_offset)

    return factors_of_two


@inlined_method(SuperblockFormat, "narrow_row_total")
def _superblock_narrow_row_total(fmt, row, x, n_cols, ahead):
    size, has_minimum = fmt.block_bytes, fmt.has_minimum

    def narrow_row_total(fmt, row, x, n_cols, ahead):
        """Two superblocks at a time; what a row's end lacks is its last once more, times a scale of zero."""
        scales, sums = x + scales_offset(n_cols), x + sums_offset(n_cols, 256)
        even = odd = minimums = splat(f32x16, types.float32(0.0))
        n_blocks = n_cols // 256
        last, last_x = row + (n_blocks - 1) * size, x + (n_blocks - 1) * 256
        for i in range(0, n_blocks, 2):
            a = row + i * size
            b, x_b = min(a + size, last), min(x + 256 * i + 256, last_x)
            s, m = fmt.scales_of_two(a, b)
            factors = fmt.factors_of_two(a, b) * _each_twice(load(f32x2, scales + 4 * i))
            later = ahead + i * size
            first = fmt.superblock_sums_0(a, x + 256 * i, s, later)
            second = fmt.superblock_sums_1(b, x_b, s, later + size)
            even = fma(first, _first_to_all(factors), even)
            odd = fma(second, _third_to_all(factors), odd)
            if has_minimum:
                weighted = convert(f32x16, pair_dot(m, load(i16x32, sums + 32 * i)))
                minimums = fma(weighted, _second_and_fourth(factors), minimums)
        return (even + odd) - minimums

    return narrow_row_total


@inlined_method(SuperblockFormat, "row_total")
def _superblock_row_total(fmt, row, x, n_cols, ahead):
    wide = is_wide(fmt)

    def row_total(fmt, row, x, n_cols, ahead):
        if wide and n_cols >= 1024:
            return fmt.wide_row_total(row, x, n_cols, ahead)
        return fmt.narrow_row_total(row, x, n_cols, ahead)

    return row_total


# ---- four rows

ROWS_AT_ONCE = 4
_next_of_4 = picker([1, 2, 3, 0])


@inlined_method(FormatTag, "sums_of_rows")
def _sums_of_rows(fmt, row, row_bytes, n_rows, x, n_cols, ahead, scratch):
    four_at_once = is_wide(fmt) and isinstance(fmt, BlockFormat)

    def sums_of_rows(fmt, row, row_bytes, n_rows, x, n_cols, ahead, scratch):
        """Up to four rows times one token's record: f32x4. Scratch has room for four registers."""
        if four_at_once and n_cols % 128 == 0:
            return fmt.wide_sums(row, row_bytes, n_rows, x, n_cols, ahead)
        for r in range(n_rows):
            address = row + r * row_bytes
            store(scratch + 64 * r, fmt.row_total(address, x, n_cols, ahead + r * row_bytes))
        return _sums_of_four(scratch)

    return sums_of_rows


@kernel_method(FormatTag, "multiply_for_two")
def _multiply_for_two(fmt, row, row_bytes, n_rows, x, y, n_cols, ahead, scratch, out_x, out_y):
    def multiply_for_two(fmt, row, row_bytes, n_rows, x, y, n_cols, ahead, scratch, out_x, out_y):
        """n_rows rows times two records -> f32[n_rows] each; False where a format gains nothing by it.

        Fine products are such: with 8 bits to a weight, one pass takes about as long as the memory, and two longer.
        Scratch has room for eight registers.
        """
        for r in range(0, n_rows, ROWS_AT_ONCE):
            n = min(n_rows - r, ROWS_AT_ONCE)
            for k in range(n):
                total_x, total_y = fmt.row_totals_of_two(row, x, y, n_cols, row + ahead)
                store(scratch + 64 * k, total_x)
                store(scratch + 256 + 64 * k, total_y)
                row += row_bytes
            store_sums(out_x + 4 * r, _sums_of_four(scratch), n)
            store_sums(out_y + 4 * r, _sums_of_four(scratch + 256), n)
        return True

    def nothing(fmt, row, row_bytes, n_rows, x, y, n_cols, ahead, scratch, out_x, out_y):
        return False

    return multiply_for_two if isinstance(fmt, BlockFormat) and not fmt.nibbles else nothing


@inline_kernel
def _sums_of_four(scratch):
    """The sums of four registers' lanes: f32x4."""
    a, b = load(f32x16, scratch), load(f32x16, scratch + 64)
    return quarter_sums(quarters(a, b, load(f32x16, scratch + 128), load(f32x16, scratch + 192)))


@inline_kernel
def store_sums(out, sums, n):
    """The first `n` of f32x4."""
    if n >= ROWS_AT_ONCE:
        store(out, sums)
        return
    for r in range(n):
        store(out + 4 * r, first_lane(sums))
        sums = _next_of_4(sums)


# ---- the activations


@kernel_method(FloatFormat, "fetch_input")
def _float_fetch_input(fmt, x, n_cols):
    def fetch_input(fmt, x, n_cols):
        """Ask for one token's numbers or record, which another core may have written."""
        _fetch(x, 4 * n_cols)

    return fetch_input


@kernel_method(BlockFormat, "fetch_input")
def _block_fetch_input(fmt, x, n_cols):
    wide = is_wide(fmt)

    def fetch_input(fmt, x, n_cols):
        if wide and n_cols % 128 == 0:  # codes in words only
            _fetch(x + scales_offset(n_cols), record_bytes(n_cols, 32) - scales_offset(n_cols))
        else:
            _fetch(x, words_offset(n_cols))

    return fetch_input


@kernel_method(SuperblockFormat, "fetch_input")
def _superblock_fetch_input(fmt, x, n_cols):
    wide = is_wide(fmt)

    def fetch_input(fmt, x, n_cols):
        if wide:  # codes in the order of nibbles only
            _fetch(x + scales_offset(n_cols), record_bytes(n_cols, 256) - scales_offset(n_cols))
        else:
            _fetch(x, nibbles_offset(n_cols))

    return fetch_input


@inline_kernel
def _fetch(address, n_bytes):
    for i in range(0, n_bytes, 64):
        prefetch(address + i)


# ---- decoding: columns start:stop of a row as f32; start is a multiple of 256


@kernel_method(FloatFormat, "decode")
def _float_decode(fmt, row, start, stop, out):
    size = fmt.block_bytes

    def decode(fmt, row, start, stop, out):
        for i in range(start, stop):
            store(out + 4 * (i - start), fmt.load_one(row + i * size))

    return decode


@kernel_method(BlockFormat, "decode")
def _block_decode(fmt, row, start, stop, out):
    size = fmt.block_bytes
    code_vector = i8x32 if fmt.signed and not SIGN_BIAS else u8x32

    def decode(fmt, row, start, stop, out):
        for i in range(start // 32, stop // 32):
            block, target = row + i * size, out + 128 * (i - start // 32)
            codes = view(code_vector, low_half(fmt.codes(block, block)))
            factor, offset = fmt.factors(block)
            scale, minimum = splat(f32x16, factor), splat(f32x16, offset)
            store(target, fma(convert(f32x16, convert(i32x16, low_half(codes))), scale, minimum))
            store(target + 64, fma(convert(f32x16, convert(i32x16, high_half(codes))), scale, minimum))

    return decode


@kernel_method(SuperblockFormat, "decode")
def _superblock_decode(fmt, row, start, stop, out):
    size = fmt.block_bytes
    code_vector = i8x16 if fmt.signed and not SIGN_BIAS else u8x16

    def decode(fmt, row, start, stop, out):
        for i in range(start // 256, stop // 256):
            block, target = row + i * size, out + 1024 * (i - start // 256)
            (d, dmin), (scales, minimums) = fmt.factors(block), fmt.scales(block)
            for chunk in range(4):
                codes = fmt.codes(block, chunk)
                for _ in range(4):
                    scale = splat(f32x16, d * types.float32(first_lane(scales)))
                    minimum = splat(f32x16, -dmin * types.float32(first_lane(minimums)))
                    part = view(code_vector, _first_16(codes))
                    store(target, fma(convert(f32x16, convert(i32x16, part)), scale, minimum))
                    codes, scales, minimums = _next_16(codes), _next_lane(scales), _next_lane(minimums)
                    target += 64

    return decode
