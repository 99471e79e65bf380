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
from edge_moe.kernels.file_numbers import bit_field, from_half
from edge_moe.kernels.jit import inline_kernel, kernel_method
from edge_moe.kernels.picks import bits_picker, pair_picker, picker, quartet_picker, whole_picker
from edge_moe.kernels.simd import (
    hidden,
    high_half,
    join,
    load,
    low_half,
    u8x16,
    u8x64,
    u16x8,
    u16x32,
    u32x16,
    view,
)

# ---- blocks of 32

# Of two registers the parts of 128 bits that come first and third in each; second and fourth.
_even_parts = picker([8 * part + lane for part in range(4) for lane in range(4)])
_odd_parts = picker([8 * part + 4 + lane for part in range(4) for lane in range(4)])
_lower_halves = whole_picker([4 * i + octet for i in range(16) for octet in (0, 1)] * 2)
_upper_halves = whole_picker([4 * i + octet for i in range(16) for octet in (2, 3)] * 2)
# Of each block's 32 fifth bits those of a word's four codes, each moved to where it is worth 16.
_bits_of_words = [bits_picker([i // 4 % 2 * 32 + 4 * word + i % 4 - 4 for i in range(64)]) for word in range(8)]
_bits_0, _bits_1, _bits_2, _bits_3, _bits_4, _bits_5, _bits_6, _bits_7 = _bits_of_words
_FIFTH_BIT = 16


@inline_kernel
def _with_bits(codes, bits):
    return codes | (bits & types.uint8(_FIFTH_BIT))


def _places(fmt: BlockFormat, first: int, n_words: int) -> list[int]:
    """Where of four blocks words of 4 bytes are: of all blocks the first, then the second.

    In 64 bytes from where the blocks begin, then, from 64 on, in those up to where they end.
    """
    size = fmt.block_bytes
    of_words = [k * size + first + 4 * word + i for word in range(n_words) for k in range(4) for i in range(4)]
    return [place if place < 64 else place - 4 * size + 128 for place in of_words]


@inline_kernel
def _same_part(a, b, c, d):
    """Of four u32x16 the first parts of 128 bits, the second, third and fourth ones."""
    lower = join(join(low_half(a), low_half(b)), join(low_half(c), low_half(d)))
    upper = join(join(high_half(a), high_half(b)), join(high_half(c), high_half(d)))
    return _even_parts(lower), _odd_parts(lower), _even_parts(upper), _odd_parts(upper)


@kernel_method(BlockFormat, "words_of_rows")
def _words_of_rows(fmt, a, b, c, d):
    back, bits, is_table = 4 * fmt.block_bytes - 64, fmt.bits, fmt.signed
    nibbles_of_four = pair_picker(_places(fmt, fmt.nibbles, 4))
    heads = _places(fmt, bits, 1) + _places(fmt, 0, 1)
    heads_of_two = quartet_picker(heads + [128 + place for place in heads])

    def codes_of(nibbles, shift):
        codes = nibbles_of(view(u8x64, nibbles), shift)
        return stored_sign(iq4_value(codes)) if is_table else hidden(codes)

    codes_of = inline_kernel(codes_of)

    def words_of_rows(fmt, a, b, c, d):
        """Four blocks of four rows, a lane for each block: codes in words of four, u8x64 8 times; scales and minimums.

        Scales are u16x16, as are the minimums of formats that have such.
        """
        begin_a, end_a, begin_b, end_b = load(u8x64, a), load(u8x64, a + back), load(u8x64, b), load(u8x64, b + back)
        begin_c, end_c, begin_d, end_d = load(u8x64, c), load(u8x64, c + back), load(u8x64, d), load(u8x64, d + back)
        words_a, words_b = nibbles_of_four(begin_a, end_a), nibbles_of_four(begin_b, end_b)
        words_c, words_d = nibbles_of_four(begin_c, end_c), nibbles_of_four(begin_d, end_d)
        # of each row first its blocks' fifth bits, if any, then their scales and minimums
        heads_ab = view(u32x16, heads_of_two(begin_a, end_a, begin_b, end_b))
        heads_cd = view(u32x16, heads_of_two(begin_c, end_c, begin_d, end_d))
        heads = join(heads_ab, heads_cd)
        n_0, n_1, n_2, n_3 = _same_part(
            view(u32x16, words_a), view(u32x16, words_b), view(u32x16, words_c), view(u32x16, words_d)
        )
        c_0, c_1, c_2, c_3 = codes_of(n_0, 0), codes_of(n_1, 0), codes_of(n_2, 0), codes_of(n_3, 0)
        c_4, c_5, c_6, c_7 = codes_of(n_0, 4), codes_of(n_1, 4), codes_of(n_2, 4), codes_of(n_3, 4)
        if bits:
            fifths = hidden(view(u8x64, _even_parts(heads)))
            c_0, c_1 = _with_bits(c_0, _bits_0(fifths)), _with_bits(c_1, _bits_1(fifths))
            c_2, c_3 = _with_bits(c_2, _bits_2(fifths)), _with_bits(c_3, _bits_3(fifths))
            c_4, c_5 = _with_bits(c_4, _bits_4(fifths)), _with_bits(c_5, _bits_5(fifths))
            c_6, c_7 = _with_bits(c_6, _bits_6(fifths)), _with_bits(c_7, _bits_7(fifths))
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
