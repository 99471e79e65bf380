"""Sixteen weight rows unpacked once for many tokens: the panel, and its product with a tile of tokens.

In a panel the lanes of each register are the 16 rows. Integer codes lie as [columns / 4][16 rows][4 columns] bytes,
followed, for each piece of 64 or 256 columns, by the scales and minimums [..][16 rows].
"""

from numba import types

from edge_moe.kernels.activations import padded_columns, scales_offset, sums_of_32_offset, sums_offset
from edge_moe.kernels.blocks import BlockFormat, FloatFormat, SuperblockFormat
from edge_moe.kernels.dots import VIA_16_BITS
from edge_moe.kernels.jit import inline_kernel, kernel_method
from edge_moe.kernels.simd import convert, f32x16, i16x32, i32x16, load, store
from edge_moe.kernels.tiles import (
    SCALED,
    TILE_ROWS,
    tile_add_pairs,
    tile_add_product,
    tile_add_scaled,
    tile_add_scaled_dot,
    tile_dot,
    tile_zero,
    transpose_16x16,
)

# A pair of blocks: 1024 codes, two scales and two minimums for each row.
PAIR_BYTES = 1024 + 4 * 64
# A superblock: 4096 codes, 16 scales, 8 pairs of minimums (of groups of 32 columns 4), and two factors for each row.
SUPERBLOCK_BYTES = 4096 + 16 * 64 + 8 * 64 + 2 * 64
SCALES, MINIMUMS, FACTORS = 4096, 4096 + 16 * 64, 4096 + 24 * 64


# ---- floats: panel [columns][16 rows]


@kernel_method(FloatFormat, "panel_bytes")
def _float_panel_bytes(fmt, n_cols):
    return lambda fmt, n_cols: ((n_cols + 15) & ~15) * 64


@kernel_method(FloatFormat, "unpack")
def _float_unpack(fmt, rows, row_bytes, n_rows, n_cols, panel, scratch):
    size = fmt.block_bytes

    def unpack(fmt, rows, row_bytes, n_rows, n_cols, panel, scratch):
        for i in range(0, n_cols & ~15, 16):
            for r in range(TILE_ROWS):
                store(scratch + 64 * r, fmt.load(rows + min(r, n_rows - 1) * row_bytes + i * size))
            transpose_16x16(scratch, panel + 64 * i)
        for i in range(n_cols & ~15, n_cols):
            for r in range(TILE_ROWS):
                store(panel + 64 * i + 4 * r, fmt.load_one(rows + min(r, n_rows - 1) * row_bytes + i * size))

    return unpack


@kernel_method(FloatFormat, "tile")
def _float_tile(fmt, panel, x, n_cols):
    def tile(fmt, panel, x, n_cols):
        total = tile_zero(f32x16)
        for i in range(n_cols):
            total = tile_add_product(total, load(f32x16, panel + 64 * i), x, 4 * i)
        return total

    return tile


# ---- blocks of 32


@kernel_method(BlockFormat, "panel_bytes")
def _block_panel_bytes(fmt, n_cols):
    return lambda fmt, n_cols: padded_columns(n_cols) // 64 * PAIR_BYTES


@kernel_method(BlockFormat, "unpack")
def _block_unpack(fmt, rows, row_bytes, n_rows, n_cols, panel, scratch):
    size = fmt.block_bytes

    def unpack(fmt, rows, row_bytes, n_rows, n_cols, panel, scratch):
        n_blocks = n_cols // 32
        for i in range(0, n_blocks, 2):
            for r in range(TILE_ROWS):
                first = rows + min(r, n_rows - 1) * row_bytes + i * size
                second = first + size if i + 1 < n_blocks else first
                store(scratch + 64 * r, fmt.codes(first, second))
                for half, block in enumerate((first, second)):
                    scale, minimum = fmt.factors(block)
                    store(panel + 1024 + 64 * half + 4 * r, scale)
                    store(panel + 1152 + 64 * half + 4 * r, minimum)
            transpose_16x16(scratch, panel)
            panel += PAIR_BYTES

    return unpack


@kernel_method(BlockFormat, "tile")
def _block_tile(fmt, panel, x, n_cols):
    has_minimum = fmt.has_minimum

    def tile(fmt, panel, x, n_cols):
        scales, sums = scales_offset(n_cols), sums_offset(n_cols, 32)
        total = tile_zero(f32x16)
        for i in range(0, padded_columns(n_cols), 64):
            for half in range(2):
                products = tile_dot(fmt, panel + 512 * half, x, i + 32 * half)
                scale = load(f32x16, panel + 1024 + 64 * half)
                total = tile_add_scaled(total, products, scale, x, scales + i // 8 + 4 * half)
                if has_minimum:
                    minimum = load(f32x16, panel + 1152 + 64 * half)
                    total = tile_add_product(total, minimum, x, sums + i // 8 + 4 * half)
            panel += PAIR_BYTES
        return total

    return tile


# ---- superblocks


@inline_kernel
def first_of_both(first, second):
    """The lower of the 16-bit numbers of two registers i32x16, as pairs."""
    return (first & types.int32(0xFFFF)) | (second << types.int32(16))


@inline_kernel
def first_scale(both):
    """The lower of two 16-bit scales i32x16, in the form that `tile_add_scaled_dot` takes."""
    if VIA_16_BITS:
        return first_of_both(both, both)
    return (both << types.int32(16)) >> types.int32(16)


@inline_kernel
def second_scale(both):
    """The upper one."""
    if VIA_16_BITS:
        return first_scale(both >> types.int32(16))
    return both >> types.int32(16)


@inline_kernel
def scaling(scale):
    """A scale in the lanes that sums are scaled in."""
    return convert(SCALED, scale)


@kernel_method(SuperblockFormat, "panel_bytes")
def _superblock_panel_bytes(fmt, n_cols):
    return lambda fmt, n_cols: n_cols // 256 * SUPERBLOCK_BYTES


@kernel_method(SuperblockFormat, "unpack")
def _superblock_unpack(fmt, rows, row_bytes, n_rows, n_cols, panel, scratch):
    size = fmt.block_bytes
    group = fmt.group

    def unpack(fmt, rows, row_bytes, n_rows, n_cols, panel, scratch):
        for i in range(n_cols // 256):
            for r in range(TILE_ROWS):
                block = rows + min(r, n_rows - 1) * row_bytes + i * size
                (d, dmin), (scales, minimums) = fmt.factors(block), fmt.scales(block)
                store(scratch + 64 * r, scales)
                store(scratch + 64 * r + 32, minimums)
                store(panel + FACTORS + 4 * r, d)
                store(panel + FACTORS + 64 + 4 * r, -dmin)
            # Gives 8 pairs of 16-bit scales, then 8 of minimums; the former are read before their place is written.
            transpose_16x16(scratch, panel + MINIMUMS - 8 * 64)
            for pair in range(8):
                both = load(i32x16, panel + MINIMUMS - 8 * 64 + 64 * pair)
                if group == 32:
                    store(panel + SCALES + 64 * pair, scaling(first_scale(both)))
                else:
                    store(panel + SCALES + 128 * pair, scaling(first_scale(both)))
                    store(panel + SCALES + 128 * pair + 64, scaling(second_scale(both)))
            if group == 32:  # there a minimum is in both places of its pair: it takes one, the next the other
                for pair in range(4):
                    place = panel + MINIMUMS + 128 * pair
                    first, second = load(i32x16, place), load(i32x16, place + 64)
                    store(panel + MINIMUMS + 64 * pair, first_of_both(first, second))
            for chunk in range(4):
                for r in range(TILE_ROWS):
                    store(scratch + 64 * r, fmt.codes(rows + min(r, n_rows - 1) * row_bytes + i * size, chunk))
                transpose_16x16(scratch, panel + 1024 * chunk)
            panel += SUPERBLOCK_BYTES

    return unpack


@kernel_method(SuperblockFormat, "tile")
def _superblock_tile(fmt, panel, x, n_cols):
    group, n_pairs = fmt.group, 128 // fmt.group  # of minimums
    has_minimum = fmt.has_minimum

    def tile(fmt, panel, x, n_cols):
        scales = scales_offset(n_cols)
        sums = sums_of_32_offset(n_cols) if group == 32 else sums_offset(n_cols, 256)
        total = tile_zero(f32x16)
        for i in range(n_cols // 256):
            products = tile_zero(SCALED)
            for g in range(256 // group):
                scale = load(SCALED, panel + SCALES + 64 * g)
                products = tile_add_scaled_dot(fmt, products, panel + 16 * group * g, x, 256 * i + group * g, scale)
            total = tile_add_scaled(total, products, load(f32x16, panel + FACTORS), x, scales + 4 * i)
            if has_minimum:
                minimums = tile_zero(i32x16)
                for pair in range(n_pairs):
                    both = load(i16x32, panel + MINIMUMS + 64 * pair)
                    minimums = tile_add_pairs(minimums, both, x, sums + 4 * (n_pairs * i + pair))
                total = tile_add_scaled(total, minimums, load(f32x16, panel + FACTORS + 64), x, scales + 4 * i)
            panel += SUPERBLOCK_BYTES
        return total

    return tile
