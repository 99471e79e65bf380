"""Four registers folded to four numbers at once, always in the same order."""

from edge_moe.kernels.jit import inline_kernel
from edge_moe.kernels.picks import picker
from edge_moe.kernels.simd import high_half, join, larger, low_half

_even_32, _odd_32 = picker(range(0, 32, 2)), picker(range(1, 32, 2))
_even_16, _odd_16 = picker(range(0, 16, 2)), picker(range(1, 16, 2))
_even_8, _odd_8 = picker(range(0, 8, 2)), picker(range(1, 8, 2))


@inline_kernel
def quarters(a, b, c, d):
    """Four vectors of 16 lanes -> one, each summed up to four lanes."""
    ab = join(low_half(a), low_half(b)) + join(high_half(a), high_half(b))
    cd = join(low_half(c), low_half(d)) + join(high_half(c), high_half(d))
    both = join(ab, cd)
    return _even_32(both) + _odd_32(both)


@inline_kernel
def quarter_sums(v):
    """The sums of each four of 16 lanes."""
    eighths = _even_16(v) + _odd_16(v)
    return _even_8(eighths) + _odd_8(eighths)


@inline_kernel
def four_maxima(a, b, c, d):
    """The largest lane of each of four f32x16 -> f32x4."""
    ab = larger(join(low_half(a), low_half(b)), join(high_half(a), high_half(b)))
    cd = larger(join(low_half(c), low_half(d)), join(high_half(c), high_half(d)))
    both = join(ab, cd)
    v = larger(_even_32(both), _odd_32(both))
    eighths = larger(_even_16(v), _odd_16(v))
    return larger(_even_8(eighths), _odd_8(eighths))
