"""The block formats that a weight row can be stored in: their sizes, their layout in the file and a plain numpy decode.

Rows are cut into blocks of `block_size` elements, each stored in `block_bytes` bytes; all numbers are little-endian.
`decode` is the definition that the fast kernels are tested against, not what the model runs on.

Source: the block structures of ggml (ggml-common.h) and their decoders (ggml-quants.c).
"""
# ruff: noqa: N801 - the classes are named after the formats

from typing import ClassVar

import numpy as np

from edge_moe.errors import FormatError, ShapeError


class BlockFormat:
    """One storage format of a weight row; a subclass gives the constants, the block's layout and `decode_blocks`."""

    name: ClassVar[str]
    ggml_type: ClassVar[int]
    block_size: ClassVar[int]  # elements
    layout: ClassVar[np.dtype]  # the fields of one block, in file order

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in the file."""
        return self.layout.itemsize

    @property
    def activation_group(self) -> int:
        """Activations that meet these blocks are quantized in groups of this many elements; 0: they stay f32."""
        return self.block_size if self.block_size > 1 else 0

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> str:
        return self.name  # a copied or unpickled format is the same object

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of one row of n_cols elements.

        Raises FormatError when n_cols is not a multiple of the block size.
        """
        n_blocks, rest = divmod(n_cols, self.block_size)
        if rest:
            raise FormatError(f"a row of {n_cols} elements cannot be {self.name}: its blocks hold {self.block_size}")
        return n_blocks * self.block_bytes

    def decode(self, data: np.ndarray) -> np.ndarray:
        """Decode whole blocks into a new array. data u8[..., n_bytes] -> f32[..., n_elements].

        Raises ShapeError when n_bytes is not a multiple of the block's bytes.
        """
        n_bytes = data.shape[-1] if data.ndim else 0
        if data.dtype != np.uint8 or data.ndim == 0 or n_bytes % self.block_bytes:
            raise ShapeError(
                f"{self.name} data must be uint8 with a last axis of whole {self.block_bytes}-byte blocks, "
                f"not {data.dtype} of shape {data.shape}"
            )
        shape = (*data.shape[:-1], n_bytes // self.block_bytes * self.block_size)
        if data.size == 0:
            return np.zeros(shape, dtype=np.float32)
        blocks = np.ascontiguousarray(data).reshape(-1).view(self.layout)
        with np.errstate(invalid="ignore"):  # a damaged scale can be inf or NaN; it decodes to that, as in ggml
            return self.decode_blocks(blocks).reshape(shape)

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        """Decode blocks layout[B] -> f32[B, ...], the block's elements in order over the last axes."""
        raise NotImplementedError


# ---- floats: a block is one element ---------------------------------------------------------------------------------


class _F32(BlockFormat):
    name = "F32"
    ggml_type = 0
    block_size = 1
    layout = np.dtype([("value", "<f4")])

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        return blocks["value"].astype(np.float32)


class _F16(BlockFormat):
    name = "F16"
    ggml_type = 1
    block_size = 1
    layout = np.dtype([("value", "<f2")])

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        return blocks["value"].astype(np.float32)


class _BF16(BlockFormat):
    name = "BF16"
    ggml_type = 30
    block_size = 1
    layout = np.dtype([("upper_half", "<u2")])  # of the f32 with the same value

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        return (blocks["upper_half"].astype(np.uint32) << 16).view(np.float32)


# ---- 32 elements with one scale -------------------------------------------------------------------------------------


class _Q8_0(BlockFormat):
    name = "Q8_0"
    ggml_type = 8
    block_size = 32
    layout = np.dtype([("scale", "<f2"), ("quants", "i1", 32)])

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        return _f32(blocks["scale"]) * blocks["quants"].astype(np.float32)


class _Q4_0(BlockFormat):
    name = "Q4_0"
    ggml_type = 2
    block_size = 32
    layout = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        quants = _nibbles_of_32(blocks["nibbles"]).astype(np.float32) - 8
        return _f32(blocks["scale"]) * quants


class _Q4_1(BlockFormat):
    name = "Q4_1"
    ggml_type = 3
    block_size = 32
    layout = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("nibbles", "u1", 16)])

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        quants = _nibbles_of_32(blocks["nibbles"]).astype(np.float32)
        return _f32(blocks["scale"]) * quants + _f32(blocks["minimum"])


class _Q5_0(BlockFormat):
    name = "Q5_0"
    ggml_type = 6
    block_size = 32
    layout = np.dtype([("scale", "<f2"), ("fifth_bits", "<u4"), ("nibbles", "u1", 16)])

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        quants = _five_bits_of_32(blocks["nibbles"], blocks["fifth_bits"]).astype(np.float32) - 16
        return _f32(blocks["scale"]) * quants


class _Q5_1(BlockFormat):
    name = "Q5_1"
    ggml_type = 7
    block_size = 32
    layout = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("fifth_bits", "<u4"), ("nibbles", "u1", 16)])

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        quants = _five_bits_of_32(blocks["nibbles"], blocks["fifth_bits"]).astype(np.float32)
        return _f32(blocks["scale"]) * quants + _f32(blocks["minimum"])


class _IQ4_NL(BlockFormat):
    name = "IQ4_NL"
    ggml_type = 20
    block_size = 32
    layout = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        return _f32(blocks["scale"]) * _IQ4_VALUES[_nibbles_of_32(blocks["nibbles"])]


# ---- 256 elements with small scales under one big scale ("K" formats) ------------------------------------------------


class _Q2_K(BlockFormat):
    """16 groups of 16: value = scale * q - minimum, both 4-bit multiples of the block's two f16."""

    name = "Q2_K"
    ggml_type = 10
    block_size = 256
    layout = np.dtype([("scales", "u1", 16), ("crumbs", "u1", (2, 32)), ("scale", "<f2"), ("minimum", "<f2")])

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        scales = _f32(blocks["scale"]) * (blocks["scales"] & 15).astype(np.float32)
        minima = _f32(blocks["minimum"]) * (blocks["scales"] >> 4).astype(np.float32)
        quants = _in_groups(blocks["crumbs"], 2, 16)
        return scales[..., None] * quants - minima[..., None]


class _Q3_K(BlockFormat):
    """16 groups of 16: value = scale * (q - 4), q of 2 + 1 bits, the scale of 4 + 2 bits less 32."""

    name = "Q3_K"
    ggml_type = 11
    block_size = 256
    layout = np.dtype(
        [
            ("third_bits", "u1", 32),
            ("crumbs", "u1", (2, 32)),
            ("scale_nibbles", "u1", 8),
            ("scale_crumbs", "u1", 4),
            ("scale", "<f2"),
        ]
    )

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        low = _in_a_row(blocks["scale_nibbles"], 4)
        high = _in_a_row(blocks["scale_crumbs"], 2)
        scales = _f32(blocks["scale"]) * (low + 16 * high - 32)
        third_bit = _in_groups(blocks["third_bits"], 1, 16)
        quants = _in_groups(blocks["crumbs"], 2, 16) + 4 * third_bit - 4
        return scales[..., None] * quants


class _Q4_K(BlockFormat):
    """8 groups of 32: value = scale * q - minimum, both 6-bit multiples of the block's two f16."""

    name = "Q4_K"
    ggml_type = 12
    block_size = 256
    layout = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("scales", "u1", (3, 4)), ("nibbles", "u1", (4, 32))])

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        scales, minima = _scales_and_minima(blocks)
        quants = _in_groups(blocks["nibbles"], 4, 32)
        return scales[..., None] * quants - minima[..., None]


class _Q5_K(BlockFormat):
    """As Q4_K, with a fifth bit of each element; bit g of fifth_bits[l] is that of element l of group g."""

    name = "Q5_K"
    ggml_type = 13
    block_size = 256
    layout = np.dtype(
        [
            ("scale", "<f2"),
            ("minimum", "<f2"),
            ("scales", "u1", (3, 4)),
            ("fifth_bits", "u1", 32),
            ("nibbles", "u1", (4, 32)),
        ]
    )

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        scales, minima = _scales_and_minima(blocks)
        fifth_bit = _in_groups(blocks["fifth_bits"], 1, 32)
        quants = _in_groups(blocks["nibbles"], 4, 32) + 16 * fifth_bit
        return scales[..., None] * quants - minima[..., None]


class _Q6_K(BlockFormat):
    """16 groups of 16: value = scale * (q - 32), q of 4 + 2 bits, the scale an int8 multiple of the block's f16."""

    name = "Q6_K"
    ggml_type = 14
    block_size = 256
    layout = np.dtype([("nibbles", "u1", (2, 64)), ("crumbs", "u1", (2, 32)), ("scales", "i1", 16), ("scale", "<f2")])

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        scales = _f32(blocks["scale"]) * blocks["scales"].astype(np.float32)
        low = _in_groups(blocks["nibbles"], 4, 16)
        high = _in_groups(blocks["crumbs"], 2, 16)
        return scales[..., None] * (low + 16 * high - 32)


class _IQ4_XS(BlockFormat):
    """8 groups of 32 as in IQ4_NL; a group's scale has 4 + 2 bits, less 32, times the block's f16."""

    name = "IQ4_XS"
    ggml_type = 23
    block_size = 256
    layout = np.dtype(
        [("scale", "<f2"), ("scale_crumbs", "<u2"), ("scale_nibbles", "u1", (4, 1)), ("nibbles", "u1", (8, 16))]
    )

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        low = _in_a_row(blocks["scale_nibbles"], 4)
        high = (blocks["scale_crumbs"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
        scales = _f32(blocks["scale"]) * (low + 16 * high.astype(np.float32) - 32)
        return scales[..., None] * _IQ4_VALUES[_nibbles_of_32(blocks["nibbles"])]


# ---- how small fields are packed ------------------------------------------------------------------------------------

# The 16 levels of IQ4_NL and IQ4_XS: denser near zero, where most weights are.
_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)


def _f32(halves: np.ndarray) -> np.ndarray:
    """f16[B] -> f32[B, 1], ready to multiply a block's elements or group scales."""
    return halves.astype(np.float32)[:, None]


def _bit_fields(packed: np.ndarray, bits: int) -> np.ndarray:
    """u8[..., n] -> u8[..., 8 // bits, n]: first the lowest field of every byte, last the highest."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def _in_groups(packed: np.ndarray, bits: int, group: int) -> np.ndarray:
    """The bit fields of packed u8[B, ..., n], taken n bytes at a time -> f32[B, n_groups, group]."""
    return _bit_fields(packed, bits).reshape(len(packed), -1, group).astype(np.float32)


def _in_a_row(packed: np.ndarray, bits: int) -> np.ndarray:
    """The bit fields of packed u8[B, ..., n], taken n bytes at a time -> f32[B, n_fields]."""
    return _bit_fields(packed, bits).reshape(len(packed), -1).astype(np.float32)


def _nibbles_of_32(packed: np.ndarray) -> np.ndarray:
    """u8[..., 16] -> u8[..., 32]: the low nibbles are the first half of the elements."""
    return _bit_fields(packed, 4).reshape(*packed.shape[:-1], 32)


def _five_bits_of_32(nibbles: np.ndarray, fifth_bits: np.ndarray) -> np.ndarray:
    """u8[B, 16] and u32[B] -> u8[B, 32]: bit j of fifth_bits is the highest bit of element j."""
    high = (fifth_bits[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return _nibbles_of_32(nibbles) | (high << 4).astype(np.uint8)


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 group scales and 8 group minima of Q4_K and Q5_K blocks, f32[B, 8] each.

    Rows 0 and 1 of `scales` hold in their low 6 bits those of groups 0-3; row 2 the low nibbles of groups 4-7 (scale
    low, minimum high), whose upper two bits are on top of rows 0 and 1.
    """
    first, second, third = (blocks["scales"][:, row] for row in range(3))
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=-1)
    return (
        _f32(blocks["scale"]) * scales.astype(np.float32),
        _f32(blocks["minimum"]) * minima.astype(np.float32),
    )


F32, F16, BF16 = _F32(), _F16(), _BF16()
Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL = _Q8_0(), _Q4_0(), _Q4_1(), _Q5_0(), _Q5_1(), _IQ4_NL()
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS = _Q2_K(), _Q3_K(), _Q4_K(), _Q5_K(), _Q6_K(), _IQ4_XS()

FORMATS: tuple[BlockFormat, ...] = (
    F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS
)  # fmt: skip
FORMATS_BY_GGML_TYPE: dict[int, BlockFormat] = {each.ggml_type: each for each in FORMATS}
