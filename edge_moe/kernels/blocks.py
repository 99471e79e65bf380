"""Each block format once, as a numba type: where its codes and scales are, which is all that the products need to know.

Three families share their products: floats; blocks of 32 with one scale (a pair of them fills a register); and
superblocks of 256 with integer scales for each 16 or 32 columns. A format is a few functions registered by `method`:

- floats: `load(address) -> f32x16`, `load_one(address) -> f32`
- blocks of 32: `codes(first, second)`; value = scale * (code - offset), or scale * code + minimum where `offset` is
  None: the scale is the block's first number in f16, the minimum its second
- superblocks: `codes(block, chunk)` for 64 columns, `scales_of_two(a, b)` -> (scales i16x32, minimums i16x32) of two
  superblocks, each for 16 columns: value = d * scale * code - dmin * minimum; d is the f16 at `d_offset`, dmin the one
  behind it, or d again

Codes are u8x64 in the order of the columns; formats with signed codes return `stored_sign(codes)`.

Source: ggml-common.h (block layouts) and ggml-quants.c (their meaning).
"""

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import models, register_model

from edge_moe.kernels.dots import SIGN_BIAS, stored_sign
from edge_moe.kernels.file_numbers import (
    add_bits,
    bit_field,
    bit_mover,
    from_bfloat,
    from_half,
    load_bfloat,
    load_half,
    table_lookup,
)
from edge_moe.kernels.jit import inline_kernel, kernel_method
from edge_moe.kernels.picks import picker
from edge_moe.kernels.simd import (
    Vector,
    convert,
    f32x16,
    hidden,
    i8x16,
    i16x16,
    i16x32,
    join,
    load,
    low_half,
    masker,
    shifter,
    splat,
    u8x16,
    u8x32,
    u8x64,
    u16x16,
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

    def __init__(
        self,
        format_name: str,
        block_bytes: int,
        max_code: int,
        offset: int | None,
        nibbles: int = 0,
        bits: int = 0,
    ) -> None:
        """nibbles, bits: where in a block those of the codes and their fifth bits begin, if it has such."""
        super().__init__(format_name, block_bytes, max_code)
        self.offset, self.nibbles, self.bits = offset, nibbles, bits


class SuperblockFormat(FormatTag):
    """Superblocks of 256 columns."""

    def __init__(
        self, format_name: str, block_bytes: int, max_code: int, group: int, d_offset: int, has_dmin: bool = False
    ) -> None:
        super().__init__(format_name, block_bytes, max_code, group)
        self.d_offset, self.has_dmin = d_offset, has_dmin


for _family in (FloatFormat, BlockFormat, SuperblockFormat):
    register_model(_family)(models.OpaqueModel)

SIGNED = -1
F32, F16, BF16 = FloatFormat("F32", 4), FloatFormat("F16", 2), FloatFormat("BF16", 2)
Q4_0, Q4_1 = BlockFormat("Q4_0", 18, 15, 8, 2), BlockFormat("Q4_1", 20, 15, None, 4)
Q5_0, Q5_1 = BlockFormat("Q5_0", 22, 31, 16, 6, 2), BlockFormat("Q5_1", 24, 31, None, 8, 4)
Q8_0, IQ4_NL = BlockFormat("Q8_0", 34, SIGNED, SIGN_BIAS), BlockFormat("IQ4_NL", 18, SIGNED, SIGN_BIAS, 2)
Q2_K, Q3_K = SuperblockFormat("Q2_K", 84, 3, 16, 80, True), SuperblockFormat("Q3_K", 110, 7, 16, 108)
Q4_K, Q5_K = SuperblockFormat("Q4_K", 144, 15, 32, 0, True), SuperblockFormat("Q5_K", 176, 31, 32, 0, True)
Q6_K, IQ4_XS = SuperblockFormat("Q6_K", 210, 63, 16, 208), SuperblockFormat("IQ4_XS", 136, SIGNED, 32, 0)

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


@kernel_method(FloatFormat, "load")
def _load(fmt, address):
    return _METHODS[fmt.format_name, "load"]


@kernel_method(FloatFormat, "load_one")
def _load_one(fmt, address):
    return _METHODS[fmt.format_name, "load_one"]


@kernel_method(BlockFormat, "codes")
def _block_codes(fmt, first, second):
    return _METHODS[fmt.format_name, "codes"]


@kernel_method(BlockFormat, "factors")
def _block_factors(fmt, block):
    offset = fmt.offset

    def factors(fmt, block):
        """(scale, minimum): value = scale * code + minimum."""
        scale = load_half(block)
        return scale, load_half(block + 2) if offset is None else scale * types.float32(-offset)

    return factors


@kernel_method(SuperblockFormat, "codes")
def _superblock_codes(fmt, block, chunk):
    return _METHODS[fmt.format_name, "codes"]


@kernel_method(SuperblockFormat, "scales_of_two")
def _superblock_scales_of_two(fmt, a, b):
    return _METHODS[fmt.format_name, "scales_of_two"]


@kernel_method(SuperblockFormat, "scales")
def _superblock_scales(fmt, block):
    def scales(fmt, block):
        """(scales i16x16, minimums i16x16) of one superblock."""
        scales, minimums = fmt.scales_of_two(block, block)
        return low_half(scales), low_half(minimums)

    return scales


@kernel_method(SuperblockFormat, "factors")
def _superblock_factors(fmt, block):
    d_offset, has_dmin = fmt.d_offset, fmt.has_dmin

    def factors(fmt, block):
        """(d, dmin)."""
        d = load_half(block + d_offset)
        return d, load_half(block + d_offset + 2) if has_dmin else d

    return factors


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

# Of four pairs of bits two, each moved to where it is worth 16.
_first_and_second, _third_and_fourth = bit_mover((-4, -2), 0x30), bit_mover((0, 2), 0x30)
nibbles_of, _low_high, low_high_twice = bit_field((0,), 15), bit_field((0, 4), 15), bit_field((0, 4, 0, 4), 15)
_pairs, _next_bits = bit_field((0, 2), 3), bit_field((0, 1), 1)


@inline_kernel
def twice(address):
    """32 bytes in both halves of a register."""
    raw = load(u8x32, address)
    return join(raw, raw)


@inline_kernel
def _nibbles_of_16(first, second):
    """16 bytes at each of two addresses -> of each the low, then the high nibbles."""
    a, b = load(u8x16, first), load(u8x16, second)
    return low_high_twice(join(join(a, a), join(b, b)), 0)


# ---- blocks of 32


@method("codes", Q8_0)
def _q8_0_codes(fmt, first, second):
    return stored_sign(join(load(u8x32, first + 2), load(u8x32, second + 2)))


@method("codes", Q4_0)
def _q4_0_codes(fmt, first, second):
    return _nibbles_of_16(first + 2, second + 2)


@method("codes", Q4_1)
def _q4_1_codes(fmt, first, second):
    return _nibbles_of_16(first + 4, second + 4)


_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
iq4_value = table_lookup(_IQ4_VALUES)


@method("codes", IQ4_NL)
def _iq4_nl_codes(fmt, first, second):
    nibbles = _nibbles_of_16(first + 2, second + 2)
    return stored_sign(iq4_value(nibbles))


@method("codes", Q5_0)
def _q5_0_codes(fmt, first, second):
    low = hidden(_nibbles_of_16(first + 6, second + 6))
    return add_bits(low, load(types.uint32, first + 2), load(types.uint32, second + 2), 16)


@method("codes", Q5_1)
def _q5_1_codes(fmt, first, second):
    low = hidden(_nibbles_of_16(first + 8, second + 8))
    return add_bits(low, load(types.uint32, first + 4), load(types.uint32, second + 4), 16)


# ---- superblocks of 256


# Of each superblock the 16 bytes of d and dmin, then three words a, b, c: 8 scales and 8 minimums of 6 bits, four of
# each whole in a and in b, of the others the nibbles in c and the upper bits above those in a and b.
def scales_of_6_bits(n: int) -> Any:
    """Make an operation on these 16 bytes of n superblocks, u8x16n: for each 8 scales, then 8 minimums."""
    starts, words, octets = range(0, 16 * n, 16), Vector(types.uint32, 4 * n), Vector(types.uint8, 16 * n)
    words_acbc = picker([i + w for i in starts for w in (*range(4, 8), *range(12, 16), *range(8, 16))])
    words_aabb = picker([i + w for i in starts for w in (*range(4, 8), *range(4, 12), *range(8, 12))])
    own_shift, own_bits = shifter((0, 0, 0, 4) * n), masker((63, 15, 63, 15) * n)
    upper_bits = masker((0, 0x30, 0, 0x30) * n)

    @inline_kernel
    def scales(raw):
        own = own_bits(view(octets, own_shift(view(words, words_acbc(raw)))))
        return own | upper_bits(view(octets, view(words, words_aabb(raw)) >> types.uint32(2)))

    return scales


_scales_of_two = scales_of_6_bits(2)
_first_8s_twice = picker([16 * i + j // 2 for i in range(2) for j in range(16)])
_second_8s_twice = picker([16 * i + 8 + j // 2 for i in range(2) for j in range(16)])


@method("scales_of_two", Q4_K, Q5_K)
def _q4_k_scales(fmt, a, b):
    scales = _scales_of_two(join(load(u8x16, a), load(u8x16, b)))
    both = hidden(convert(i16x32, scales))  # LLVM would widen what is picked once more for each pick
    return _first_8s_twice(both), _second_8s_twice(both)


@method("codes", Q4_K)
def _q4_k_codes(fmt, block, chunk):
    return _low_high(twice(block + 16 + 32 * chunk), 0)


@method("codes", Q5_K)
def _q5_k_codes(fmt, block, chunk):
    return _low_high(twice(block + 48 + 32 * chunk), 0) | (_next_bits(twice(block + 16), 2 * chunk) << types.uint8(4))


@method("scales_of_two", Q6_K)
def _q6_k_scales(fmt, a, b):
    scales = hidden(convert(i16x32, join(load(i8x16, a + 192), load(i8x16, b + 192))))
    return scales, scales << types.int16(5)  # the codes are 32 too large


@method("codes", Q6_K)
def _q6_k_codes(fmt, block, chunk):
    half, odd = chunk >> 1, chunk & 1
    low = nibbles_of(hidden(load(u8x64, block + 64 * half)), 4 * odd)
    bits = hidden(twice(block + 128 + 32 * half))
    return low | (_third_and_fourth(bits) if odd else _first_and_second(bits))


# The 16 bytes that end with three words a, b, c and d: 16 scales of 6 bits, 32 too large, nibbles in a and b, upper
# bits in c.
_words_abab = picker([i + w for i in (0, 16) for w in (*range(2, 10), *range(2, 10))])
_words_cccc = picker([i + w for i in (0, 16) for w in (*range(10, 14),) * 4])
_nibble_shift, _upper_left = shifter((0, 0, 4, 4) * 2), shifter((-4, -2, 0, 0) * 2)
_upper_right = shifter((0, 0, 0, 2) * 2)


@method("scales_of_two", Q3_K)
def _q3_k_scales(fmt, a, b):
    raw = join(load(u8x16, a + 94), load(u8x16, b + 94))
    own = view(u8x32, _nibble_shift(view(u32x8, _words_abab(raw)))) & types.uint8(15)
    upper = view(u8x32, _upper_right(_upper_left(view(u32x8, _words_cccc(raw))))) & types.uint8(0x30)
    scales = hidden(convert(i16x32, own | upper) - types.int16(32))
    return scales, scales << types.int16(2)  # the codes are 4 too large


@method("codes", Q3_K)
def _q3_k_codes(fmt, block, chunk):
    low = _pairs(twice(block + 32 + 32 * (chunk >> 1)), 4 * (chunk & 1))
    return low | (_next_bits(twice(block), 2 * chunk) << types.uint8(2))


@method("scales_of_two", Q2_K)
def _q2_k_scales(fmt, a, b):
    packed = join(load(u8x16, a), load(u8x16, b))
    scales, minimums = convert(i16x32, packed & types.uint8(15)), convert(i16x32, packed >> types.uint8(4))
    return hidden(scales), minimums


@method("codes", Q2_K)
def _q2_k_codes(fmt, block, chunk):
    return _pairs(twice(block + 16 + 32 * (chunk >> 1)), 4 * (chunk & 1))


_shift_by_nibble, _shift_by_pair = shifter(range(0, 32, 4)), shifter(range(0, 16, 2))
_each_twice = picker([i // 2 for i in range(16)])


@inline_kernel
def _iq4_xs_scales_of_one(block):
    low = _shift_by_nibble(splat(u32x8, load(types.uint32, block + 4))) & types.uint32(15)
    high = _shift_by_pair(splat(u32x8, types.uint32(load(types.uint16, block + 2)))) & types.uint32(3)
    return convert(i16x16, _each_twice(low | (high << types.uint32(4)))) - types.int16(32)


@method("scales_of_two", IQ4_XS)
def _iq4_xs_scales(fmt, a, b):
    scales = hidden(join(_iq4_xs_scales_of_one(a), _iq4_xs_scales_of_one(b)))
    return scales, scales * types.int16(SIGN_BIAS)


@method("codes", IQ4_XS)
def _iq4_xs_codes(fmt, block, chunk):
    return stored_sign(iq4_value(_nibbles_of_16(block + 8 + 32 * chunk, block + 24 + 32 * chunk)))
