"""What the searches need of vectors beyond the products' own: division, choices, half precision on the way in."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_moe.kernels.jit import inline_kernel
from edge_moe.kernels.simd import call, f32x16, llvm_type, rearrange, spread, suffix, view

LANES = 16  # trials that are computed side by side

# Levels of IQ4_NL and IQ4_XS, and the level nearest to h / 2 for h from -256 to 255: thresholds are multiples of 1/2.
IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
_HALVES = (np.arange(-256, 256) + 0.25) / 2
IQ4_CODES = np.abs(_HALVES[:, None] - IQ4_LEVELS).argmin(axis=1).astype(np.float32)
IQ4_NEAREST = IQ4_LEVELS[IQ4_CODES.astype(np.int64)]


@intrinsic
def quotient(typingctx: Any, a: Any, b: Any) -> Any:
    """a / b in each lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fdiv(*args)

    return a(a, a), codegen


@intrinsic
def clamp(typingctx: Any, value: Any, low: Any, high: Any) -> Any:
    """The nearest number from low to high; NaN becomes low."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        v, least, most = args
        v = builder.select(builder.fcmp_ordered(">", v, least), v, least)
        return builder.select(builder.fcmp_ordered("<", v, most), v, most)

    return value(value, value, value), codegen


@intrinsic
def choose_above(typingctx: Any, value: Any, limit: Any, then: Any, otherwise: Any) -> Any:
    """`then` in lanes where value > limit, `otherwise` in the others."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[2], args[3])

    return value(value, value, value, value), codegen


@intrinsic
def look_up(typingctx: Any, address: Any, place: Any) -> Any:
    """The f32 of a table at an address, by the whole numbers in the lanes of `place`, f32x16 -> f32x16."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes = sig.args[1].lanes
        wide = ir.VectorType(ir.IntType(64), lanes)
        offsets = builder.shl(
            builder.sext(builder.fptosi(args[1], ir.VectorType(ir.IntType(32), lanes)), wide),
            ir.Constant(wide, [2] * lanes),
        )
        base = builder.insert_element(ir.Constant(wide, ir.Undefined), args[0], ir.Constant(ir.IntType(32), 0))
        base = builder.shuffle_vector(base, base, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))
        addresses = builder.add(base, offsets)
        result = ir.Constant(llvm_type(sig.return_type), ir.Undefined)
        for lane in range(lanes):
            at = ir.Constant(ir.IntType(32), lane)
            pointer = builder.inttoptr(builder.extract_element(addresses, at), ir.FloatType().as_pointer())
            result = builder.insert_element(result, builder.load(pointer), at)
        return result

    return f32x16(types.int64, f32x16), codegen


@intrinsic
def rounded_down(typingctx: Any, value: Any) -> Any:
    """The largest whole numbers that are not above."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        t = llvm_type(value)
        return call(builder, f"llvm.floor.{suffix(t)}", t, args)

    return value(value), codegen


@intrinsic
def least_lane(typingctx: Any, value: Any) -> Any:
    """(the least number, the first lane that has it); NaN counts as infinite."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (v,) = args
        lanes = value.lanes
        endless = ir.Constant(v.type, [float("inf")] * lanes)
        v = builder.select(builder.fcmp_ordered("ord", v, v), v, endless)
        least = v
        n = lanes
        while n > 1:
            n //= 2
            a, b = rearrange(builder, least, range(n)), rearrange(builder, least, range(n, 2 * n))
            least = builder.select(builder.fcmp_ordered("<", b, a), b, a)
        least = builder.extract_element(least, ir.Constant(ir.IntType(32), 0))
        hits = builder.fcmp_ordered("==", v, spread(builder, least, lanes))
        mask = builder.zext(builder.bitcast(hits, ir.IntType(lanes)), ir.IntType(64))
        lane = builder.cttz(mask, ir.Constant(ir.IntType(1), 0))
        return context.make_tuple(builder, sig.return_type, [least, lane])

    return types.Tuple((value.element, types.int64))(value), codegen


@inline_kernel
def half_bits(value):
    """The bits of the f16 nearest to an f32, halves to even; beyond the largest finite f16: that one."""
    bits = types.int64(view(types.int32, types.float32(value)))
    sign = (bits >> 16) & 0x8000
    magnitude = bits & 0x7FFFFFFF
    if magnitude >= 0x477FF000:
        return sign | 0x7BFF
    if magnitude < 0x38800000:  # a subnormal f16: a multiple of 2^-24
        return sign | types.int64(np.rint(abs(types.float32(value)) * types.float32(2.0**24)))
    return sign | ((magnitude + 0xFFF + ((magnitude >> 13) & 1) - 0x38000000) >> 13)


@inline_kernel
def half_value(bits):
    """The f32 of f16 bits, which must be finite."""
    fraction = bits & 1023
    exponent = (bits >> 10) & 31
    if exponent:
        value = view(types.float32, types.int32(((exponent + 112) << 23) | (fraction << 13)))
    else:
        value = types.float32(fraction) * types.float32(2.0**-24)
    return -value if bits & 0x8000 else value


@inline_kernel
def put_half(out, at, bits):
    """Write f16 bits to out u8[...] at a place."""
    out[at] = bits & 255
    out[at + 1] = (bits >> 8) & 255
