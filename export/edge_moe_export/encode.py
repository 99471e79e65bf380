"""Encodes f32 values into the float formats and Q8_0, bit for bit as the `gguf` package does."""

from collections.abc import Callable

import numpy as np

from edge_moe.formats import BF16, F16, F32, Q8_0, BlockFormat


def encode(values: np.ndarray, fmt: BlockFormat) -> np.ndarray:
    """Encode rows. values f32[..., C], C a multiple of the block size -> u8[n_bytes].

    Source: ggml's reference encoders (ggml-quants.c).
    """
    return _ENCODERS[fmt.name](np.ascontiguousarray(values, np.float32).reshape(-1)).view(np.uint8).reshape(-1)


def _f32(values: np.ndarray) -> np.ndarray:
    return values.astype("<f4", copy=False)


def _f16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # too large for f16: infinite, as in ggml
        return values.astype("<f2")


def _bf16(values: np.ndarray) -> np.ndarray:
    """The upper half of each f32, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))  # may wrap for NaN only
    return np.where(is_nan, (bits >> 16) | 64, rounded >> 16).astype("<u2")


def _q8_0(values: np.ndarray) -> np.ndarray:
    """Blocks of 32 with one f16 scale: the largest value becomes 127, halves are rounded away from zero."""
    groups = values.reshape(-1, Q8_0.block_size)
    scales = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = groups * np.where(scales == 0, np.float32(0), 1 / scales)
        whole = np.trunc(scaled)
        whole += np.where(np.abs(scaled - whole) >= 0.5, np.sign(scaled), np.float32(0))
        blocks = np.empty(len(groups), Q8_0.layout)
        blocks["scale"] = scales[:, 0]
        blocks["quants"] = whole
    return blocks


_ENCODERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    F32.name: _f32,
    F16.name: _f16,
    BF16.name: _bf16,
    Q8_0.name: _q8_0,
}
