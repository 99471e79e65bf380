"""The grids of block formats whose levels are evenly spaced: base + code * step, with the codes put into the blocks.

Codes are unsigned, 0 to the format's top code. Source: the block structures of ggml (ggml-common.h).
"""

import numpy as np

from edge_moe.formats import BlockFormat

# Format -> least and largest code. Q8_0's -127 to 127 are shifted by 128.
TOP_CODES: dict[str, tuple[int, int]] = {
    "Q4_0": (0, 15), "Q4_1": (0, 15), "Q4_K": (0, 15), "Q5_0": (0, 31), "Q5_1": (0, 31), "Q5_K": (0, 31),
    "Q6_K": (0, 63), "Q8_0": (1, 255),
}  # fmt: skip


def has_grid(fmt: BlockFormat) -> bool:
    """Whether the levels of a format are evenly spaced and known here."""
    return fmt.name in TOP_CODES


def grid(data: np.ndarray, fmt: BlockFormat) -> tuple[np.ndarray, np.ndarray]:
    """The grid that encoded rows u8[R,row_bytes] lie on: base and step, f32[R,C] each."""
    least, top = TOP_CODES[fmt.name]
    shape = (len(data), data.shape[1] // fmt.block_bytes * fmt.block_size)
    low = fmt.decode(with_codes(data, fmt, np.full(shape, least, np.uint8)))
    high = fmt.decode(with_codes(data, fmt, np.full(shape, top, np.uint8)))
    step = (high - low) / np.float32(top - least)
    return low - np.float32(least) * step, step


def with_codes(data: np.ndarray, fmt: BlockFormat, codes: np.ndarray) -> np.ndarray:
    """A copy of encoded rows u8[R,row_bytes] with other codes u8[R,C], their scales as they are."""
    blocks = data.copy().reshape(-1, fmt.block_bytes)
    q = codes.reshape(-1, fmt.block_size)
    if fmt.name == "Q8_0":
        blocks[:, 2:] = q - np.uint8(128)
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
    else:  # blocks of 32: the first and the second 16 share bytes, fifth bits lie in four bytes before them
        blocks[:, -16:] = q[:, :16] & 15 | (q[:, 16:] & 15) << 4
        if fmt.name in ("Q5_0", "Q5_1"):
            blocks[:, -20:-16] = np.packbits(q >> 4, axis=1, bitorder="little")
    return blocks.reshape(data.shape)
