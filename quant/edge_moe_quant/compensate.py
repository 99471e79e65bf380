"""Encodes rows so that errors of one column are made good by the columns after it (GPTQ), on the grid of a format.

The grid, that is every scale, is chosen first by the weighted search and stays; only codes are decided here. Then
single codes are changed as long as that helps. Source: GPTQ, arXiv 2210.17323, section 3.3, with the columns in the
order of falling importance; cyclic descent as in QuantEase, arXiv 2309.01885.
"""

import numpy as np

from edge_moe.formats import BlockFormat
from edge_moe.kernels.jit import inline_kernel, kernel
from edge_moe_quant.encode import encode_rows
from edge_moe_quant.grids import LEVELS, grid, with_codes

AIM_DAMPING = 0.1  # of the mean second moment, where weights are moved to meet the original's outputs
DAMPING = 0.01  # of the mean second moment, added to each
SWEEPS = 8  # over the columns at most, for single codes that can still be bettered
_COLUMNS = 128  # walked one by one before the columns after them are mended by one matrix product


def encode_compensated(values: np.ndarray, fmt: BlockFormat, factor: "Factor") -> np.ndarray:
    """Encode rows f32[R,C] for inputs with the second moments of `factor` -> u8[R,row_bytes].

    Raises FormatError for values that are not finite. The format must have a grid.
    """
    encoded = encode_rows(values, fmt, factor.importance)
    base, step = (np.ascontiguousarray(each[:, factor.order]) for each in grid(encoded, fmt))
    levels = LEVELS[fmt.name]
    middles = np.empty(0, np.float32) if _is_even(levels) else (levels[1:] + levels[:-1]) / 2
    wanted = np.ascontiguousarray(values[:, factor.order], np.float32)
    work, codes = wanted.copy(), np.empty(wanted.shape, np.uint8)
    n_cols = work.shape[1]
    for first in range(0, n_cols, _COLUMNS):
        last = min(first + _COLUMNS, n_cols)
        errors = np.empty((len(work), last - first), np.float32)
        _walk_columns(work, base, step, factor.root, first, last, levels, middles, codes, errors)
        if last < n_cols:
            work[:, last:] -= errors @ factor.root[first:last, last:]
    slope = (wanted - (base + levels[codes] * step)) @ factor.moments
    _descend(base, step, factor.moments, levels, middles, codes, slope)
    unordered = np.empty_like(codes)
    unordered[:, factor.order] = codes
    return with_codes(encoded, fmt, unordered)


def _is_even(levels: np.ndarray) -> bool:
    return bool((np.diff(levels) == 1).all())


class Aim:
    """Moves rows so that they give from the quantized model's inputs x what they gave from the original's y.

    By least squares over all tokens. Source: the asymmetric aim of GPTAQ, arXiv 2504.02692, here solved before the
    columns are walked.
    """

    def __init__(self, own: np.ndarray, cross: np.ndarray) -> None:
        """own f64[C,C] is the sum of x x^T, cross f64[C,C] that of y x^T. With y = x rows stay."""
        damped = own + np.eye(len(own)) * (AIM_DAMPING * np.diagonal(own).mean())
        self._change = np.linalg.solve(damped, (cross - own).T).T.astype(np.float32)

    def at(self, values: np.ndarray) -> np.ndarray:
        """The moved rows. f32[R,C] -> f32[R,C]."""
        return values + values @ self._change


class Factor:
    """What compensation needs of second moments H f64[C,C], damped, in falling order: H, the root U of its inverse."""

    def __init__(self, moments: np.ndarray) -> None:
        diagonal = np.diagonal(moments)
        mean = float(diagonal.mean())
        if not mean > 0:
            raise ValueError("second moments that are all zero have no inverse")
        self.importance = np.maximum(diagonal / mean, 1e-3).astype(np.float32)
        self.order = np.argsort(-diagonal, kind="stable")
        ordered = moments[np.ix_(self.order, self.order)] + np.eye(len(moments)) * (DAMPING * mean)
        self.moments = np.ascontiguousarray(ordered / mean, np.float32)
        inverse = np.linalg.inv(ordered / mean)
        lower = np.linalg.cholesky((inverse + inverse.T) / 2)
        self.root = np.ascontiguousarray(lower.T, np.float32)


@inline_kernel
def _nearest(t, levels, middles):
    """The code of the level next to t; `middles` lie between levels, or there are none where levels are even."""
    if middles.size == 0:
        return min(max(int(np.floor(t - levels[0] + np.float32(0.5))), 0), levels.size - 1)
    code = 0
    for middle in middles:
        code += t > middle
    return code


@kernel
def _walk_columns(work, base, step, root, first, last, levels, middles, codes, errors):
    """Decide the codes of columns first:last, each row by itself; later columns of this range take up the errors."""
    for r in range(work.shape[0]):
        for j in range(first, last):
            code = 0
            if step[r, j] != 0:
                code = _nearest((work[r, j] - base[r, j]) / step[r, j], levels, middles)
            codes[r, j] = np.uint8(code)
            error = (work[r, j] - (base[r, j] + levels[code] * step[r, j])) / root[j, j]
            errors[r, j - first] = error
            for k in range(j + 1, last):
                work[r, k] -= error * root[j, k]


@kernel
def _descend(base, step, moments, levels, middles, codes, slope):
    """Change single codes as long as that brings a row nearer. slope: (what is wanted - what there is) @ moments."""
    for r in range(codes.shape[0]):
        for _ in range(SWEEPS):
            n_changed = 0
            for j in range(codes.shape[1]):
                if step[r, j] == 0:
                    continue
                now = levels[codes[r, j]] + slope[r, j] / (moments[j, j] * step[r, j])
                code = _nearest(now, levels, middles)
                if code != codes[r, j]:
                    change = (levels[code] - levels[codes[r, j]]) * step[r, j]
                    codes[r, j] = np.uint8(code)
                    n_changed += 1
                    for k in range(codes.shape[1]):
                        slope[r, k] -= change * moments[j, k]
            if n_changed == 0:
                break
