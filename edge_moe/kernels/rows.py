"""One weight row: its product with one token's activations, straight from the file's blocks, or its decoded numbers."""

from numba import types
from numba.extending import overload_method

from edge_moe.kernels.activations import scales_offset, sums_offset
from edge_moe.kernels.blocks import BlockFormat, FloatFormat, SuperblockFormat
from edge_moe.kernels.dots import SIGN_BIAS, add_scaled_dot, dot, pair_dot
from edge_moe.kernels.simd import (
    convert,
    f32x8,
    f32x16,
    first_lane,
    fma,
    high_half,
    i8x16,
    i8x32,
    i8x64,
    i16x16,
    i32x16,
    join,
    load,
    low_half,
    picker,
    prefetch,
    reduce_add,
    splat,
    store,
    u8x16,
    u8x32,
    view,
)

PREFETCH_BYTES = 1024

# Registers turned, so that what comes next is always in the first lanes.
_next_scales = picker([(i + 4) % 16 for i in range(16)])
_next_lane = picker([(i + 1) % 16 for i in range(16)])
_next_16 = picker([(i + 16) % 64 for i in range(64)])
_first_16 = picker(range(16))


@overload_method(FloatFormat, "row_dot")
def _float_row_dot(fmt, row, x, n_cols):
    size = fmt.block_bytes

    def row_dot(fmt, row, x, n_cols):
        a = b = c = d = splat(f32x16, types.float32(0.0))
        for i in range(0, n_cols - 63, 64):
            prefetch(row + i * size + PREFETCH_BYTES)
            a = fma(fmt.load(row + i * size), load(f32x16, x + 4 * i), a)
            b = fma(fmt.load(row + (i + 16) * size), load(f32x16, x + 4 * i + 64), b)
            c = fma(fmt.load(row + (i + 32) * size), load(f32x16, x + 4 * i + 128), c)
            d = fma(fmt.load(row + (i + 48) * size), load(f32x16, x + 4 * i + 192), d)
        for i in range(n_cols & ~63, n_cols & ~15, 16):
            a = fma(fmt.load(row + i * size), load(f32x16, x + 4 * i), a)
        total = reduce_add((a + b) + (c + d))
        for i in range(n_cols & ~15, n_cols):
            total += fmt.load_one(row + i * size) * load(types.float32, x + 4 * i)
        return total

    return row_dot


@overload_method(BlockFormat, "row_dot")
def _block_row_dot(fmt, row, x, n_cols):
    size = fmt.block_bytes
    has_minimum = fmt.has_minimum

    def row_dot(fmt, row, x, n_cols):
        scales, sums = x + scales_offset(n_cols), x + sums_offset(n_cols, 32)
        total, even, odd = splat(f32x16, types.float32(0.0)), types.float32(0.0), types.float32(0.0)
        n_blocks = n_cols // 32
        for i in range(0, n_blocks, 2):
            first = row + i * size
            second = first + size if i + 1 < n_blocks else first  # a lone last block meets zeros in its second half
            prefetch(first + PREFETCH_BYTES)
            codes = fmt.codes(first, second)
            first_scale, first_minimum = fmt.factors(first)
            second_scale, second_minimum = fmt.factors(second)
            low = splat(f32x8, first_scale * load(types.float32, scales + 4 * i))
            high = splat(f32x8, second_scale * load(types.float32, scales + 4 * i + 4))
            total = fma(convert(f32x16, dot(fmt, codes, load(i8x64, x + 32 * i))), join(low, high), total)
            if has_minimum:
                even += first_minimum * load(types.float32, sums + 4 * i)
                odd += second_minimum * load(types.float32, sums + 4 * i + 4)
        return reduce_add(total) + (even + odd)

    return row_dot


@overload_method(SuperblockFormat, "row_dot")
def _superblock_row_dot(fmt, row, x, n_cols):
    size = fmt.block_bytes
    has_minimum = fmt.has_minimum

    def row_dot(fmt, row, x, n_cols):
        scales, sums = x + scales_offset(n_cols), x + sums_offset(n_cols, 256)
        total, minimums = splat(f32x16, types.float32(0.0)), splat(f32x8, types.float32(0.0))
        for i in range(n_cols // 256):
            block, columns = row + i * size, x + 256 * i
            for line in range(0, size, 64):
                prefetch(block + line + PREFETCH_BYTES)
            d, dmin, block_scales, block_minimums = fmt.scales(block)
            scale = load(types.float32, scales + 4 * i)
            products = splat(i32x16, types.int32(0))
            for chunk in range(4):
                codes = fmt.codes(block, chunk)
                products = add_scaled_dot(fmt, products, codes, load(i8x64, columns + 64 * chunk), block_scales)
                block_scales = _next_scales(block_scales)
            total = fma(convert(f32x16, products), splat(f32x16, d * scale), total)
            if has_minimum:
                weighted = pair_dot(block_minimums, load(i16x16, sums + 32 * i))
                minimums = fma(convert(f32x8, weighted), splat(f32x8, dmin * scale), minimums)
        return reduce_add(total) - reduce_add(minimums)

    return row_dot


# ---- decoding: columns start:stop of a row as f32; start is a multiple of 256


@overload_method(FloatFormat, "decode")
def _float_decode(fmt, row, start, stop, out):
    size = fmt.block_bytes

    def decode(fmt, row, start, stop, out):
        for i in range(start, stop):
            store(out + 4 * (i - start), fmt.load_one(row + i * size))

    return decode


@overload_method(BlockFormat, "decode")
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


@overload_method(SuperblockFormat, "decode")
def _superblock_decode(fmt, row, start, stop, out):
    size = fmt.block_bytes
    code_vector = i8x16 if fmt.signed and not SIGN_BIAS else u8x16

    def decode(fmt, row, start, stop, out):
        for i in range(start // 256, stop // 256):
            block, target = row + i * size, out + 1024 * (i - start // 256)
            d, dmin, scales, minimums = fmt.scales(block)
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
