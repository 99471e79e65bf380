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
    hidden,
    join,
    load,
    low_half,
    picker,
    u8x16,
    u8x64,
    u16x8,
    u16x16,
    u16x32,
    u32x16,
    view,
    whole_picker,
)

# ---- blocks of 32

_add_set_bits = adder_of_bits(range(8))


@overload_method(BlockFormat, "codes_of_four")
def _codes_of_four(fmt, block):
    size, nibbles, bits, is_table = fmt.block_bytes, fmt.nibbles, fmt.bits, fmt.signed
    back = 4 * size - 64  # two loads of 64 bytes: the first from where the blocks begin, the second to where they end
    nibbles_01 = whole_picker([i // 32 * size + nibbles + i % 16 for i in range(64)])
    nibbles_23 = whole_picker([(2 + i // 32) * size + nibbles + i % 16 - back for i in range(64)])
    bits_01 = whole_picker([i // 32 * size + bits + i % 32 // 8 for i in range(64)])
    bits_23 = whole_picker([(2 + i // 32) * size + bits + i % 32 // 8 - back for i in range(64)])
    words = picker([0, size // 4, 16 + (2 * size - back) // 4, 16 + (3 * size - back) // 4])

    def codes_of_four(fmt, block):
        """The codes of the first and of the second two of four blocks; of each u32 that has its scale."""
        a, b = load(u8x64, block), load(u8x64, block + back)
        low, high = low_high_twice(nibbles_01(a), 0), low_high_twice(nibbles_23(b), 0)
        if bits:
            low, high = _add_set_bits(hidden(low), bits_01(a), 16), _add_set_bits(hidden(high), bits_23(b), 16)
        own = words(join(view(u32x16, a), view(u32x16, b)))
        if is_table:
            return stored_sign(iq4_value(low)), stored_sign(iq4_value(high)), own
        return low, high, own

    return codes_of_four


@overload_method(BlockFormat, "halves_of_words")
def _halves_of_words(fmt, words):
    odd = fmt.block_bytes % 4  # every second block begins in the middle of a word then
    places = [4 * i + i % 2 * odd + half for i in range(16) for half in (0, 1)]
    scales_of, minimums_of = whole_picker(2 * places), whole_picker(2 * [(place + 2) % 64 for place in places])

    def halves_of_words(fmt, words):
        """Of what `codes_of_four` gives of four rows, u32x16, the scales and the minimums: u16x16."""
        octets = view(u8x64, words)
        return view(u16x16, low_half(scales_of(octets))), view(u16x16, low_half(minimums_of(octets)))

    return halves_of_words


# ---- superblocks of eight groups of 32: Q4_K and Q5_K

_scales_of_6_bits = scales_of_6_bits(4)
_first_words = picker([0, 4, 8, 12])
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
        """Of four superblocks u8x64: for each 8 scales, then 8 minimums."""
        return hidden(_scales_of_6_bits(_four_times_16(block, size)))

    return scales_of_four


@overload_method(SuperblockFormat, "factors_of_four")
def _factors_of_four(fmt, block, x_scales):
    size = fmt.block_bytes

    def factors_of_four(fmt, block, x_scales):
        """d and dmin of four superblocks times x_scales: f32x8."""
        return from_half(view(u16x8, _first_words(view(u32x16, _four_times_16(block, size))))) * x_scales

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
        return hidden(_scales_of_6_bits(_two_times_two_of_16(a, b, size)))

    return scales_of_two_pairs


@overload_method(SuperblockFormat, "factors_of_two_pairs")
def _factors_of_two_pairs(fmt, a, b, x_scales):
    size = fmt.block_bytes

    def factors_of_two_pairs(fmt, a, b, x_scales):
        """`factors_of_four` of two superblocks at each of two addresses."""
        return from_half(view(u16x8, _first_words(view(u32x16, _two_times_two_of_16(a, b, size))))) * x_scales

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
