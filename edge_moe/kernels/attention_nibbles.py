"""The latent cache in 4 bits: the methods of its format that attention.py is written in.

16 tokens form a block: codes [rank / 8][16 tokens][4 bytes], the low half of a byte for the first 4 dims of 8 and the
high half for the others; rope keys as in 8 bits; for each token what a step and a middle are in and the rope key's
scale, f32 [3][16]; and for each 32 dims of the latent a step u8 [groups][16] and a middle i8 [groups][16]. A dim is
middle + step * (code - 8). Codes are unpacked to bytes where they are multiplied, then all goes as in
attention_codes.py; what the middles add to scores and values is one number for each group. A latent is filled up to a
multiple of 8.
"""

import numpy as np
from numba import types
from numba.extending import models, register_model

from edge_moe.kernels.attention_codes import (
    BLOCK_TOKENS,
    QuadsFormat,
    add_rope_scores,
    add_values,
    clear_behind,
    decode_rope_keys,
    hide_behind,
    largest_of,
    rope_pairs,
    rope_query_bytes,
    softmax_of_blocks,
    store_query_codes,
    store_rope_key,
    store_rope_query,
    weigh_blocks,
)
from edge_moe.kernels.attention_rows import CHUNK_TOKENS, CONTEXT
from edge_moe.kernels.attention_tiles import (
    HEADS,
    MAX_QUERY,
    PAIRS,
    QUERY_BYTES,
    store_by_quads,
    tile_add_scores,
    tile_numbers,
)
from edge_moe.kernels.dots import SIGN_BIAS
from edge_moe.kernels.functions import inverse_of
from edge_moe.kernels.jit import inline_kernel, kernel_method
from edge_moe.kernels.simd import Vector, convert, f32x16, fma, i8x16, load, reduce_add, splat, store
from edge_moe.kernels.tiles import tile_add_product, tile_add_scaled, tile_store, tile_zero

GROUP = 32  # dims that share a token's step and middle
MAX_CODE, MAX_STEP, MAX_MIDDLE = 15, 255, 127
_ZERO_CODE = 8
# Unpacked codes, middles, sums, and these by quads; beside those of 8 bits.
SCRATCH_BYTES = CHUNK_TOKENS // BLOCK_TOKENS * (128 + 64) + 64 + 16 * HEADS

u8x16, u8x64 = Vector(types.uint8, 16), Vector(types.uint8, 64)


class NibbleFormat(QuadsFormat):
    """Latents in 4 bits, in blocks of 16 tokens."""


register_model(NibbleFormat)(models.OpaqueModel)
INT4 = NibbleFormat("INT4", 1)


@inline_kernel
def _octets(rank):
    return (rank + 7) // 8


@inline_kernel
def _groups(rank):
    return (rank + GROUP - 1) // GROUP


@inline_kernel
def _scales(rank, rope):
    """Where in a block the tokens' scales are; steps and middles of the groups come behind them."""
    return 64 * (_octets(rank) + rope_pairs(rope))


@inline_kernel
def _block_bytes(rank, rope):
    return _scales(rank, rope) + 192 + (32 * _groups(rank) + 63) // 64 * 64


def block_bytes(rank: int, rope: int) -> int:
    """Bytes of 16 tokens: codes, rope keys, scales, steps and middles."""
    return 64 * (-(-rank // 8) + -(-rope // 2) + 3 + -(-rank // GROUP // 2))


def layer_bytes(n_tokens: int, rank: int, rope: int) -> int:
    """Bytes of one layer's blocks."""
    return -(-n_tokens // BLOCK_TOKENS) * block_bytes(rank, rope)


def decode_blocks(blocks: np.ndarray, rank: int, rope: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks u8[n,block_bytes] as floats: latents f32[16 n,rank], rope keys f32[16 n,rope]."""
    octets, pairs, groups = -(-rank // 8), -(-rope // 2), -(-rank // GROUP)
    ends = np.cumsum([64 * octets, 64 * pairs, 192, 16 * groups, 16 * groups])
    codes, keys, scales, steps, middles, _ = np.split(blocks, ends, axis=1)
    halves = codes.reshape(-1, octets, BLOCK_TOKENS, 1, 4) >> np.array([[0], [4]], np.uint8) & np.uint8(15)
    signed = halves.transpose(0, 2, 1, 3, 4).reshape(-1, 8 * octets)[:, :rank].astype(np.float32) - _ZERO_CODE
    units = np.ascontiguousarray(scales).view(np.float32).reshape(-1, 3, 1, BLOCK_TOKENS)

    def of_dims(codes: np.ndarray, unit: int) -> np.ndarray:
        values = codes.reshape(-1, groups, BLOCK_TOKENS) * units[:, unit]
        return np.repeat(values.transpose(0, 2, 1).reshape(-1, groups), GROUP, 1)[:, :rank]

    latents = of_dims(middles.view(np.int8), 1) + of_dims(steps, 0) * signed
    return latents, decode_rope_keys(keys, units[:, 2].reshape(-1, 1), rope)


@inline_kernel
def _range(values, first, end):
    """Least and largest of the floats first to end."""
    low = high = load(types.float32, values + 4 * first)
    for i in range(first + 1, end):
        value = load(types.float32, values + 4 * i)
        low, high = min(low, value), max(high, value)
    return low, high


@inline_kernel
def _middle_of(low, step):
    return low + types.float32(_ZERO_CODE) * step


@kernel_method(NibbleFormat, "store_latent")
def _store_latent(fmt, cache, position, c_kv, k_pe, rank, rope):
    def store_latent(fmt, cache, position, c_kv, k_pe, rank, rope):
        token = position % BLOCK_TOKENS
        block = cache + position // BLOCK_TOKENS * _block_bytes(rank, rope)
        scales = block + _scales(rank, rope)
        steps, middles = scales + 192 + token, scales + 192 + 16 * _groups(rank) + token
        most_step = most_middle = types.float32(0.0)
        for g in range(_groups(rank)):
            low, high = _range(c_kv, g * GROUP, min(rank, (g + 1) * GROUP))
            step = (high - low) * types.float32(1 / MAX_CODE)
            most_step, most_middle = max(most_step, step), max(most_middle, abs(_middle_of(low, step)))
        wrong = largest_of(c_kv, rank) * types.float32(0.0)  # not a number if one is infinite or none
        step_scale = most_step * types.float32(1 / MAX_STEP) + wrong
        middle_scale = most_middle * types.float32(1 / MAX_MIDDLE) + wrong
        store(scales + 4 * token, step_scale)
        store(scales + 64 + 4 * token, middle_scale)
        for g in range(_groups(rank)):
            first, end = g * GROUP, min(rank, (g + 1) * GROUP)
            low, high = _range(c_kv, first, end)
            step = (high - low) * types.float32(1 / MAX_CODE)
            # upwards, so that the ends are not cut off
            step_code = min(np.ceil(step * inverse_of(step_scale)), types.float32(MAX_STEP))
            middle_code = np.rint(_middle_of(low, step) * inverse_of(middle_scale))
            store(steps + 16 * g, types.uint8(types.int32(step_code)))
            store(middles + 16 * g, types.int8(types.int32(middle_code)))
            inverse, middle = inverse_of(step_code * step_scale), middle_code * middle_scale
            for i in range(first, (end + 7) & ~7, 8):
                word = types.uint32(0)
                for k in range(8):
                    code = types.int32(0)
                    if i + k < end:
                        nearest = np.rint((load(types.float32, c_kv + 4 * (i + k)) - middle) * inverse)
                        code = min(max(types.int32(nearest) + _ZERO_CODE, 0), MAX_CODE)
                    word |= types.uint32(code) << types.uint32(8 * (k % 4) + 4 * (k // 4))
                store(block + 64 * (i // 8) + 4 * token, types.uint32(word))
        store_rope_key(block + 64 * _octets(rank) + 4 * token, scales + 128 + 4 * token, k_pe, rope)

    return store_latent


# ---- a tile's queries: codes, what the sums of each group begin with, scales, sums as floats, rope queries


@inline_kernel
def _query_places(rank):
    """Offsets of the first sums, the scales, the sums and the rope queries in a head's record."""
    first_sums, n_bytes = 2 * QUERY_BYTES * _octets(rank), 4 * _groups(rank)
    return first_sums, first_sums + n_bytes, first_sums + 2 * n_bytes, first_sums + 3 * n_bytes


@kernel_method(NibbleFormat, "query_tile")
def _query_tile(fmt, tile, q_latent, latent_stride, q_pe, pe_stride, n_heads, rank, rope, scale):
    def query_tile(fmt, tile, q_latent, latent_stride, q_pe, pe_stride, n_heads, rank, rope, scale):
        first_sums, scales, sums, keys = _query_places(rank)
        if n_heads < HEADS or rank % 8 or rope % 2:  # what is not written below
            for i in range(0, HEADS * (keys + rope_query_bytes(rope)), 4):
                store(tile + i, types.int32(0))
        for h in range(n_heads):
            q = q_latent + h * latent_stride
            for g in range(_groups(rank)):
                first, end = g * GROUP, min(rank, (g + 1) * GROUP)
                step = largest_of(q + 4 * first, end - first) * types.float32(1 / MAX_QUERY)
                total = store_query_codes(tile, h, q, first, end, inverse_of(step))
                store(tile + HEADS * (first_sums + 4 * g) + 4 * h, types.int32(-SIGN_BIAS * total))
                store(tile + HEADS * (scales + 4 * g) + 4 * h, step * scale)
                store(tile + HEADS * (sums + 4 * g) + 4 * h, types.float32(total) * step * scale)
            store_rope_query(tile + HEADS * keys + 4 * h, q_pe + h * pe_stride, rope, scale)

    return query_tile


# ---- one chunk


@inline_kernel
def _unpack(codes, pair):
    """16 tokens' codes of 8 dims as bytes [2][16][4] around zero, stored by `stored_sign` as those of 8 bits."""
    w = load(u8x64, codes)
    bias = types.uint8((SIGN_BIAS - _ZERO_CODE) & 255)
    store(pair, (w & types.uint8(15)) + bias)
    store(pair + 64, (w >> types.uint8(4)) + bias)


@inline_kernel
def _steps_of(scales, g):
    """A group's steps of 16 tokens f32x16."""
    return convert(f32x16, load(u8x16, scales + 192 + 16 * g)) * load(f32x16, scales)


@inline_kernel
def _middles_of(scales, rank, g):
    return convert(f32x16, load(i8x16, scales + 192 + 16 * (_groups(rank) + g))) * load(f32x16, scales + 64)


@inline_kernel
def _scores(block, n_blocks, query, rank, rope, out, pair):
    """Scores of all tokens of some blocks, f32 [blocks][HEADS][16]."""
    first_sums, query_scales, query_sums, rope_queries = _query_places(rank)
    for b in range(n_blocks):
        total, codes, offset, scales = tile_zero(f32x16), block, 0, block + _scales(rank, rope)
        for g in range(_groups(rank)):
            sums = tile_numbers(query, first_sums + 4 * g)
            for _ in range(min(GROUP // 8, _octets(rank) - GROUP // 8 * g)):
                _unpack(codes, pair)
                sums = tile_add_scores(sums, pair, query, offset)
                sums = tile_add_scores(sums, pair + 64, query, offset + QUERY_BYTES)
                codes += 64
                offset += 2 * QUERY_BYTES
            total = tile_add_scaled(total, sums, _steps_of(scales, g), query, query_scales + 4 * g)
            total = tile_add_product(total, _middles_of(scales, rank, g), query, query_sums + 4 * g)
        total = add_rope_scores(total, codes, scales + 128, query, rope_queries, rope)
        tile_store(out + 64 * HEADS * b, total)
        block += _block_bytes(rank, rope)


@inline_kernel
def _add_middles(scores, n_blocks, middles, context, rank, first, new, sums):
    """Add to a group's dims of the contexts what the tokens' middles make, weighted and times `new` f32x16."""
    for h in range(HEADS):
        total = splat(f32x16, types.float32(0.0))
        for b in range(n_blocks):
            total = fma(load(f32x16, scores + 64 * (HEADS * b + h)), load(f32x16, middles + 64 * b), total)
        store(sums + 4 * h, reduce_add(total))
    store_by_quads(sums + 64, load(f32x16, sums) * new)
    for i in range(first // 4, (min(first + GROUP, rank) + 3) // 4):
        for part in range(0, 16 * HEADS, 64):
            place = context + 16 * HEADS * i + part
            store(place, load(f32x16, place) + load(f32x16, sums + 64 + part))


@kernel_method(NibbleFormat, "attend_chunk")
def _attend_chunk(fmt, cache, first, n, then, query, partial, rank, rope, scratch):
    n_chunk_blocks = CHUNK_TOKENS // BLOCK_TOKENS

    def attend_chunk(fmt, cache, first, n, then, query, partial, rank, rope, scratch):
        block_bytes = _block_bytes(rank, rope)
        block, n_blocks = cache + first // BLOCK_TOKENS * block_bytes, (n + BLOCK_TOKENS - 1) // BLOCK_TOKENS
        factors, largest, sums = scratch, scratch + 128, scratch + 192
        by_quads, steps = scratch + 256, scratch + 512
        scores = steps + 64 * n_chunk_blocks
        weights = scores + 64 * HEADS * n_chunk_blocks
        pairs = weights + 128 * HEADS * n_chunk_blocks
        middles = pairs + 128 * n_chunk_blocks
        sums_of_middles = middles + 64 * n_chunk_blocks
        _scores(block, n_blocks, query, rank, rope, scores, pairs)
        hide_behind(scores, n, n_blocks)
        softmax_of_blocks(scores, n_blocks, partial, factors, largest, sums)
        new = load(f32x16, factors + 64)
        store_by_quads(by_quads, load(f32x16, factors))
        for g in range(_groups(rank)):
            for b in range(n_blocks):
                scales = block + b * block_bytes + _scales(rank, rope)
                store(steps + 64 * b, _steps_of(scales, g))
                store(middles + 64 * b, _middles_of(scales, rank, g))
                clear_behind(steps + 64 * b, n - BLOCK_TOKENS * b)  # tokens that are not seen may not matter
                clear_behind(middles + 64 * b, n - BLOCK_TOKENS * b)
            worth = weigh_blocks(scores, n_blocks, weights, steps, False)
            store_by_quads(by_quads + 16 * HEADS, new * worth)
            for octet in range(GROUP // 8 * g, min(GROUP // 8 * (g + 1), _octets(rank))):
                for b in range(n_blocks):
                    _unpack(block + b * block_bytes + 64 * octet, pairs + 128 * b)
                for half in range(0, 2, 2 if PAIRS else 1):
                    context = partial + CONTEXT + 16 * HEADS * (2 * octet + half)
                    add_values(pairs + 64 * half, 128, n_blocks, weights, False, 0, context, by_quads)
            _add_middles(scores, n_blocks, middles, partial + CONTEXT, rank, GROUP * g, new, sums_of_middles)

    return attend_chunk
