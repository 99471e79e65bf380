"""The grids of block formats: base + level * step, the same few levels for all elements, and codes put into blocks.

A code is an index into the levels. Source: the block structures of ggml (ggml-common.h).
"""

import numpy as np

from edge_moe.formats import BlockFormat

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Format -> the levels of its codes from 0 on, rising. Q8_0's -128 is not used.
LEVELS: dict[str, np.ndarray] = {
    name: np.array(levels, np.float32)
    for name, levels in {
        "Q4_0": range(16), "Q4_1": range(16), "Q4_K": range(16), "Q5_0": range(32), "Q5_1": range(32),
        "Q5_K": range(32), "Q6_K": range(64), "Q8_0": range(-127, 128), "Q2_K": range(4), "Q3_K": range(8),
        "IQ4_NL": _IQ4_LEVELS, "IQ4_XS": _IQ4_LEVELS,
    }.items()
}  # fmt: skip


def has_grid(fmt: BlockFormat) -> bool:
    """Whether a format's levels are known here."""
    return fmt.name in LEVELS


def grid(data: np.ndarray, fmt: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    """The grid that encoded rows u8[R,row_bytes] lie on: base and step, f32[R,C] each."""
    levels = LEVELS[fmt.name]
    shape = (len(data), data.shape[1] // fmt.block_bytes * fmt.block_size)
    low = fmt.decode(with_codes(data, fmt, np.zeros(shape, np.uint8)))
    high = fmt.decode(with_codes(data, fmt, np.full(shape, len(levels) - 1, np.uint8)))
    step = (high - low) / (levels[-1] - levels[0])
    return low - levels[0] * step, step


def with_codes(data: np.ndarray, fmt: BlockFormat, codes: np.ndarray) -> np.ndarray:
    """A copy of encoded rows u8[R,row_bytes] with other codes u8[R,C], their scales as they are."""
    blocks = data.copy().reshape(-1, fmt.block_bytes)
    q = codes.reshape(-1, fmt.block_size)
    if fmt.name == "Q8_0":
        blocks[:, 2:] = q - np.uint8(127)
    elif fmt.name in ("Q4_K", "Q5_K"):
        runs = q.reshape(-1, 8, 32)
        nibbles = runs[:, 0::2] & 15 | (runs[:, 1::2] & 15) << 4
        if fmt.name == "Q5_K":
            blocks[:, 16:48] = np.bitwise_or.reduce((runs >> 4) << np.arange(8, dtype=np.uint8)[None, :, None], axis=1)
        blocks[:, -128:] = nibbles.reshape(-1, 128)
    elif fmt.name == "Q6_K":
        halves = q.reshape(-1, 2, 4, 32)  # in each half four runs
        blocks[:, :128] = (halves[:, :, :2] & 15 | (halves[:, :, 2:] & 15) << 4).reshape(-1, 128)
        shifts = np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]
        blocks[:, 128:192] = np.bitwise_or.reduce((halves >> 4) << shifts, axis=2).reshape(-1, 64)
    elif fmt.name in ("Q2_K", "Q3_K"):
        halves, first = q.reshape(-1, 2, 4, 32), 16 if fmt.name == "Q2_K" else 32
        shifts = np.arange(0, 8, 2, dtype=np.uint8)[None, None, :, None]
        blocks[:, first : first + 64] = np.bitwise_or.reduce((halves & 3) << shifts, axis=2).reshape(-1, 64)
        if fmt.name == "Q3_K":
            runs = q.reshape(-1, 8, 32)
            blocks[:, :32] = np.bitwise_or.reduce((runs >> 2) << np.arange(8, dtype=np.uint8)[None, :, None], axis=1)
    elif fmt.name == "IQ4_XS":
        in_two = q.reshape(-1, 8, 2, 16)
        blocks[:, -128:] = (in_two[:, :, 0] | in_two[:, :, 1] << 4).reshape(-1, 128)
    else:  # blocks of 32: the first and the second 16 share bytes, fifth bits lie in four bytes before them
        blocks[:, -16:] = q[:, :16] & 15 | (q[:, 16:] & 15) << 4
        if fmt.name in ("Q5_0", "Q5_1"):
            blocks[:, -20:-16] = np.packbits(q >> 4, axis=1, bitorder="little")
    return blocks.reshape(data.shape)
