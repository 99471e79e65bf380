"""Attention of a few tokens to the latent cache, in absorbed form: the latent is both key and value.

Two steps on plans (see launch.py): `prepare_units` stores the new latents and brings the queries into the form that
is multiplied, `attend_units` gives each part of the context a partial softmax and joins the parts. Their plans stay
valid from token to token: the number of tokens that the cache holds is read by its address.

Heads are taken HEADS at a time, a tile, which share each load of the cache. Scores are in powers of 2, so that the
scale of the softmax holds a factor log2(e). Every sum has an order that depends on positions alone, so that results do
not depend on the number of threads.
Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C; online softmax, arXiv 1805.02867.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import get_num_threads, types

from edge_moe.errors import ShapeError
from edge_moe.kernels import attention_codes, attention_nibbles, attention_rows
from edge_moe.kernels.attention_rows import CHUNK_TOKENS, CONTEXT, JOINED, LARGEST, SUM
from edge_moe.kernels.attention_tiles import HEADS
from edge_moe.kernels.blocks import TAGS, FormatTag
from edge_moe.kernels.functions import exp2
from edge_moe.kernels.jit import both_sides, inline_kernel, kernel
from edge_moe.kernels.launch import first_of_unit, float_bits
from edge_moe.kernels.simd import address_of, f32x16, fetch_add, fma, larger, load, splat, store

# How latents are kept, by name.
FORMATS: dict[str, FormatTag] = {
    "bf16": TAGS["BF16"],
    "int8": attention_codes.INT8,
    "int4": attention_nibbles.INT4,
    "f32": TAGS["F32"],
}
LONG_PARTS, MOST_PARTS = 8, 16  # so many parts occupy the threads; and so many do of any machine
FEW_TOKENS = 8  # from here on there are tokens enough to occupy the threads without splitting the context

# A plan is int64[N_FIELDS]; the same for all three kernels. Strides are bytes; the scale is given by its f64 bits.
COUNTER, N_TOKENS, N_HEADS, RANK, ROPE, LENGTH, CACHE, SCALE, SHARES = range(9)
C_KV, C_KV_STRIDE, K_PE, K_PE_STRIDE = range(9, 13)
Q_LATENT, Q_LATENT_STRIDE, Q_LATENT_HEAD, Q_PE, Q_PE_STRIDE, Q_PE_HEAD = range(13, 19)
OUT, OUT_STRIDE, OUT_HEAD, QUERIES, QUERY_BYTES, PARTS, PART_BYTES = range(19, 26)
N_FIELDS = 26

# Of a thread: steps, scores, weights, and what latents in 4 bits need more.
SCRATCH_BYTES = 512 + CHUNK_TOKENS * 4 * (1 + HEADS + 2 * HEADS) + attention_nibbles.SCRATCH_BYTES


class Step(NamedTuple):
    """A kernel with its plan i64[], for `launch`: at most n_units units, of so many multiplications in all."""

    function: Callable[..., Any]
    fmt: FormatTag
    plan: np.ndarray
    n_units: int
    operations: int


@inline_kernel
def _field(plan, i):
    return load(types.int64, plan + 8 * i)


@inline_kernel
def _n_tiles(plan):
    return (_field(plan, N_HEADS) + HEADS - 1) // HEADS


@both_sides
def _part_tokens(n_tokens, length):
    """Tokens of a part of the context: many parts for few tokens, but no more than MOST_PARTS, as they are joined."""
    if n_tokens >= FEW_TOKENS:
        return 1 << 62
    part_tokens = CHUNK_TOKENS
    while length >= MOST_PARTS * part_tokens:
        part_tokens *= 2
    return part_tokens


@inline_kernel
def _n_parts(plan, n_tokens):
    """Parts of the context that the first n_tokens of the new tokens see."""
    length = load(types.int64, _field(plan, LENGTH))
    part_tokens = _part_tokens(_field(plan, N_TOKENS), length)
    return (length + n_tokens - 1) // part_tokens + 1


@inline_kernel
def _partial(plan, t, part, n_parts, tile):
    """Where the partial result of a tile of a token's heads is, of one of n_parts parts of the context."""
    return _field(plan, PARTS) + ((t * n_parts + part) * _n_tiles(plan) + tile) * _field(plan, PART_BYTES)


@kernel
def prepare_units(fmt, plan):
    """Store a token's latent and rope key in the cache, or make a tile of queries, as long as the plan has some."""
    n_tokens, n_heads, n_tiles = _field(plan, N_TOKENS), _field(plan, N_HEADS), _n_tiles(plan)
    rank, rope = _field(plan, RANK), _field(plan, ROPE)
    while True:
        unit = fetch_add(plan, 1)
        if unit >= n_tokens * (1 + n_tiles):
            return 0
        if unit < n_tokens:
            position = load(types.int64, _field(plan, LENGTH)) + unit
            c_kv = _field(plan, C_KV) + unit * _field(plan, C_KV_STRIDE)
            k_pe = _field(plan, K_PE) + unit * _field(plan, K_PE_STRIDE)
            fmt.store_latent(_field(plan, CACHE), position, c_kv, k_pe, rank, rope)
        else:
            i = unit - n_tokens
            t, head, n_parts = i // n_tiles, i % n_tiles * HEADS, _n_parts(plan, n_tokens)
            for part in range(n_parts):
                store(_partial(plan, t, part, n_parts, i % n_tiles) + JOINED, 0)
            tile = _field(plan, QUERIES) + i * _field(plan, QUERY_BYTES)
            latent_head, pe_head = _field(plan, Q_LATENT_HEAD), _field(plan, Q_PE_HEAD)
            q_latent = _field(plan, Q_LATENT) + t * _field(plan, Q_LATENT_STRIDE) + head * latent_head
            q_pe = _field(plan, Q_PE) + t * _field(plan, Q_PE_STRIDE) + head * pe_head
            n, scale = min(HEADS, n_heads - head), types.float32(load(types.float64, plan + 8 * SCALE))
            fmt.query_tile(tile, q_latent, latent_head, q_pe, pe_head, n, rank, rope, scale)


@kernel
def attend_units(fmt, plan):
    """Attend one tile of heads of one token to one part of the context, as long as the plan has some.

    A partial result holds the largest scores f32[16], the sums f32[16] and the contexts f32[HEADS][rank up to 16s].
    """
    n_tokens, n_tiles, rank, rope = _field(plan, N_TOKENS), _n_tiles(plan), _field(plan, RANK), _field(plan, ROPE)
    length = load(types.int64, _field(plan, LENGTH))
    part_tokens, n_parts = _part_tokens(n_tokens, length), _n_parts(plan, n_tokens)
    memory = np.empty(SCRATCH_BYTES + 64, np.uint8)
    scratch = (address_of(memory) + 63) & ~63
    # Of a long context a thread takes all tiles of a part: what one has read lies in its own cache for the others.
    tiles_at_once = n_tiles if n_parts >= LONG_PARTS else 1
    n_runs, shares = n_tokens * n_parts * n_tiles // tiles_at_once, _field(plan, SHARES)
    unit = fetch_add(plan, 1)
    run = first_of_unit(unit, n_runs, shares, 1)
    while run < n_runs:
        stop, following = min(first_of_unit(unit + 1, n_runs, shares, 1), n_runs), -1
        for start in range(run * tiles_at_once, stop * tiles_at_once, tiles_at_once):
            i, first_tile = start // n_tiles, start % n_tiles
            t, part = i // n_parts, i % n_parts
            begin, end = part * part_tokens, min((part + 1) * part_tokens, length + t + 1)
            if begin >= end:
                continue  # an earlier token does not see this part
            for tile in range(first_tile, first_tile + tiles_at_once):
                partial = _partial(plan, t, part, n_parts, tile)
                store(partial + LARGEST, splat(f32x16, types.float32(-np.inf)))
                store(partial + SUM, splat(f32x16, types.float32(0.0)))
                for place in range(partial + CONTEXT, partial + _field(plan, PART_BYTES), 64):
                    store(place, splat(f32x16, types.float32(0.0)))
            for first in range(begin, end, CHUNK_TOKENS):
                # which tokens come next, to be fetched meanwhile
                n, then = min(CHUNK_TOKENS, end - first), first + CHUNK_TOKENS
                if then >= end:
                    after = start + tiles_at_once
                    if after >= stop * tiles_at_once:  # the next unit is taken as early as that
                        unit = fetch_add(plan, 1)
                        following = first_of_unit(unit, n_runs, shares, 1)
                        after = following * tiles_at_once
                    then = after // n_tiles % n_parts * part_tokens if after < n_runs * tiles_at_once else first
                for tile in range(first_tile, first_tile + tiles_at_once):
                    query = _field(plan, QUERIES) + (t * n_tiles + tile) * _field(plan, QUERY_BYTES)
                    partial = _partial(plan, t, part, n_parts, tile)
                    fmt.attend_chunk(_field(plan, CACHE), first, n, then, query, partial, rank, rope, scratch)
            for tile in range(first_tile, first_tile + tiles_at_once):
                _join_parts(fmt, plan, t, part, n_parts, tile, scratch)
        if following < 0:
            unit = fetch_add(plan, 1)
            following = first_of_unit(unit, n_runs, shares, 1)
        run = following
    return memory.size  # the memory must live until here


@inline_kernel
def _join_parts(fmt, plan, t, part, n_parts, tile, scratch):
    """Join a part that is done with its neighbour if that is done too, then pairs, and so on; the last writes all out.

    Who joins two is who was later with his. Most often he did both, and they lie in his own cache. What is joined with
    what, and in which order, depends on positions alone.
    """
    rank, n, size = _field(plan, RANK), _n_parts(plan, t + 1), 1
    while size < n:
        part = part // (2 * size) * (2 * size)
        if part + size < n:
            left, right = _partial(plan, t, part, n_parts, tile), _partial(plan, t, part + size, n_parts, tile)
            if fetch_add(right + JOINED, 1) == 0:
                return
            _join(fmt, left, right, rank, scratch)
        size *= 2
    partial = _partial(plan, t, 0, n_parts, tile)
    store(scratch, splat(f32x16, types.float32(1.0)) / load(f32x16, partial + SUM))
    head, out_head = tile * HEADS, _field(plan, OUT_HEAD)
    out, n_heads = _field(plan, OUT) + t * _field(plan, OUT_STRIDE) + head * out_head, _field(plan, N_HEADS)
    fmt.write_contexts(partial + CONTEXT, scratch, rank, min(HEADS, n_heads - head), out, out_head)


@inline_kernel
def _join(fmt, left, right, rank, scratch):
    """Join the partial results of two parts, in place of the left one's."""
    before, behind = load(f32x16, left + LARGEST), load(f32x16, right + LARGEST)
    top = larger(before, behind)
    old, new = exp2(before - top), exp2(behind - top)
    store(left + LARGEST, top)
    store(left + SUM, fma(load(f32x16, left + SUM), old, load(f32x16, right + SUM) * new))
    store(scratch, old)
    store(scratch + 64, new)
    fmt.join_contexts(left + CONTEXT, right + CONTEXT, scratch, rank, scratch + 128)


# ---- Python side


def layer_bytes(fmt: FormatTag, context_length: int, rank: int, rope: int) -> int:
    """Bytes of the latents and rope keys of one layer."""
    if fmt is attention_codes.INT8:
        return attention_codes.layer_bytes(context_length, rank, rope)
    if fmt is attention_nibbles.INT4:
        return attention_nibbles.layer_bytes(context_length, rank, rope)
    return attention_rows.layer_bytes(context_length, rank, rope, fmt.block_bytes)


def cached(
    fmt: FormatTag, layer: np.ndarray, first: int, last: int, rank: int, rope: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens first to last of a layer u8[`layer_bytes`] as floats: latents f32[n,rank], rope keys f32[n,rope].

    `first` is a multiple of 16.
    """
    if fmt is attention_codes.INT8 or fmt is attention_nibbles.INT4:
        module = attention_codes if fmt is attention_codes.INT8 else attention_nibbles
        begin, end = module.layer_bytes(first, rank, rope), module.layer_bytes(last, rank, rope)
        latents, keys = module.decode_blocks(layer[begin:end].reshape(-1, module.block_bytes(rank, rope)), rank, rope)
        return latents[: last - first], keys[: last - first]
    row_bytes = attention_rows.layer_bytes(1, rank, rope, fmt.block_bytes)
    rows = layer[first * row_bytes : last * row_bytes].reshape(-1, row_bytes)
    return attention_rows.decode_rows(rows, rank, rope, fmt.block_bytes)


def _query_bytes(rank: int, rope: int) -> int:
    """Bytes of a tile of queries: room for either form."""
    return HEADS * 4 * (attention_rows.row_columns(rank, rope) + 16)


def _part_bytes(rank: int) -> int:
    return CONTEXT + 64 * HEADS * -(-rank // 16)


def _most_parts(n_tokens: int, context_length: int) -> int:
    """The most parts that any length up to the context's makes of it."""
    return min(-(-context_length // CHUNK_TOKENS), MOST_PARTS + 1) if n_tokens < FEW_TOKENS else 1


def scratch_bytes(n_tokens: int, n_heads: int, rank: int, rope: int, context_length: int) -> int:
    """Bytes that `attention_steps` needs for n_tokens at once, anywhere in a context; the same for each layer."""
    n_tiles, n_parts = -(-n_heads // HEADS), _most_parts(n_tokens, context_length)
    return 64 + n_tokens * n_tiles * (_query_bytes(rank, rope) + n_parts * _part_bytes(rank))


def attention_steps(
    fmt: FormatTag,
    cache: int,
    length: int,
    context_length: int,
    q_latent: np.ndarray,
    q_pe: np.ndarray,
    c_kv: np.ndarray,
    k_pe: np.ndarray,
    out: np.ndarray,
    scratch: np.ndarray,
    scale: float,
) -> list[Step]:
    """The steps that store T tokens behind those in a layer's cache and attend them to all up to themselves.

    `cache` is the address of `layer_bytes` bytes that begin as zeros, `length` that of an int64, the number of tokens
    in the cache when a step is run; length + T may not exceed context_length.
    q_latent f32[T,H,R] (absorbed), q_pe f32[T,H,P], c_kv f32[T,R], k_pe f32[T,P], out f32[T,H,R]: any strides, but the
    last axis must be contiguous. scratch u8[`scratch_bytes`]. All of them must live as long as the steps are used.
    Raises ShapeError for arrays that do not fit together.
    """
    n_tokens, n_heads, rank = q_latent.shape
    rope, n_tiles = q_pe.shape[-1], -(-n_heads // HEADS)
    fitting = ((n_tokens, n_heads, rank), (n_tokens, n_heads, rope), (n_tokens, rank), (n_tokens, rope))
    for array, shape in zip((q_latent, q_pe, c_kv, k_pe, out), (*fitting, fitting[0]), strict=True):
        has_gaps = array.size > 0 and shape[-1] > 1 and array.strides[-1] != 4
        if array.shape != shape or array.dtype != np.float32 or has_gaps:
            raise ShapeError(f"expected float32{list(shape)} with contiguous rows, found {array.dtype}{[*array.shape]}")
    if scratch.nbytes < scratch_bytes(n_tokens, n_heads, rank, rope, context_length):
        raise ShapeError(f"{scratch.nbytes} bytes of scratch are too few for {n_tokens} tokens")
    queries = (scratch.ctypes.data + 63) & ~63
    plan = np.zeros(N_FIELDS, np.int64)
    plan[[N_TOKENS, N_HEADS, RANK, ROPE, LENGTH, CACHE]] = n_tokens, n_heads, rank, rope, length, cache
    plan[SCALE] = float_bits(scale * math.log2(math.e))
    plan[SHARES] = get_num_threads()
    for field, array in ((C_KV, c_kv), (K_PE, k_pe), (Q_LATENT, q_latent), (Q_PE, q_pe), (OUT, out)):
        plan[field : field + array.ndim] = array.ctypes.data, *array.strides[:-1]
    plan[[QUERIES, QUERY_BYTES]] = queries, _query_bytes(rank, rope)
    plan[[PARTS, PART_BYTES]] = queries + n_tokens * n_tiles * _query_bytes(rank, rope), _part_bytes(rank)
    n_parts = _most_parts(n_tokens, context_length)
    numbers = n_tokens * n_heads * rank
    return [
        Step(prepare_units, fmt, plan, n_tokens * (1 + n_tiles), 4 * numbers),
        Step(attend_units, fmt, plan.copy(), n_tokens * n_tiles * n_parts, 2 * context_length * numbers),
    ]
