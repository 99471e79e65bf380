"""Functions of vectors and numbers that take several operations."""

from numba import types

from edge_moe.kernels.jit import inline_kernel
from edge_moe.kernels.simd import convert, f32x16, fma, i32x16, larger, load, rounded, splat, view


@inline_kernel
def exp2(x):
    """2 to the power of each lane f32x16, held within -126 and 126. Relative error below 1e-6."""
    zero, least = splat(f32x16, types.float32(0.0)), splat(f32x16, types.float32(-126.0))
    return exp2_below(zero - larger(least, zero - x))


@inline_kernel
def exp2_below(x):
    """`exp2` of what is known to be at most 126."""
    x = larger(splat(f32x16, types.float32(-126.0)), x)  # in this order what is not a number stays so
    whole = rounded(x)
    f = x - whole
    # the Taylor series of exp(f ln 2), |f| <= 1/2
    power = splat(f32x16, types.float32(1.5252734e-5))
    power = fma(power, f, splat(f32x16, types.float32(1.5403530e-4)))
    power = fma(power, f, splat(f32x16, types.float32(1.3333558e-3)))
    power = fma(power, f, splat(f32x16, types.float32(9.6181291e-3)))
    power = fma(power, f, splat(f32x16, types.float32(5.5504109e-2)))
    power = fma(power, f, splat(f32x16, types.float32(2.4022651e-1)))
    power = fma(power, f, splat(f32x16, types.float32(6.9314718e-1)))
    power = fma(power, f, splat(f32x16, types.float32(1.0)))
    exponent = (convert(i32x16, whole) + types.int32(127)) << types.int32(23)
    return power * view(f32x16, exponent)


@inline_kernel
def inverse_of(step):
    """1 / step of a scale, 0 of one of 0."""
    return types.float32(1.0) / step if step > types.float32(0.0) else types.float32(0.0)


@inline_kernel
def codes_of(values, inverse):
    """16 floats at an address, over a scale, as whole numbers i32x16."""
    return convert(i32x16, rounded(load(f32x16, values) * inverse))
