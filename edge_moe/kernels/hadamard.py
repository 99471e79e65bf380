"""Rotation of latents by Sylvester's Hadamard matrix, in blocks of the largest power of 2 that fits.

Outlier channels are spread over all others, which few bits then hold better. The matrix is its own inverse. Source:
QuaRot, arXiv 2404.00456, section 3.
"""

import numpy as np
from numba import types

from edge_moe.kernels.jit import inline_kernel, kernel
from edge_moe.kernels.simd import f32x16, fetch_add, load, splat, store

# A plan is int64[N_FIELDS]: rows [outer][inner] of `columns` floats, from a source to a place that may be the same,
# strides in bytes; BEFORE and AFTER are addresses of f32[columns] that multiply before and after the rotation.
COUNTER, N_OUTER, N_INNER, COLUMNS, SOURCE, SOURCE_OUTER, SOURCE_INNER = range(7)
PLACE, PLACE_OUTER, PLACE_INNER, BEFORE, AFTER = range(7, 12)
N_FIELDS = 12


@inline_kernel
def _rotate_block(row, n):
    """n floats at an address, n a power of 2, by the butterflies of the fast transform, not normalized."""
    half = 1
    while half < n:
        if half < 16:
            for first in range(0, n, 2 * half):
                for i in range(first, first + half):
                    a, b = load(types.float32, row + 4 * i), load(types.float32, row + 4 * (i + half))
                    store(row + 4 * i, a + b)
                    store(row + 4 * (i + half), a - b)
        else:
            for first in range(0, n, 2 * half):
                for i in range(first, first + half, 16):
                    a, b = load(f32x16, row + 4 * i), load(f32x16, row + 4 * (i + half))
                    store(row + 4 * i, a + b)
                    store(row + 4 * (i + half), a - b)
        half *= 2


@inline_kernel
def _multiply(source, factors, n, place):
    for i in range(0, n - 15, 16):
        store(place + 4 * i, load(f32x16, source + 4 * i) * load(f32x16, factors + 4 * i))
    for i in range(n & ~15, n):
        store(place + 4 * i, load(types.float32, source + 4 * i) * load(types.float32, factors + 4 * i))


@kernel
def rotate_units(fmt, plan):
    """Multiply, rotate and multiply a row, as long as the plan has some. fmt stands for nothing here."""
    n_inner, columns = load(types.int64, plan + 8 * N_INNER), load(types.int64, plan + 8 * COLUMNS)
    n_rows = load(types.int64, plan + 8 * N_OUTER) * n_inner
    block = columns & -columns
    scale = types.float32(1.0 / np.sqrt(types.float64(block)))
    while True:
        unit = fetch_add(plan, 1)
        if unit >= n_rows:
            return 0
        outer, inner = unit // n_inner, unit % n_inner
        source = load(types.int64, plan + 8 * SOURCE) + outer * load(types.int64, plan + 8 * SOURCE_OUTER)
        source += inner * load(types.int64, plan + 8 * SOURCE_INNER)
        place = load(types.int64, plan + 8 * PLACE) + outer * load(types.int64, plan + 8 * PLACE_OUTER)
        place += inner * load(types.int64, plan + 8 * PLACE_INNER)
        _multiply(source, load(types.int64, plan + 8 * BEFORE), columns, place)
        for first in range(0, columns, block):
            _rotate_block(place + 4 * first, block)
        for i in range(0, columns - 15, 16):
            store(place + 4 * i, load(f32x16, place + 4 * i) * splat(f32x16, scale))
        for i in range(columns & ~15, columns):
            store(place + 4 * i, load(types.float32, place + 4 * i) * scale)
        _multiply(place, load(types.int64, plan + 8 * AFTER), columns, place)


def rotation_plan(source: np.ndarray, place: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """A plan i64[] of `rotate_units` for rows f32[outer,inner,columns]; all arrays must live as long as it is used."""
    plan = np.zeros(N_FIELDS, np.int64)
    plan[N_OUTER : COLUMNS + 1] = source.shape
    plan[SOURCE : SOURCE_INNER + 1] = source.ctypes.data, *source.strides[:2]
    plan[PLACE : PLACE_INNER + 1] = place.ctypes.data, *place.strides[:2]
    plan[[BEFORE, AFTER]] = before.ctypes.data, after.ctypes.data
    return plan
