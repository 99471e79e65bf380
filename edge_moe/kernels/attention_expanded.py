"""Attention of many tokens to keys and values that are made from the cached latents, block by block of the context.

For few queries it is cheaper to bring them to the latents; for many it is cheaper to bring the latents to them: a key
and a value have fewer dims than a latent. All is done in f32. Latents and matrices lie in panels, so that lanes are
neighbouring tokens of keys and neighbouring dims of values; a tile is a few queries of one head. Every query goes
through the blocks in their order, so that results do not depend on the number of threads.
Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; online softmax over blocks, FlashAttention, arXiv 2205.14135.
"""

import math

import numpy as np
from numba import types

from edge_moe.errors import ShapeError
from edge_moe.kernels.attention_codes import softmax_of_blocks
from edge_moe.kernels.attention_rows import CHUNK_TOKENS, CONTEXT, LARGEST, SUM, context_bytes
from edge_moe.kernels.attention_tiles import tile_accumulate, tile_add_outer
from edge_moe.kernels.jit import inline_kernel, kernel
from edge_moe.kernels.launch import NUMBERS, run_units
from edge_moe.kernels.simd import address_of, f32x16, fetch_add, load, store
from edge_moe.kernels.tiles import TILE_TOKENS, tile_add_product, tile_store, tile_zero

LANES = 16
_HIDDEN = -1e30  # the score of a token that a query may not see; finite, as a query may see none of a chunk

# Of `multiply_units`: for each head, each panel of A [depth][16] times each of B [depth][TILE_TOKENS].
A_COUNTER, A_HEADS, A_PANELS, B_PANELS, DEPTH, A, A_HEAD = range(7)
B, B_HEAD, PRODUCT, PRODUCT_HEAD, PRODUCT_A, PRODUCT_B = range(7, 13)
# Of `expanded_units`: a block of N tokens of the context from position FIRST on; queries from position START on.
COUNTER, N_HEADS, N_QUERIES, NOPE, ROPE, VALUE, N, FIRST, START = range(9)
QUERIES, KEYS, KEYS_HEAD, KEYS_PE, VALUES, VALUES_HEAD, PARTS = range(9, 16)


@inline_kernel
def _field(plan, i):
    return load(types.int64, plan + 8 * i)


@kernel
def multiply_units(fmt, plan):
    """Multiply a panel of A with all of B, as long as the plan has some. fmt stands for nothing here."""
    n_a, n_b, depth = _field(plan, A_PANELS), _field(plan, B_PANELS), _field(plan, DEPTH)
    while True:
        unit = fetch_add(plan, 1)
        if unit >= n_a * _field(plan, A_HEADS):
            return 0
        head, a = unit // n_a, unit % n_a
        left = _field(plan, A) + head * _field(plan, A_HEAD) + a * depth * 4 * LANES
        right = _field(plan, B) + head * _field(plan, B_HEAD)
        out = _field(plan, PRODUCT) + head * _field(plan, PRODUCT_HEAD) + a * _field(plan, PRODUCT_A)
        for b in range(n_b):
            total = tile_zero(f32x16)
            for i in range(depth):
                total = tile_add_product(total, load(f32x16, left + 4 * LANES * i), right, 4 * i)
            tile_store(out + b * _field(plan, PRODUCT_B), total)
            right += depth * 4 * TILE_TOKENS


@inline_kernel
def _add_scores(total, keys, n_dims, query, offset):
    for i in range(n_dims):
        total = tile_add_product(total, load(f32x16, keys + 4 * LANES * i), query, offset + 4 * i)
    return total


@kernel
def expanded_units(fmt, plan):
    """Attend a tile of queries of one head to a block of the context, as long as the plan has some."""
    n_queries, nope, rope, value = _field(plan, N_QUERIES), _field(plan, NOPE), _field(plan, ROPE), _field(plan, VALUE)
    n_tiles = (n_queries + TILE_TOKENS - 1) // TILE_TOKENS
    part_bytes = CONTEXT + TILE_TOKENS * context_bytes(value)
    n_blocks_at_most = CHUNK_TOKENS // LANES
    memory = np.empty(256 + 64 + 4 * LANES * TILE_TOKENS * n_blocks_at_most, np.uint8)
    scratch = (address_of(memory) + 63) & ~63
    factors, largest, sums, scores = scratch, scratch + 128, scratch + 192, scratch + 256
    while True:
        unit = fetch_add(plan, 1)
        if unit >= n_tiles * _field(plan, N_HEADS):
            return memory.size  # the memory must live until here
        head, tile = unit // n_tiles, unit % n_tiles
        query = _field(plan, QUERIES) + unit * (nope + rope) * 4 * TILE_TOKENS
        partial = _field(plan, PARTS) + unit * part_bytes
        # how many tokens of the block the tile's first query sees; each query behind it sees one more
        seen_by_first = _field(plan, START) + tile * TILE_TOKENS + 1 - _field(plan, FIRST)
        last = min(TILE_TOKENS, n_queries - tile * TILE_TOKENS) - 1
        visible = min(_field(plan, N), seen_by_first + last)
        for begin in range(0, visible, CHUNK_TOKENS):
            n = min(CHUNK_TOKENS, visible - begin)
            n_blocks = (n + LANES - 1) // LANES
            for b in range(n_blocks):
                block = begin // LANES + b
                keys = _field(plan, KEYS) + head * _field(plan, KEYS_HEAD) + block * nope * 4 * LANES
                total = _add_scores(tile_zero(f32x16), keys, nope, query, 0)
                total = _add_scores(total, _field(plan, KEYS_PE) + block * rope * 4 * LANES, rope, query, 4 * nope)
                tile_store(scores + 4 * LANES * TILE_TOKENS * b, total)
            for t in range(TILE_TOKENS):
                for j in range(max(0, min(n, seen_by_first + t - begin)), LANES * n_blocks):
                    place = scores + 4 * LANES * (TILE_TOKENS * (j // LANES) + t) + 4 * (j % LANES)
                    store(place, types.float32(_HIDDEN))
            softmax_of_blocks(scores, n_blocks, partial, factors, largest, sums)
            values = _field(plan, VALUES) + head * _field(plan, VALUES_HEAD) + begin * value * 4
            for i in range(0, value, LANES):
                total = tile_zero(f32x16)
                for j in range(0, n, TILE_TOKENS):
                    rows = values + j * value * 4 + i * 4 * TILE_TOKENS
                    weights = scores + 4 * LANES * TILE_TOKENS * (j // LANES) + 4 * (j % LANES)
                    for k in range(TILE_TOKENS):
                        total = tile_add_outer(total, load(f32x16, rows + 4 * LANES * k), weights + 4 * k)
                tile_accumulate(partial + CONTEXT + 4 * i, context_bytes(value), total, factors)


# ---- Python side


def _panels(x: np.ndarray, width: int) -> np.ndarray:
    """f32[...,n,depth] -> f32[...,n up to a multiple of width / width,depth,width], filled up with zeros."""
    *outer, n, depth = x.shape
    n_panels = -(-n // width)
    padded = np.zeros((*outer, n_panels * width, depth), np.float32)
    padded[..., :n, :] = x
    return np.ascontiguousarray(padded.reshape(*outer, n_panels, width, depth).swapaxes(-1, -2))


class ExpandedAttention:
    """Softmax attention of T queries, at the positions from `start` on, to a context that is given block by block."""

    def __init__(
        self,
        q_nope: np.ndarray,
        q_pe: np.ndarray,
        key_matrix: np.ndarray,
        value_matrix: np.ndarray,
        start: int,
        scale: float,
    ) -> None:
        """q_nope f32[T,H,N], q_pe f32[T,H,P]; key_matrix f32[H,N,R] and value_matrix f32[H,V,R] make a head's keys and
        values of a latent. `scale` is the softmax's. Raises ShapeError for arrays that do not fit together.
        """
        n_queries, n_heads, nope = q_nope.shape
        rank = key_matrix.shape[-1]
        fits = key_matrix.shape == (n_heads, nope, rank) and value_matrix.shape[::2] == (n_heads, rank)
        if not fits or q_pe.shape[:2] != (n_queries, n_heads):
            raise ShapeError(
                f"queries {q_nope.shape} and {q_pe.shape} do not fit matrices {key_matrix.shape}, {value_matrix.shape}"
            )
        self._shape = n_queries, n_heads, value_matrix.shape[1]
        self._start, self._rope = start, q_pe.shape[-1]
        self._key_panels = _panels(key_matrix, TILE_TOKENS)
        self._value_panels = _panels(value_matrix, LANES)
        # rows of a query: nope dims filled up as the keys are, then rope dims; in powers of 2
        nope_columns = self._key_panels.shape[1] * TILE_TOKENS
        query = np.zeros((n_heads, n_queries, nope_columns + self._rope), np.float32)
        factor = np.float32(scale * math.log2(math.e))
        np.multiply(q_nope.swapaxes(0, 1), factor, out=query[..., :nope])
        np.multiply(q_pe.swapaxes(0, 1), factor, out=query[..., nope_columns:])
        self._queries = _panels(query, TILE_TOKENS)
        self._value_columns = self._value_panels.shape[1] * LANES
        part = (CONTEXT + TILE_TOKENS * 4 * self._value_columns) // 4
        self._parts = np.zeros((n_heads, self._queries.shape[1], part), np.float32)
        self._parts[..., LARGEST // 4 : LARGEST // 4 + LANES] = -np.inf

    def add(self, first: int, latents: np.ndarray, keys_pe: np.ndarray) -> None:
        """Attend to the tokens from position `first` on: latents f32[n,R], rope keys f32[n,P]. Blocks come in order.

        Raises ShapeError for arrays that do not fit.
        """
        n, rank = latents.shape
        n_queries, n_heads, _ = self._shape
        if rank != self._key_panels.shape[2] or keys_pe.shape != (n, self._rope):
            raise ShapeError(f"latents {latents.shape} and rope keys {keys_pe.shape} do not fit the queries")
        by_lanes, by_tiles = _panels(latents, LANES), _panels(latents, TILE_TOKENS)
        n_blocks, n_key_panels, n_value_panels = len(by_lanes), self._key_panels.shape[1], self._value_panels.shape[1]
        keys = np.empty((n_heads, n_blocks, n_key_panels, TILE_TOKENS, LANES), np.float32)
        _multiply(by_lanes, 0, self._key_panels, keys, (keys.strides[1], keys.strides[2]))
        # up to whole blocks of keys, so that a tile never reads behind the end
        n_tiles = n_blocks * LANES // TILE_TOKENS
        values = np.zeros((n_heads, n_tiles, n_value_panels, TILE_TOKENS, LANES), np.float32)
        _multiply(self._value_panels, 1, by_tiles, values, (values.strides[2], values.strides[1]))
        pe_panels = _panels(keys_pe, LANES)
        n_units = n_heads * self._queries.shape[1]
        columns = self._queries.shape[2] - self._rope
        plan = [0, n_heads, n_queries, columns, self._rope, self._value_columns, n, first, self._start]
        plan += [self._queries.ctypes.data, keys.ctypes.data, keys.strides[0], pe_panels.ctypes.data]
        plan += [values.ctypes.data, values.strides[0], self._parts.ctypes.data]
        run_units(expanded_units, NUMBERS, plan, n_units, n_units * TILE_TOKENS * n * (columns + self._value_columns))

    def result(self) -> np.ndarray:
        """The weighted sums of values, f32[T,H,V]."""
        n_queries, n_heads, value = self._shape
        sums = self._parts[..., SUM // 4 : SUM // 4 + TILE_TOKENS, None]
        contexts = self._parts[..., CONTEXT // 4 :].reshape(n_heads, -1, TILE_TOKENS, self._value_columns)
        out = (contexts[..., :value] / sums[: len(contexts)]).reshape(n_heads, -1, value)[:, :n_queries]
        return np.ascontiguousarray(out.swapaxes(0, 1))


def _multiply(a: np.ndarray, a_has_heads: int, b: np.ndarray, out: np.ndarray, steps: tuple[int, int]) -> None:
    """Panels [(H,)n,depth,16] times panels [(H,)m,depth,TILE_TOKENS]; only one of both has heads. out [H,...].

    steps: bytes in `out` from one panel of a, and of b, to the next.
    """
    n_heads, depth = len(out), a.shape[-2]
    n_a, n_b = a.shape[-3], b.shape[-3]
    heads = (a.strides[0], 0) if a_has_heads else (0, b.strides[0])
    plan = [0, n_heads, n_a, n_b, depth, a.ctypes.data, heads[0], b.ctypes.data, heads[1]]
    plan += [out.ctypes.data, out.strides[0], *steps]
    run_units(multiply_units, NUMBERS, plan, n_heads * n_a, n_heads * n_a * n_b * depth * LANES * TILE_TOKENS)
