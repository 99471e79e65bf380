"""Tiles of 16 rows times a few tokens: the lanes are the rows, and each token has an accumulator of 64 bytes.

A tile is a tuple of TILE_TOKENS vectors. What differs between tokens is read at `x`: there the tokens' records are
interleaved by 4 bytes, [bytes / 4][TILE_TOKENS][4], so that the numbers of all tokens at one offset of a record lie
together.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_moe.kernels.dots import BYTE, I32, SCALES_ARE_FLOATS, GroupDot, add_pair_sums_32
from edge_moe.kernels.simd import (
    Vector,
    call,
    f32x16,
    i16x32,
    i32x16,
    llvm_type,
    load_at,
    rearrange,
    spread,
    store_at,
    suffix,
)
from edge_moe.kernels.target import TARGET

TILE_ROWS = 16
# As many accumulators as leave registers for the operands.
TILE_TOKENS = 8 if TARGET.registers * TARGET.register_bytes >= 2048 else 4

# With 16 registers LLVM would begin with products of several steps at once, and store and load most of their sums.
STEPS_IN_ORDER = TARGET.is_x86 and TARGET.register_bytes == 32

SCALED = f32x16 if SCALES_ARE_FLOATS else i32x16  # in which a superblock's groups are scaled and added


def tile_of(vector: Vector) -> types.UniTuple:
    return types.UniTuple(vector, TILE_TOKENS)


def pack_tile(builder: ir.IRBuilder, values: Sequence[ir.Value]) -> ir.Value:
    packed = ir.Constant(ir.ArrayType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        packed = builder.insert_value(packed, value, i)
    return packed


def unpack_tile(builder: ir.IRBuilder, packed: ir.Value) -> list[ir.Value]:
    return [builder.extract_value(packed, i) for i in range(TILE_TOKENS)]


def numbers_at(builder: ir.IRBuilder, x: ir.Value, offset: ir.Value, step: int, element: ir.Type) -> list[ir.Value]:
    """The 4 bytes of each token at an offset of their records, plus steps of 4; each in 16 lanes."""
    start = builder.add(x, builder.mul(offset, ir.Constant(offset.type, TILE_TOKENS)))
    places = [4 * (step * TILE_TOKENS + t) for t in range(TILE_TOKENS)]
    return [spread(builder, load_at(builder, start, element, place), 16) for place in places]


@intrinsic
def tile_zero(typingctx: Any, kind: Any) -> Any:
    """A tile of zeros, of i32x16 or f32x16."""
    tile = tile_of(kind.instance_type)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(tile), None)

    return tile(kind), codegen


def _in_order(builder: ir.IRBuilder, values: list[ir.Value], address: ir.Value) -> tuple[list[ir.Value], ir.Value]:
    """The same values and address, all known only when all are: an assembly of nothing between two steps."""
    lanes = values[0].type.count // 2  # of two registers each
    halves = [rearrange(builder, v, range(i, i + lanes)) for v in values for i in (0, lanes)]
    types_ = [each.type for each in halves] + [address.type]
    n = len(halves)
    constraints = ",".join(["=x"] * n + ["=r"] + [str(i) for i in range(n + 1)])
    kind = ir.LiteralStructType(types_)
    done = builder.asm(ir.FunctionType(kind, types_), "", constraints, [*halves, address], side_effect=False)
    parts = [builder.extract_value(done, i) for i in range(n + 1)]
    both = range(2 * lanes)
    return [rearrange(builder, parts[i], both, parts[i + 1]) for i in range(0, n, 2)], parts[n]


def _tile_dot(builder: Any, fmt: Any, total: Any, codes: Any, x: Any, offset: Any, scale: Any) -> Any:
    groups = [GroupDot(builder, fmt, acc, scale) for acc in unpack_tile(builder, total)]
    for step in range(fmt.group // 4):  # a register of codes meets all tokens before the next is loaded
        if step and STEPS_IN_ORDER and fmt.group > 16:
            sums, codes = _in_order(builder, [group.sums for group in groups], codes)
            for group, each in zip(groups, sums, strict=True):
                group.sums = each
        w = load_at(builder, codes, ir.VectorType(BYTE, 64), 64 * step)
        for group, quad in zip(groups, numbers_at(builder, x, offset, step, I32), strict=True):
            group.add(w, builder.bitcast(quad, w.type))
    return pack_tile(builder, [group.result() for group in groups])


@intrinsic
def tile_dot(typingctx: Any, fmt: Any, codes: Any, x: Any, offset: Any) -> Any:
    """One group of columns: codes at an address [group/4][16 rows][4], int8 at the offset -> i32 tile."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = ir.Constant(context.get_value_type(tile_of(i32x16)), None)
        return _tile_dot(builder, fmt, zero, args[1], args[2], args[3], None)

    return tile_of(i32x16)(fmt, types.int64, types.int64, types.int64), codegen


@intrinsic
def tile_add_scaled_dot(typingctx: Any, fmt: Any, total: Any, codes: Any, x: Any, offset: Any, scale: Any) -> Any:
    """total + scale * tile_dot(...), one scale for each row; both are SCALED, i32 twice in 16 bits if VIA_16_BITS."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if not SCALES_ARE_FLOATS:
            return _tile_dot(builder, fmt, *args[1:])
        _, total, codes, x, offset, scale = args
        zero = ir.Constant(context.get_value_type(tile_of(i32x16)), None)
        sums = unpack_tile(builder, _tile_dot(builder, fmt, zero, codes, x, offset, None))
        floats = [builder.sitofp(each, scale.type) for each in sums]
        pairs = zip(floats, unpack_tile(builder, total), strict=True)
        return pack_tile(builder, [_fmuladd(builder, each, scale, acc) for each, acc in pairs])

    return total(fmt, total, types.int64, types.int64, types.int64, scale), codegen


@intrinsic
def tile_add_pairs(typingctx: Any, total: Any, pairs: Any, x: Any, offset: Any) -> Any:
    """total i32 tile + products of i16 pairs: pairs i16x32, two for each row; two i16 at the offset."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, pairs, x, offset = args
        sums = []
        for acc, both in zip(unpack_tile(builder, total), numbers_at(builder, x, offset, 0, I32), strict=True):
            sums.append(add_pair_sums_32(builder, acc, pairs, builder.bitcast(both, llvm_type(i16x32))))
        return pack_tile(builder, sums)

    return total(total, i16x32, types.int64, types.int64), codegen


def _fmuladd(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return call(builder, f"llvm.fmuladd.{suffix(a.type)}", a.type, [a, b, c])


@intrinsic
def tile_add_product(typingctx: Any, total: Any, factor: Any, x: Any, offset: Any) -> Any:
    """total f32 tile + factor f32x16 (one for each row) times the float at the offset."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, factor, x, offset = args
        pairs = zip(unpack_tile(builder, total), numbers_at(builder, x, offset, 0, ir.FloatType()), strict=True)
        return pack_tile(builder, [_fmuladd(builder, factor, number, acc) for acc, number in pairs])

    return total(total, f32x16, types.int64, types.int64), codegen


@intrinsic
def tile_add_scaled(typingctx: Any, total: Any, sums: Any, factor: Any, x: Any, offset: Any) -> Any:
    """total f32 tile + i32 or f32 tile times factor f32x16 (one for each row) times the float at the offset."""
    is_float = sums == tile_of(f32x16)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, integers, factor, x, offset = args
        results = []
        numbers = numbers_at(builder, x, offset, 0, ir.FloatType())
        for acc, integer, number in zip(
            unpack_tile(builder, total), unpack_tile(builder, integers), numbers, strict=True
        ):
            scale = builder.fmul(factor, number)
            value = integer if is_float else builder.sitofp(integer, factor.type)
            results.append(_fmuladd(builder, value, scale, acc))
        return pack_tile(builder, results)

    return total(total, sums, f32x16, types.int64, types.int64), codegen


@intrinsic
def tile_store(typingctx: Any, address: Any, tile: Any) -> Any:
    """Write a tile as [TILE_TOKENS][16]."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for t, value in enumerate(unpack_tile(builder, args[1])):
            store_at(builder, args[0], value, 64 * t)
        return context.get_dummy_value()

    return types.void(types.int64, tile), codegen


# ---- interleaving tokens, transposing 16 rows


@intrinsic
def interleave(typingctx: Any, table: Any, offset: Any, target: Any) -> Any:
    """16 bytes at an offset of the records at TILE_TOKENS addresses in a table -> [4][TILE_TOKENS] of 4 bytes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        table, offset, target = args
        records = [load_at(builder, table, offset.type, 8 * t) for t in range(TILE_TOKENS)]
        parts = [load_at(builder, builder.add(record, offset), ir.VectorType(I32, 4)) for record in records]
        while len(parts) > 1:
            both = range(2 * parts[0].type.count)
            parts = [rearrange(builder, a, both, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        order = [4 * t + i for i in range(4) for t in range(TILE_TOKENS)]
        store_at(builder, target, rearrange(builder, parts[0], order))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _transpose(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """16 vectors of 16 lanes, rows and lanes exchanged, by shuffles that x86 has: within quarters, then of quarters."""

    def quarters(pattern: Sequence[int]) -> list[int]:  # 0 to 3: the first operand, 4 to 7: the second
        return [4 * q + p % 4 + 16 * (p // 4) for q in range(4) for p in pattern]

    def merge(a: ir.Value, b: ir.Value, patterns: Sequence[Sequence[int]]) -> list[ir.Value]:
        return [rearrange(builder, a, pattern, b) for pattern in patterns]

    singles = quarters((0, 4, 1, 5)), quarters((2, 6, 3, 7))
    doubles = quarters((0, 1, 4, 5)), quarters((2, 3, 6, 7))
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


@intrinsic
def transpose_16x16(typingctx: Any, source: Any, target: Any) -> Any:
    """16 rows of 64 bytes at one address -> [16][16 rows] of 4 bytes at another, which may be the same."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, target = args
        rows = [load_at(builder, source, ir.VectorType(I32, 16), 64 * r) for r in range(TILE_ROWS)]
        for i, row in enumerate(_transpose(builder, rows)):
            store_at(builder, target, row, 64 * i)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
