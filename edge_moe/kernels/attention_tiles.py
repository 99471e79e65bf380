"""Vector operations of attention: tiles of a few heads that share what is read from the latent cache.

A tile is a tuple of HEADS vectors. What differs between heads is interleaved as in tiles.py. Latents kept in 8 bits are
multiplied in blocks of 16 tokens times 4 dims: with the CPU's dot products of bytes where it has them, and else as
pairs of 16 bits, where nothing overflows and both factors keep more than 8 bits.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_moe.kernels.dots import BYTE, I16, I32, SIGN_BIAS, VIA_16_BITS, GroupDot, add_pair_sums_32, pair_sums_32
from edge_moe.kernels.simd import (
    Vector,
    call,
    constant,
    f32x16,
    i32x16,
    llvm_type,
    load_at,
    rearrange,
    spread,
    store_at,
    suffix,
)
from edge_moe.kernels.target import TARGET
from edge_moe.kernels.tiles import TILE_TOKENS, numbers_at, pack_tile, tile_of, unpack_tile

HEADS = TILE_TOKENS
BY_BYTES = not VIA_16_BITS
# Bytes of a head's query for 4 dims, and its largest code: the 16-bit form has bits to spare.
QUERY_BYTES, MAX_QUERY = (4, 127) if BY_BYTES else (8, 32767)
# A probability is kept in two bytes, high and low, each in what the CPU multiplies, or in one number of 16 bits. One
# byte would lose what is spread thin over many tokens beside one that draws most of the attention, as the first does;
# it is enough where no token draws much.
LOW_BITS = 7 if TARGET.dot == "sdot" else 8
MAX_PROBABILITY, MAX_HIGH = ((1 << 2 * LOW_BITS) - 1, (1 << LOW_BITS) - 1) if BY_BYTES else (32767, 32767)
PAIRS = BY_BYTES and TARGET.registers * TARGET.register_bytes >= 2048  # there are registers for two tiles of sums

CODES = SimpleNamespace(signed=True, max_code=-1)


@intrinsic
def to_bfloat(typingctx: Any, value: Any) -> Any:
    """f32 -> bf16 bits, the nearest, ties to even; what is not a number stays so."""
    result = Vector(types.uint16, value.lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.VectorType(I32, value.lanes)

        def const(number: int) -> ir.Constant:
            return ir.Constant(wide, [number] * value.lanes)

        bits = builder.bitcast(args[0], wide)
        high = builder.lshr(bits, const(16))
        odd = builder.and_(high, const(1))
        nearest = builder.lshr(builder.add(builder.add(bits, const(0x7FFF)), odd), const(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, builder.or_(high, const(64)), nearest), llvm_type(result))

    return result(value), codegen


@intrinsic
def scatter(typingctx: Any, address: Any, step: Any, value: Any) -> Any:
    """Write each 4 bytes of a vector `step` bytes behind the last."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, step, v = args
        n_words = value.lanes * value.element.bitwidth // 32
        words = builder.bitcast(v, ir.VectorType(I32, n_words))
        for i in range(n_words):
            store_at(builder, address, builder.extract_element(words, ir.Constant(I32, i)))
            address = builder.add(address, step)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value), codegen


# ---- tiles of floats


@intrinsic
def tile_add_rows(typingctx: Any, total: Any, factor: Any, address: Any) -> Any:
    """total f32 tile + factor f32x16 times each head's vector, [HEADS][16] at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, factor, address = args
        sums = []
        for h, acc in enumerate(unpack_tile(builder, total)):
            row = load_at(builder, address, factor.type, 64 * h)
            sums.append(call(builder, f"llvm.fmuladd.{suffix(acc.type)}", acc.type, [factor, row, acc]))
        return pack_tile(builder, sums)

    return total(total, f32x16, types.int64), codegen


@intrinsic
def tile_add_outer(typingctx: Any, total: Any, factor: Any, address: Any) -> Any:
    """total f32 tile + factor f32x16 times a float of each row of the tile, 64 bytes from one to the next."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, factor, address = args
        sums = []
        for h, acc in enumerate(unpack_tile(builder, total)):
            number = spread(builder, load_at(builder, address, ir.FloatType(), 64 * h), 16)
            sums.append(call(builder, f"llvm.fmuladd.{suffix(acc.type)}", acc.type, [factor, number, acc]))
        return pack_tile(builder, sums)

    return total(total, f32x16, types.int64), codegen


@intrinsic
def tile_store_sums(typingctx: Any, address: Any, tile: Any) -> Any:
    """Write the sum of each head's 16 lanes, [HEADS] floats; always added in the same order."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def add(a: ir.Value, b: ir.Value, first: Sequence[int], second: Sequence[int]) -> ir.Value:
            return builder.fadd(rearrange(builder, a, first, b), rearrange(builder, a, second, b))

        low, high = range(8), range(8, 16)
        halves = [
            builder.fadd(rearrange(builder, v, low), rearrange(builder, v, high)) for v in unpack_tile(builder, args[1])
        ]
        # two, then four heads side by side within each half of a register, as x86 shuffles them
        pairs = [
            add(a, b, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
            for a, b in zip(halves[::2], halves[1::2], strict=True)
        ]
        fours = [
            add(a, b, (0, 2, 8, 10, 4, 6, 12, 14), (1, 3, 9, 11, 5, 7, 13, 15))
            for a, b in zip(pairs[::2], pairs[1::2], strict=True)
        ]
        for i, v in enumerate(fours):
            store_at(builder, args[0], add(v, v, range(4), range(4, 8)), 16 * i)
        return context.get_dummy_value()

    return types.void(types.int64, tile), codegen


@intrinsic
def tile_accumulate(typingctx: Any, address: Any, step: Any, tile: Any, factors: Any) -> Any:
    """Each head's 16 floats at an address, `step` bytes behind the last's: times old, plus the tile times new.

    factors f32 [old, new][16 heads].
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, step, tile, factors = args
        for h, value in enumerate(unpack_tile(builder, tile)):
            old, new = (
                spread(builder, load_at(builder, factors, ir.FloatType(), 64 * i + 4 * h), 16) for i in range(2)
            )
            _accumulate(builder, address, value, old, new)
            address = builder.add(address, step)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, tile, types.int64), codegen


def _accumulate(builder: ir.IRBuilder, address: ir.Value, value: ir.Value, old: ir.Value, new: ir.Value) -> None:
    """Memory times old, plus value times new."""
    before = builder.fmul(load_at(builder, address, value.type), old)
    store_at(builder, address, call(builder, f"llvm.fmuladd.{suffix(value.type)}", value.type, [value, new, before]))


# ---- latents in 8 bits, blocks of [dims / 4][16 tokens][4]


@intrinsic
def tile_numbers(typingctx: Any, x: Any, offset: Any) -> Any:
    """Each head's int32 at an offset, in all lanes: what sums begin with."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack_tile(builder, numbers_at(builder, args[0], args[1], 0, I32))

    return tile_of(i32x16)(types.int64, types.int64), codegen


def _as_pairs(builder: ir.IRBuilder, codes: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Signed bytes -> the even ones and the odd ones as 16-bit numbers."""
    words = builder.bitcast(codes, ir.VectorType(I16, 32))
    eight = ir.Constant(words.type, [8] * 32)
    return builder.ashr(builder.shl(words, eight), eight), builder.ashr(words, eight)


@intrinsic
def query_codes(typingctx: Any, codes: Any) -> Any:
    """Codes of 16 dims of a query i32x16, as `tile_add_scores` reads them: 4 or 8 bytes for every 4 dims."""
    result = Vector(types.int8, 16) if BY_BYTES else Vector(types.int16, 16)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        narrow = builder.trunc(args[0], llvm_type(result))
        if BY_BYTES:
            return narrow
        # in pairs: the even dims of every four, then the odd ones
        return rearrange(builder, narrow, [4 * (i // 4) + (0, 2, 1, 3)[i % 4] for i in range(16)])

    return result(codes), codegen


@intrinsic
def tile_add_scores(typingctx: Any, total: Any, codes: Any, x: Any, offset: Any) -> Any:
    """total i32 tile + products of 4 dims: codes [16 tokens][4] at an address, each head's query at the offset."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, codes, x, offset = args
        w, sums = load_at(builder, codes, ir.VectorType(BYTE, 64)), []
        quads = numbers_at(builder, x, offset, 0, I32)
        if BY_BYTES:
            for acc, quad in zip(unpack_tile(builder, total), quads, strict=True):
                sums.append(_add(builder, acc, w, builder.bitcast(quad, w.type)))
            return pack_tile(builder, sums)
        even, odd = _as_pairs(builder, w)
        others = numbers_at(builder, x, offset, 1, I32)
        for acc, first, second in zip(unpack_tile(builder, total), quads, others, strict=True):
            acc = builder.add(acc, pair_sums_32(builder, even, builder.bitcast(first, even.type)))
            sums.append(builder.add(acc, pair_sums_32(builder, odd, builder.bitcast(second, odd.type))))
        return pack_tile(builder, sums)

    return total(total, types.int64, types.int64, types.int64), codegen


def _values_by_dims(builder: ir.IRBuilder, codes: ir.Value, offset: int = 0) -> ir.Value:
    """64 bytes of codes with a sign at an address, within each 16: 4 tokens of 4 dims -> 4 dims of 4 tokens."""
    w = load_at(builder, codes, ir.VectorType(BYTE, 64), offset)
    w = rearrange(builder, w, [16 * (i // 16) + 4 * (i % 4) + i % 16 // 4 for i in range(64)])
    return builder.xor(w, ir.Constant(w.type, [SIGN_BIAS] * 64)) if SIGN_BIAS else w


@intrinsic
def tile_add_values(typingctx: Any, total: Any, codes: Any, probabilities: Any, part: Any) -> Any:
    """total i32 tile + 16 tokens' codes times their probabilities, by `store_probabilities`: lanes [4 tokens][4 dims].

    `part` is 0 or 1, the high or the low byte; a target without dot products of bytes takes both at once.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, codes, probabilities, part = args
        w, sums = _values_by_dims(builder, codes), []
        if BY_BYTES:
            start = builder.add(probabilities, builder.mul(part, ir.Constant(part.type, 64 * HEADS)))
            for h, acc in enumerate(unpack_tile(builder, total)):
                sums.append(_add(builder, acc, load_at(builder, start, w.type, 64 * h), w))
            return pack_tile(builder, sums)
        even, odd = _as_pairs(builder, w)
        for h, acc in enumerate(unpack_tile(builder, total)):
            first = load_at(builder, probabilities, even.type, 64 * h)
            second = load_at(builder, probabilities, odd.type, 64 * (HEADS + h))
            acc = builder.add(acc, pair_sums_32(builder, even, first))
            sums.append(builder.add(acc, pair_sums_32(builder, odd, second)))
        return pack_tile(builder, sums)

    return total(total, types.int64, types.int64, types.int64), codegen


# ---- two tiles at once, where there are registers for them: what is read for one serves the other


@intrinsic
def pair_of(typingctx: Any, tile: Any) -> Any:
    """A tile twice."""
    pair = types.UniTuple(tile.dtype, 2 * HEADS)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return pack_tile(builder, 2 * unpack_tile(builder, args[0]))

    return pair(tile), codegen


def _tile_of_pair(start: int) -> Any:
    @intrinsic
    def one(typingctx: Any, pair: Any) -> Any:
        tile = types.UniTuple(pair.dtype, HEADS)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return pack_tile(builder, [builder.extract_value(args[0], start + h) for h in range(HEADS)])

        return tile(pair), codegen

    return one


first_tile, second_tile = _tile_of_pair(0), _tile_of_pair(HEADS)


def _add_to_pair(register: ir.Type, add: Callable[..., ir.Value]) -> Any:
    """Make an operation: a pair + products of each head's 4 bytes at the offset with a register at each address."""

    @intrinsic
    def operation(typingctx: Any, total: Any, first: Any, second: Any, x: Any, offset: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            total, *addresses, x, offset = args
            sums = [builder.extract_value(total, i) for i in range(2 * HEADS)]
            registers = [load_at(builder, address, register) for address in addresses]
            for h, number in enumerate(numbers_at(builder, x, offset, 0, I32)):
                for i, w in zip((h, HEADS + h), registers, strict=True):
                    sums[i] = add(builder, sums[i], w, builder.bitcast(number, register))
            return pack_tile(builder, sums)

        return total(total, *[types.int64] * 4), codegen

    return operation


@intrinsic
def pair_add_values(typingctx: Any, total: Any, codes: Any, probabilities: Any, part: Any) -> Any:
    """`tile_add_values` of 4 dims and of the 4 behind them."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, codes, probabilities, part = args
        sums = [builder.extract_value(total, i) for i in range(2 * HEADS)]
        registers = [_values_by_dims(builder, codes, offset) for offset in (0, 64)]
        start = builder.add(probabilities, builder.mul(part, ir.Constant(part.type, 64 * HEADS)))
        for h in range(HEADS):
            weights = load_at(builder, start, registers[0].type, 64 * h)
            for i, w in zip((h, HEADS + h), registers, strict=True):
                sums[i] = _add(builder, sums[i], weights, w)
        return pack_tile(builder, sums)

    return total(total, *[types.int64] * 3), codegen


def _add(builder: ir.IRBuilder, total: ir.Value, codes: ir.Value, x: ir.Value) -> ir.Value:
    """total + sums of four products."""
    group = GroupDot(builder, CODES, total, None)
    group.add(codes, x)
    return group.result()


# `tile_add_scores` and `tile_add_pairs` of two blocks of tokens
pair_add_scores = _add_to_pair(ir.VectorType(BYTE, 64), _add)
pair_add_rope_scores = _add_to_pair(ir.VectorType(I16, 32), add_pair_sums_32)


def _transposed_sums(builder: ir.IRBuilder, four: Sequence[ir.Value]) -> ir.Value:
    """Of each of four vectors [4][4 lanes] the sum of its quarters, side by side."""

    def quarters(indices: Sequence[int]) -> list[int]:
        return [4 * q + i for q in indices for i in range(4)]

    def add(a: ir.Value, b: ir.Value, first: Sequence[int], second: Sequence[int]) -> ir.Value:
        return builder.add(rearrange(builder, a, quarters(first), b), rearrange(builder, a, quarters(second), b))

    a, b = (add(u, v, (0, 1, 4, 5), (2, 3, 6, 7)) for u, v in (four[:2], four[2:]))
    return add(a, b, (0, 2, 4, 6), (1, 3, 5, 7))


@intrinsic
def tile_accumulate_quads(typingctx: Any, address: Any, tile: Any, factors: Any) -> Any:
    """Contexts f32 [HEADS][4 dims] at an address: times old, plus the sums of a tile of `tile_add_values` times new.

    factors f32 [old, new][HEADS][4], by `store_by_quads`.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, tile, factors = args
        sums = unpack_tile(builder, tile)
        for h in range(0, HEADS, 4):
            value = _transposed_sums(builder, sums[h : h + 4])
            value = builder.sitofp(value, ir.VectorType(ir.FloatType(), 16))
            old, new = (load_at(builder, factors, value.type, 16 * (h + i * HEADS)) for i in range(2))
            _accumulate(builder, builder.add(address, ir.Constant(address.type, 16 * h)), value, old, new)
        return context.get_dummy_value()

    return types.void(types.int64, tile, types.int64), codegen


@intrinsic
def store_by_quads(typingctx: Any, address: Any, value: Any) -> Any:
    """Write the first HEADS lanes of f32x16, each four times: [HEADS][4]."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for h in range(0, HEADS, 4):
            store_at(builder, args[0], rearrange(builder, args[1], [h + i // 4 for i in range(16)]), 16 * h)
        return context.get_dummy_value()

    return types.void(types.int64, f32x16), codegen


@intrinsic
def store_probabilities(typingctx: Any, address: Any, weights: Any) -> Any:
    """A head's probabilities of 16 tokens, i32x16 of 0 to MAX_PROBABILITY, as `tile_add_values` takes them.

    Each 4 tokens' stand 4 times, once for each dim: 64 bytes here, and 64 of the other part HEADS * 64 further.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, w = args

        def const(number: int) -> ir.Constant:
            return ir.Constant(w.type, [number] * 16)

        if BY_BYTES:
            for i in range(2):
                part, byte = w, 1 - i
                if LOW_BITS < 8:
                    part = builder.and_(w, const((1 << LOW_BITS) - 1)) if i else builder.lshr(w, const(LOW_BITS))
                    byte = 0
                octets = builder.bitcast(part, ir.VectorType(BYTE, 64))
                quads = rearrange(builder, octets, [16 * (j // 16) + 4 * (j % 4) + byte for j in range(64)])
                store_at(builder, address, quads, 64 * HEADS * i)
        else:
            # 16 bits each: lanes 0 and 2 of every four become a pair, and lanes 1 and 3
            above = rearrange(builder, w, [4 * (j // 4) + (j + 2) % 4 for j in range(16)])
            pairs = builder.or_(w, builder.shl(above, const(16)))
            for i in range(2):
                quads = rearrange(builder, pairs, [4 * (j // 4) + i for j in range(16)])
                store_at(builder, address, quads, 64 * HEADS * i)
        return context.get_dummy_value()

    return types.void(types.int64, i32x16), codegen


@intrinsic
def store_high_probabilities(typingctx: Any, address: Any, weights: Any) -> Any:
    """The same where one byte is enough: a head's probabilities of 16 tokens, i32x16 of 0 to MAX_HIGH, 64 bytes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        octets = builder.bitcast(args[1], ir.VectorType(BYTE, 64))
        store_at(builder, args[0], rearrange(builder, octets, [16 * (j // 16) + 4 * (j % 4) for j in range(64)]))
        return context.get_dummy_value()

    return types.void(types.int64, i32x16), codegen


@intrinsic
def dither(typingctx: Any) -> Any:
    """f32x16 to add before fractions are cut off: of numbers that are alike, as many are rounded up as is right."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return constant(f32x16, [(7 * i % 16 + 0.5) / 16 for i in range(16)])

    return f32x16(), codegen


@intrinsic
def tile_make_high(typingctx: Any, total: Any) -> Any:
    """Sums over the high bytes, before those over the low ones are added."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = ir.Constant(llvm_type(i32x16), [LOW_BITS] * 16)
        sums = [builder.extract_value(args[0], i) for i in range(total.count)]
        return pack_tile(builder, [builder.shl(acc, bits) for acc in sums])

    return total(total), codegen
