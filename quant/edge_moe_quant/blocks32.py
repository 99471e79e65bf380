"""Encodes rows to the block formats of 32 weights with one f16 scale: Q8_0, Q4_0, Q5_0, IQ4_NL, Q4_1 and Q5_1.

Source: ggml-common.h (the layouts).
"""

import numpy as np
from numba import types

from edge_moe.kernels.jit import inline_kernel, kernel
from edge_moe.kernels.simd import address_of, f32x16, fma, load, reduce_add, rounded, splat, store
from edge_moe_quant.kquants import affine_sums, codes_of_levels, mean_square, scaled_sums, scratch, take_block
from edge_moe_quant.lanes import LANES, clamp, half_bits, half_value, put_half
from edge_moe_quant.search import search_affine, search_scaled

BLOCK = 32


@inline_kernel
def put_codes(out, at, q, bits):
    """Codes u8[32] as nibbles, the first half below the second; before them the fifth bits, if there are some."""
    if bits == 5:
        for byte in range(4):
            high = 0
            for i in range(8):
                high |= (types.int64(q[8 * byte + i]) >> 4) << i
            out[at + byte] = high
        at += 4
    for i in range(16):
        out[at + i] = (q[i] & 15) | (q[i + 16] & 15) << 4


@kernel
def encode_scaled_32(rows, importance, emphasis, bits, tables, nearest, out):
    """Q4_0 and Q5_0 by bits or, with `nearest` f32[2,512] (levels and their codes; else empty), IQ4_NL."""
    x, w, codes, _, lanes, q = scratch()
    half = 1 << (bits - 1)
    levels, table = address_of(nearest) if nearest.size else 0, address_of(tables)
    block_bytes = 2 + bits * 4
    for r in range(rows.shape[0]):
        square = emphasis * mean_square(rows[r], 0, rows.shape[1])
        for block in range(rows.shape[1] // BLOCK):
            take_block(rows[r], importance, block * BLOCK, BLOCK, square, x, w)
            scale, _ = search_scaled(
                x, w, 0, BLOCK, -half, half - 1, levels, table, tables.shape[0], lanes, address_of(lanes)
            )
            d = half_bits(scale)
            scaled_sums(x, w, 0, BLOCK, -half, half - 1, levels, half_value(d), codes)
            if levels:
                codes_of_levels(codes, BLOCK, nearest[1:], q)
            else:
                for i in range(BLOCK):
                    q[i] = types.uint8(types.int32(codes[i]) + half)
            put_half(out[r], block * block_bytes, d)
            put_codes(out[r], block * block_bytes + 2, q, bits)


@kernel
def encode_affine_32(rows, importance, emphasis, bits, tables, out):
    """Q4_1 and Q5_1 by bits."""
    x, w, codes, _, lanes, q = scratch()
    top = (1 << bits) - 1
    block_bytes = 4 + bits * 4
    for r in range(rows.shape[0]):
        square = emphasis * mean_square(rows[r], 0, rows.shape[1])
        for block in range(rows.shape[1] // BLOCK):
            take_block(rows[r], importance, block * BLOCK, BLOCK, square, x, w)
            scale, low, _, _ = search_affine(
                x, w, 0, BLOCK, top, False, address_of(tables), tables.shape[0] // 2, lanes, address_of(lanes)
            )
            d, minimum = half_bits(scale), half_bits(low)
            affine_sums(x, w, 0, BLOCK, top, half_value(d), half_value(minimum), codes)
            for i in range(BLOCK):
                q[i] = types.uint8(types.int32(codes[i]))
            put_half(out[r], block * block_bytes, d)
            put_half(out[r], block * block_bytes + 2, minimum)
            put_codes(out[r], block * block_bytes + 4, q, bits)


@inline_kernel
def error_of_8_bits(x, w, scale, codes):
    """Store the codes -127..127 of a block for a scale, and return the weighted error."""
    factor = splat(f32x16, types.float32(1) / scale if scale != 0 else types.float32(0))
    least, most = splat(f32x16, types.float32(-127)), splat(f32x16, types.float32(127))
    error = zero = splat(f32x16, types.float32(0))
    for i in range(0, BLOCK, LANES):
        value = load(f32x16, address_of(x) + 4 * i)
        code = clamp(rounded(value * factor), least, most)
        off = fma(code, splat(f32x16, scale), zero - value)
        error = fma(off * load(f32x16, address_of(w) + 4 * i), off, error)
        store(address_of(codes) + 4 * i, code)
    return reduce_add(error)


@kernel
def encode_q8_0(rows, importance, emphasis, out):
    """The scale that gives the largest weight 127, refitted to its codes, and f16 numbers around: the best of them."""
    x, w, codes, _, _, _ = scratch()
    for r in range(rows.shape[0]):
        square = emphasis * mean_square(rows[r], 0, rows.shape[1])
        for block in range(rows.shape[1] // BLOCK):
            take_block(rows[r], importance, block * BLOCK, BLOCK, square, x, w)
            largest = types.float32(0)
            for i in range(BLOCK):
                largest = max(largest, abs(x[i]))
            best = half_bits(largest / types.float32(127))
            best_error = error_of_8_bits(x, w, half_value(best), codes)
            sum_qq, sum_qx = types.float32(0), types.float32(0)
            for i in range(BLOCK):
                sum_qq += w[i] * codes[i] * codes[i]
                sum_qx += w[i] * codes[i] * x[i]
            middle = half_bits(sum_qx / sum_qq) if sum_qq > 0 else best
            for bits in range(max(middle - 1, 0), middle + 2):
                error = error_of_8_bits(x, w, half_value(bits), codes)
                if error < best_error:
                    best, best_error = bits, error
            error_of_8_bits(x, w, half_value(best), codes)
            at = block * 34
            put_half(out[r], at, best)
            for i in range(BLOCK):
                out[r, at + 2 + i] = types.uint8(types.int8(codes[i]))


NO_LEVELS = np.empty((0, 512), np.float32)
