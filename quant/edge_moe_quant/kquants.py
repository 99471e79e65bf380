"""Encodes rows to the block formats of 256 weights with small scales under a common one: K-quants and IQ4_XS.

Each group is searched by itself (search.py), a common scale is fitted to the groups' scales, and then both are refined
together: for every group sixteen neighbours on the grid of small scales and minimums are measured exactly, the common
scale and minimum are solved anew for the codes that follow, and so on; the best of all rounds is stored.

Source: ggml-common.h (the layouts).
"""

import numpy as np
from numba import types

from edge_moe.kernels.jit import inline_kernel, kernel
from edge_moe.kernels.simd import address_of, f32x16, fma, load, reduce_add, rounded, splat, store
from edge_moe_quant.lanes import LANES, clamp, half_bits, half_value, least_lane, look_up, put_half
from edge_moe_quant.search import (
    affine_error,
    fit_common_scale,
    scaled_error,
    search_affine,
    search_scaled,
    snapped,
)

BLOCK = 256


@inline_kernel
def mean_square(row, first, n):
    """The mean square of n weights."""
    square = types.float32(0)
    for i in range(first, first + n):
        square += row[i] * row[i]
    return square / types.float32(n)


@inline_kernel
def take_block(row, importance, first, n, square, x, w):
    """Copy n weights to x and their importance to w; with square > 0, times sqrt(square + weight^2)."""
    for i in range(n):
        x[i] = row[first + i]
        w[i] = importance[first + i]
    if square > 0:
        for i in range(n):
            w[i] *= np.sqrt(square + x[i] * x[i])


# ---- value = scale * code - minimum ---------------------------------------------------------------------------------


@inline_kernel
def affine_sums(x, w, first, n, top, scale, intercept, codes):
    """Store the nearest codes of a group, and return sum(w q), sum(w q q), sum(w q x)."""
    zero = splat(f32x16, types.float32(0))
    most = splat(f32x16, types.float32(top))
    inverse = types.float32(1) / scale if scale > 0 else types.float32(0)
    factor, shift = splat(f32x16, inverse), splat(f32x16, -intercept * inverse)
    sum_q = sum_qq = sum_qx = zero
    for i in range(first, first + n, LANES):
        value = load(f32x16, address_of(x) + 4 * i)
        code = clamp(rounded(fma(value, factor, shift)), zero, most)
        weighted = code * load(f32x16, address_of(w) + 4 * i)
        sum_q = sum_q + weighted
        sum_qq = fma(weighted, code, sum_qq)
        sum_qx = fma(weighted, value, sum_qx)
        store(address_of(codes) + 4 * i, code)
    return reduce_add(sum_q), reduce_add(sum_qq), reduce_add(sum_qx)


# rows of the scratch g f32[10, 16], one column for each group
_S, _M, _MEAN, _CURVE, _W, _X, _SC, _MN, _BEST_SC, _BEST_MN = range(10)


@inline_kernel
def encode_affine(x, w, n, top, stop, n_rounds, tables, g, lanes, codes):
    """Encode 256 weights in groups of n: value = d * sc * code - dmin * mn; sc, mn 0..stop, codes 0..top.

    tables f32[3 + 2 n,16]: trials of the common scale, steps of sc and of mn, n sets of cuts. Afterwards codes f32[256]
    and the rows _BEST_SC and _BEST_MN of g are set; returns the f16 bits of d and dmin.
    """
    table, at = address_of(tables), address_of(lanes)
    sets, n_sets = table + 192, (tables.shape[0] - 3) // 2
    n_groups = BLOCK // n
    zero, last = splat(f32x16, types.float32(0)), splat(f32x16, types.float32(stop))
    for j in range(n_groups):
        scale, intercept, mean, curvature = search_affine(x, w, j * n, n, top, True, sets, n_sets, lanes, at)
        sum_w, sum_x = types.float32(0), types.float32(0)
        for i in range(j * n, j * n + n):
            sum_w += w[i]
            sum_x += w[i] * x[i]
        g[_S, j], g[_M, j], g[_MEAN, j], g[_CURVE, j], g[_W, j], g[_X, j] = (
            scale, -intercept, mean, curvature, sum_w, sum_x
        )  # fmt: skip
    d = fit_common_scale(g[_S], g[_CURVE], n_groups, 0, stop, table, lanes, at)
    dmin = fit_common_scale(g[_M], g[_W], n_groups, 0, stop, table, lanes, at)
    best_error = types.float32(np.inf)
    best_d, best_dmin = types.int64(0), types.int64(0)
    for turn in range(n_rounds):
        d_bits, dmin_bits = half_bits(d), half_bits(dmin)
        d, dmin = half_value(d_bits), half_value(dmin_bits)
        error = types.float32(0)
        zeros = types.float32(0)
        a11, a12, a22, b1, b2 = zeros, zeros, zeros, zeros, zeros
        for j in range(n_groups):
            per_d = types.float32(1) / d if d > 0 else types.float32(0)
            per_dmin = types.float32(1) / dmin if dmin > 0 else types.float32(0)
            sc = clamp(splat(f32x16, np.rint(g[_S, j] * per_d)) + load(f32x16, table + 64), zero, last)
            # a larger scale goes with a larger minimum: the middle of the group stays where it was
            wanted = (sc * d - splat(f32x16, g[_S, j])) * g[_MEAN, j] + splat(f32x16, g[_M, j])
            mn = clamp(rounded(wanted * per_dmin) + load(f32x16, table + 128), zero, last)
            store(at, sc)
            store(at + 64, mn)
            if turn:
                lanes[0, LANES - 1], lanes[1, LANES - 1] = g[_SC, j], g[_MN, j]
            scale, intercept = load(f32x16, at) * d, load(f32x16, at + 64) * -dmin
            least, lane = least_lane(affine_error(x, w, j * n, n, top, scale, intercept))
            g[_SC, j], g[_MN, j] = lanes[0, lane], lanes[1, lane]
            error += least
            q, qq, qx = affine_sums(x, w, j * n, n, top, d * g[_SC, j], -dmin * g[_MN, j], codes)
            a11 += g[_SC, j] * g[_SC, j] * qq
            a12 -= g[_SC, j] * g[_MN, j] * q
            a22 += g[_MN, j] * g[_MN, j] * g[_W, j]
            b1 += g[_SC, j] * qx
            b2 -= g[_MN, j] * g[_X, j]
        if error < best_error:
            best_error, best_d, best_dmin = error, d_bits, dmin_bits
            for j in range(n_groups):
                g[_BEST_SC, j], g[_BEST_MN, j] = g[_SC, j], g[_MN, j]
        determinant = a11 * a22 - a12 * a12
        if determinant > types.float32(1e-5) * a11 * a22:
            d, dmin = (b1 * a22 - b2 * a12) / determinant, (b2 * a11 - b1 * a12) / determinant
        elif a11 > 0:
            d = (b1 - dmin * a12) / a11
        d, dmin = max(d, types.float32(0)), max(dmin, types.float32(0))
    if best_error == np.inf:  # not even zeros could be measured: weights near the end of f32
        g[_BEST_SC:] = 0
    d, dmin = half_value(best_d), half_value(best_dmin)
    for j in range(n_groups):
        affine_sums(x, w, j * n, n, top, d * g[_BEST_SC, j], -dmin * g[_BEST_MN, j], codes)
    return best_d, best_dmin


# ---- value = scale * code -------------------------------------------------------------------------------------------


@inline_kernel
def scaled_sums(x, w, first, n, low, high, levels, scale, codes):
    """Store the nearest codes (or levels) of a group, and return sum(w q q), sum(w q x)."""
    zero = splat(f32x16, types.float32(0))
    least, most = splat(f32x16, types.float32(low)), splat(f32x16, types.float32(high))
    factor = splat(f32x16, types.float32(1) / scale if scale != 0 else types.float32(0))
    sum_qq = sum_qx = zero
    for i in range(first, first + n, LANES):
        value = load(f32x16, address_of(x) + 4 * i)
        code = snapped(value * factor, least, most, levels)
        weighted = code * load(f32x16, address_of(w) + 4 * i)
        sum_qq = fma(weighted, code, sum_qq)
        sum_qx = fma(weighted, value, sum_qx)
        store(address_of(codes) + 4 * i, code)
    return reduce_add(sum_qq), reduce_add(sum_qx)


@inline_kernel
def encode_scaled(x, w, n, low, high, levels, least, most, n_rounds, tables, g, lanes, codes):
    """Encode 256 weights in groups of n: value = d * sc * code; sc least..most, codes low..high or IQ4's levels.

    tables f32[2 + n,16]: trials of the common scale, steps of sc, n sets of trials. Afterwards codes f32[256] and row
    _BEST_SC of g are set; returns the f16 bits of d.
    """
    table, at = address_of(tables), address_of(lanes)
    sets, n_sets = table + 128, tables.shape[0] - 2
    n_groups = BLOCK // n
    for j in range(n_groups):
        g[_S, j], g[_CURVE, j] = search_scaled(x, w, j * n, n, low, high, levels, sets, n_sets, lanes, at)
    d = fit_common_scale(g[_S], g[_CURVE], n_groups, least, most, table, lanes, at)
    first, last = splat(f32x16, types.float32(least)), splat(f32x16, types.float32(most))
    best_error = types.float32(np.inf)
    best_d = types.int64(0)
    for _ in range(n_rounds):
        d_bits = half_bits(d)
        d = half_value(d_bits)
        per_d = types.float32(1) / d if d != 0 else types.float32(0)
        error, sum_qq, sum_qx = types.float32(0), types.float32(0), types.float32(0)
        for j in range(n_groups):
            sc = clamp(splat(f32x16, np.rint(g[_S, j] * per_d)) + load(f32x16, table + 64), first, last)
            store(at, sc)
            least_error, lane = least_lane(scaled_error(x, w, j * n, n, low, high, levels, sc * d))
            g[_SC, j] = lanes[0, lane]
            error += least_error
            qq, qx = scaled_sums(x, w, j * n, n, low, high, levels, d * g[_SC, j], codes)
            sum_qq += g[_SC, j] * g[_SC, j] * qq
            sum_qx += g[_SC, j] * qx
        if error < best_error:
            best_error, best_d = error, d_bits
            for j in range(n_groups):
                g[_BEST_SC, j] = g[_SC, j]
        if sum_qq > 0:
            d = sum_qx / sum_qq
    if best_error == np.inf:
        g[_BEST_SC:] = 0
    d = half_value(best_d)
    for j in range(n_groups):
        scaled_sums(x, w, j * n, n, low, high, levels, d * g[_BEST_SC, j], codes)
    return best_d


# ---- how blocks are packed ------------------------------------------------------------------------------------------


@inline_kernel
def put_crumbs(out, at, q):
    """The low two bits of q u8[256]: byte l of 32 holds elements l, l + 32, l + 64, l + 96 of its 128."""
    for half in range(2):
        for l in range(32):
            e = 128 * half + l
            out[at + 32 * half + l] = (
                (q[e] & 3) | (q[e + 32] & 3) << 2 | (q[e + 64] & 3) << 4 | (q[e + 96] & 3) << 6
            )  # fmt: skip


@inline_kernel
def put_nibbles(out, at, q, n_low):
    """The low four bits of q u8[256]: n_low elements in the low halves of as many bytes, the next n_low above them."""
    for group in range(BLOCK // (2 * n_low)):
        for l in range(n_low):
            e = 2 * n_low * group + l
            out[at + n_low * group + l] = (q[e] & 15) | (q[e + n_low] & 15) << 4


@inline_kernel
def put_high_bits(out, at, q, bit):
    """One bit of q u8[256]: bit g of byte l is that of element 32 g + l."""
    for l in range(32):
        byte = 0
        for group in range(8):
            byte |= ((q[32 * group + l] >> bit) & 1) << group
        out[at + l] = byte


@inline_kernel
def put_six_bit_pairs(out, at, sc, mn):
    """Eight scales and minimums of six bits in twelve bytes, as Q4_K and Q5_K hold them."""
    for j in range(4):
        a, b = types.int64(sc[j]), types.int64(mn[j])
        c, e = types.int64(sc[j + 4]), types.int64(mn[j + 4])
        out[at + j] = a | (c >> 4) << 6
        out[at + 4 + j] = b | (e >> 4) << 6
        out[at + 8 + j] = (c & 15) | (e & 15) << 4


@inline_kernel
def whole(codes, offset, q):
    """Codes f32[256] plus an offset as u8[256]."""
    for i in range(BLOCK):
        q[i] = types.uint8(types.int32(codes[i]) + offset)


@inline_kernel
def codes_of_levels(levels, n, codes_of, q):
    """Levels of IQ4 f32[n] as the codes that mean them, u8[n]; codes_of f32[...,512] by 2 * level + 256."""
    table = address_of(codes_of)
    for i in range(0, n, LANES):
        place = fma(
            load(f32x16, address_of(levels) + 4 * i), splat(f32x16, types.float32(2)), splat(f32x16, types.float32(256))
        )
        store(address_of(levels) + 4 * i, look_up(table, place))
    for i in range(n):
        q[i] = types.uint8(types.int32(levels[i]))


@inline_kernel
def scratch():
    """x, w, codes f32[256]; g f32[10,16]; lanes f32[4,16]; q u8[256]."""
    x, w, codes = (np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32))
    g, lanes = np.zeros((10, LANES), np.float32), np.empty((4, LANES), np.float32)
    return x, w, codes, g, lanes, np.empty(BLOCK, np.uint8)


# ---- one kernel for each format: rows f32[R, C], importance f32[C] -> out u8[R, row bytes] --------------------------


@kernel
def encode_q4_k(rows, importance, emphasis, n_rounds, tables, out):
    x, w, codes, g, lanes, q = scratch()
    for r in range(rows.shape[0]):
        for block in range(rows.shape[1] // BLOCK):
            square = emphasis * mean_square(rows[r], block * BLOCK, BLOCK)
            take_block(rows[r], importance, block * BLOCK, BLOCK, square, x, w)
            d, dmin = encode_affine(x, w, 32, 15, 63, n_rounds, tables, g, lanes, codes)
            whole(codes, 0, q)
            at = block * 144
            put_half(out[r], at, d)
            put_half(out[r], at + 2, dmin)
            put_six_bit_pairs(out[r], at + 4, g[_BEST_SC], g[_BEST_MN])
            put_nibbles(out[r], at + 16, q, 32)


@kernel
def encode_q5_k(rows, importance, emphasis, n_rounds, tables, out):
    x, w, codes, g, lanes, q = scratch()
    for r in range(rows.shape[0]):
        for block in range(rows.shape[1] // BLOCK):
            square = emphasis * mean_square(rows[r], block * BLOCK, BLOCK)
            take_block(rows[r], importance, block * BLOCK, BLOCK, square, x, w)
            d, dmin = encode_affine(x, w, 32, 31, 63, n_rounds, tables, g, lanes, codes)
            whole(codes, 0, q)
            at = block * 176
            put_half(out[r], at, d)
            put_half(out[r], at + 2, dmin)
            put_six_bit_pairs(out[r], at + 4, g[_BEST_SC], g[_BEST_MN])
            put_high_bits(out[r], at + 16, q, 4)
            put_nibbles(out[r], at + 48, q, 32)


@kernel
def encode_q2_k(rows, importance, emphasis, n_rounds, tables, out):
    x, w, codes, g, lanes, q = scratch()
    for r in range(rows.shape[0]):
        for block in range(rows.shape[1] // BLOCK):
            square = emphasis * mean_square(rows[r], block * BLOCK, BLOCK)
            take_block(rows[r], importance, block * BLOCK, BLOCK, square, x, w)
            d, dmin = encode_affine(x, w, 16, 3, 15, n_rounds, tables, g, lanes, codes)
            whole(codes, 0, q)
            at = block * 84
            for j in range(16):
                out[r, at + j] = types.int64(g[_BEST_SC, j]) | types.int64(g[_BEST_MN, j]) << 4
            put_crumbs(out[r], at + 16, q)
            put_half(out[r], at + 80, d)
            put_half(out[r], at + 82, dmin)


@kernel
def encode_q6_k(rows, importance, emphasis, n_rounds, tables, out):
    x, w, codes, g, lanes, q = scratch()
    for r in range(rows.shape[0]):
        for block in range(rows.shape[1] // BLOCK):
            square = emphasis * mean_square(rows[r], block * BLOCK, BLOCK)
            take_block(rows[r], importance, block * BLOCK, BLOCK, square, x, w)
            d = encode_scaled(x, w, 16, -32, 31, 0, -128, 127, n_rounds, tables, g, lanes, codes)
            whole(codes, 32, q)
            at = block * 210
            put_nibbles(out[r], at, q, 64)
            for i in range(BLOCK):
                q[i] >>= 4
            put_crumbs(out[r], at + 128, q)
            for j in range(16):
                out[r, at + 192 + j] = types.int64(g[_BEST_SC, j]) & 255
            put_half(out[r], at + 208, d)


@kernel
def encode_q3_k(rows, importance, emphasis, n_rounds, tables, out):
    x, w, codes, g, lanes, q = scratch()
    for r in range(rows.shape[0]):
        for block in range(rows.shape[1] // BLOCK):
            square = emphasis * mean_square(rows[r], block * BLOCK, BLOCK)
            take_block(rows[r], importance, block * BLOCK, BLOCK, square, x, w)
            d = encode_scaled(x, w, 16, -4, 3, 0, -32, 31, n_rounds, tables, g, lanes, codes)
            whole(codes, 4, q)
            at = block * 110
            put_high_bits(out[r], at, q, 2)
            put_crumbs(out[r], at + 32, q)
            out[r, at + 104 : at + 108] = 0
            for j in range(8):
                low, high = types.int64(g[_BEST_SC, j]) + 32, types.int64(g[_BEST_SC, j + 8]) + 32
                out[r, at + 96 + j] = (low & 15) | (high & 15) << 4
                out[r, at + 104 + j % 4] |= (low >> 4) << (2 * (j // 4)) | (high >> 4) << (2 * (j // 4) + 4)
            put_half(out[r], at + 108, d)


@kernel
def encode_iq4_xs(rows, importance, emphasis, n_rounds, tables, nearest, out):
    x, w, codes, g, lanes, q = scratch()
    for r in range(rows.shape[0]):
        for block in range(rows.shape[1] // BLOCK):
            square = emphasis * mean_square(rows[r], block * BLOCK, BLOCK)
            take_block(rows[r], importance, block * BLOCK, BLOCK, square, x, w)
            d = encode_scaled(x, w, 32, 0, 0, address_of(nearest), -32, 31, n_rounds, tables, g, lanes, codes)
            codes_of_levels(codes, BLOCK, nearest[1:], q)
            at = block * 136
            put_half(out[r], at, d)
            high = 0
            for j in range(8):
                high |= ((types.int64(g[_BEST_SC, j]) + 32) >> 4) << (2 * j)
            put_half(out[r], at + 2, high)
            for j in range(4):
                low, up = types.int64(g[_BEST_SC, 2 * j]) + 32, types.int64(g[_BEST_SC, 2 * j + 1]) + 32
                out[r, at + 4 + j] = (low & 15) | (up & 15) << 4
            put_nibbles(out[r], at + 8, q, 16)
