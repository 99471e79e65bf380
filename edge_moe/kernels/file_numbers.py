"""Numbers as files have them: halves and bfloats, codes of a table, fields and single bits of bytes."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_moe.kernels.jit import inline_kernel
from edge_moe.kernels.simd import (
    INT32,
    Vector,
    call,
    constant,
    hidden,
    in_registers,
    llvm_type,
    load,
    load_at,
    rearrange,
    spread,
    u8x64,
    u16x4,
    view,
)
from edge_moe.kernels.target import TARGET

# ---- floats of 16 bits


def half_bits_to_float(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """f16 bits (i16 or a vector of it) -> f32."""
    vector = isinstance(bits.type, ir.VectorType)

    def shaped(t: ir.Type) -> ir.Type:
        return ir.VectorType(t, bits.type.count) if vector else t

    def const(t: ir.Type, value: float | int) -> ir.Constant:
        return ir.Constant(shaped(t), [value] * bits.type.count if vector else value)

    if TARGET.has_f16 and vector:
        return builder.fpext(builder.bitcast(bits, shaped(ir.HalfType())), shaped(ir.FloatType()))
    if TARGET.has_f16:
        # LLVM would load into a lane of whatever register, and so wait for what was computed in it; by way of a general
        # register, behind an assembly of nothing that hides where the number is from, it cannot.
        wide = builder.zext(bits, INT32)
        if TARGET.is_x86:
            wide = builder.asm(ir.FunctionType(INT32, [INT32]), "", "=r,0", [wide], side_effect=False)
        return builder.fpext(builder.bitcast(builder.trunc(wide, bits.type), ir.HalfType()), ir.FloatType())
    # Without an instruction LLVM would call a library function for each lane: move the exponent instead, and scale.
    wide = builder.zext(bits, shaped(INT32))
    magnitude = builder.shl(builder.and_(wide, const(INT32, 0x7FFF)), const(INT32, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, shaped(ir.FloatType())), const(ir.FloatType(), 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, const(INT32, 0x0F800000))
    exponent = builder.or_(magnitude, const(INT32, 0x7F800000))
    value = builder.select(special, exponent, builder.bitcast(scaled, shaped(INT32)))
    sign = builder.shl(builder.and_(wide, const(INT32, 0x8000)), const(INT32, 16))
    return builder.bitcast(builder.or_(value, sign), shaped(ir.FloatType()))


@intrinsic
def load_half(typingctx: Any, address: Any) -> Any:
    """The f16 number at an address, as f32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return half_bits_to_float(builder, load_at(builder, args[0], ir.IntType(16)))

    return types.float32(types.int64), codegen


@inline_kernel
def load_halves(a, b, c, d):
    """The f16 numbers at four addresses, as f32x4."""
    low = types.uint64(load(types.uint16, a)) | (types.uint64(load(types.uint16, b)) << types.uint64(16))
    high = types.uint64(load(types.uint16, c)) | (types.uint64(load(types.uint16, d)) << types.uint64(16))
    return from_half(view(u16x4, hidden(low | (high << types.uint64(32)))))  # LLVM would put one by one into a register


@intrinsic
def from_half(typingctx: Any, bits: Any) -> Any:
    """f16 bits u16x16 -> f32x16, or as many."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return half_bits_to_float(builder, args[0])

    return Vector(types.float32, bits.lanes)(bits), codegen


@intrinsic
def from_bfloat(typingctx: Any, bits: Any) -> Any:
    """bf16 bits u16x16 -> f32x16."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.VectorType(INT32, bits.lanes)
        shifted = builder.shl(builder.zext(args[0], wide), ir.Constant(wide, [16] * bits.lanes))
        return builder.bitcast(shifted, ir.VectorType(ir.FloatType(), bits.lanes))

    return Vector(types.float32, bits.lanes)(bits), codegen


@intrinsic
def load_bfloat(typingctx: Any, address: Any) -> Any:
    """The bf16 number at an address, as f32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.zext(load_at(builder, args[0], ir.IntType(16)), INT32)
        return builder.bitcast(builder.shl(bits, ir.Constant(INT32, 16)), ir.FloatType())

    return types.float32(types.int64), codegen


# ---- codes


def table_lookup(table: Sequence[int]) -> Any:
    """Make an operation that replaces each byte (0 to 15) by an entry of a constant table of 16 bytes."""

    @intrinsic
    def lookup(typingctx: Any, indices: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            name = {
                "avx512": "llvm.x86.avx512.pshuf.b.512",
                "avx2": "llvm.x86.avx2.pshuf.b",
                "ssse3": "llvm.x86.ssse3.pshuf.b.128",
                "neon": "llvm.aarch64.neon.tbl1.v16i8",
            }.get(TARGET.shuffle)

            def one(part: ir.Value) -> ir.Value:
                n = part.type.count
                if name is not None:
                    entries = ir.Constant(part.type, [v & 255 for v in table] * (n // 16))
                    return call(builder, name, part.type, [entries, part])
                found = ir.Constant(part.type, [table[0] & 255] * n)
                for i, entry in enumerate(table[1:], 1):
                    hit = builder.icmp_unsigned("==", part, ir.Constant(part.type, [i] * n))
                    found = builder.select(hit, ir.Constant(part.type, [entry & 255] * n), found)
                return found

            return in_registers(builder, args, one)

        return Vector(types.int8, indices.lanes)(indices), codegen

    return lookup


@intrinsic
def add_bits(typingctx: Any, codes: Any, first: Any, second: Any, value: Any) -> Any:
    """codes u8x64 + `value` for each bit that is set of two uint32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        codes, first, second, value = args
        byte = spread(builder, builder.trunc(value, ir.IntType(8)), 64)
        if TARGET.shuffle == "avx512":  # bits are a mask there
            low, high = (builder.zext(word, ir.IntType(64)) for word in (first, second))
            bits = builder.or_(low, builder.shl(high, ir.Constant(high.type, 32)))
            is_set = builder.bitcast(bits, ir.VectorType(ir.IntType(1), 64))
            return builder.select(is_set, builder.add(codes, byte), codes)
        words = rearrange(builder, spread(builder, first, 8), range(16), spread(builder, second, 8))
        octets = builder.bitcast(words, ir.VectorType(ir.IntType(8), 64))
        own_octet = rearrange(builder, octets, [32 * (i // 32) + i % 32 // 8 for i in range(64)])
        masks = constant(u8x64, [1 << i % 8 for i in range(64)])
        is_set = builder.icmp_unsigned("==", builder.and_(own_octet, masks), masks)
        return builder.or_(codes, builder.select(is_set, byte, constant(u8x64, 0)))

    return u8x64(u8x64, types.uint32, types.uint32, types.int64), codegen


_EACH_BIT = 0x0102040810204080  # of an 8 x 8 matrix of bits the rows, of which the last is that of bit 0


def _bit_matrices(builder: ir.IRBuilder, shifts: Sequence[int], more: ir.Value, mask: int) -> ir.Value:
    """What the bits of each of 64 bytes are multiplied with to get those of `bit_field`: u64x8."""
    rows = sum(255 << 8 * (7 - bit) for bit in range(8) if mask >> bit & 1)
    wide = ir.VectorType(ir.IntType(64), 8)
    own = ir.Constant(wide, [8 * shift for shift in shifts for _ in range(8 // len(shifts))])
    by = builder.add(own, spread(builder, builder.shl(more, ir.Constant(more.type, 3)), 8))
    return builder.and_(builder.shl(ir.Constant(wide, [_EACH_BIT] * 8), by), ir.Constant(wide, [rows] * 8))


def bit_field(shifts: Sequence[int], mask: int) -> Any:
    """Make an operation on u8xN that takes bits out of bytes, shifted right by the part's constant plus one number.

    In lanes of 16 bits: what comes over from a neighbour must be masked away. Where the CPU multiplies the bits of each
    byte with a matrix, it shifts and masks in one step.
    """

    @intrinsic
    def field(typingctx: Any, value: Any, more: Any) -> Any:
        wide = Vector(types.uint16, value.lanes // 2)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            bits, goal = args[0], constant(value, mask)
            if TARGET.has_gfni and value.lanes == 64:
                matrices = builder.bitcast(_bit_matrices(builder, shifts, args[1], mask), bits.type)
                name, none = "llvm.x86.vgf2p8affineqb.512", ir.Constant(ir.IntType(8), 0)
                moved = call(builder, name, bits.type, [bits, matrices, none])
                if any(shifts):
                    return moved
                is_in_place = builder.icmp_signed("==", args[1], ir.Constant(args[1].type, 0))
                return builder.select(is_in_place, builder.and_(bits, goal), moved)
            own = constant(wide, [n for n in shifts for _ in range(wide.lanes // len(shifts))])
            by = builder.add(own, spread(builder, builder.trunc(args[1], ir.IntType(16)), wide.lanes))
            shifted = builder.lshr(builder.bitcast(bits, llvm_type(wide)), by)
            return builder.and_(builder.bitcast(shifted, bits.type), goal)

        return value(value, types.int64), codegen

    return field


def bit_mover(shifts: Sequence[int], mask: int) -> Any:
    """Make a `bit_field` of constants alone; those below 0 shift to the left."""

    @intrinsic
    def move(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            if TARGET.has_gfni and value.lanes == 64:
                sources = [{bit: bit + shift for bit in range(8) if mask >> bit & 1} for shift in shifts]
                matrices = [
                    sum(1 << (8 * (7 - bit) + source) for bit, source in each.items() if 0 <= source < 8)
                    for each in sources
                ]
                own = [matrix for matrix in matrices for _ in range(8 // len(shifts))]
                constants = builder.bitcast(ir.Constant(ir.VectorType(ir.IntType(64), 8), own), args[0].type)
                name, none = "llvm.x86.vgf2p8affineqb.512", ir.Constant(ir.IntType(8), 0)
                return call(builder, name, args[0].type, [args[0], constants, none])
            wide = Vector(types.uint16, value.lanes // 2)
            each_lane = [shift for shift in shifts for _ in range(wide.lanes // len(shifts))]
            bits = builder.bitcast(args[0], llvm_type(wide))
            left = builder.shl(bits, constant(wide, [max(-shift, 0) for shift in each_lane]))
            moved = builder.lshr(left, constant(wide, [max(shift, 0) for shift in each_lane]))
            return builder.and_(builder.bitcast(moved, args[0].type), constant(value, mask))

        return value(value), codegen

    return move
