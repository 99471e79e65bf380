"""Block formats as MLX's affine groups: value = scale * q + bias, q of a few bits, for each 32 elements of a row.

Scales and biases are f32: products of an f16 and a whole number are exact in it, and so is nothing lost of the formats
whose groups are of 32. Those of 16 become 8-bit groups of 32, which are near but not the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_moe.formats import BlockFormat

GROUP = 32
_WIDE_BITS = 8  # of formats that have no such groups


@dataclass(frozen=True)
class Affine:
    """Rows in groups: q u8[..., cols], scales and biases f32[..., cols/32]."""

    q: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int

    def packed(self) -> np.ndarray:
        """q as MLX keeps it: a stream of bits, the lowest first, in u32[..., cols * bits / 32]."""
        if self.bits == 8:
            return np.ascontiguousarray(self.q).view(np.uint32)
        if self.bits == 4:
            return np.ascontiguousarray(self.q[..., 0::2] | (self.q[..., 1::2] << 4)).view(np.uint32)
        fields = (self.q[..., None] >> np.arange(self.bits, dtype=np.uint8)) & 1
        stream = np.packbits(fields.reshape(*self.q.shape[:-1], -1), axis=-1, bitorder="little")
        return stream.view(np.uint32)


def is_float(fmt: BlockFormat) -> bool:
    """Whether weights stay the floats they are."""
    return fmt.block_size == 1


def is_lossless(fmt: BlockFormat) -> bool:
    """Whether a format's values stay the same, but for the rounding of f32."""
    return is_float(fmt) or fmt.name in _EXACT


def form_bytes(fmt: BlockFormat, n_weights: int) -> int:
    """What weights take in memory as MLX has them."""
    if is_float(fmt):
        return n_weights * fmt.block_bytes
    bits = _EXACT[fmt.name][0] if fmt.name in _EXACT else _WIDE_BITS
    return n_weights * bits // 8 + n_weights // GROUP * 8


def affine(fmt: BlockFormat, data: np.ndarray) -> Affine:
    """Rows of blocks u8[..., row_bytes] in groups of 32."""
    if fmt.name not in _EXACT:
        return _wide(fmt.decode(data))
    bits, unpack = _EXACT[fmt.name]
    blocks = np.ascontiguousarray(data).reshape(-1).view(fmt.layout)
    with np.errstate(invalid="ignore"):  # a damaged scale
        q, scales, biases = unpack(blocks)
    rows = data.shape[:-1]
    return Affine(
        q.reshape(*rows, -1),
        np.ascontiguousarray(scales, np.float32).reshape(*rows, -1),
        np.ascontiguousarray(biases, np.float32).reshape(*rows, -1),
        bits,
    )


def _wide(values: np.ndarray) -> Affine:
    """The nearest groups of 8 bits. values f32[..., cols]."""
    groups = values.reshape(*values.shape[:-1], -1, GROUP)
    low, high = groups.min(-1), groups.max(-1)
    scales = (high - low) / 255
    steps = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    q = np.rint((groups - low[..., None]) * steps[..., None])
    return Affine(np.clip(q, 0, 255).astype(np.uint8).reshape(values.shape), scales, low, _WIDE_BITS)


Unpacked = tuple[np.ndarray, np.ndarray, np.ndarray]  # q, scales, biases


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """u8[..., 16] -> u8[..., 32], the low ones first."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _scale(blocks: np.ndarray, name: str = "scale") -> np.ndarray:
    return blocks[name].astype(np.float32)


def _q8_0(blocks: np.ndarray) -> Unpacked:
    scale = _scale(blocks)
    return blocks["quants"].view(np.uint8) ^ 128, scale, -128 * scale


def _q4_0(blocks: np.ndarray) -> Unpacked:
    scale = _scale(blocks)
    return _nibbles(blocks["nibbles"]), scale, -8 * scale


def _q4_1(blocks: np.ndarray) -> Unpacked:
    return _nibbles(blocks["nibbles"]), _scale(blocks), _scale(blocks, "minimum")


def _five_bits(blocks: np.ndarray) -> np.ndarray:
    fifth = (blocks["fifth_bits"][:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return _nibbles(blocks["nibbles"]) | (fifth << 4).astype(np.uint8)


def _q5_0(blocks: np.ndarray) -> Unpacked:
    scale = _scale(blocks)
    return _five_bits(blocks), scale, -16 * scale


def _q5_1(blocks: np.ndarray) -> Unpacked:
    return _five_bits(blocks), _scale(blocks), _scale(blocks, "minimum")


def _k_factors(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases f32[B,8] of Q4_K and Q5_K: 6 bits each, those of groups 4 to 7 in two pieces."""
    first, second, third = (blocks["scales"][:, row] for row in range(3))
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    return _scale(blocks)[:, None] * scales, -(_scale(blocks, "minimum")[:, None] * minima)


def _k_nibbles(blocks: np.ndarray) -> np.ndarray:
    """u8[B,8,32]: each 32 bytes hold two groups."""
    return np.stack([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(blocks: np.ndarray) -> Unpacked:
    return _k_nibbles(blocks), *_k_factors(blocks)


def _q5_k(blocks: np.ndarray) -> Unpacked:
    fifth = (blocks["fifth_bits"][:, None] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return _k_nibbles(blocks) | (fifth << 4), *_k_factors(blocks)


# The 16 levels of IQ4_NL and IQ4_XS, 128 above: as 8-bit codes they are exact.
_LEVELS = np.array([1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241], np.uint8)


def _iq4_nl(blocks: np.ndarray) -> Unpacked:
    scale = _scale(blocks)
    return _LEVELS[_nibbles(blocks["nibbles"])], scale, -128 * scale


def _iq4_xs(blocks: np.ndarray) -> Unpacked:
    low = np.concatenate([blocks["scale_nibbles"] & 15, blocks["scale_nibbles"] >> 4], axis=-1).reshape(-1, 8)
    high = (blocks["scale_crumbs"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    scale = _scale(blocks)[:, None] * (low.astype(np.float32) + 16 * high.astype(np.float32) - 32)
    return _LEVELS[_nibbles(blocks["nibbles"])], scale, -128 * scale


_EXACT: dict[str, tuple[int, Callable[[np.ndarray], Unpacked]]] = {
    "Q8_0": (8, _q8_0),
    "Q4_0": (4, _q4_0),
    "Q4_1": (4, _q4_1),
    "Q5_0": (5, _q5_0),
    "Q5_1": (5, _q5_1),
    "Q4_K": (4, _q4_k),
    "Q5_K": (5, _q5_k),
    "IQ4_NL": (8, _iq4_nl),
    "IQ4_XS": (8, _iq4_xs),
}
