"""What `wide_rows` reads of blocks: the codes of four blocks at a time, the scales of four superblocks."""

from numba import types
from numba.extending import overload_method

from edge_moe.kernels.blocks import (
    BlockFormat,
    SuperblockFormat,
    iq4_value,
    low_high_twice,
    nibbles_of,
    scales_of_6_bits,
    twice,
)
from edge_moe.kernels.dots import stored_sign
from edge_moe.kernels.file_numbers import adder_of_bits, bit_field, from_half
from edge_moe.kernels.jit import inline_kernel
from edge_moe.kernels.simd import (
    convert,
    hidden,
    high_half,
    i16x32,
    join,
    load,
    low_half,
    picker,
    u8x16,
    u8x64,
    u16x8,
    u16x32,
    u16x64,
    u32x16,
    view,
)

# ---- blocks of 32

_add_set_bits = adder_of_bits(range(8))


@overload_method(BlockFormat, "codes_of_four")
def _codes_of_four(fmt, block):
    size, nibbles, bits, is_table = fmt.block_bytes, fmt.nibbles, fmt.bits, fmt.signed
    back = 4 * size - 64  # two loads of 64 bytes: the first from where the blocks begin, the second to where they end
    nibbles_01 = picker([i // 32 * size + nibbles + i % 16 for i in range(64)])
    nibbles_23 = picker([(2 + i // 32) * size + nibbles + i % 16 - back for i in range(64)])
    bits_01 = picker([i // 32 * size + bits + i % 32 // 8 for i in range(64)])
    bits_23 = picker([(2 + i // 32) * size + bits + i % 32 // 8 - back for i in range(64)])
    halves = [0, size // 2, 32 + (2 * size - back) // 2, 32 + (3 * size - back) // 2]
    scales_of, minimums_of = picker(halves), picker([h + 1 for h in halves])

    def codes_of_four(fmt, block):
        """The codes of the first and of the second two of four blocks, their scales and minimums u16x4."""
        a, b = load(u8x64, block), load(u8x64, block + back)
        low, high = low_high_twice(nibbles_01(a), 0), low_high_twice(nibbles_23(b), 0)
        if bits:
            low, high = _add_set_bits(hidden(low), bits_01(a), 16), _add_set_bits(hidden(high), bits_23(b), 16)
        both = view(u16x64, join(a, b))
        if is_table:
            return stored_sign(iq4_value(low)), stored_sign(iq4_value(high)), scales_of(both), minimums_of(both)
        return low, high, scales_of(both), minimums_of(both)

    return codes_of_four


# ---- superblocks of eight groups of 32: Q4_K and Q5_K

_scales_of_6_bits = scales_of_6_bits(4)
_first_words, _each_twice = picker([0, 4, 8, 12]), picker([0, 0, 1, 1, 2, 2, 3, 3])
_fifth_bits = bit_field((0, 2), 16)


@inline_kernel
def _four_times_16(address, size):
    """16 bytes at each of four addresses `size` apart."""
    low = join(load(u8x16, address), load(u8x16, address + size))
    return join(low, join(load(u8x16, address + 2 * size), load(u8x16, address + 3 * size)))


@overload_method(SuperblockFormat, "scales_of_four")
def _scales_of_four(fmt, block):
    size = fmt.block_bytes

    def scales_of_four(fmt, block):
        """Of two superblocks and of the next two, i16x32: for each 8 scales, then 8 minimums."""
        both = hidden(_scales_of_6_bits(_four_times_16(block, size)))
        return hidden(convert(i16x32, low_half(both))), hidden(convert(i16x32, high_half(both)))

    return scales_of_four


@overload_method(SuperblockFormat, "factors_of_four")
def _factors_of_four(fmt, block, x_scales):
    size = fmt.block_bytes

    def factors_of_four(fmt, block, x_scales):
        """d and dmin of four superblocks times x_scales f32x4: f32x8."""
        words = _first_words(view(u32x16, _four_times_16(block, size)))
        return from_half(view(u16x8, words)) * _each_twice(x_scales)

    return factors_of_four


@inline_kernel
def _two_times_two_of_16(a, b, size):
    """16 bytes at each of two addresses, and those `size` behind each."""
    return join(join(load(u8x16, a), load(u8x16, a + size)), join(load(u8x16, b), load(u8x16, b + size)))


@overload_method(SuperblockFormat, "scales_of_two_pairs")
def _scales_of_two_pairs(fmt, a, b):
    size = fmt.block_bytes

    def scales_of_two_pairs(fmt, a, b):
        """`scales_of_four` of two superblocks at each of two addresses."""
        both = hidden(_scales_of_6_bits(_two_times_two_of_16(a, b, size)))
        return hidden(convert(i16x32, low_half(both))), hidden(convert(i16x32, high_half(both)))

    return scales_of_two_pairs


@overload_method(SuperblockFormat, "factors_of_two_pairs")
def _factors_of_two_pairs(fmt, a, b, x_scales):
    size = fmt.block_bytes

    def factors_of_two_pairs(fmt, a, b, x_scales):
        """`factors_of_four` of two superblocks at each of two addresses."""
        words = _first_words(view(u32x16, _two_times_two_of_16(a, b, size)))
        return from_half(view(u16x8, words)) * _each_twice(x_scales)

    return factors_of_two_pairs


@overload_method(SuperblockFormat, "nibble_codes")
def _nibble_codes(fmt, block, chunk):
    has_fifth_bit = fmt.max_code > 15
    first = 48 if has_fifth_bit else 16

    def nibble_codes(fmt, block, chunk):
        """64 codes in the order of nibbles: of each 128 columns the groups 0 and 2, then 1 and 3."""
        half, odd = chunk >> 1, chunk & 1
        codes = nibbles_of(load(u8x64, block + first + 64 * half), 4 * odd)
        if has_fifth_bit:
            bits = view(u8x64, view(u16x32, twice(block + 16)) << types.uint16(4 - 4 * half))
            codes = codes | _fifth_bits(bits, odd)
        return codes

    return nibble_codes
