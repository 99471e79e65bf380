"""Grouped-query attention of a few tokens to a cache of keys and values, of which several query heads share each.

Three steps on plans, as in attention.py: `prepare_units` stores the new keys and values and lays out the queries,
`attend_units` gives each part of the context a partial softmax, `merge_units` joins the parts. The cache is, for each
head of keys, one row for each token: key, value, and for 8 bits a scale of each.

The queries that read the same rows, of neighbouring tokens and of all heads of a group, are taken HEADS at a time, a
tile. Scores are in powers of 2. Every sum has an order that depends on positions alone.
Source: grouped queries, arXiv 2305.13245; sliding window, arXiv 2310.06825, section 2; online softmax, arXiv
1805.02867.
"""

import math

import numpy as np
from numba import types
from numba.extending import models, overload_method, register_model

from edge_moe.errors import ShapeError
from edge_moe.kernels.attention import FEW_TOKENS, Step
from edge_moe.kernels.attention_rows import (
    CHUNK_TOKENS,
    CONTEXT,
    LARGEST,
    SUM,
    context_bytes,
    join_chunk,
)
from edge_moe.kernels.attention_tiles import (
    HEADS,
    tile_accumulate,
    tile_add_rows,
    tile_store_sums,
    to_bfloat,
)
from edge_moe.kernels.blocks import TAGS, FloatFormat, FormatTag
from edge_moe.kernels.elementwise import to_bf16
from edge_moe.kernels.functions import exp2
from edge_moe.kernels.jit import inline_kernel, kernel
from edge_moe.kernels.simd import (
    absolute,
    address_of,
    convert,
    f32x16,
    fetch_add,
    fma,
    i8x16,
    i32x16,
    larger,
    load,
    picker,
    reduce_max,
    rounded,
    splat,
    store,
)
from edge_moe.kernels.tiles import tile_add_product, tile_zero

MAX_CODE = 127
# A score that cannot win: below all others, but a number, so that a tile's row may see nothing of a chunk.
HIDDEN = -1e30

# A plan is int64[N_FIELDS]; the same for all three kernels. Strides are bytes; the scale is given by its f64 bits.
COUNTER, N_TOKENS, N_HEADS, N_KV_HEADS, DIM, LENGTH, CACHE, HEAD_BYTES, SCALE, WINDOW, PART_TOKENS = range(11)
Q, Q_STRIDE, Q_HEAD, K, K_STRIDE, K_HEAD, V, V_STRIDE, V_HEAD, OUT, OUT_STRIDE, OUT_HEAD = range(11, 23)
QUERIES, QUERY_BYTES, PARTS, PART_BYTES = range(23, 27)
N_FIELDS = 27

_SCRATCH_BYTES = 128 + CHUNK_TOKENS * 4 * HEADS  # of a thread: factors, scores
_turn_8, _turn_4 = picker([(i + 8) % 16 for i in range(16)]), picker([(i + 4) % 16 for i in range(16)])


class ByteRows(FormatTag):
    """Rows of codes with a sign, then the scales of key and value."""


register_model(ByteRows)(models.OpaqueModel)
INT8 = ByteRows("INT8", 1)

# How keys and values are kept, by name.
FORMATS: dict[str, FormatTag] = {"bf16": TAGS["BF16"], "int8": INT8, "f32": TAGS["F32"]}


# ---- what the formats differ in


@inline_kernel
def _columns(dim):
    """Numbers of a key or value as it is kept."""
    return (dim + 15) & ~15


@overload_method(FloatFormat, "row_part")
@overload_method(ByteRows, "row_part")
def _row_part(fmt, dim):
    """Bytes of a key or value."""
    size = fmt.block_bytes
    return lambda fmt, dim: _columns(dim) * size


@overload_method(FloatFormat, "row_bytes")
def _float_row_bytes(fmt, dim):
    return lambda fmt, dim: 2 * fmt.row_part(dim)


@overload_method(ByteRows, "row_bytes")
def _code_row_bytes(fmt, dim):
    return lambda fmt, dim: 2 * fmt.row_part(dim) + 16


@overload_method(ByteRows, "load")
def _load_codes(fmt, address):
    return lambda fmt, address: convert(f32x16, convert(i32x16, load(i8x16, address)))


@overload_method(FloatFormat, "store_half")
def _store_floats(fmt, row, half, values, dim):
    size = fmt.block_bytes

    def store_half(fmt, row, half, values, dim):
        """Keep a key (half 0) or a value (half 1), dim floats at an address."""
        place = row + half * fmt.row_part(dim)
        for i in range(0, dim - 15, 16):
            if size == 4:
                store(place + size * i, load(f32x16, values + 4 * i))
            else:
                store(place + size * i, to_bfloat(load(f32x16, values + 4 * i)))
        for i in range(dim & ~15, dim):
            if size == 4:
                store(place + size * i, load(types.float32, values + 4 * i))
            else:
                store(place + size * i, to_bf16(load(types.float32, values + 4 * i)))

    return store_half


@overload_method(ByteRows, "store_half")
def _store_codes(fmt, row, half, values, dim):
    def store_half(fmt, row, half, values, dim):
        place = row + half * _columns(dim)
        zero = types.float32(0.0)
        tops, wrong = splat(f32x16, zero), zero
        for i in range(0, dim - 15, 16):
            tops = larger(absolute(load(f32x16, values + 4 * i)), tops)
        top = reduce_max(tops)
        for i in range(dim):
            value = load(types.float32, values + 4 * i)
            wrong += value * zero  # what is infinite or not a number must show
            top = max(top, abs(value))
        scale = top * types.float32(1 / MAX_CODE) + wrong
        inverse = types.float32(1.0) / scale if scale > zero else zero
        for i in range(0, dim - 15, 16):
            codes = convert(i32x16, rounded(load(f32x16, values + 4 * i) * inverse))
            store(place + i, convert(i8x16, codes))
        for i in range(dim & ~15, dim):
            store(place + i, types.int8(np.rint(load(types.float32, values + 4 * i) * inverse)))
        store(row + 2 * _columns(dim) + 4 * half, scale)

    return store_half


@overload_method(FloatFormat, "scale_scores")
def _scale_nothing(fmt, scores, n, rows, half, dim):
    return lambda fmt, scores, n, rows, half, dim: None


@overload_method(ByteRows, "scale_scores")
def _scale_scores(fmt, scores, n, rows, half, dim):
    def scale_scores(fmt, scores, n, rows, half, dim):
        """scores f32 [n][HEADS] times the scales of the keys (half 0) or values (half 1), in place."""
        place, row_bytes = rows + 2 * _columns(dim) + 4 * half, fmt.row_bytes(dim)
        for j in range(n):
            scale = load(types.float32, place + j * row_bytes)
            for h in range(HEADS):
                at = scores + 4 * (HEADS * j + h)
                store(at, load(types.float32, at) * scale)

    return scale_scores


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
    return (_field(plan, N_TOKENS) * _group(plan) + HEADS - 1) // HEADS


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


@kernel
def prepare_units(fmt, plan):
    """Store a token's keys and values in the cache, or lay out a tile of queries, as long as the plan has some.

    A tile is [columns / 16][HEADS][16], times the scale, zeros beyond the last query and the last column.
    """
    n_tokens, n_kv_heads, group, dim = _field(plan, N_TOKENS), _field(plan, N_KV_HEADS), _group(plan), _field(plan, DIM)
    n_tiles, length = _n_tiles(plan), load(types.int64, _field(plan, LENGTH))
    scale, whole = types.float32(load(types.float64, plan + 8 * SCALE)), dim & ~15
    while True:
        unit = fetch_add(plan, 1)
        if unit >= n_tokens + n_kv_heads * n_tiles:
            return 0
        if unit < n_tokens:
            for head in range(n_kv_heads):
                rows = _field(plan, CACHE) + head * _field(plan, HEAD_BYTES)
                row = rows + (length + unit) * fmt.row_bytes(dim)
                key = _field(plan, K) + unit * _field(plan, K_STRIDE) + head * _field(plan, K_HEAD)
                value = _field(plan, V) + unit * _field(plan, V_STRIDE) + head * _field(plan, V_HEAD)
                fmt.store_half(row, 0, key, dim)
                fmt.store_half(row, 1, value, dim)
        else:
            i = unit - n_tokens
            head, first = i // n_tiles, i % n_tiles * HEADS
            tile = _field(plan, QUERIES) + i * _field(plan, QUERY_BYTES)
            n = min(HEADS, n_tokens * group - first)
            if n < HEADS or dim % 16:
                for place in range(tile, tile + _field(plan, QUERY_BYTES), 64):
                    store(place, splat(f32x16, types.float32(0.0)))
            for r in range(n):
                t, h = (first + r) // group, head * group + (first + r) % group
                q = _field(plan, Q) + t * _field(plan, Q_STRIDE) + h * _field(plan, Q_HEAD)
                target = tile + 64 * r
                for c in range(0, whole, 16):
                    store(target + 4 * HEADS * c, load(f32x16, q + 4 * c) * scale)
                for c in range(whole, dim):
                    store(target + 4 * HEADS * whole + 4 * (c - whole), load(types.float32, q + 4 * c) * scale)


@inline_kernel
def _softmax(scores, n, partial, factors):
    """scores f32 [n][HEADS] -> 2**(score - largest), in place; n is a multiple of 16 / HEADS."""
    top = splat(f32x16, types.float32(HIDDEN))
    for i in range(0, 4 * n * HEADS, 64):
        top = larger(load(f32x16, scores + i), top)
    top = larger(top, _turn_8(top))
    if HEADS == 4:
        top = larger(top, _turn_4(top))
    total = splat(f32x16, types.float32(0.0))
    for i in range(0, 4 * n * HEADS, 64):
        weight = exp2(load(f32x16, scores + i) - top)
        store(scores + i, weight)
        total = total + weight
    total = total + _turn_8(total)
    if HEADS == 4:
        total = total + _turn_4(total)
    join_chunk(partial, top, total, factors)


@inline_kernel
def _add_scores(fmt, rows, n, query, dim, scratch):
    """Scores of n rows with a tile of queries, [n][HEADS] behind the factors."""
    scores, row_bytes = scratch + 128, fmt.row_bytes(dim)
    step = fmt.row_part(16)
    for j in range(n):
        place, total = rows + j * row_bytes, tile_zero(f32x16)
        for i in range(_columns(dim) // 16):
            total = tile_add_rows(total, fmt.load(place + i * step), query + 64 * HEADS * i)
        tile_store_sums(scores + 4 * HEADS * j, total)
    fmt.scale_scores(scores, n, rows, 0, dim)


@inline_kernel
def _add_values(fmt, rows, n, partial, dim, scratch):
    """Weigh the values of n rows and add them to a partial result."""
    scores, factors, row_bytes = scratch + 128, scratch, fmt.row_bytes(dim)
    fmt.scale_scores(scores, n, rows, 1, dim)
    values, step = rows + fmt.row_part(dim), fmt.row_part(16)
    for i in range(_columns(dim) // 16):
        column, total = values + i * step, tile_zero(f32x16)
        for j in range(n):
            total = tile_add_product(total, fmt.load(column + j * row_bytes), scores, 4 * j)
        tile_accumulate(partial + CONTEXT + 64 * i, context_bytes(dim), total, factors)


@kernel
def attend_units(fmt, plan):
    """Attend one tile of queries to one part of the context, as long as the plan has some.

    A partial result holds the largest scores f32[16], the sums f32[16] and the contexts f32[HEADS][columns].
    """
    n_tokens, n_kv_heads, group, dim = _field(plan, N_TOKENS), _field(plan, N_KV_HEADS), _group(plan), _field(plan, DIM)
    part_tokens, length = _field(plan, PART_TOKENS), load(types.int64, _field(plan, LENGTH))
    n_tiles, n_parts, row_bytes = _n_tiles(plan), _n_parts(plan, n_tokens), fmt.row_bytes(dim)
    memory = np.empty(_SCRATCH_BYTES + 64, np.uint8)
    scratch = (address_of(memory) + 63) & ~63
    scores = scratch + 128
    while True:
        unit = fetch_add(plan, 1)
        if unit >= n_kv_heads * n_tiles * n_parts:
            return memory.size  # the memory must live until here
        tile, part = unit // n_parts, unit % n_parts
        head, first_row = tile // n_tiles, tile % n_tiles * HEADS
        n_rows = min(HEADS, n_tokens * group - first_row)
        first_position = length + first_row // group
        last_position = length + (first_row + n_rows - 1) // group
        begin = max(part * part_tokens, _first_seen(plan, first_position))
        end = min((part + 1) * part_tokens, last_position + 1)
        query = _field(plan, QUERIES) + tile * _field(plan, QUERY_BYTES)
        partial = _field(plan, PARTS) + unit * _field(plan, PART_BYTES)
        store(partial + LARGEST, splat(f32x16, types.float32(HIDDEN)))
        for place in range(partial + SUM, partial + _field(plan, PART_BYTES), 64):
            store(place, splat(f32x16, types.float32(0.0)))
        for first in range(begin, end, CHUNK_TOKENS):
            n = min(CHUNK_TOKENS, end - first)
            rows = _field(plan, CACHE) + head * _field(plan, HEAD_BYTES) + first * row_bytes
            _add_scores(fmt, rows, n, query, dim, scratch)
            if first + n > first_position + 1 or first < _first_seen(plan, last_position):
                for r in range(n_rows):
                    position = length + (first_row + r) // group
                    for j in range(0, min(n, _first_seen(plan, position) - first)):
                        store(scores + 4 * (HEADS * j + r), types.float32(HIDDEN))
                    for j in range(max(0, position + 1 - first), n):
                        store(scores + 4 * (HEADS * j + r), types.float32(HIDDEN))
            filled = n
            while filled * HEADS % 16:
                for h in range(HEADS):
                    store(scores + 4 * (HEADS * filled + h), types.float32(HIDDEN))
                filled += 1
            _softmax(scores, filled, partial, scratch)
            _add_values(fmt, rows, n, partial, dim, scratch)


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
        lane, tile = row % HEADS, head // group * n_tiles + row // HEADS
        first = _field(plan, PARTS) + tile * n_parts * part_bytes
        n = _n_parts(plan, t + 1)
        top, total = types.float32(HIDDEN), types.float32(0.0)
        for c in range(n):
            top = max(top, load(types.float32, first + c * part_bytes + LARGEST + 4 * lane))
        for i in range(0, dim, 16):
            store(context + 4 * i, splat(f32x16, types.float32(0.0)))
        for c in range(n):
            part = first + c * part_bytes
            weight = np.exp2(load(types.float32, part + LARGEST + 4 * lane) - top)
            total += weight * load(types.float32, part + SUM + 4 * lane)
            vector, place = splat(f32x16, weight), part + CONTEXT + lane * context_bytes(dim)
            for i in range(0, dim, 16):
                store(context + 4 * i, fma(load(f32x16, place + 4 * i), vector, load(f32x16, context + 4 * i)))
        out = _field(plan, OUT) + t * _field(plan, OUT_STRIDE) + head * _field(plan, OUT_HEAD)
        for i in range(dim):
            store(out + 4 * i, load(types.float32, context + 4 * i) / total)


# ---- Python side


def head_bytes(fmt: FormatTag, context_length: int, dim: int) -> int:
    """Bytes of one head's keys and values in one layer."""
    columns = -(-dim // 16) * 16
    return context_length * (2 * columns * fmt.block_bytes + (16 if fmt is INT8 else 0))


def _tile_bytes(dim: int) -> tuple[int, int]:
    """Bytes of a tile of queries, and of its partial result."""
    columns = -(-dim // 16) * 16
    return 4 * HEADS * columns, CONTEXT + 4 * HEADS * columns


def scratch_bytes(n_tokens: int, n_heads: int, n_kv_heads: int, dim: int, context_length: int) -> int:
    """Bytes that `attention_steps` needs for n_tokens at once, anywhere in a context; the same for each layer."""
    n_tiles = n_kv_heads * -(-n_tokens * (n_heads // n_kv_heads) // HEADS)
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

    `cache` is the address of the heads' rows, each `cache_head_bytes`, that begin as zeros, `length` that of an int64,
    the number of tokens in the cache when a step is run; length + T may not exceed context_length. A token sees itself
    and the `window` - 1 tokens before it; 0: all.
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
    n_tiles = n_kv_heads * -(-n_tokens * (n_heads // n_kv_heads) // HEADS)
    query_bytes, part_bytes = _tile_bytes(dim)
    queries = (scratch.ctypes.data + 63) & ~63
    plan = np.zeros(N_FIELDS, np.int64)
    plan[[N_TOKENS, N_HEADS, N_KV_HEADS, DIM]] = n_tokens, n_heads, n_kv_heads, dim
    plan[[LENGTH, CACHE, HEAD_BYTES, WINDOW, PART_TOKENS]] = length, cache, cache_head_bytes, window, part_tokens
    plan[SCALE] = np.float64(scale * math.log2(math.e)).view(np.int64)
    for field, array in ((Q, q), (K, k), (V, v), (OUT, out)):
        plan[field : field + 3] = array.ctypes.data, *array.strides[:2]
    plan[[QUERIES, QUERY_BYTES]] = queries, query_bytes
    plan[[PARTS, PART_BYTES]] = queries + n_tiles * query_bytes, part_bytes
    n_parts = -(-context_length // part_tokens)
    numbers = n_tokens * n_heads * dim
    return [
        Step(prepare_units, fmt, plan, n_tokens + n_tiles, 4 * numbers),
        Step(attend_units, fmt, plan.copy(), n_tiles * n_parts, 2 * context_length * numbers),
        Step(merge_units, fmt, plan.copy(), n_tokens * n_heads, n_parts * numbers),
    ]
