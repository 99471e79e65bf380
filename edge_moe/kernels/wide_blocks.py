"""What `wide_rows` reads of blocks: the codes of four blocks of four rows, the scales of four superblocks."""

from numba import types

from edge_moe.kernels.activations import lower_of_parts, upper_of_parts
from edge_moe.kernels.blocks import (
    BlockFormat,
    SuperblockFormat,
    iq4_value,
    nibbles_of,
    scales_of_6_bits,
    twice,
)
from edge_moe.kernels.dots import stored_sign
from edge_moe.kernels.file_numbers import adder_of_bits, bit_field, from_half
from edge_moe.kernels.jit import inline_kernel, kernel_method
from edge_moe.kernels.simd import (
    hidden,
    high_half,
    join,
    load,
    low_half,
    pair_picker,
    picker,
    u8x16,
    u8x64,
    u16x8,
    u16x32,
    u32x16,
    view,
    whole_picker,
)

# ---- blocks of 32

# Of two registers the parts of 128 bits that come first and third in each; second and fourth.
_even_parts = picker([8 * part + lane for part in range(4) for lane in range(4)])
_odd_parts = picker([8 * part + 4 + lane for part in range(4) for lane in range(4)])
# Of 32 bits in each lane one byte, four times; of such a byte the bits of one word's codes.
_octet_0, _octet_1, _octet_2, _octet_3 = (picker([i & ~3 | octet for i in range(64)]) for octet in range(4))
_add_lower_bits, _add_upper_bits = adder_of_bits(range(4)), adder_of_bits(range(4, 8))
_lower_halves = whole_picker([4 * i + octet for i in range(16) for octet in (0, 1)] * 2)
_upper_halves = whole_picker([4 * i + octet for i in range(16) for octet in (2, 3)] * 2)


@kernel_method(BlockFormat, "words_of_row")
def _words_of_row(fmt, row):
    size, nibbles, bits = fmt.block_bytes, fmt.nibbles, fmt.bits
    back = 4 * size - 64  # two loads of 64 bytes: the first from where the blocks begin, the second to where they end

    def places(first: int, n_words: int) -> list[int]:
        """Where in what was loaded words of 4 bytes are: of all blocks the first, then the second."""
        of_words = [k * size + first + 4 * word + i for word in range(n_words) for k in range(4) for i in range(4)]
        return [place if place < 64 else place - back + 64 for place in of_words]

    nibbles_of_four = pair_picker(places(nibbles, 4))
    heads_of_four = pair_picker((places(bits, 1) + places(0, 1)) * 2)

    def words_of_row(fmt, row):
        """Of four blocks the words of nibbles; and that of fifth bits, if any, beside the first: u32x16, u32x8."""
        a, b = load(u8x64, row), load(u8x64, row + back)
        return view(u32x16, nibbles_of_four(a, b)), low_half(view(u32x16, heads_of_four(a, b)))

    return words_of_row


@inline_kernel
def _same_part(a, b, c, d):
    """Of four u32x16 the first parts of 128 bits, the second, third and fourth ones."""
    lower = join(join(low_half(a), low_half(b)), join(low_half(c), low_half(d)))
    upper = join(join(high_half(a), high_half(b)), join(high_half(c), high_half(d)))
    return _even_parts(lower), _odd_parts(lower), _even_parts(upper), _odd_parts(upper)


@kernel_method(BlockFormat, "words_of_rows")
def _words_of_rows(fmt, a, b, c, d):
    bits, is_table = fmt.bits, fmt.signed

    def codes_of(nibbles, shift):
        codes = nibbles_of(view(u8x64, nibbles), shift)
        return stored_sign(iq4_value(codes)) if is_table else hidden(codes)

    codes_of = inline_kernel(codes_of)

    def words_of_rows(fmt, a, b, c, d):
        """Four blocks of four rows, a lane for each block: codes in words of four, u8x64 8 times; scales and minimums.

        Scales are u16x16, as are the minimums of formats that have such.
        """
        (words_a, head_a), (words_b, head_b) = fmt.words_of_row(a), fmt.words_of_row(b)
        (words_c, head_c), (words_d, head_d) = fmt.words_of_row(c), fmt.words_of_row(d)
        n_0, n_1, n_2, n_3 = _same_part(words_a, words_b, words_c, words_d)
        heads = join(join(head_a, head_b), join(head_c, head_d))
        c_0, c_1, c_2, c_3 = codes_of(n_0, 0), codes_of(n_1, 0), codes_of(n_2, 0), codes_of(n_3, 0)
        c_4, c_5, c_6, c_7 = codes_of(n_0, 4), codes_of(n_1, 4), codes_of(n_2, 4), codes_of(n_3, 4)
        if bits:
            words = hidden(view(u8x64, _even_parts(heads)))
            first, second = hidden(_octet_0(words)), hidden(_octet_1(words))
            c_0, c_1 = _add_lower_bits(c_0, first, 16), _add_upper_bits(c_1, first, 16)
            c_2, c_3 = _add_lower_bits(c_2, second, 16), _add_upper_bits(c_3, second, 16)
            third, fourth = hidden(_octet_2(words)), hidden(_octet_3(words))
            c_4, c_5 = _add_lower_bits(c_4, third, 16), _add_upper_bits(c_5, third, 16)
            c_6, c_7 = _add_lower_bits(c_6, fourth, 16), _add_upper_bits(c_7, fourth, 16)
        firsts = view(u8x64, _odd_parts(heads))
        own, lowest = view(u16x32, _lower_halves(firsts)), view(u16x32, _upper_halves(firsts))
        return (c_0, c_1, c_2, c_3, c_4, c_5, c_6, c_7), low_half(own), low_half(lowest)

    return words_of_rows


# ---- superblocks of eight groups of 32: Q4_K and Q5_K

_scales_of_6_bits = scales_of_6_bits(4)
_first_words = picker([0, 4, 8, 12])
_fifth_bits = bit_field((0, 4, 0, 4, 2, 6, 2, 6), 1)


@inline_kernel
def _four_times_16(address, size):
    """16 bytes at each of four addresses `size` apart."""
    low = join(load(u8x16, address), load(u8x16, address + size))
    return join(low, join(load(u8x16, address + 2 * size), load(u8x16, address + 3 * size)))


@kernel_method(SuperblockFormat, "scales_of_four")
def _scales_of_four(fmt, block):
    size = fmt.block_bytes

    def scales_of_four(fmt, block):
        """Of four superblocks u8x64: for each 8 scales, then 8 minimums."""
        return hidden(_scales_of_6_bits(_four_times_16(block, size)))

    return scales_of_four


@kernel_method(SuperblockFormat, "factors_of_four")
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


@kernel_method(SuperblockFormat, "scales_of_two_pairs")
def _scales_of_two_pairs(fmt, a, b):
    size = fmt.block_bytes

    def scales_of_two_pairs(fmt, a, b):
        """`scales_of_four` of two superblocks at each of two addresses."""
        return hidden(_scales_of_6_bits(_two_times_two_of_16(a, b, size)))

    return scales_of_two_pairs


@kernel_method(SuperblockFormat, "factors_of_two_pairs")
def _factors_of_two_pairs(fmt, a, b, x_scales):
    size = fmt.block_bytes

    def factors_of_two_pairs(fmt, a, b, x_scales):
        """`factors_of_four` of two superblocks at each of two addresses."""
        return from_half(view(u16x8, _first_words(view(u32x16, _two_times_two_of_16(a, b, size))))) * x_scales

    return factors_of_two_pairs


@kernel_method(SuperblockFormat, "nibble_codes")
def _nibble_codes(fmt, block):
    has_fifth_bit = fmt.max_code > 15
    first = 48 if has_fifth_bit else 16

    def nibble_codes(fmt, block):
        """The 256 codes in the order of nibbles, in which all 128 bits of a register have the same groups."""
        a, b = view(u32x16, load(u8x64, block + first)), view(u32x16, load(u8x64, block + first + 64))
        both = join(a, b)
        lower, upper = view(u8x64, lower_of_parts(both)), view(u8x64, upper_of_parts(both))
        c_0, c_1, c_2, c_3 = nibbles_of(lower, 0), nibbles_of(upper, 0), nibbles_of(lower, 4), nibbles_of(upper, 4)
        if has_fifth_bit:
            bits = view(u32x16, twice(block + 16))
            twice_bits = join(bits, bits)
            lower, upper = view(u8x64, lower_of_parts(twice_bits)), view(u8x64, upper_of_parts(twice_bits))
            c_0, c_1 = c_0 | _fifth_bits(lower, 0) << types.uint8(4), c_1 | _fifth_bits(upper, 0) << types.uint8(4)
            c_2, c_3 = c_2 | _fifth_bits(lower, 1) << types.uint8(4), c_3 | _fifth_bits(upper, 1) << types.uint8(4)
        return c_0, c_1, c_2, c_3

    return nibble_codes
