"""Weights as ONNX Runtime's quantized operators take them: blocks of 4- or 8-bit codes with f32 scales.

A value is scale * (code - zero), zero being 8 or 128; codes of 4 bits lie two to a byte, the first one low. Q4_0 and
Q8_0 are of this kind already, so that they are only repacked; all other formats are decoded and rounded anew.
Source: the MatMulNBits, GatherBlockQuantized and QMoE pages of ONNX Runtime's contrib operators.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from edge_moe.formats import Q4_0, Q8_0
from edge_moe.weights import Weight

LOSSLESS_BLOCK = 32  # of Q4_0 and Q8_0; any divisor of it serves, too
_PART_VALUES = 1 << 20
# Largest codes tried for a block's largest value: fewer steps lose it a little and serve the others better.
_TRIED_STEPS = {8: (127.0,), 4: (-8.0, 8.3, -7.5, 7.0, 7.6, -8.7, -7.0, 6.5)}


@dataclass
class Loss:
    """What was rounded anew: weights, and the sums of squares of their errors and of themselves, by `from -> to`."""

    n_weights: dict[str, int] = field(default_factory=dict)
    _errors: dict[str, float] = field(default_factory=dict)
    _squares: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, values: np.ndarray, errors: np.ndarray) -> None:
        """Count some weights."""
        self.n_weights[kind] = self.n_weights.get(kind, 0) + values.size
        self._errors[kind] = self._errors.get(kind, 0.0) + float(np.vdot(errors, errors))
        self._squares[kind] = self._squares.get(kind, 0.0) + float(np.vdot(values, values))

    def relative_error(self, kind: str) -> float:
        """Root of the mean squared error, as a part of the weights' own size."""
        squares = self._squares[kind]
        return math.sqrt(self._errors[kind] / squares) if squares else 0.0


def fits(weight: Weight, block: int) -> bool:
    """Whether the weight's rows are whole blocks."""
    return weight.shape[-1] % block == 0


def decoded(weight: Weight) -> Iterator[np.ndarray]:
    """All values in order, some rows at a time: f32[rows,C]."""
    for index in range(_n_matrices(weight)):
        for rows in _row_parts(weight):
            yield weight.format.decode(_row_bytes(weight, index, rows))


def matrix(weight: Weight, index: int = 0) -> np.ndarray:
    """One matrix of a weight, decoded: f32[rows,C]."""
    return weight.format.decode(_row_bytes(weight, index, slice(0, weight.shape[-2])))


def is_lossless(weight: Weight, bits: int, block: int) -> bool:
    """Whether codes of `bits` with a scale for each `block` hold exactly what the file holds."""
    return LOSSLESS_BLOCK % block == 0 and (weight.format is Q4_0 or (weight.format is Q8_0 and bits == 8))


def packed(
    weight: Weight,
    bits: int,
    block: int,
    loss: Loss,
    scales: list[np.ndarray],
    index: int | None = None,
    importance: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Codes of a weight (of one matrix of a stack: `index`) in order: u8[rows, C * bits / 8] for some rows at a time.

    The scales f32[rows, C / block] are appended to `scales` meanwhile; what is lost is counted in `loss`.
    `importance` f32[matrices, C] says how much an error in a column counts.
    """
    for number in range(_n_matrices(weight)) if index is None else (index,):
        for rows in _row_parts(weight):
            data = _row_bytes(weight, number, rows)
            if is_lossless(weight, bits, block):
                codes, scale = _repacked(weight, data)
                scale = np.repeat(scale, LOSSLESS_BLOCK // block, axis=1)
            else:
                values = weight.format.decode(data)
                codes, scale = quantize(values, bits, block, None if importance is None else importance[number])
                restored = codes.reshape(*scale.shape, block) * scale[..., None]
                kind = f"{weight.format.name} to {bits} bits"
                loss.add(kind, values, values - restored.reshape(values.shape))
            scales.append(scale)
            yield pack(codes, bits)


def quantize(
    values: np.ndarray, bits: int, block: int, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Round each block to signed codes. values f32[rows,C] -> codes i8[rows,C], scales f32[rows, C / block].

    The scale with the least squared error of a few is taken; given the codes, the best scale is sum(v q) / sum(q q).
    With `importance` f32[C], above 0, the errors are weighted by it.
    """
    blocks = values.reshape(-1, block)
    weighted, weights = blocks, None
    if importance is not None:
        weights = np.broadcast_to(importance, values.shape).reshape(-1, block)
        weighted = blocks * weights
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    best_codes = np.zeros(blocks.shape, np.int8)
    best_scales = np.zeros((len(blocks), 1), np.float32)
    best_gain = np.zeros((len(blocks), 1), np.float32)  # how much of sum(v v) the codes explain
    for steps in _TRIED_STEPS[bits]:
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            codes = np.clip(np.rint(np.nan_to_num(blocks * (np.float32(steps) / extreme))), low, high)
            overlap = np.einsum("bi,bi->b", weighted, codes)[:, None]
            size = np.einsum("bi,bi->b", codes if weights is None else codes * weights, codes)[:, None]
            gain = np.nan_to_num(overlap * overlap / size)
            scales = np.nan_to_num(overlap / size)
        better = gain > best_gain
        np.copyto(best_codes, codes, where=better, casting="unsafe")
        np.copyto(best_scales, scales, where=better)
        np.copyto(best_gain, gain, where=better)
    return best_codes.reshape(values.shape), best_scales.reshape(len(values), -1)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes to bytes. i8[rows,C] -> u8[rows, C * bits / 8]."""
    raised = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return raised if bits == 8 else raised[:, 0::2] | raised[:, 1::2] << 4


def _repacked(weight: Weight, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes i8[rows,C] and scales f32[rows, C / 32] that the file itself holds."""
    blocks = np.ascontiguousarray(data).reshape(-1).view(weight.format.layout)
    if weight.format is Q8_0:
        codes = blocks["quants"]
    else:  # element i and i + 16 share a byte
        nibbles = blocks["nibbles"]
        codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.int8) - np.int8(8)
    return codes.reshape(len(data), -1), blocks["scale"].astype(np.float32).reshape(len(data), -1)


def _n_matrices(weight: Weight) -> int:
    return weight.shape[0] if len(weight.shape) == 3 else 1


def _row_parts(weight: Weight) -> Iterator[slice]:
    n_rows, step = weight.shape[-2], max(1, _PART_VALUES // weight.shape[-1])
    return (slice(first, min(first + step, n_rows)) for first in range(0, n_rows, step))


def _row_bytes(weight: Weight, index: int, rows: slice) -> np.ndarray:
    """The bytes of some rows of one matrix: u8[rows, row_bytes]."""
    start = weight.first_byte + index * (weight.stride_bytes or weight.matrix_bytes)
    first, last = start + rows.start * weight.row_bytes, start + rows.stop * weight.row_bytes
    return weight.data[first:last].reshape(-1, weight.row_bytes)
