"""Integer dot products of codes with int8 activations: 64 of each give sums of four neighbours in 16 int32 lanes."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_moe.kernels.simd import (
    Vector,
    call,
    i8x64,
    i32x16,
    in_registers,
    llvm_type,
    rearrange,
    suffix,
    u8x64,
)
from edge_moe.kernels.target import TARGET

MAX_ACTIVATION = 127

# Here byte products are summed in 16 bits first, and a scale can be multiplied in on the way to 32 bits.
VIA_16_BITS = TARGET.dot in ("avx512", "avx2", "ssse3")
# Where bytes can be added straight into 32 bits, so can pairs of 16 bits: a scale costs nothing on that way, either.
_PAIR_DOT = {"avx512vnni": "llvm.x86.avx512.vpdpwssd.512", "avxvnni": "llvm.x86.avx512.vpdpwssd.256"}.get(TARGET.dot)
# There, tiles scale a group's sums as floats: converting and adding are two steps, where multiplying 32-bit numbers
# alone is two on Intel's CPUs. Sums of a superblock up to 24 bits stay exact; few are longer.
SCALES_ARE_FLOATS = _PAIR_DOT is not None
# Codes with a sign are stored unsigned, 128 too large, where unsigned ones can be multiplied in full.
SIGN_BIAS = 128 if TARGET.exact_u8 else 0

BYTE, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)


def _pair_sums_16(builder: ir.IRBuilder, codes: ir.Value, x: ir.Value) -> ir.Value:
    """u8 x i8 products, neighbours added in 16 bits."""
    name = {16: "ssse3.pmadd.ub.sw.128", 32: "avx2.pmadd.ub.sw", 64: "avx512.pmaddubs.w.512"}[TARGET.register_bytes]

    def one(u: ir.Value, s: ir.Value) -> ir.Value:
        return call(builder, f"llvm.x86.{name}", ir.VectorType(I16, u.type.count // 2), [u, s])

    return in_registers(builder, [codes, x], one)


def pair_sums_32(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """i16 x i16 products, neighbours added in 32 bits."""
    names = {8: "sse2.pmadd.wd", 16: "avx2.pmadd.wd", 32: "avx512.pmaddw.d.512"}

    def one(u: ir.Value, v: ir.Value) -> ir.Value:
        half = ir.VectorType(I32, u.type.count // 2)
        if TARGET.is_x86:
            return call(builder, f"llvm.x86.{names[u.type.count]}", half, [u, v])
        wide = ir.VectorType(I32, u.type.count)
        return _fold_pairs(builder, builder.mul(builder.sext(u, wide), builder.sext(v, wide)))

    return in_registers(builder, [a, b], one)


def add_pair_sums_32(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """total i32 + `pair_sums_32`, in one step where the CPU has it."""
    if _PAIR_DOT is None:
        return builder.add(total, pair_sums_32(builder, a, b))

    def one(t: ir.Value, u: ir.Value, v: ir.Value) -> ir.Value:
        as_words = ir.VectorType(I32, u.type.count // 2)
        return call(builder, _PAIR_DOT, t.type, [t, builder.bitcast(u, as_words), builder.bitcast(v, as_words)])

    return in_registers(builder, [total, a, b], one)


def _fold_pairs(builder: ir.IRBuilder, v: ir.Value) -> ir.Value:
    n = v.type.count
    return builder.add(rearrange(builder, v, range(0, n, 2)), rearrange(builder, v, range(1, n, 2)))


def _with_signs(builder: ir.IRBuilder, codes: ir.Value, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(|codes|, x with the codes' signs): the same products, with the first factor unsigned."""
    magnitude = call(builder, f"llvm.abs.{suffix(codes.type)}", codes.type, [codes, ir.Constant(ir.IntType(1), 0)])
    name = {16: "llvm.x86.ssse3.psign.b.128", 32: "llvm.x86.avx2.psign.b"}.get(TARGET.register_bytes)

    def one(s: ir.Value, w: ir.Value) -> ir.Value:
        if name is not None:
            return call(builder, name, s.type, [s, w])
        zero = ir.Constant(w.type, [0] * w.type.count)
        return builder.select(builder.icmp_signed("<", w, zero), builder.sub(zero, s), s)

    return magnitude, in_registers(builder, [x, codes], one)


def _add_dot(builder: ir.IRBuilder, total: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """total + sums of four products, on targets that add bytes straight into 32 bits."""
    name = {
        "avx512vnni": "llvm.x86.avx512.vpdpbusd.512",
        "avxvnni": "llvm.x86.avx512.vpdpbusd.256",
        "usdot": "llvm.aarch64.neon.usdot.v4i32.v16i8",
        "sdot": "llvm.aarch64.neon.sdot.v4i32.v16i8",
    }.get(TARGET.dot)
    if name is None:
        wide = ir.VectorType(I16, codes.type.count)
        pairs = pair_sums_32(builder, builder.zext(codes, wide), builder.sext(x, wide))
        return builder.add(total, _fold_pairs(builder, pairs))

    def one(t: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        if TARGET.is_x86:  # before LLVM 22 words of four bytes, which newer ones take as well
            u, s = builder.bitcast(u, t.type), builder.bitcast(s, t.type)
        return call(builder, name, t.type, [t, u, s])

    return in_registers(builder, [total, codes, x], one)


class GroupDot:
    """total + scale * (sum of products of registers of codes and activations), given one register after the other."""

    def __init__(self, builder: ir.IRBuilder, fmt: Any, total: ir.Value, scale: ir.Value | None) -> None:
        self.builder, self.fmt, self.total, self.scale = builder, fmt, total, scale
        self.pending, self.length = None, 0
        if not VIA_16_BITS:
            self.pending = total if scale is None else ir.Constant(total.type, [0] * total.type.count)
        # Two products of the largest code: how many such sums does a 16-bit lane hold?
        self.chain = 1 if fmt.signed else max(1, 32767 // (2 * MAX_ACTIVATION * fmt.max_code))

    @property
    def sums(self) -> ir.Value:
        """What the next products will be added to."""
        return self.total if self.pending is None else self.pending

    @sums.setter
    def sums(self, value: ir.Value) -> None:
        if self.pending is None:
            self.total = value
        else:
            self.pending = value

    def add(self, codes: ir.Value, x: ir.Value) -> None:
        """Take one more register of each."""
        builder = self.builder
        if not VIA_16_BITS:
            self.pending = _add_dot(builder, self.pending, codes, x)
            return
        operands = _with_signs(builder, codes, x) if self.fmt.signed else (codes, x)
        sums = _pair_sums_16(builder, *operands)
        self.pending = sums if self.pending is None else builder.add(self.pending, sums)
        self.length += 1
        if self.length == self.chain:
            self._widen()

    def _widen(self) -> None:
        builder = self.builder
        pairs = ir.VectorType(I16, 2 * self.total.type.count)
        factor = ir.Constant(pairs, [1] * pairs.count) if self.scale is None else builder.bitcast(self.scale, pairs)
        self.total = builder.add(self.total, pair_sums_32(builder, self.pending, factor))
        self.pending, self.length = None, 0

    def result(self) -> ir.Value:
        """The new total."""
        if not VIA_16_BITS:
            if self.scale is None:
                return self.pending
            return self.builder.add(self.total, self.builder.mul(self.pending, self.scale))
        if self.pending is not None:
            self._widen()
        return self.total


# ---- one row: lanes are neighbouring columns


@intrinsic
def dot(typingctx: Any, fmt: Any, codes: Any, x: Any) -> Any:
    """Sums of four neighbouring products: codes u8x64 or i8x64, x i8x64 -> i32x16."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = ir.Constant(llvm_type(i32x16), [0] * 16)
        group = GroupDot(builder, fmt, zero, None)
        group.add(args[1], args[2])
        return group.result()

    return i32x16(fmt, codes, x), codegen


@intrinsic
def add_scaled_dot(typingctx: Any, fmt: Any, total: Any, codes: Any, x: Any, scales: Any) -> Any:
    """total i32x16 + dot(codes, x) times scales i16x32, one for each two columns, equal for each four."""
    fits_16_bits = not fmt.signed and 2 * MAX_ACTIVATION * fmt.max_code < 1 << 15

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, total, codes, x, scale = args
        if _PAIR_DOT is not None and fits_16_bits:
            return add_pair_sums_32(builder, total, _pair_sums_16(builder, codes, x), scale)
        if not VIA_16_BITS:
            scale = builder.sext(rearrange(builder, scale, range(0, 32, 2)), llvm_type(i32x16))
        group = GroupDot(builder, fmt, total, scale)
        group.add(codes, x)
        return group.result()

    return i32x16(fmt, total, codes, x, scales), codegen


@intrinsic
def add_dot(typingctx: Any, total: Any, codes: Any, x: Any) -> Any:
    """total i32x16 + dot(codes, x), where bytes are added straight into 32 bits."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _add_dot(builder, *args)

    return i32x16(total, codes, x), codegen


@intrinsic
def packed_sums(typingctx: Any, a: Any, b: Any) -> Any:
    """i32x16 and i32x16 whose numbers fit 16 bits -> i16x32: four of a, four of b, and so on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        names = {16: "avx512.packssdw.512", 8: "avx2.packssdw", 4: "sse2.packssdw.128"}

        def one(u: ir.Value, v: ir.Value) -> ir.Value:
            n = u.type.count
            if TARGET.is_x86:
                return call(builder, f"llvm.x86.{names[n]}", ir.VectorType(I16, 2 * n), [u, v])
            halves = [builder.bitcast(w, ir.VectorType(I16, 2 * n)) for w in (u, v)]
            order = [2 * (i + j) + 2 * n * w for i in range(0, n, 4) for w in (0, 1) for j in range(4)]
            return rearrange(builder, halves[0], order, halves[1])

        return in_registers(builder, list(args), one)

    return Vector(types.int16, 32)(a, b), codegen


@intrinsic
def pair_dot(typingctx: Any, a: Any, b: Any) -> Any:
    """i16 x i16 -> i32, sums of two neighbouring products."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pair_sums_32(builder, args[0], args[1])

    return Vector(types.int32, a.lanes // 2)(a, a), codegen


@intrinsic
def stored_sign(typingctx: Any, codes: Any) -> Any:
    """Signed codes in the form that this target multiplies: as they are, or SIGN_BIAS larger."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.xor(args[0], ir.Constant(args[0].type, [SIGN_BIAS] * args[0].type.count))

    return (u8x64 if SIGN_BIAS else i8x64)(codes), codegen
