"""Functions of vectors that take several operations."""

from numba import types

from edge_moe.kernels.jit import inline_kernel
from edge_moe.kernels.simd import convert, f32x16, fma, i32x16, larger, rounded, splat, view


@inline_kernel
def exp2(x):
    """2 to the power of each lane f32x16, held within -126 and 126. Relative error below 1e-6."""
    zero, least = splat(f32x16, types.float32(0.0)), splat(f32x16, types.float32(-126.0))
    x = larger(least, x)  # in this order what is not a number stays so
    x = zero - larger(least, zero - x)
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
