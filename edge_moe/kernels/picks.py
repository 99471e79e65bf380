"""Picking lanes and bytes of registers by constant indices."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from edge_moe.kernels.simd import Vector, call, constant, i16x32, llvm_type, rearrange, u8x64
from edge_moe.kernels.target import TARGET


def picker(indices: Sequence[int]) -> Any:
    """Make an operation that picks lanes by constant indices: the result has as many lanes as there are indices."""

    @intrinsic
    def pick(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return rearrange(builder, args[0], indices)

        return Vector(value.element, len(indices))(value), codegen

    return pick


def _pick_bytes(builder: ir.IRBuilder, sources: Sequence[ir.Value], indices: Sequence[int]) -> ir.Value:
    """Bytes of several <64 x i8>, those of the second counted from 64, by constant indices; zeros for those below 0.

    One step for each source on CPUs that have an instruction for it.
    """
    kind = sources[0].type
    order = _unknown_constant(builder, ir.Constant(kind, [i % 64 for i in indices]))  # the same of all sources
    picked: ir.Value = ir.Constant(kind, [0] * 64)
    for s, source in enumerate(sources):
        own = sum(1 << place for place, i in enumerate(indices) if i // 64 == s)
        lanes = call(builder, "llvm.x86.avx512.permvar.qi.512", kind, [source, order])
        if s or min(indices) < 0:
            mask = _unknown_constant(builder, ir.Constant(ir.IntType(64), own))
            lanes = builder.select(builder.bitcast(mask, ir.VectorType(ir.IntType(1), 64)), lanes, picked)
        picked = lanes
    return picked


def _unknown_constant(builder: ir.IRBuilder, value: ir.Constant) -> ir.Value:
    """A constant that LLVM only copies, once before a loop: it would see other instructions in what is made of it."""
    is_vector = isinstance(value.type, ir.VectorType)
    floats = ir.VectorType(ir.FloatType(), 16) if is_vector else ir.DoubleType()
    name = "llvm.arithmetic.fence." + ("v16f32" if is_vector else "f64")
    fenced = call(builder, name, floats, [builder.bitcast(value, floats)])
    return builder.bitcast(fenced, value.type)


def whole_picker(indices: Sequence[int]) -> Any:
    """Make a `picker` of all lanes of 64 bytes, byte by byte where the CPU can: Intel's take two steps for 16 bits."""

    @intrinsic
    def pick(typingctx: Any, value: Any) -> Any:
        size = value.element.bitwidth // 8

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            if not TARGET.has_vbmi:
                return rearrange(builder, args[0], indices)
            octets = builder.bitcast(args[0], llvm_type(u8x64))
            picked = _pick_bytes(builder, [octets], [size * i + octet for i in indices for octet in range(size)])
            return builder.bitcast(picked, args[0].type)

        return value(value), codegen

    return pick


def pair_picker(indices: Sequence[int]) -> Any:
    """Make an operation that picks bytes of two u8x64 by constant indices, in two steps; the second's count from 64."""

    @intrinsic
    def pick(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return _pick_bytes(builder, args, indices)

        return a(a, a), codegen

    return pick


def quartet_picker(indices: Sequence[int]) -> Any:
    """The same of four u8x64, in four steps."""

    @intrinsic
    def pick(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return _pick_bytes(builder, args, indices)

        return a(a, a, a, a), codegen

    return pick


def bits_picker(starts: Sequence[int]) -> Any:
    """Make an operation on u8x64 that gives each byte the 8 bits of its own 64 that begin at a constant place."""

    @intrinsic
    def pick(typingctx: Any, octets: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            places = _unknown_constant(builder, constant(octets, [start % 64 for start in starts]))
            return call(builder, "llvm.x86.avx512.pmultishift.qb.512", args[0].type, [places, args[0]])

        return octets(octets), codegen

    return pick


def widener(indices: Sequence[int]) -> Any:
    """Make an operation that picks 32 of u8x64 by constant indices, as i16x32."""

    @intrinsic
    def widen(typingctx: Any, octets: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            if TARGET.has_vbmi:
                picked = _pick_bytes(builder, args, [place for i in indices for place in (i, -1)])
                return builder.bitcast(picked, llvm_type(i16x32))
            wide = builder.zext(args[0], ir.VectorType(ir.IntType(16), 64))
            return rearrange(builder, wide, indices)

        return i16x32(u8x64), codegen

    return widen
