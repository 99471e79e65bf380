"""Integer dot products of block codes with int8 activations, for one row and for a tile of rows times tokens.

A register of 64 codes times 64 activations gives sums of four neighbours in 16 int32 lanes. In a tile the lanes are 16 rows,
and each token of the tile has an accumulator.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_moe.kernels.simd import (
    Vector,
    call,
    f32x16,
    i8x64,
    i16x16,
    i16x32,
    i32x16,
    llvm_type,
    load_at,
    rearrange,
    spread,
    store_at,
    suffix,
    u8x64,
)
from edge_moe.kernels.target import TARGET

TILE_ROWS = 16
# As many accumulators of 64 bytes as leave registers for the operands.
TILE_TOKENS = 8 if TARGET.registers * TARGET.register_bytes >= 2048 else 4
MAX_ACTIVATION = 127

# On these targets byte products are summed in 16 bits first, so that a scale can be multiplied in on the way to 32 bits.
VIA_16_BITS = TARGET.dot in ("avx512", "avx2", "ssse3")
# Codes with a sign are stored unsigned, 128 too large, where unsigned ones can be multiplied in full.
SIGN_BIAS = 128 if TARGET.exact_u8 else 0

BYTE, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)


# ---- pieces of 64 bytes, in registers of the target's size


def _in_registers(builder: ir.IRBuilder, args: Sequence[ir.Value], function: Any) -> ir.Value:
    """Apply a function of register-sized vectors to larger ones."""
    lanes = TARGET.register_bytes * 8 // args[0].type.element.width
    n = args[0].type.count // lanes
    if n <= 1:
        return function(*args)
    parts = []
    for i in range(n):
        per = [a.type.count // n for a in args]
        parts.append(function(*(rearrange(builder, a, range(i * p, i * p + p)) for a, p in zip(args, per, strict=True))))
    while len(parts) > 1:
        both = range(2 * parts[0].type.count)
        parts = [rearrange(builder, a, both, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _pair_sums_16(builder: ir.IRBuilder, codes: ir.Value, x: ir.Value) -> ir.Value:
    """u8 x i8 products, neighbours added in 16 bits."""
    name = {16: "ssse3.pmadd.ub.sw.128", 32: "avx2.pmadd.ub.sw", 64: "avx512.pmaddubs.w.512"}[TARGET.register_bytes]

    def one(u: ir.Value, s: ir.Value) -> ir.Value:
        return call(builder, f"llvm.x86.{name}", ir.VectorType(I16, u.type.count // 2), [u, s])

    return _in_registers(builder, [codes, x], one)


def _pair_sums_32(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """i16 x i16 products, neighbours added in 32 bits."""
    name = {16: "sse2.pmadd.wd", 32: "avx2.pmadd.wd", 64: "avx512.pmaddw.d.512"}[TARGET.register_bytes]

    def one(u: ir.Value, v: ir.Value) -> ir.Value:
        half = ir.VectorType(I32, u.type.count // 2)
        if TARGET.is_x86:
            return call(builder, f"llvm.x86.{name}", half, [u, v])
        wide = ir.VectorType(I32, u.type.count)
        return _fold_pairs(builder, builder.mul(builder.sext(u, wide), builder.sext(v, wide)))

    return _in_registers(builder, [a, b], one)


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

    return magnitude, _in_registers(builder, [x, codes], one)


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
        pairs = _pair_sums_32(builder, builder.zext(codes, wide), builder.sext(x, wide))
        return builder.add(total, _fold_pairs(builder, pairs))

    def one(t: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
        return call(builder, name, t.type, [t, u, s])

    return _in_registers(builder, [total, codes, x], one)


class _GroupDot:
    """total + scale * (sum of products of registers of codes and activations), given one register after the other."""

    def __init__(self, builder: ir.IRBuilder, fmt: Any, total: ir.Value, scale: ir.Value | None) -> None:
        self.builder, self.fmt, self.total, self.scale = builder, fmt, total, scale
        self.pending, self.length = None, 0
        if not VIA_16_BITS:
            self.pending = total if scale is None else ir.Constant(total.type, [0] * total.type.count)
        # Two products of the largest code: how many such sums does a 16-bit lane hold?
        self.chain = 1 if fmt.signed else max(1, 32767 // (2 * MAX_ACTIVATION * fmt.max_code))

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
        self.total = builder.add(self.total, _pair_sums_32(builder, self.pending, factor))
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
        group = _GroupDot(builder, fmt, zero, None)
        group.add(args[1], args[2])
        return group.result()

    return i32x16(fmt, codes, x), codegen


@intrinsic
def add_scaled_dot(typingctx: Any, fmt: Any, total: Any, codes: Any, x: Any, scales: Any) -> Any:
    """total i32x16 + dot(codes, x) times the first four of scales i16x16, one for each 16 columns."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        per_lane = rearrange(builder, args[4], [i // 8 for i in range(32)] if VIA_16_BITS else [i // 4 for i in range(16)])
        scale = per_lane if VIA_16_BITS else builder.sext(per_lane, llvm_type(i32x16))
        group = _GroupDot(builder, fmt, args[1], scale)
        group.add(args[2], args[3])
        return group.result()

    return i32x16(fmt, total, codes, x, scales), codegen


@intrinsic
def pair_dot(typingctx: Any, a: Any, b: Any) -> Any:
    """i16 x i16 -> i32, sums of two neighbouring products."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _pair_sums_32(builder, args[0], args[1])

    return Vector(types.int32, a.lanes // 2)(a, a), codegen


@intrinsic
def stored_sign(typingctx: Any, codes: Any) -> Any:
    """Signed codes in the form that this target multiplies: as they are, or SIGN_BIAS larger."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.xor(args[0], ir.Constant(args[0].type, [SIGN_BIAS] * args[0].type.count))

    return (u8x64 if SIGN_BIAS else i8x64)(codes), codegen


# ---- a tile: lanes are 16 rows, one accumulator for each of TILE_TOKENS tokens

_POINTERS = types.UniTuple(types.int64, TILE_TOKENS)


def _tile(vector: Vector) -> types.UniTuple:
    return types.UniTuple(vector, TILE_TOKENS)


def _pack(builder: ir.IRBuilder, values: Sequence[ir.Value]) -> ir.Value:
    packed = ir.Constant(ir.ArrayType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        packed = builder.insert_value(packed, value, i)
    return packed


def _unpack(builder: ir.IRBuilder, packed: ir.Value) -> list[ir.Value]:
    return [builder.extract_value(packed, i) for i in range(TILE_TOKENS)]


def _broadcast(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value, element: ir.Type, lanes: int) -> ir.Value:
    return spread(builder, load_at(builder, builder.add(address, offset), element), lanes)


@intrinsic
def tile_pointers(typingctx: Any, table: Any) -> Any:
    """The int64 addresses of TILE_TOKENS tokens, from a table in memory."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _pack(builder, [load_at(builder, args[0], ir.IntType(64), 8 * t) for t in range(TILE_TOKENS)])

    return _POINTERS(types.int64), codegen


@intrinsic
def tile_zero(typingctx: Any, kind: Any) -> Any:
    """A tile of zeros, of i32x16 or f32x16."""
    tile = _tile(kind.instance_type)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(tile), None)

    return tile(kind), codegen


def _tile_dot(builder: Any, fmt: Any, total: Any, codes: Any, tokens: Any, offset: Any, scale: Any) -> Any:
    groups = [_GroupDot(builder, fmt, acc, scale) for acc in _unpack(builder, total)]
    addresses = [builder.add(token, offset) for token in _unpack(builder, tokens)]
    for step in range(fmt.group // 4):  # a register of codes meets all tokens before the next is loaded
        w = load_at(builder, codes, ir.VectorType(BYTE, 64), 64 * step)
        for group, address in zip(groups, addresses, strict=True):
            quad = spread(builder, load_at(builder, address, I32, 4 * step), 16)
            group.add(w, builder.bitcast(quad, ir.VectorType(BYTE, 64)))
    return _pack(builder, [group.result() for group in groups])


@intrinsic
def tile_dot(typingctx: Any, fmt: Any, codes: Any, tokens: Any, offset: Any) -> Any:
    """One group of columns: codes at an address [group/4][16 rows][4], int8 activations at token + offset -> i32 tile."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = ir.Constant(context.get_value_type(_tile(i32x16)), None)
        return _tile_dot(builder, fmt, zero, args[1], args[2], args[3], None)

    return _tile(i32x16)(fmt, types.int64, tokens, types.int64), codegen


@intrinsic
def tile_add_scaled_dot(typingctx: Any, fmt: Any, total: Any, codes: Any, tokens: Any, offset: Any, scale: Any) -> Any:
    """total + scale * tile_dot(...); scale i32x16 as made by `row_scale`, one for each row."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _tile_dot(builder, fmt, *args[1:])

    return total(fmt, total, types.int64, tokens, types.int64, scale), codegen


@intrinsic
def row_scale(typingctx: Any, scales: Any) -> Any:
    """i16x16, one for each row -> i32x16 in the form that `tile_add_scaled_dot` multiplies."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if VIA_16_BITS:
            twice = rearrange(builder, args[0], [i // 2 for i in range(32)])
            return builder.bitcast(twice, llvm_type(i32x16))
        return builder.sext(args[0], llvm_type(i32x16))

    return i32x16(i16x16), codegen


@intrinsic
def tile_add_pairs(typingctx: Any, total: Any, pairs: Any, tokens: Any, offset: Any) -> Any:
    """total i32 tile + products of i16 pairs: pairs i16x32, two for each row; two i16 at token + offset."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, pairs, tokens, offset = args
        sums = []
        for acc, token in zip(_unpack(builder, total), _unpack(builder, tokens), strict=True):
            both = _broadcast(builder, token, offset, I32, 16)
            product = _pair_sums_32(builder, pairs, builder.bitcast(both, llvm_type(i16x32)))
            sums.append(builder.add(acc, product))
        return _pack(builder, sums)

    return total(total, i16x32, tokens, types.int64), codegen


def _fmuladd(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return call(builder, f"llvm.fmuladd.{suffix(a.type)}", a.type, [a, b, c])


@intrinsic
def tile_add_product(typingctx: Any, total: Any, factor: Any, tokens: Any, offset: Any) -> Any:
    """total f32 tile + factor f32x16 (one for each row) times the float at token + offset."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, factor, tokens, offset = args
        sums = []
        for acc, token in zip(_unpack(builder, total), _unpack(builder, tokens), strict=True):
            x = _broadcast(builder, token, offset, ir.FloatType(), 16)
            sums.append(_fmuladd(builder, factor, x, acc))
        return _pack(builder, sums)

    return total(total, f32x16, tokens, types.int64), codegen


@intrinsic
def tile_add_scaled(typingctx: Any, total: Any, sums: Any, factor: Any, tokens: Any, offset: Any) -> Any:
    """total f32 tile + i32 tile times factor f32x16 (one for each row) times the float at token + offset."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, integers, factor, tokens, offset = args
        results = []
        parts = zip(_unpack(builder, total), _unpack(builder, integers), _unpack(builder, tokens), strict=True)
        for acc, integer, token in parts:
            scale = builder.fmul(factor, _broadcast(builder, token, offset, ir.FloatType(), 16))
            results.append(_fmuladd(builder, builder.sitofp(integer, factor.type), scale, acc))
        return _pack(builder, results)

    return total(total, sums, f32x16, tokens, types.int64), codegen


@intrinsic
def tile_store(typingctx: Any, address: Any, tile: Any) -> Any:
    """Write a tile as [TILE_TOKENS][16]."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for t, value in enumerate(_unpack(builder, args[1])):
            store_at(builder, args[0], value, 64 * t)
        return context.get_dummy_value()

    return types.void(types.int64, tile), codegen


# ---- transposing 16 rows


def _transpose(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """16 vectors of 16 lanes, rows and lanes exchanged, by shuffles that x86 has: within quarters, then of quarters."""

    def quarters(pattern: Sequence[int]) -> list[int]:  # 0 to 3: the first operand, 4 to 7: the second
        return [4 * q + p % 4 + 16 * (p // 4) for q in range(4) for p in pattern]

    def merge(a: ir.Value, b: ir.Value, patterns: Sequence[Sequence[int]]) -> list[ir.Value]:
        return [rearrange(builder, a, pattern, b) for pattern in patterns]

    singles, doubles = (quarters((0, 4, 1, 5)), quarters((2, 6, 3, 7))), (quarters((0, 1, 4, 5)), quarters((2, 3, 6, 7)))
    columns = []  # for each four rows: their four columns of each quarter
    for r in range(0, 16, 4):
        a, b = merge(rows[r], rows[r + 1], singles), merge(rows[r + 2], rows[r + 3], singles)
        columns.append([v for x, y in zip(a, b, strict=True) for v in merge(x, y, doubles)])
    halves = [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]
    lanes = [*range(4), *range(8, 12)]
    evens, odds = [*lanes, *(16 + i for i in lanes)], [*(4 + i for i in lanes), *(20 + i for i in lanes)]
    result: list[Any] = [None] * 16
    for j in range(4):
        top, bottom = merge(columns[0][j], columns[1][j], halves), merge(columns[2][j], columns[3][j], halves)
        for half in range(2):
            first, second = merge(top[half], bottom[half], (evens, odds))
            result[8 * half + j], result[8 * half + 4 + j] = first, second
    return result


def _transposer(element: ir.Type) -> Any:
    @intrinsic
    def transpose(typingctx: Any, source: Any, stride: Any, target: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            source, stride, target = args
            vector = ir.VectorType(element, 16)
            rows = []
            for _ in range(TILE_ROWS):
                rows.append(load_at(builder, source, vector))
                source = builder.add(source, stride)
            for i, row in enumerate(_transpose(builder, rows)):
                store_at(builder, target, row, i * 2 * element.width)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return transpose


transpose_16x16 = _transposer(I32)  # (source, stride, target): 16 rows of 64 bytes -> [16][16 rows] of 4 bytes at target
