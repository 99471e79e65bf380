"""Encodes rows so that errors of one column are made good by the columns after it (GPTQ), on the grid of a format.

The grid, that is every scale, is chosen first by the weighted search and stays; only codes are decided here. Source:
GPTQ, arXiv 2210.17323, section 3.3, with the columns in the order of falling importance.
"""

import numpy as np

from edge_moe.formats import BlockFormat
from edge_moe.kernels.jit import kernel
from edge_moe_quant.encode import encode_rows
from edge_moe_quant.grids import TOP_CODES, grid, with_codes

AIM_DAMPING = 0.1  # of the mean second moment, where weights are moved to meet the original's outputs
DAMPING = 0.01  # of the mean second moment, added to each
_COLUMNS = 128  # walked one by one before the columns after them are mended by one matrix product


def encode_compensated(values: np.ndarray, fmt: BlockFormat, factor: "Factor") -> np.ndarray:
    """Encode rows f32[R,C] for inputs with the second moments of `factor` -> u8[R,row_bytes].

    Raises FormatError for values that are not finite. The format must have a grid.
    """
    encoded = encode_rows(values, fmt, factor.importance)
    base, step = (np.ascontiguousarray(each[:, factor.order]) for each in grid(encoded, fmt))
    least, top = TOP_CODES[fmt.name]
    work = np.ascontiguousarray(values[:, factor.order], np.float32)
    codes = np.empty(work.shape, np.uint8)
    n_cols = work.shape[1]
    for first in range(0, n_cols, _COLUMNS):
        last = min(first + _COLUMNS, n_cols)
        errors = np.empty((len(work), last - first), np.float32)
        _walk_columns(work, base, step, factor.root, first, last, np.float32(least), np.float32(top), codes, errors)
        if last < n_cols:
            work[:, last:] -= errors @ factor.root[first:last, last:]
    unordered = np.empty_like(codes)
    unordered[:, factor.order] = codes
    return with_codes(encoded, fmt, unordered)


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
    """What compensation needs of second moments H f64[C,C]: the root U of its inverse, U^T U, in falling order of H."""

    def __init__(self, moments: np.ndarray) -> None:
        diagonal = np.diagonal(moments)
        mean = float(diagonal.mean())
        if not mean > 0:
            raise ValueError("second moments that are all zero have no inverse")
        self.importance = np.maximum(diagonal / mean, 1e-3).astype(np.float32)
        self.order = np.argsort(-diagonal, kind="stable")
        ordered = moments[np.ix_(self.order, self.order)] + np.eye(len(moments)) * (DAMPING * mean)
        inverse = np.linalg.inv(ordered / mean)
        lower = np.linalg.cholesky((inverse + inverse.T) / 2)
        self.root = np.ascontiguousarray(lower.T, np.float32)


@kernel
def _walk_columns(work, base, step, root, first, last, least, top, codes, errors):
    """Decide the codes of columns first:last, each row by itself; later columns of this range take up the errors."""
    for r in range(work.shape[0]):
        for j in range(first, last):
            code = least
            if step[r, j] != 0:
                code = min(max(np.floor((work[r, j] - base[r, j]) / step[r, j] + np.float32(0.5)), least), top)
            codes[r, j] = np.uint8(code)
            error = (work[r, j] - (base[r, j] + code * step[r, j])) / root[j, j]
            errors[r, j - first] = error
            for k in range(j + 1, last):
                work[r, k] -= error * root[j, k]
