"""Grouped-query attention of a few tokens to a cache of keys and values, of which several query heads share each.

Three steps on plans (attention.py has two): `prepare_units` stores the new keys and values and lays out the queries,
`attend_units` gives each part of the context a partial softmax, `merge_units` joins the parts. grouped_formats.py
says how the keys and values of a head lie in the cache.

The queries that read the same keys, of neighbouring tokens and of all heads of a group, are taken QUERIES at a time, a
tile. Scores are in powers of 2. Every sum has an order that depends on positions alone.
Source: grouped queries, arXiv 2305.13245; sliding window, arXiv 2310.06825, section 2; online softmax, arXiv
1805.02867.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_moe.errors import ShapeError
from edge_moe.kernels.attention import FEW_TOKENS, Step
from edge_moe.kernels.attention_rows import CHUNK_TOKENS
from edge_moe.kernels.blocks import FormatTag
from edge_moe.kernels.functions import exp2
from edge_moe.kernels.grouped_formats import BLOCK, WHOLE, columns, token_bytes
from edge_moe.kernels.jit import inline_kernel, kernel
from edge_moe.kernels.launch import float_bits
from edge_moe.kernels.simd import (
    address_of,
    call,
    f32x16,
    fetch_add,
    first_lane,
    fma,
    larger,
    llvm_type,
    load,
    load_at,
    reduce_add,
    reduce_max,
    splat,
    spread,
    store,
    store_at,
    suffix,
)
from edge_moe.kernels.target import TARGET

# A score that cannot win: below all others, but a number, so that a tile's row may see nothing of a chunk.
HIDDEN = -1e30
QUERIES = 4  # of a tile: as many as the groups of most models have
# Blocks of keys, or vectors of a value, that are multiplied with a tile at once: as many as the registers hold sums of.
_KEYS_AT_ONCE, _VALUES_AT_ONCE = (2, 4) if TARGET.register_bytes == 64 else (1, 1)

# A plan is int64[N_FIELDS]; the same for all three kernels. Strides are bytes; the scale is given by its f64 bits.
COUNTER, N_TOKENS, N_HEADS, N_KV_HEADS, DIM, LENGTH, CACHE, HEAD_BYTES, SCALE, WINDOW, PART_TOKENS = range(11)
Q, Q_STRIDE, Q_HEAD, K, K_STRIDE, K_HEAD, V, V_STRIDE, V_HEAD, OUT, OUT_STRIDE, OUT_HEAD = range(11, 23)
QUERY_TILES, QUERY_BYTES, PARTS, PART_BYTES, CONTEXT_LENGTH = range(23, 28)
N_FIELDS = 28

# A partial result: the largest scores and the sums of weights f32[QUERIES], then the contexts f32[QUERIES][columns].
LARGEST, SUM, CONTEXT = 0, 4 * QUERIES, 64
_SCRATCH_BYTES = 4 * QUERIES * CHUNK_TOKENS + 64  # of a thread: scores, factors


# ---- sums of a tile: QUERIES times n vectors


def _sums(n: int) -> types.UniTuple:
    return types.UniTuple(f32x16, QUERIES * n)


def _pack(builder: ir.IRBuilder, values: list[ir.Value]) -> ir.Value:
    packed = ir.Constant(ir.ArrayType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        packed = builder.insert_value(packed, value, i)
    return packed


def _row(builder: ir.IRBuilder, address: ir.Value, stride: ir.Value, q: int) -> ir.Value:
    return builder.add(address, builder.mul(stride, ir.Constant(stride.type, q)))


@intrinsic
def _add_products(typingctx: Any, sums: Any, vectors: Any, address: Any, stride: Any) -> Any:
    """Each of n vectors times a number of each query, f32 at an address and `stride` bytes behind the last's, added."""
    n = len(vectors)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        sums, vectors, address, stride = args
        out = []
        for q in range(QUERIES):
            number = spread(builder, load_at(builder, _row(builder, address, stride, q), ir.FloatType()), 16)
            for i in range(n):
                old = builder.extract_value(sums, q * n + i)
                terms = [builder.extract_value(vectors, i), number, old]
                out.append(call(builder, f"llvm.fmuladd.{suffix(old.type)}", old.type, terms))
        return _pack(builder, out)

    return sums(sums, vectors, types.int64, types.int64), codegen


@intrinsic
def _store_sums(typingctx: Any, sums: Any, address: Any, stride: Any) -> Any:
    """Write each query's vectors at an address and `stride` bytes behind the last's."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        sums, address, stride = args
        n = len(sig.args[0]) // QUERIES
        for q in range(QUERIES):
            for i in range(n):
                at = _row(builder, address, stride, q)
                store_at(builder, at, builder.extract_value(sums, q * n + i), 64 * i)
        return context.get_dummy_value()

    return types.void(sums, types.int64, types.int64), codegen


def _zeros_of(n: int) -> Any:
    @intrinsic
    def zeros(typingctx: Any) -> Any:
        """Sums of n vectors, all 0."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return ir.Constant(context.get_value_type(_sums(n)), None)

        return _sums(n)(), codegen

    return zeros


def _scaled_of(n: int) -> Any:
    @intrinsic
    def scaled(typingctx: Any, address: Any, stride: Any, factors: Any) -> Any:
        """Each query's n vectors at an address and `stride` bytes behind the last's, times its factor f32[QUERIES]."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address, stride, factors = args
            out = []
            for q in range(QUERIES):
                factor = spread(builder, load_at(builder, factors, ir.FloatType(), 4 * q), 16)
                for i in range(n):
                    old = load_at(builder, _row(builder, address, stride, q), llvm_type(f32x16), 64 * i)
                    out.append(builder.fmul(old, factor))
            return _pack(builder, out)

        return _sums(n)(types.int64, types.int64, types.int64), codegen

    return scaled


# ---- the steps


@inline_kernel
def _field(plan, i):
    return load(types.int64, plan + 8 * i)


@inline_kernel
def _group(plan):
    """Query heads that share a head of keys."""
    return _field(plan, N_HEADS) // _field(plan, N_KV_HEADS)


@inline_kernel
def _n_tiles(plan):
    """Tiles of queries of one head of keys."""
    return (_field(plan, N_TOKENS) * _group(plan) + QUERIES - 1) // QUERIES


@inline_kernel
def _n_parts(plan, n_tokens):
    """Parts of the context that the first n_tokens of the new tokens see."""
    part_tokens = _field(plan, PART_TOKENS)
    return (load(types.int64, _field(plan, LENGTH)) + n_tokens + part_tokens - 1) // part_tokens


@inline_kernel
def _first_seen(plan, position):
    """The first position that a token at `position` sees."""
    window = _field(plan, WINDOW)
    return max(0, position + 1 - window) if window else 0


@inline_kernel
def _places(fmt, plan, head):
    """Where a head's keys, values, scales of keys and scales of values begin."""
    keys, context_length = _field(plan, CACHE) + head * _field(plan, HEAD_BYTES), _field(plan, CONTEXT_LENGTH)
    half = context_length * fmt.row_bytes(_field(plan, DIM))
    return keys, keys + half, keys + 2 * half, keys + 2 * half + 4 * context_length


@kernel
def prepare_units(fmt, plan):
    """Store the keys and values of a block of tokens, or lay out a tile of queries, as long as the plan has some.

    A tile is f32[QUERIES][columns], times the scale, zeros beyond the last query and the last column.
    """
    n_tokens, n_kv_heads, group, dim = _field(plan, N_TOKENS), _field(plan, N_KV_HEADS), _group(plan), _field(plan, DIM)
    n_tiles, length = _n_tiles(plan), load(types.int64, _field(plan, LENGTH))
    scale, whole, row_bytes = types.float32(load(types.float64, plan + 8 * SCALE)), dim & ~15, fmt.row_bytes(dim)
    first_block = length // BLOCK
    n_blocks = (length + n_tokens - 1) // BLOCK + 1 - first_block
    while True:
        unit = fetch_add(plan, 1)
        if unit >= n_blocks + n_kv_heads * n_tiles:
            return 0
        if unit < n_blocks:
            start = (first_block + unit) * BLOCK
            for head in range(n_kv_heads):
                keys, values, key_scales, value_scales = _places(fmt, plan, head)
                for position in range(max(start, length), min(start + BLOCK, length + n_tokens)):
                    t = position - length
                    key = _field(plan, K) + t * _field(plan, K_STRIDE) + head * _field(plan, K_HEAD)
                    value = _field(plan, V) + t * _field(plan, V_STRIDE) + head * _field(plan, V_HEAD)
                    column = keys + start * row_bytes + (position - start) * fmt.number_bytes()
                    fmt.store_key(column, key_scales + 4 * position, key, dim)
                    fmt.store_value(values + position * row_bytes, value_scales + 4 * position, value, dim)
        else:
            i = unit - n_blocks
            head, first = i // n_tiles, i % n_tiles * QUERIES
            tile = _field(plan, QUERY_TILES) + i * _field(plan, QUERY_BYTES)
            n = min(QUERIES, n_tokens * group - first)
            if n < QUERIES or dim % 16:
                for place in range(tile, tile + _field(plan, QUERY_BYTES), 64):
                    store(place, splat(f32x16, types.float32(0.0)))
            for r in range(n):
                t, h = (first + r) // group, head * group + (first + r) % group
                q = _field(plan, Q) + t * _field(plan, Q_STRIDE) + h * _field(plan, Q_HEAD)
                target = tile + 4 * columns(dim) * r
                for c in range(0, whole, 16):
                    store(target + 4 * c, load(f32x16, q + 4 * c) * scale)
                for c in range(whole, dim):
                    store(target + 4 * c, load(types.float32, q + 4 * c) * scale)


def _vectors_of(n: int) -> Callable[..., Any]:
    """A helper that loads n vectors, `step` bytes between them."""
    if n == 1:
        return inline_kernel(lambda fmt, place, step: (fmt.load(place),))
    if n == 2:
        return inline_kernel(lambda fmt, place, step: (fmt.load(place), fmt.load(place + step)))
    assert n == 4
    return inline_kernel(
        lambda fmt, place, step: (
            fmt.load(place),
            fmt.load(place + step),
            fmt.load(place + 2 * step),
            fmt.load(place + 3 * step),
        )
    )


_load_keys, _no_scores = _vectors_of(_KEYS_AT_ONCE), _zeros_of(_KEYS_AT_ONCE)


@inline_kernel
def _add_scores(fmt, keys, key_scales, n, query, dim, scores):
    """Scores f32 [QUERIES][CHUNK_TOKENS] of n tokens, a multiple of WHOLE, from a block's begin on."""
    row_bytes, n_columns = fmt.row_bytes(dim), columns(dim)
    for j in range(0, n, _KEYS_AT_ONCE * BLOCK):
        place, total = keys + j * row_bytes, _no_scores()
        for i in range(dim):
            vectors = _load_keys(fmt, place + BLOCK * fmt.number_bytes() * i, BLOCK * row_bytes)
            total = _add_products(total, vectors, query + 4 * i, 4 * n_columns)
        _store_sums(total, scores + 4 * j, 4 * CHUNK_TOKENS)
        for q in range(QUERIES):
            for k in range(j, j + _KEYS_AT_ONCE * BLOCK, 16):
                at = scores + 4 * (CHUNK_TOKENS * q + k)
                store(at, fmt.scaled(load(f32x16, at), key_scales + 4 * k))


@inline_kernel
def _softmax(fmt, value_scales, n, scores, partial, factors):
    """Scores of n tokens, a multiple of 16 -> weights 2**(score - largest), times the values' scales, in place.

    The largest scores and sums of a partial result take part; its contexts are then to be multiplied with `factors`.
    """
    for q in range(QUERIES):
        row, old = scores + 4 * CHUNK_TOKENS * q, load(types.float32, partial + LARGEST + 4 * q)
        tops = splat(f32x16, old)
        for i in range(0, n, 16):
            tops = larger(load(f32x16, row + 4 * i), tops)
        top = splat(f32x16, reduce_max(tops))
        total = splat(f32x16, types.float32(0.0))
        for i in range(0, n, 16):
            weights = exp2(load(f32x16, row + 4 * i) - top)
            total = total + weights
            store(row + 4 * i, fmt.scaled(weights, value_scales + 4 * i))
        factor = first_lane(exp2(splat(f32x16, old) - top))
        store(factors + 4 * q, factor)
        store(partial + LARGEST + 4 * q, first_lane(top))
        at = partial + SUM + 4 * q
        store(at, fma(load(types.float32, at), factor, reduce_add(total)))


def _weigher_of(n_vectors: int) -> Callable[..., Any]:
    load_values, scaled = _vectors_of(n_vectors), _scaled_of(n_vectors)

    @inline_kernel
    def weigh(fmt, values, row_bytes, n, weights, context, stride, factors):
        """Contexts at an address times their factors, plus n values weighted: n_vectors vectors of each."""
        total = scaled(context, stride, factors)
        for j in range(n):
            vectors = load_values(fmt, values + j * row_bytes, 16 * fmt.number_bytes())
            total = _add_products(total, vectors, weights + 4 * j, 4 * CHUNK_TOKENS)
        _store_sums(total, context, stride)

    return weigh


_weigh_several, _weigh_one = _weigher_of(_VALUES_AT_ONCE), _weigher_of(1)


@inline_kernel
def _add_values(fmt, values, n, weights, dim, partial, factors):
    """Weigh n values and add them to a partial result."""
    row_bytes, n_vectors, stride = fmt.row_bytes(dim), columns(dim) // 16, 4 * columns(dim)
    context, vector_bytes = partial + CONTEXT, 16 * fmt.number_bytes()
    whole = n_vectors // _VALUES_AT_ONCE * _VALUES_AT_ONCE
    for i in range(0, whole, _VALUES_AT_ONCE):
        _weigh_several(fmt, values + i * vector_bytes, row_bytes, n, weights, context + 64 * i, stride, factors)
    for i in range(whole, n_vectors):
        _weigh_one(fmt, values + i * vector_bytes, row_bytes, n, weights, context + 64 * i, stride, factors)


@kernel
def attend_units(fmt, plan):
    """Attend one tile of queries to one part of the context, as long as the plan has some."""
    n_tokens, n_kv_heads, group, dim = _field(plan, N_TOKENS), _field(plan, N_KV_HEADS), _group(plan), _field(plan, DIM)
    part_tokens, length = _field(plan, PART_TOKENS), load(types.int64, _field(plan, LENGTH))
    n_tiles, n_parts, row_bytes = _n_tiles(plan), _n_parts(plan, n_tokens), fmt.row_bytes(dim)
    memory = np.empty(_SCRATCH_BYTES + 64, np.uint8)
    scores = (address_of(memory) + 63) & ~63
    factors = scores + 4 * QUERIES * CHUNK_TOKENS
    while True:
        unit = fetch_add(plan, 1)
        if unit >= n_kv_heads * n_tiles * n_parts:
            return memory.size  # the memory must live until here
        tile, part = unit // n_parts, unit % n_parts
        head, first_row = tile // n_tiles, tile % n_tiles * QUERIES
        n_rows = min(QUERIES, n_tokens * group - first_row)
        first_position = length + first_row // group
        last_position = length + (first_row + n_rows - 1) // group
        # so that scores of whole groups of blocks go beyond the part's end only where nothing is seen any more
        begin = max(part * part_tokens, _first_seen(plan, first_position) // WHOLE * WHOLE)
        end = min((part + 1) * part_tokens, last_position + 1)
        query = _field(plan, QUERY_TILES) + tile * _field(plan, QUERY_BYTES)
        partial = _field(plan, PARTS) + unit * _field(plan, PART_BYTES)
        for place in range(partial, partial + _field(plan, PART_BYTES), 64):
            store(place, splat(f32x16, types.float32(0.0)))
        for q in range(QUERIES):
            store(partial + LARGEST + 4 * q, types.float32(HIDDEN))
        keys, values, key_scales, value_scales = _places(fmt, plan, head)
        for first in range(begin, end, CHUNK_TOKENS):
            n = min(CHUNK_TOKENS, end - first)
            n_scores = (n + WHOLE - 1) // WHOLE * WHOLE
            _add_scores(fmt, keys + first * row_bytes, key_scales + 4 * first, n_scores, query, dim, scores)
            if first + n_scores > first_position + 1 or first < _first_seen(plan, last_position):
                for r in range(QUERIES):
                    position = length + (first_row + min(r, n_rows - 1)) // group
                    row = scores + 4 * CHUNK_TOKENS * r
                    for j in range(0, min(n, _first_seen(plan, position) - first)):
                        store(row + 4 * j, types.float32(HIDDEN))
                    for j in range(max(0, position + 1 - first), n_scores):
                        store(row + 4 * j, types.float32(HIDDEN))
            _softmax(fmt, value_scales + 4 * first, n_scores, scores, partial, factors)
            _add_values(fmt, values + first * row_bytes, n, scores, dim, partial, factors)


@kernel
def merge_units(fmt, plan):
    """Join the parts of one head of one token, in order, as long as the plan has some: the sum of values weighted."""
    n_tokens, n_heads, group, dim = _field(plan, N_TOKENS), _field(plan, N_HEADS), _group(plan), _field(plan, DIM)
    n_tiles, n_parts, part_bytes = _n_tiles(plan), _n_parts(plan, n_tokens), _field(plan, PART_BYTES)
    memory = np.empty(4 * dim + 64, np.uint8)
    context = address_of(memory)
    while True:
        unit = fetch_add(plan, 1)
        if unit >= n_tokens * n_heads:
            return memory.size  # the memory must live until here
        t, head = unit // n_heads, unit % n_heads
        row = t * group + head % group
        q, tile = row % QUERIES, head // group * n_tiles + row // QUERIES
        first = _field(plan, PARTS) + tile * n_parts * part_bytes
        n = _n_parts(plan, t + 1)
        top, total = types.float32(HIDDEN), types.float32(0.0)
        for c in range(n):
            top = max(top, load(types.float32, first + c * part_bytes + LARGEST + 4 * q))
        for i in range(0, dim, 16):
            store(context + 4 * i, splat(f32x16, types.float32(0.0)))
        for c in range(n):
            part = first + c * part_bytes
            weight = np.exp2(load(types.float32, part + LARGEST + 4 * q) - top)
            total += weight * load(types.float32, part + SUM + 4 * q)
            vector, place = splat(f32x16, weight), part + CONTEXT + 4 * q * columns(dim)
            for i in range(0, dim, 16):
                store(context + 4 * i, fma(load(f32x16, place + 4 * i), vector, load(f32x16, context + 4 * i)))
        out = _field(plan, OUT) + t * _field(plan, OUT_STRIDE) + head * _field(plan, OUT_HEAD)
        divisor = splat(f32x16, total)
        for i in range(0, dim - 15, 16):
            store(out + 4 * i, load(f32x16, context + 4 * i) / divisor)
        for i in range(dim & ~15, dim):
            store(out + 4 * i, load(types.float32, context + 4 * i) / total)


# ---- Python side


def _tile_bytes(dim: int) -> tuple[int, int]:
    """Bytes of a tile of queries, and of its partial result."""
    columns = -(-dim // 16) * 16
    return 4 * QUERIES * columns, CONTEXT + 4 * QUERIES * columns


def scratch_bytes(n_tokens: int, n_heads: int, n_kv_heads: int, dim: int, context_length: int) -> int:
    """Bytes that `attention_steps` needs for n_tokens at once, anywhere in a context; the same for each layer."""
    n_tiles = n_kv_heads * -(-n_tokens * (n_heads // n_kv_heads) // QUERIES)
    n_parts = -(-context_length // CHUNK_TOKENS) if n_tokens < FEW_TOKENS else 1
    query_bytes, part_bytes = _tile_bytes(dim)
    return 64 + n_tiles * (query_bytes + n_parts * part_bytes)


def attention_steps(
    fmt: FormatTag,
    cache: int,
    cache_head_bytes: int,
    length: int,
    context_length: int,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    scratch: np.ndarray,
    scale: float,
    window: int,
) -> list[Step]:
    """The steps that store T tokens behind those in a layer's cache and attend them to all up to themselves.

    `cache` is the address of the heads, `cache_head_bytes` each, that begin as zeros, `length` that of an int64, the
    number of tokens in the cache when a step is run; length + T may not exceed context_length. A token sees itself and
    the `window` - 1 tokens before it; 0: all.
    q f32[T,H,N], k and v f32[T,K,N], out f32[T,H,N]: any strides, but the last axis must be contiguous. scratch
    u8[`scratch_bytes`]. All of them must live as long as the steps are used.
    Raises ShapeError for arrays that do not fit together.
    """
    n_tokens, n_heads, dim = q.shape
    n_kv_heads = k.shape[1]
    if n_heads % n_kv_heads:
        raise ShapeError(f"{n_heads} heads of queries for {n_kv_heads} of keys: expected a multiple")
    few, many = (n_tokens, n_kv_heads, dim), (n_tokens, n_heads, dim)
    for array, shape in ((q, many), (k, few), (v, few), (out, many)):
        if array.shape != shape or array.dtype != np.float32 or (dim > 1 and array.strides[-1] != 4):
            raise ShapeError(f"expected float32{list(shape)} with contiguous rows, found {array.dtype}{[*array.shape]}")
    if scratch.nbytes < scratch_bytes(n_tokens, n_heads, n_kv_heads, dim, context_length):
        raise ShapeError(f"{scratch.nbytes} bytes of scratch are too few for {n_tokens} tokens")
    part_tokens = CHUNK_TOKENS if n_tokens < FEW_TOKENS else max(1, -(-context_length // CHUNK_TOKENS)) * CHUNK_TOKENS
    n_tiles = n_kv_heads * -(-n_tokens * (n_heads // n_kv_heads) // QUERIES)
    query_bytes, part_bytes = _tile_bytes(dim)
    queries = (scratch.ctypes.data + 63) & ~63
    plan = np.zeros(N_FIELDS, np.int64)
    plan[[N_TOKENS, N_HEADS, N_KV_HEADS, DIM]] = n_tokens, n_heads, n_kv_heads, dim
    plan[[LENGTH, CACHE, HEAD_BYTES, WINDOW, PART_TOKENS]] = length, cache, cache_head_bytes, window, part_tokens
    plan[SCALE] = float_bits(scale * math.log2(math.e))
    for field, array in ((Q, q), (K, k), (V, v), (OUT, out)):
        plan[field : field + 3] = array.ctypes.data, *array.strides[:2]
    plan[[QUERY_TILES, QUERY_BYTES]] = queries, query_bytes
    plan[CONTEXT_LENGTH] = cache_head_bytes // token_bytes(fmt, dim)
    plan[[PARTS, PART_BYTES]] = queries + n_tiles * query_bytes, part_bytes
    n_parts = -(-context_length // part_tokens)
    numbers = n_tokens * n_heads * dim
    return [
        Step(prepare_units, fmt, plan, n_tokens // BLOCK + 2 + n_tiles, 4 * numbers),
        Step(attend_units, fmt, plan.copy(), n_tiles * n_parts, 2 * context_length * numbers),
        Step(merge_units, fmt, plan.copy(), n_tokens * n_heads, n_parts * numbers),
    ]
