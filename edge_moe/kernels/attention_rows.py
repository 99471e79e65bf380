"""The latent cache as rows of floats, one for each token: latent, then rope key, then zeros to a multiple of 16.

The methods of its formats, F32 and BF16, that attention.py is written in. Lanes are neighbouring dims; each row that is
read meets the queries of all heads of a tile.
"""

import numpy as np
from numba import types

from edge_moe.kernels.attention_tiles import HEADS, tile_accumulate, tile_add_rows, tile_store_sums, to_bfloat
from edge_moe.kernels.blocks import FloatFormat
from edge_moe.kernels.elementwise import to_bf16
from edge_moe.kernels.functions import exp2
from edge_moe.kernels.jit import inline_kernel, kernel_method
from edge_moe.kernels.picks import picker
from edge_moe.kernels.simd import f32x16, fma, larger, load, splat, store
from edge_moe.kernels.tiles import tile_add_product, tile_zero

# The most cached tokens attended at once: their scores stay in the first-level cache, their latents in the second.
CHUNK_TOKENS = 256
# Places in a tile's partial result; JOINED counts the sides of the pair of parts that it is the latter of.
LARGEST, SUM, JOINED, CONTEXT = 0, 64, 128, 192

_turn_8, _turn_4 = picker([(i + 8) % 16 for i in range(16)]), picker([(i + 4) % 16 for i in range(16)])


def row_columns(rank: int, rope: int) -> int:
    """Numbers from one row to the next."""
    return (rank + rope + 15) // 16 * 16


_row_columns = inline_kernel(row_columns)


def layer_bytes(n_tokens: int, rank: int, rope: int, number_bytes: int) -> int:
    """Bytes of one layer's rows."""
    return n_tokens * row_columns(rank, rope) * number_bytes


def decode_rows(rows: np.ndarray, rank: int, rope: int, number_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows u8[n,...] of bf16 or f32 as floats: latents f32[n,rank], rope keys f32[n,rope]."""
    if number_bytes == 2:
        rows = (rows.view(np.uint16).astype(np.uint32) << 16).view(np.uint8)
    floats = rows.view(np.float32)
    return floats[:, :rank], floats[:, rank : rank + rope]


@inline_kernel
def context_bytes(rank):
    """Bytes from one head's context in a partial result to the next."""
    return ((rank + 15) & ~15) * 4


@inline_kernel
def join_chunk(partial, largest, total, factors):
    """Add a chunk's softmax to a partial result: largest scores and sums f32x16 of each head.

    Stores what the contexts so far and those of the chunk are to be multiplied with, at `factors`, f32 [2][16].
    """
    before = load(f32x16, partial + LARGEST)
    top = larger(before, largest)
    old, new = exp2(before - top), exp2(largest - top)
    store(partial + LARGEST, top)
    store(partial + SUM, fma(load(f32x16, partial + SUM), old, total * new))
    store(factors, old)
    store(factors + 64, new)


@inline_kernel
def _softmax(scores, n, partial, factors):
    """scores f32 [n][HEADS] -> 2**(score - largest), in place; n is a multiple of 16 / HEADS."""
    top = splat(f32x16, types.float32(-np.inf))
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


@kernel_method(FloatFormat, "store_numbers")
def _store_numbers(fmt, place, values, n):
    size = fmt.block_bytes

    def store_numbers(fmt, place, values, n):
        """Keep n floats at an address one behind the other at another."""
        for i in range(0, n - 15, 16):
            if size == 4:
                store(place + size * i, load(f32x16, values + 4 * i))
            else:
                store(place + size * i, to_bfloat(load(f32x16, values + 4 * i)))
        for i in range(n & ~15, n):
            if size == 4:
                store(place + size * i, load(types.float32, values + 4 * i))
            else:
                store(place + size * i, to_bf16(load(types.float32, values + 4 * i)))

    return store_numbers


@kernel_method(FloatFormat, "store_latent")
def _store_latent(fmt, cache, position, c_kv, k_pe, rank, rope):
    size = fmt.block_bytes

    def store_latent(fmt, cache, position, c_kv, k_pe, rank, rope):
        row = cache + position * _row_columns(rank, rope) * size
        fmt.store_numbers(row, c_kv, rank)
        fmt.store_numbers(row + size * rank, k_pe, rope)

    return store_latent


@inline_kernel
def _spread(target, first, values, n, scale):
    """n floats at an address, times scale, to columns from `first` on of one head's vectors, HEADS * 64 bytes apart."""
    whole = n & ~15 if first % 16 == 0 else 0
    for i in range(0, whole, 16):
        store(target + 4 * HEADS * (first + i), load(f32x16, values + 4 * i) * scale)
    for i in range(whole, n):
        number = load(types.float32, values + 4 * i) * scale
        store(target + 64 * HEADS * ((first + i) // 16) + 4 * ((first + i) % 16), number)


@kernel_method(FloatFormat, "query_tile")
def _query_tile(fmt, tile, q_latent, latent_stride, q_pe, pe_stride, n_heads, rank, rope, scale):
    def query_tile(fmt, tile, q_latent, latent_stride, q_pe, pe_stride, n_heads, rank, rope, scale):
        """[columns / 16][HEADS][16], times scale, zeros beyond n_heads and the last column."""
        if n_heads < HEADS or (rank + rope) % 16:  # what is not written below
            for i in range(0, _row_columns(rank, rope) * HEADS * 4, 64):
                store(tile + i, splat(f32x16, types.float32(0.0)))
        for h in range(n_heads):
            _spread(tile + 64 * h, 0, q_latent + h * latent_stride, rank, scale)
            _spread(tile + 64 * h, rank, q_pe + h * pe_stride, rope, scale)

    return query_tile


@kernel_method(FloatFormat, "join_contexts")
def _join_contexts(fmt, left, right, factors, rank, scratch):
    def join_contexts(fmt, left, right, factors, rank, scratch):
        """left = left times the first factors + right times the second: f32 [HEADS][rank up to 16s]; [2][16]."""
        for h in range(HEADS):
            old = splat(f32x16, load(types.float32, factors + 4 * h))
            new = splat(f32x16, load(types.float32, factors + 64 + 4 * h))
            for i in range(h * context_bytes(rank), (h + 1) * context_bytes(rank), 64):
                store(left + i, fma(load(f32x16, right + i), new, load(f32x16, left + i) * old))

    return join_contexts


@kernel_method(FloatFormat, "write_contexts")
def _write_contexts(fmt, contexts, factors, rank, n_heads, out, out_head):
    def write_contexts(fmt, contexts, factors, rank, n_heads, out, out_head):
        """Each head's context times its factor -> f32[rank] at `out`, `out_head` bytes from one to the next."""
        for h in range(n_heads):
            context, factor = contexts + h * context_bytes(rank), load(types.float32, factors + 4 * h)
            for i in range(0, rank - 15, 16):
                store(out + h * out_head + 4 * i, load(f32x16, context + 4 * i) * factor)
            for i in range(rank & ~15, rank):
                store(out + h * out_head + 4 * i, load(types.float32, context + 4 * i) * factor)

    return write_contexts


@kernel_method(FloatFormat, "attend_chunk")
def _attend_chunk(fmt, cache, first, n, then, query, partial, rank, rope, scratch):
    size = fmt.block_bytes

    def attend_chunk(fmt, cache, first, n, then, query, partial, rank, rope, scratch):
        columns = _row_columns(rank, rope)
        rows, row_bytes = cache + first * columns * size, columns * size
        scores, factors = scratch + 128, scratch
        for j in range(n):
            row, total = rows + j * row_bytes, tile_zero(f32x16)
            for i in range(0, columns, 16):
                total = tile_add_rows(total, fmt.load(row + i * size), query + 4 * HEADS * i)
            tile_store_sums(scores + 4 * HEADS * j, total)
        filled = n
        while filled * HEADS % 16:
            for h in range(HEADS):
                store(scores + 4 * (HEADS * filled + h), types.float32(-np.inf))
            filled += 1
        _softmax(scores, filled, partial, factors)
        for i in range(0, rank, 16):
            column, total = rows + i * size, tile_zero(f32x16)
            for j in range(n):
                total = tile_add_product(total, fmt.load(column + j * row_bytes), scores, 4 * j)
            tile_accumulate(partial + CONTEXT + 4 * i, context_bytes(rank), total, factors)

    return attend_chunk
