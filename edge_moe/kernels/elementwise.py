"""What touches each value once, row by row: norms, rotary embedding, gated activation, weighted sums, bf16 rounding."""

import math

import numba
import numpy as np
from numba import types

from edge_moe.kernels.functions import exp2
from edge_moe.kernels.jit import inline_kernel, kernel
from edge_moe.kernels.simd import address_of, f32x16, first_lane, fma, load, reduce_add, splat, store


@inline_kernel
def rms_norm_row(x, weight, eps, out):
    """RMSNorm of one row. x, weight and out f32[D], contiguous."""
    n = x.shape[0]
    whole = n & ~15
    xs, weights, outs = address_of(x), address_of(weight), address_of(out)
    a = b = splat(f32x16, types.float32(0.0))
    for i in range(0, 4 * (whole & ~31), 128):
        first, second = load(f32x16, xs + i), load(f32x16, xs + i + 64)
        a, b = fma(first, first, a), fma(second, second, b)
    if whole & 16:
        first = load(f32x16, xs + 4 * whole - 64)
        a = fma(first, first, a)
    for i in range(whole, n):  # each in all lanes, a sixteenth of its square
        first = splat(f32x16, x[i])
        b = fma(first, first * types.float32(1 / 16), b)
    scale = types.float32(1.0) / np.sqrt(reduce_add(a + b) / types.float32(n) + eps)
    for i in range(0, 4 * whole, 64):
        store(outs + i, load(f32x16, xs + i) * scale * load(f32x16, weights + i))
    for i in range(whole, n):
        store(outs + 4 * i, first_lane(splat(f32x16, x[i]) * scale * splat(f32x16, weight[i])))


@inline_kernel
def rope_row(x, cos, sin, out):
    """Rotate adjacent pairs of one row. x and out f32[P], cos and sin f32[P/2]."""
    for i in range(cos.shape[0]):
        even, odd = x[2 * i], x[2 * i + 1]
        out[2 * i] = fma(even, cos[i], -(odd * sin[i]))
        out[2 * i + 1] = fma(even, sin[i], odd * cos[i])


@inline_kernel
def to_bf16(value):
    """Round f32 to the nearest bf16, ties to even; returns its 16 bits. NaN keeps its sign and stays NaN."""
    bits = np.float32(value).view(np.uint32)
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16((bits >> np.uint32(16)) | np.uint32(64))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@inline_kernel
def from_bf16(bits):
    """The f32 value of 16 bf16 bits."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@kernel
def store_bf16(values, out):
    """Round values f32[T,N] into out u16[T,N] (bf16 bits)."""
    for t in range(values.shape[0]):
        for i in range(values.shape[1]):
            out[t, i] = to_bf16(values[t, i])


@inline_kernel
def silu_multiply_row(gate, up, out):
    """silu(gate) * up. All f32[F], contiguous."""
    n = gate.shape[0]
    whole = n & ~15
    gates, ups, outs = address_of(gate), address_of(up), address_of(out)
    for i in range(0, 4 * whole, 64):
        g = load(f32x16, gates + i)
        power = exp2(g * types.float32(-math.log2(math.e)))
        store(outs + i, g / (splat(f32x16, types.float32(1.0)) + power) * load(f32x16, ups + i))
    for i in range(whole, n):
        out[i] = gate[i] / (np.float32(1.0) + np.exp(-gate[i])) * up[i]


@inline_kernel
def weighted_sum_row(values, positions, weights, out):
    """Rows times their weights, added. values f32[M,D], positions i64[K], weights f32[K], out f32[D]."""
    out[:] = 0
    for k in range(positions.shape[0]):
        row, weight = values[positions[k]], weights[k]
        for i in range(values.shape[1]):
            out[i] += weight * row[i]


def set_threads(n_threads: int) -> None:
    """Use `n_threads` in the kernels that the calling Python thread starts from now on."""
    numba.set_num_threads(n_threads)


def max_threads() -> int:
    """The most threads that `set_threads` takes in this process."""
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
