"""Kernels that read whole rows of logits: their softmax normalizers, and how far two distributions are apart."""

import numpy as np
from numba import prange

from edge_moe.kernels.jit import inline_kernel, parallel_kernel, spliced_kernel
from edge_moe.kernels.simd import fma

_LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
_LEAST = np.float32(-87.0)  # exp of less is no normal f32
_NOTHING = np.float32(-80.0)  # a probability below exp of this adds nothing to a divergence
_CLOSE = np.float32(0.25)
# So many terms are computed at a time, in a loop that LLVM vectorizes, and added to a sum for each lane: it may not
# make lanes of a single sum, since their order is another.
_TERMS, _LANES = 512, 16


@inline_kernel
def _exp(x):
    """exp of f32 to about one unit in the last place, at least exp(-87): without a call, so that LLVM vectorizes it."""
    if x < _LEAST:
        x = _LEAST
    n = np.floor(fma(x, _LOG2_E, np.float32(0.5)))
    r = fma(n, -_LN_2, x)
    # Taylor's series on |r| <= ln(2) / 2, where the first term left out is 5e-9
    p = np.float32(1 / 5040)
    p = fma(p, r, np.float32(1 / 720))
    p = fma(p, r, np.float32(1 / 120))
    p = fma(p, r, np.float32(1 / 24))
    p = fma(p, r, np.float32(1 / 6))
    p = fma(p, r, np.float32(0.5))
    p = fma(p, r, np.float32(1))
    p = fma(p, r, np.float32(1))
    power = np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)
    return p * np.uint32(power).view(np.float32)


@inline_kernel
def _add_terms(terms, sums):
    """Add terms f32[_TERMS] to sums f64[_LANES]."""
    for i in range(0, _TERMS, _LANES):
        for lane in range(_LANES):
            sums[lane] += np.float64(terms[i + lane])


@parallel_kernel
def log_normalizers(logits, top):
    """log(sum(exp(logits))) of each row. logits f32[T,V], top f32[T] (each row's largest) -> f64[T]."""
    n_rows, n_cols = logits.shape
    out = np.empty(n_rows, np.float64)
    for t in prange(n_rows):
        row, highest = logits[t], top[t]
        terms, sums = np.zeros(_TERMS, np.float32), np.zeros(_LANES, np.float64)
        for first in range(0, n_cols, _TERMS):
            n = min(_TERMS, n_cols - first)
            terms[n:] = 0
            for i in range(n):
                terms[i] = _exp(row[first + i] - highest)
            _add_terms(terms, sums)
        out[t] = np.float64(highest) + np.log(sums.sum())
    return out


@spliced_kernel
def _divergence_term(p_log, q_log):
    """p log(p/q) - p + q, which is never negative, and p. f32, f32 -> f32, f32.

    Over all tokens -p + q adds up to nothing; with it each term is of second order where p and q are close, so that
    f32 rounding (and that of log probabilities kept in 16 bits) does not swamp a divergence of 1e-6.
    """
    x = p_log - q_log
    p, q = _exp(p_log), _exp(q_log)
    # q (exp(x) (x - 1) + 1) by its series: the sum above would cancel
    s = np.float32(1 / 840)
    s = fma(s, x, np.float32(1 / 144))
    s = fma(s, x, np.float32(1 / 30))
    s = fma(s, x, np.float32(1 / 8))
    s = fma(s, x, np.float32(1 / 3))
    s = fma(s, x, np.float32(0.5))
    close = q * x * x * s
    apart = q
    if p_log > _NOTHING:
        apart = p * (x - np.float32(1)) + q
    return (close if abs(x) < _CLOSE else apart), p


@parallel_kernel
def divergences(values, first, scale, offset, floor, logits, normalizers):
    """KL(reference || model) of each row, in nats, and the reference's probabilities added up.

    The reference's log probability of token i is values[:, first + i] * scale + offset, unless the value is at most
    `floor`: then it is too small to be known and left out. values f32 or u16[T,first+V or more], scale, offset and
    floor f32[T] (NaN: no floor), logits f32[T,V], normalizers f32[T] -> f64[T], f64[T].
    """
    n_rows, n_cols = logits.shape
    out, mass = np.empty(n_rows, np.float64), np.empty(n_rows, np.float64)
    for t in prange(n_rows):
        reference, row = values[t, first : first + n_cols], logits[t]
        step, base, least, normalizer = scale[t], offset[t], floor[t], normalizers[t]
        terms, probabilities = np.zeros(_TERMS, np.float32), np.zeros(_TERMS, np.float32)
        total, probability = np.zeros(_LANES, np.float64), np.zeros(_LANES, np.float64)
        for start in range(0, n_cols, _TERMS):
            n = min(_TERMS, n_cols - start)
            terms[n:], probabilities[n:] = 0, 0
            for i in range(n):
                value = np.float32(reference[start + i])
                p_log = value * step + base
                term, p = _divergence_term(p_log, row[start + i] - normalizer)
                unknown = value <= least
                terms[i] = np.float32(0) if unknown else term
                probabilities[i] = np.float32(0) if unknown else p
            _add_terms(terms, total)
            _add_terms(probabilities, probability)
        out[t], mass[t] = total.sum(), probability.sum()
    return out, mass
