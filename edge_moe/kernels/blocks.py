"""Each block format once, as a numba type: where its codes and scales are, which is all that the products need to know.

Three families share their products: floats; blocks of 32 with one scale (a pair of them fills a register); and
superblocks of 256 with integer scales for each 16 or 32 columns. A format is a few functions registered by `method`:

- floats: `load(address) -> f32x16`, `load_one(address) -> f32`
- blocks of 32: `codes(first, second)`, `factors(block)` -> (scale, minimum): value = scale * code + minimum
- superblocks: `codes(block, chunk)` for 64 columns, `scales(block)` -> (d, dmin, scales i16x16, minimums i16x16), each
  for 16 columns: value = d * scale * code - dmin * minimum

Codes are u8x64 in the order of the columns; formats with signed codes return `stored_sign(codes)`.

Source: ggml-common.h (block layouts) and ggml-quants.c (their meaning).
"""

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import models, overload_method, register_model

from edge_moe.kernels.dots import SIGN_BIAS, stored_sign
from edge_moe.kernels.jit import inline_kernel
from edge_moe.kernels.simd import (
    bits_to_bytes,
    convert,
    f32x16,
    from_bfloat,
    from_half,
    i8x16,
    i16x16,
    join,
    load,
    load_bfloat,
    load_half,
    picker,
    shifter,
    splat,
    table_lookup,
    u8x8,
    u8x16,
    u8x32,
    u8x64,
    u16x16,
    u16x32,
    u32x8,
    view,
)


class FormatTag(types.Opaque):
    """A block format as the type of a kernel's argument, so that the kernel is compiled for it; it has no value."""

    group = 1  # columns that share a scale

    def __init__(self, format_name: str, block_bytes: int, max_code: int = 0, group: int = 0) -> None:
        self.format_name, self.block_bytes, self.max_code = format_name, block_bytes, max_code
        self.group = group or self.group
        self.signed = max_code < 0
        self.has_minimum = not self.signed or SIGN_BIAS > 0
        super().__init__(name=f"{type(self).__name__}({format_name})")


class FloatFormat(FormatTag):
    """Plain numbers."""


class BlockFormat(FormatTag):
    """Blocks of 32 columns with a scale, some with a minimum."""

    group = 32


class SuperblockFormat(FormatTag):
    """Superblocks of 256 columns."""


for _family in (FloatFormat, BlockFormat, SuperblockFormat):
    register_model(_family)(models.OpaqueModel)

SIGNED = -1
F32, F16, BF16 = FloatFormat("F32", 4), FloatFormat("F16", 2), FloatFormat("BF16", 2)
Q4_0, Q4_1 = BlockFormat("Q4_0", 18, 15), BlockFormat("Q4_1", 20, 15)
Q5_0, Q5_1 = BlockFormat("Q5_0", 22, 31), BlockFormat("Q5_1", 24, 31)
Q8_0, IQ4_NL = BlockFormat("Q8_0", 34, SIGNED), BlockFormat("IQ4_NL", 18, SIGNED)
Q2_K, Q3_K = SuperblockFormat("Q2_K", 84, 3, 16), SuperblockFormat("Q3_K", 110, 7, 16)
Q4_K, Q5_K = SuperblockFormat("Q4_K", 144, 15, 32), SuperblockFormat("Q5_K", 176, 31, 32)
Q6_K, IQ4_XS = SuperblockFormat("Q6_K", 210, 63, 16), SuperblockFormat("IQ4_XS", 136, SIGNED, 32)

TAGS: dict[str, FormatTag] = {
    tag.format_name: tag
    for tag in (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS)
}

_METHODS: dict[tuple[str, str], Callable[..., Any]] = {}


def method(name: str, *formats: FormatTag) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the method `name` of formats."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for fmt in formats:
            _METHODS[fmt.format_name, name] = function
        return function

    return register


@overload_method(FloatFormat, "load")
def _load(fmt, address):
    return _METHODS[fmt.format_name, "load"]


@overload_method(FloatFormat, "load_one")
def _load_one(fmt, address):
    return _METHODS[fmt.format_name, "load_one"]


@overload_method(BlockFormat, "codes")
def _block_codes(fmt, first, second):
    return _METHODS[fmt.format_name, "codes"]


@overload_method(BlockFormat, "factors")
def _block_factors(fmt, block):
    return _METHODS[fmt.format_name, "factors"]


@overload_method(SuperblockFormat, "codes")
def _superblock_codes(fmt, block, chunk):
    return _METHODS[fmt.format_name, "codes"]


@overload_method(SuperblockFormat, "scales")
def _superblock_scales(fmt, block):
    return _METHODS[fmt.format_name, "scales"]


# ---- floats


@method("load", F32)
def _f32_load(fmt, address):
    return load(f32x16, address)


@method("load_one", F32)
def _f32_load_one(fmt, address):
    return load(types.float32, address)


@method("load", F16)
def _f16_load(fmt, address):
    return from_half(load(u16x16, address))


@method("load_one", F16)
def _f16_load_one(fmt, address):
    return load_half(address)


@method("load", BF16)
def _bf16_load(fmt, address):
    return from_bfloat(load(u16x16, address))


@method("load_one", BF16)
def _bf16_load_one(fmt, address):
    return load_bfloat(address)


# ---- parts of a register

# Bytes are shifted as halves of 16-bit lanes: what comes over from the neighbour is cut off by the mask that follows.
_shift_0_4, _shift_0_2, _shift_0_1 = shifter((0, 4)), shifter((0, 2)), shifter((0, 1))
_quarters_0_2_1_3 = picker([*range(16), *range(32, 48), *range(16, 32), *range(48, 64)])


@inline_kernel
def _twice(address):
    """32 bytes in both halves of a register."""
    raw = load(u8x32, address)
    return view(u16x32, join(raw, raw))


@inline_kernel
def _nibbles_of_16(raw):
    """Two runs of 16 bytes u8x32 -> for each the low, then the high nibbles."""
    high = view(u8x32, view(u16x16, raw) >> types.uint16(4))
    return _quarters_0_2_1_3(join(raw, high)) & types.uint8(15)


# ---- blocks of 32


@method("factors", Q4_1, Q5_1)
def _factors_apart(fmt, block):
    return load_half(block), load_half(block + 2)


@method("factors", Q4_0)
def _factors_8(fmt, block):
    scale = load_half(block)
    return scale, scale * types.float32(-8.0)


@method("factors", Q5_0)
def _factors_16(fmt, block):
    scale = load_half(block)
    return scale, scale * types.float32(-16.0)


@method("factors", Q8_0, IQ4_NL)
def _factors_of_signed(fmt, block):
    scale = load_half(block)
    return scale, scale * types.float32(-SIGN_BIAS)


@method("codes", Q8_0)
def _q8_0_codes(fmt, first, second):
    return stored_sign(join(load(u8x32, first + 2), load(u8x32, second + 2)))


@method("codes", Q4_0)
def _q4_0_codes(fmt, first, second):
    return _nibbles_of_16(join(load(u8x16, first + 2), load(u8x16, second + 2)))


@method("codes", Q4_1)
def _q4_1_codes(fmt, first, second):
    return _nibbles_of_16(join(load(u8x16, first + 4), load(u8x16, second + 4)))


_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_iq4_value = table_lookup(_IQ4_VALUES)


@method("codes", IQ4_NL)
def _iq4_nl_codes(fmt, first, second):
    nibbles = _nibbles_of_16(join(load(u8x16, first + 2), load(u8x16, second + 2)))
    return stored_sign(_iq4_value(nibbles))


@method("codes", Q5_0)
def _q5_0_codes(fmt, first, second):
    low = _nibbles_of_16(join(load(u8x16, first + 6), load(u8x16, second + 6)))
    return low | bits_to_bytes(load(types.uint32, first + 2), load(types.uint32, second + 2), 16)


@method("codes", Q5_1)
def _q5_1_codes(fmt, first, second):
    low = _nibbles_of_16(join(load(u8x16, first + 8), load(u8x16, second + 8)))
    return low | bits_to_bytes(load(types.uint32, first + 4), load(types.uint32, second + 4), 16)


# ---- superblocks of 256

_low_8_twice = picker([i // 2 for i in range(16)])
_high_8_twice = picker([8 + i // 2 for i in range(16)])


@inline_kernel
def _words4(a, b, c, d):
    """Four uint32 as 16 bytes."""
    low = types.uint64(a) | (types.uint64(b) << types.uint64(32))
    high = types.uint64(c) | (types.uint64(d) << types.uint64(32))
    return join(view(u8x8, low), view(u8x8, high))


@method("scales", Q4_K, Q5_K)
def _q4_k_scales(fmt, block):
    # Twelve bytes hold 8 scales and 8 minimums of 6 bits: four of each whole, the rest in nibbles and upper bits.
    a = load(types.uint32, block + 4)
    b = load(types.uint32, block + 8)
    c = load(types.uint32, block + 12)
    six, four, two = types.uint32(0x3F3F3F3F), types.uint32(0x0F0F0F0F), types.uint32(0x03030303)
    packed = _words4(
        a & six,
        (c & four) | (((a >> types.uint32(6)) & two) << types.uint32(4)),
        b & six,
        ((c >> types.uint32(4)) & four) | (((b >> types.uint32(6)) & two) << types.uint32(4)),
    )
    scales, minimums = convert(i16x16, _low_8_twice(packed)), convert(i16x16, _high_8_twice(packed))
    return load_half(block), load_half(block + 2), scales, minimums


@method("codes", Q4_K)
def _q4_k_codes(fmt, block, chunk):
    return view(u8x64, _shift_0_4(_twice(block + 16 + 32 * chunk))) & types.uint8(15)


@method("codes", Q5_K)
def _q5_k_codes(fmt, block, chunk):
    low = view(u8x64, _shift_0_4(_twice(block + 48 + 32 * chunk))) & types.uint8(15)
    high = view(u8x64, _shift_0_1(_twice(block + 16) >> types.uint16(2 * chunk))) & types.uint8(1)
    return low | (high << types.uint8(4))


@method("scales", Q6_K)
def _q6_k_scales(fmt, block):
    d = load_half(block + 208)
    scales = convert(i16x16, load(i8x16, block + 192))
    return d, d, scales, scales << types.int16(5)  # the codes are 32 too large


@method("codes", Q6_K)
def _q6_k_codes(fmt, block, chunk):
    half, shift = chunk >> 1, types.uint16(4 * (chunk & 1))
    low = view(u8x64, view(u16x32, load(u8x64, block + 64 * half)) >> shift) & types.uint8(15)
    high = view(u8x64, _shift_0_2(_twice(block + 128 + 32 * half) >> shift)) & types.uint8(3)
    return low | (high << types.uint8(4))


@method("scales", Q3_K)
def _q3_k_scales(fmt, block):
    # Twelve bytes hold 16 scales of 6 bits, 32 too large: nibbles in eight bytes, upper bits in the last four.
    a = load(types.uint32, block + 96)
    b = load(types.uint32, block + 100)
    c = load(types.uint32, block + 104)
    four, two = types.uint32(0x0F0F0F0F), types.uint32(0x03030303)
    packed = _words4(
        (a & four) | ((c & two) << types.uint32(4)),
        (b & four) | (((c >> types.uint32(2)) & two) << types.uint32(4)),
        ((a >> types.uint32(4)) & four) | (((c >> types.uint32(4)) & two) << types.uint32(4)),
        ((b >> types.uint32(4)) & four) | (((c >> types.uint32(6)) & two) << types.uint32(4)),
    )
    scales = convert(i16x16, packed) - types.int16(32)
    d = load_half(block + 108)
    return d, d, scales, scales << types.int16(2)  # the codes are 4 too large


@method("codes", Q3_K)
def _q3_k_codes(fmt, block, chunk):
    raw = _twice(block + 32 + 32 * (chunk >> 1)) >> types.uint16(4 * (chunk & 1))
    low = view(u8x64, _shift_0_2(raw)) & types.uint8(3)
    high = view(u8x64, _shift_0_1(_twice(block) >> types.uint16(2 * chunk))) & types.uint8(1)
    return low | (high << types.uint8(2))


@method("scales", Q2_K)
def _q2_k_scales(fmt, block):
    packed = load(u8x16, block)
    scales, minimums = convert(i16x16, packed & types.uint8(15)), convert(i16x16, packed >> types.uint8(4))
    return load_half(block + 80), load_half(block + 82), scales, minimums


@method("codes", Q2_K)
def _q2_k_codes(fmt, block, chunk):
    raw = _twice(block + 16 + 32 * (chunk >> 1)) >> types.uint16(4 * (chunk & 1))
    return view(u8x64, _shift_0_2(raw)) & types.uint8(3)


_shift_by_nibble, _shift_by_pair = shifter(range(0, 32, 4)), shifter(range(0, 16, 2))
_each_twice = picker([i // 2 for i in range(16)])


@method("scales", IQ4_XS)
def _iq4_xs_scales(fmt, block):
    low = _shift_by_nibble(splat(u32x8, load(types.uint32, block + 4))) & types.uint32(15)
    high = _shift_by_pair(splat(u32x8, types.uint32(load(types.uint16, block + 2)))) & types.uint32(3)
    scales = convert(i16x16, _each_twice(low | (high << types.uint32(4)))) - types.int16(32)
    d = load_half(block)
    return d, d, scales, scales * types.int16(SIGN_BIAS)


@method("codes", IQ4_XS)
def _iq4_xs_codes(fmt, block, chunk):
    return stored_sign(_iq4_value(_nibbles_of_16(load(u8x32, block + 8 + 32 * chunk))))
