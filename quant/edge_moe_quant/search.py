"""Searches for the scale, and minimum, of one group of weights: sixteen trials at once, one in each lane of a vector.

A trial is a scale (and an intercept). It is improved by turns: the nearest codes, then the scale and intercept that fit
these codes best by weighted least squares. The last turn measures the true weighted error of every trial.
"""

import numpy as np
from numba import types

from edge_moe.kernels.jit import inline_kernel, spliced_kernel
from edge_moe.kernels.simd import f32x16, fma, load, rounded, splat, store
from edge_moe_quant.lanes import choose_above, clamp, least_lane, look_up, quotient, rounded_down

N_TURNS = 2
SMALLEST = 1e-15  # a group of smaller weights is stored as zeros


@inline_kernel
def affine_error(x, w, first, n, top, scale, intercept):
    """The weighted error of value = scale * code + intercept for each lane; codes are the nearest of 0..top."""
    zero, one = splat(f32x16, types.float32(0)), splat(f32x16, types.float32(1))
    most = splat(f32x16, types.float32(top))
    inverse = choose_above(scale, zero, quotient(one, scale), zero)
    shift = zero - intercept * inverse
    error = zero
    for i in range(first, first + n):
        value = splat(f32x16, x[i])
        code = clamp(rounded(fma(value, inverse, shift)), zero, most)
        off = fma(code, scale, intercept) - value
        error = fma(off * splat(f32x16, w[i]), off, error)
    return error


@inline_kernel
def search_affine(x, w, first, n, top, keep_zero, trials, n_sets, lanes, at):
    """Find scale and intercept of a group: value = scale * code + intercept, codes 0..top.

    x, w f32[...] from `first` on; trials f32[n_sets,2,16] at an address: how many steps each trial cuts off at the low
    and at the high end.
    keep_zero: the intercept must not be above 0. lanes f32[4,16] is scratch at address `at`.
    Returns (scale, intercept, mean code, curvature of the error in the scale).
    """
    zero, one = splat(f32x16, types.float32(0)), splat(f32x16, types.float32(1))
    most = splat(f32x16, types.float32(top))
    low, high = x[first], x[first]
    sum_w, sum_x = types.float32(0), types.float32(0)
    for i in range(first, first + n):
        low, high = min(low, x[i]), max(high, x[i])
        sum_w += w[i]
        sum_x += w[i] * x[i]
    if keep_zero and low > 0:
        low = types.float32(0)
    step = (high - low) / types.float32(top)
    if not (step > SMALLEST and sum_w > 0):
        return types.float32(0), low, types.float32(0), sum_w
    all_w, all_x = splat(f32x16, sum_w), splat(f32x16, sum_x)
    least_error = types.float32(np.inf)
    best_scale, best_intercept, mean, curvature = step, low, types.float32(0), sum_w
    for trial_set in range(n_sets):
        cut_low, cut_high = load(f32x16, trials + 128 * trial_set), load(f32x16, trials + 128 * trial_set + 64)
        scale = (splat(f32x16, types.float32(top)) - cut_low - cut_high) * (step / types.float32(top))
        intercept = fma(cut_low, splat(f32x16, step), splat(f32x16, low))
        sum_q = sum_qq = zero
        for _ in range(N_TURNS):
            inverse = quotient(one, scale)
            shift = zero - intercept * inverse
            sum_q = sum_qq = sum_qx = zero
            for i in range(first, first + n):
                value = splat(f32x16, x[i])
                code = clamp(rounded(fma(value, inverse, shift)), zero, most)
                weighted = code * splat(f32x16, w[i])
                sum_q = sum_q + weighted
                sum_qq = fma(weighted, code, sum_qq)
                sum_qx = fma(weighted, value, sum_qx)
            spread = sum_qq * all_w - sum_q * sum_q
            enough = all_w * sum_qq * types.float32(1e-6)
            fitted = quotient(sum_qx * all_w - sum_q * all_x, spread)
            offset = quotient(sum_qq * all_x - sum_q * sum_qx, spread)
            if keep_zero:
                through_zero = quotient(sum_qx, sum_qq)
                fitted = choose_above(offset, zero, through_zero, fitted)
                offset = choose_above(offset, zero, zero, offset)
            fitted = choose_above(spread, enough, fitted, zero)
            intercept = choose_above(fitted, zero, offset, intercept)
            scale = choose_above(fitted, zero, fitted, scale)
        error, lane = least_lane(affine_error(x, w, first, n, top, scale, intercept))
        if error < least_error:
            store(at, scale)
            store(at + 64, intercept)
            store(at + 128, sum_q)
            store(at + 192, sum_qq)
            least_error, best_scale, best_intercept = error, lanes[0, lane], lanes[1, lane]
            mean = lanes[2, lane] / sum_w
            curvature = lanes[3, lane] - lanes[2, lane] * mean
    return best_scale, best_intercept, mean, max(curvature, types.float32(1e-6) * sum_w)


@inline_kernel
def nearest_level(value, levels):
    """The nearest of IQ4's sixteen values; levels: address of IQ4_NEAREST."""
    middle, top = splat(f32x16, types.float32(256)), splat(f32x16, types.float32(511))
    place = rounded_down(fma(value, splat(f32x16, types.float32(2)), middle))
    return look_up(levels, clamp(place, splat(f32x16, types.float32(0)), top))


@spliced_kernel
def snapped(value, least, most, levels):
    """The nearest whole numbers from least to most or, with levels, the nearest of IQ4's sixteen values."""
    return nearest_level(value, levels) if levels else clamp(rounded(value), least, most)


@inline_kernel
def scaled_error(x, w, first, n, low, high, levels, scale):
    """The weighted error of value = scale * code for each lane, the nearest codes taken."""
    zero, one = splat(f32x16, types.float32(0)), splat(f32x16, types.float32(1))
    least, most = splat(f32x16, types.float32(low)), splat(f32x16, types.float32(high))
    is_zero = choose_above(scale * scale, zero, one, zero)
    inverse = choose_above(is_zero, zero, quotient(one, scale), zero)
    error = zero
    for i in range(first, first + n):
        value = splat(f32x16, x[i])
        off = fma(snapped(value * inverse, least, most, levels), scale, zero - value)
        error = fma(off * splat(f32x16, w[i]), off, error)
    return error


@inline_kernel
def search_scaled(x, w, first, n, low, high, levels, trials, n_sets, lanes, at):
    """Find the scale of a group: value = scale * code, codes low..high or, with levels, IQ4's values.

    trials f32[n_sets,16] at an address: the code that the largest weight is first given, of either sign. levels:
    address of IQ4_NEAREST, or 0. Returns (scale, curvature of the error in the scale).
    """
    zero, one = splat(f32x16, types.float32(0)), splat(f32x16, types.float32(1))
    least, most = splat(f32x16, types.float32(low)), splat(f32x16, types.float32(high))
    largest = types.float32(0)
    sum_w = types.float32(0)
    for i in range(first, first + n):
        sum_w += w[i]
        if abs(x[i]) > abs(largest):
            largest = x[i]
    if not (abs(largest) > SMALLEST and sum_w > 0):
        return types.float32(0), types.float32(0)
    least_error = types.float32(np.inf)
    best_scale, curvature = types.float32(0), types.float32(0)
    for trial_set in range(n_sets):
        scale = quotient(splat(f32x16, largest), load(f32x16, trials + 64 * trial_set))
        sum_qq = zero
        for _ in range(N_TURNS):
            inverse = quotient(one, scale)
            sum_qq = sum_qx = zero
            for i in range(first, first + n):
                value = splat(f32x16, x[i])
                code = snapped(value * inverse, least, most, levels)
                weighted = code * splat(f32x16, w[i])
                sum_qq = fma(weighted, code, sum_qq)
                sum_qx = fma(weighted, value, sum_qx)
            fitted = quotient(sum_qx, sum_qq)
            scale = choose_above(fitted * fitted, zero, fitted, scale)
        error, lane = least_lane(scaled_error(x, w, first, n, low, high, levels, scale))
        if error < least_error:
            store(at, scale)
            store(at + 64, sum_qq)
            least_error, best_scale, curvature = error, lanes[0, lane], lanes[1, lane]
    return best_scale, curvature


@inline_kernel
def fit_common_scale(values, weights, n, low, high, trials, lanes, at):
    """The number d for which the values are best written as d * whole numbers from low to high.

    values, weights f32[n]; trials f32[16] at an address: the whole number that the largest value is first given.
    """
    largest = types.float32(0)
    for i in range(n):
        if abs(values[i]) > abs(largest):
            largest = values[i]
    if not abs(largest) > SMALLEST:
        return types.float32(0)
    scale = quotient(splat(f32x16, largest), load(f32x16, trials))
    zero, one = splat(f32x16, types.float32(0)), splat(f32x16, types.float32(1))
    least, most = splat(f32x16, types.float32(low)), splat(f32x16, types.float32(high))
    inverse = quotient(one, scale)
    sum_qq = sum_qx = zero
    for i in range(n):
        value = splat(f32x16, values[i])
        code = clamp(rounded(value * inverse), least, most)
        weighted = code * splat(f32x16, weights[i])
        sum_qq = fma(weighted, code, sum_qq)
        sum_qx = fma(weighted, value, sum_qx)
    fitted = quotient(sum_qx, sum_qq)
    scale = choose_above(fitted * fitted, zero, fitted, scale)
    _, best = least_lane(scaled_error(values, weights, 0, n, low, high, 0, scale))
    store(at, scale)
    return lanes[0, best]
