"""The latent cache in 8 bits: the methods of its format that attention.py is written in.

16 tokens form a block: codes [rank / 4][16 tokens][4 dims] with a sign; rope keys as pairs of 13 bits with a sign, each
in 16 [rope / 2][16][2]; and for each token a float scale for each 128 dims of the latent and one for its rope key,
[groups + 1][16]. A latent is filled up with zeros to a multiple of 4, a rope key to one of 2. Codes are stored by
`stored_sign`, as the CPU multiplies them. Both as keys and as values they are multiplied as whole numbers, once a load
for all heads of a tile.
"""

import numpy as np
from numba import types
from numba.extending import models, register_model

from edge_moe.kernels.attention_rows import CHUNK_TOKENS, CONTEXT, join_chunk
from edge_moe.kernels.attention_tiles import (
    BY_BYTES,
    HEADS,
    MAX_HIGH,
    MAX_PROBABILITY,
    MAX_QUERY,
    PAIRS,
    QUERY_BYTES,
    dither,
    first_tile,
    pair_add_rope_scores,
    pair_add_scores,
    pair_add_values,
    pair_of,
    query_codes,
    scatter,
    second_tile,
    store_by_quads,
    store_high_probabilities,
    store_probabilities,
    tile_accumulate_quads,
    tile_add_scores,
    tile_add_values,
    tile_make_high,
    tile_numbers,
)
from edge_moe.kernels.blocks import FormatTag
from edge_moe.kernels.dots import SIGN_BIAS
from edge_moe.kernels.fetches import prefetch, prefetch_far
from edge_moe.kernels.functions import codes_of, exp2_below, inverse_of
from edge_moe.kernels.jit import both_sides, inline_kernel, inlined_kernel, kernel_method
from edge_moe.kernels.simd import (
    absolute,
    convert,
    f32x4,
    f32x16,
    fma,
    i8x16,
    i16x16,
    i16x32,
    i32x16,
    larger,
    load,
    reduce_add,
    reduce_max,
    splat,
    store,
)
from edge_moe.kernels.tiles import tile_add_pairs, tile_add_scaled, tile_store, tile_zero

PREFETCH_BYTES = 8192
GROUP = 128  # dims that share a token's scale
BLOCK_TOKENS = 16
MAX_CODE = 127
FLAT_SUM = 16 * 255 // MAX_HIGH  # where a chunk's probabilities are so many times their largest, one byte is enough
MAX_ROPE_KEY = 4095  # a sum of products with queries must stay within 32 bits


class QuadsFormat(FormatTag):
    """Latents as whole numbers; the contexts that they add to are f32 [rank / 4][HEADS][4]."""


class CodeFormat(QuadsFormat):
    """Latents in 8 bits, in blocks of 16 tokens."""


register_model(CodeFormat)(models.OpaqueModel)
INT8 = CodeFormat("INT8", 1)


@inline_kernel
def _quads(rank):
    return (rank + 3) // 4


@inline_kernel
def _groups(rank):
    return (rank + GROUP - 1) // GROUP


@inline_kernel
def rope_pairs(rope):
    return (rope + 1) // 2


@inline_kernel
def _scales(rank, rope):
    """Where in a block the scales are."""
    return 64 * (_quads(rank) + rope_pairs(rope))


@inline_kernel
def _block_bytes(rank, rope):
    return _scales(rank, rope) + 64 * (_groups(rank) + 1)


def block_bytes(rank: int, rope: int) -> int:
    """Bytes of 16 tokens: codes, rope keys and scales."""
    return 64 * (-(-rank // 4) + -(-rope // 2) + -(-rank // GROUP) + 1)


def layer_bytes(n_tokens: int, rank: int, rope: int) -> int:
    """Bytes of one layer's blocks."""
    return -(-n_tokens // BLOCK_TOKENS) * block_bytes(rank, rope)


def decode_blocks(blocks: np.ndarray, rank: int, rope: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks u8[n,block_bytes] as floats: latents f32[16 n,rank], rope keys f32[16 n,rope]."""
    quads, pairs = -(-rank // 4), -(-rope // 2)
    codes, keys, scales = np.split(blocks, [64 * quads, 64 * (quads + pairs)], axis=1)
    # a code with a bias wraps to its sign
    codes = (codes - np.uint8(SIGN_BIAS)).view(np.int8).reshape(-1, quads, BLOCK_TOKENS, 4).transpose(0, 2, 1, 3)
    blocks_steps = np.ascontiguousarray(scales).view(np.float32).reshape(len(blocks), -1, BLOCK_TOKENS)
    steps = blocks_steps.transpose(0, 2, 1).reshape(len(codes) * BLOCK_TOKENS, -1)
    latents = codes.reshape(-1, 4 * quads)[:, :rank] * np.repeat(steps[:, :-1], GROUP, 1)[:, :rank]
    return latents, decode_rope_keys(keys, steps[:, -1:], rope)


def decode_rope_keys(keys: np.ndarray, steps: np.ndarray, rope: int) -> np.ndarray:
    """Rope keys of blocks u8[n,64 pairs], with the tokens' steps f32[16 n,1] -> f32[16 n,rope]."""
    codes = np.ascontiguousarray(keys).view(np.int16).reshape(len(keys), -1, BLOCK_TOKENS, 2).transpose(0, 2, 1, 3)
    return codes.reshape(len(keys) * BLOCK_TOKENS, -1)[:, :rope] * steps


@inline_kernel
def largest_of(values, n):
    """The largest magnitude of n floats at an address; not a number if one is infinite or none, so that it shows."""
    zero = types.float32(0.0)
    tops = wrong = splat(f32x16, zero)
    for i in range(0, n - 15, 16):
        value = load(f32x16, values + 4 * i)
        tops, wrong = larger(absolute(value), tops), wrong + value * zero
    top = reduce_max(tops)
    for i in range(n & ~15, n):
        value = load(types.float32, values + 4 * i)
        top = max(top, abs(value))
        wrong = wrong + splat(f32x16, value) * zero
    return top + reduce_add(wrong)


@inline_kernel
def code_of(value, inverse):
    return types.int32(np.rint(value * inverse))


@inline_kernel
def _store_pairs(pairs, stride, values, n, inverse):
    """n floats at an address as codes of 16 bits, `stride` bytes from one pair of them to the next."""
    for i in range(0, n - 15, 16):
        scatter(pairs + stride * (i // 2), stride, convert(i16x16, codes_of(values + 4 * i, inverse)))
    for i in range(n & ~15, 2 * rope_pairs(n)):
        code = code_of(load(types.float32, values + 4 * i), inverse) if i < n else types.int32(0)
        store(pairs + stride * (i // 2) + 2 * (i % 2), types.int16(code))


@inline_kernel
def store_rope_key(keys, scale, k_pe, rope):
    """A token's rope key as pairs of codes, 64 bytes from one pair to the next, and its scale."""
    step = largest_of(k_pe, rope) * types.float32(1 / MAX_ROPE_KEY)
    store(scale, step)
    _store_pairs(keys, 64, k_pe, rope, inverse_of(step))


@kernel_method(CodeFormat, "store_latent")
def _store_latent(fmt, cache, position, c_kv, k_pe, rank, rope):
    def store_latent(fmt, cache, position, c_kv, k_pe, rank, rope):
        block = cache + position // BLOCK_TOKENS * _block_bytes(rank, rope) + 4 * (position % BLOCK_TOKENS)
        for g in range(_groups(rank)):
            first, end = g * GROUP, min(rank, (g + 1) * GROUP)
            scale = largest_of(c_kv + 4 * first, end - first) * types.float32(1 / MAX_CODE)
            inverse = inverse_of(scale)
            store(block + _scales(rank, rope) + 64 * g, scale)
            for i in range(first, end - 15, 16):
                codes = codes_of(c_kv + 4 * i, inverse) + types.int32(SIGN_BIAS)
                scatter(block + 16 * i, 64, convert(i8x16, codes))
            for i in range(end & ~15, (end + 3) & ~3):
                code = code_of(load(types.float32, c_kv + 4 * i), inverse) if i < end else types.int32(0)
                store(block + 64 * (i // 4) + i % 4, types.uint8(code + SIGN_BIAS))
        store_rope_key(block + 64 * _quads(rank), block + _scales(rank, rope) + 64 * _groups(rank), k_pe, rope)

    return store_latent


# ---- a tile's queries: codes, what the sums of each group begin with, scales, rope queries; interleaved by 4 bytes


@inline_kernel
def _query_places(rank):
    """Offsets of the first sums, the scales and the rope queries in a head's record."""
    sums = QUERY_BYTES * _quads(rank)
    return sums, sums + 4 * _groups(rank), sums + 8 * _groups(rank)


@inline_kernel
def _store_code(tile, h, i, code):
    """The query code of dim i of a head, as `tile_add_scores` reads it."""
    if BY_BYTES:
        store(tile + 4 * (HEADS * (i // 4) + h) + i % 4, types.int8(code))
    else:  # pairs of the even and of the odd dims
        store(tile + 4 * (HEADS * (2 * (i // 4) + i % 2) + h) + 2 * (i % 4 // 2), types.int16(code))


@inline_kernel
def store_query_codes(tile, h, q, first, end, inverse):
    """Dims first to end of a head's query as codes, `first` a multiple of 16. Returns the sum of the codes."""
    totals = splat(i32x16, types.int32(0))
    for i in range(first, end - 15, 16):
        codes = codes_of(q + 4 * i, inverse)
        totals = totals + codes
        scatter(tile + HEADS * QUERY_BYTES * (i // 4) + 4 * h, 4 * HEADS, query_codes(codes))
    total = reduce_add(totals)
    for i in range(end & ~15, end):
        code = code_of(load(types.float32, q + 4 * i), inverse)
        total += code
        _store_code(tile, h, i, code)
    return total


@both_sides
def most_rope_query(rope):
    """The largest code of a rope query: as large as keeps the sums of products with keys within 32 bits."""
    return min(32767, 2147483647 // (MAX_ROPE_KEY * max(rope, 1)))


@inline_kernel
def rope_query_bytes(rope):
    """Bytes of a head's rope query: pairs of codes, and its scale."""
    return 4 * rope_pairs(rope) + 4


@inline_kernel
def store_rope_query(place, q_pe, rope, scale):
    """A head's rope query, interleaved with those of the other heads; the softmax's scale is in its scale."""
    step = largest_of(q_pe, rope) / types.float32(most_rope_query(rope))
    _store_pairs(place, 4 * HEADS, q_pe, rope, inverse_of(step))
    store(place + 4 * HEADS * rope_pairs(rope), step * scale)


@kernel_method(CodeFormat, "query_tile")
def _query_tile(fmt, tile, q_latent, latent_stride, q_pe, pe_stride, n_heads, rank, rope, scale):
    def query_tile(fmt, tile, q_latent, latent_stride, q_pe, pe_stride, n_heads, rank, rope, scale):
        sums, scales, keys = _query_places(rank)
        if n_heads < HEADS or rank % 4 or rope % 2:  # what is not written below
            for i in range(0, HEADS * (keys + rope_query_bytes(rope)), 4):
                store(tile + i, types.int32(0))
        for h in range(n_heads):
            q = q_latent + h * latent_stride
            for g in range(_groups(rank)):
                first, end = g * GROUP, min(rank, (g + 1) * GROUP)
                step = largest_of(q + 4 * first, end - first) * types.float32(1 / MAX_QUERY)
                inverse = inverse_of(step)
                total = store_query_codes(tile, h, q, first, end, inverse)
                store(tile + HEADS * (sums + 4 * g) + 4 * h, types.int32(-SIGN_BIAS * total))
                store(tile + HEADS * (scales + 4 * g) + 4 * h, step * scale)
            store_rope_query(tile + HEADS * keys + 4 * h, q_pe + h * pe_stride, rope, scale)

    return query_tile


# ---- one chunk


@inlined_kernel
def add_rope_scores(total, keys, scales, query, rope_queries, rope):
    """total f32 tile + products of 16 tokens' rope keys at an address, times their scales, with the heads' queries."""
    sums = tile_zero(i32x16)
    for i in range(rope_pairs(rope)):
        sums = tile_add_pairs(sums, load(i16x32, keys + 64 * i), query, rope_queries + 4 * i)
    return tile_add_scaled(total, sums, load(f32x16, scales), query, rope_queries + 4 * rope_pairs(rope))


@inlined_kernel
def _score_products(sums, first, second, query, offset, quads):
    """Products of some quads of dims of one block of tokens, or of two, with a tile's queries."""
    for i in range(quads):
        prefetch(first + 64 * i + PREFETCH_BYTES)
        if PAIRS:
            prefetch(second + 64 * i + PREFETCH_BYTES)
            sums = pair_add_scores(sums, first + 64 * i, second + 64 * i, query, offset + QUERY_BYTES * i)
        else:
            sums = tile_add_scores(sums, first + 64 * i, query, offset + QUERY_BYTES * i)
    return sums


@inline_kernel
def _scores(block, n_blocks, query, rank, rope, out):
    """Scores of all tokens of some blocks, f32 [blocks][HEADS][16]; of PAIRS, up to an even number of blocks."""
    first_sums, query_scales, rope_queries = _query_places(rank)
    block_bytes, places = _block_bytes(rank, rope), _scales(rank, rope)
    for b in range(0, n_blocks, 2 if PAIRS else 1):
        first = block + b * block_bytes
        second = first + block_bytes if b + 1 < n_blocks else first
        total, other = tile_zero(f32x16), tile_zero(f32x16)
        for g in range(_groups(rank)):
            start, quads = GROUP // 4 * g, min(GROUP // 4, _quads(rank) - GROUP // 4 * g)
            numbers = tile_numbers(query, first_sums + 4 * g)
            sums = pair_of(numbers) if PAIRS else numbers
            a, c = first + 64 * start, second + 64 * start
            sums = _score_products(sums, a, c, query, QUERY_BYTES * start, quads)
            scale = load(f32x16, first + places + 64 * g)
            total = tile_add_scaled(total, first_tile(sums), scale, query, query_scales + 4 * g)
            if PAIRS:
                scale = load(f32x16, second + places + 64 * g)
                other = tile_add_scaled(other, second_tile(sums), scale, query, query_scales + 4 * g)
        keys, scales = 64 * _quads(rank), places + 64 * _groups(rank)
        if PAIRS:
            sums = pair_of(tile_zero(i32x16))
            for i in range(rope_pairs(rope)):
                a, c = first + keys + 64 * i, second + keys + 64 * i
                sums = pair_add_rope_scores(sums, a, c, query, rope_queries + 4 * i)
            rope_scales = rope_queries + 4 * rope_pairs(rope)
            total = tile_add_scaled(total, first_tile(sums), load(f32x16, first + scales), query, rope_scales)
            other = tile_add_scaled(other, second_tile(sums), load(f32x16, second + scales), query, rope_scales)
            tile_store(out + 64 * HEADS * (b + 1), other)
        else:
            total = add_rope_scores(total, first + keys, first + scales, query, rope_queries, rope)
        tile_store(out + 64 * HEADS * b, total)


@inline_kernel
def hide_behind(scores, n, n_blocks):
    """Tokens from n on get no attention."""
    for h in range(HEADS):
        for j in range(n, BLOCK_TOKENS * n_blocks):
            place = scores + 64 * (HEADS * (n_blocks - 1) + h) + 4 * (j % BLOCK_TOKENS)
            store(place, types.float32(-np.inf))


@inline_kernel
def _weigh(place, top):
    """A score's weight 2**(score - top), of 16 at an address, where it also takes their place."""
    weight = exp2_below(load(f32x16, place) - top)
    store(place, weight)
    return weight


@inline_kernel
def softmax_of_blocks(scores, n_blocks, partial, factors, largest, sums):
    """scores -> 2**(score - largest), in place."""
    store(largest, splat(f32x16, types.float32(0.0)))
    store(sums, splat(f32x16, types.float32(0.0)))
    for h in range(0, HEADS, 4):  # four at a time, as each by itself would wait for its own results
        first, end = scores + 64 * h, scores + 64 * h + 64 * HEADS * n_blocks
        a = b = c = d = splat(f32x16, types.float32(-np.inf))
        for row in range(first, end, 64 * HEADS):
            a, b = larger(load(f32x16, row), a), larger(load(f32x16, row + 64), b)
            c, d = larger(load(f32x16, row + 128), c), larger(load(f32x16, row + 192), d)
        top_a, top_b, top_c, top_d = reduce_max(a), reduce_max(b), reduce_max(c), reduce_max(d)
        a = b = c = d = splat(f32x16, types.float32(0.0))
        for row in range(first, end, 64 * HEADS):
            a, b = a + _weigh(row, top_a), b + _weigh(row + 64, top_b)
            c, d = c + _weigh(row + 128, top_c), d + _weigh(row + 192, top_d)
        for i, top, total in ((0, top_a, a), (4, top_b, b), (8, top_c, c), (12, top_d, d)):
            store(largest + 4 * h + i, top)
            store(sums + 4 * h + i, reduce_add(total))
    join_chunk(partial, load(f32x16, largest), load(f32x16, sums), factors)


@inline_kernel
def clear_behind(vector, n):
    """Set the lanes from n on of 16 floats in memory to zero."""
    for j in range(n, BLOCK_TOKENS):
        store(vector + 4 * j, types.float32(0.0))


@inline_kernel
def _one_byte_is_enough(sums):
    """Whether a chunk's probabilities may be rounded to one byte; f32 [heads], their sums, the largest being 1.

    The errors of 256 tokens are then together about a 40th of the largest probability, and less than a 600th of the
    sum: less than the codes' own rounding costs.
    """
    is_enough = BY_BYTES
    for h in range(HEADS):
        is_enough = is_enough and load(types.float32, sums + 4 * h) >= types.float32(FLAT_SUM)
    return is_enough


@inline_kernel
def weigh_blocks(scores, n_blocks, weights, steps, in_one_byte):
    """Probabilities times a group's scales, f32 [blocks][16], as whole numbers. Returns what one of them is worth."""
    even = odd = splat(f32x16, types.float32(0.0))
    for b in range(0, n_blocks - 1, 2):
        even, odd = larger(load(f32x16, steps + 64 * b), even), larger(load(f32x16, steps + 64 * b + 64), odd)
    top = reduce_max(larger(larger(load(f32x16, steps + 64 * (n_blocks - 1)), even), odd))
    most = types.float32(MAX_HIGH if in_one_byte else MAX_PROBABILITY)
    factor = most / top if top > types.float32(0.0) else types.float32(0.0)
    half = splat(f32x16, types.float32(0.5))
    for b in range(n_blocks):
        step = load(f32x16, steps + 64 * b) * factor
        if in_one_byte:
            for h in range(HEADS):
                weight = fma(load(f32x16, scores + 64 * (HEADS * b + h)), step, dither())
                store_high_probabilities(weights + 64 * (2 * HEADS * b + h), convert(i32x16, weight))
        else:
            for h in range(HEADS):
                weight = fma(load(f32x16, scores + 64 * (HEADS * b + h)), step, half)
                store_probabilities(weights + 64 * (2 * HEADS * b + h), convert(i32x16, weight))
    return top / most


@inline_kernel
def _add_products(total, codes, block_bytes, n_blocks, weights, part):
    """Codes of some blocks times a part of the weights."""
    for b in range(n_blocks):
        place = codes + b * block_bytes
        if PAIRS:
            total = pair_add_values(total, place, weights + 128 * HEADS * b, part)
        else:
            total = tile_add_values(total, place, weights + 128 * HEADS * b, part)
    return total


@inline_kernel
def add_values(codes, block_bytes, n_blocks, weights, in_one_byte, ahead, context, by_quads):
    """Add to the contexts of 4 dims, or of PAIRS of 8, their codes times the weights.

    What lies `ahead` bytes further is asked for: the scores of the next chunk would wait for it.
    """
    total = pair_of(tile_zero(i32x16)) if PAIRS else tile_zero(i32x16)
    for b in range(n_blocks):
        place = codes + b * block_bytes
        prefetch_far(place + ahead)
        if PAIRS:
            prefetch_far(place + ahead + 64)
            total = pair_add_values(total, place, weights + 128 * HEADS * b, 0)
        else:
            total = tile_add_values(total, place, weights + 128 * HEADS * b, 0)
    if BY_BYTES and not in_one_byte:
        total = _add_products(tile_make_high(total), codes, block_bytes, n_blocks, weights, 1)
    tile_accumulate_quads(context, first_tile(total), by_quads)
    if PAIRS:
        tile_accumulate_quads(context + 16 * HEADS, second_tile(total), by_quads)


@kernel_method(QuadsFormat, "join_contexts")
def _join_contexts(fmt, left, right, factors, rank, scratch):
    def join_contexts(fmt, left, right, factors, rank, scratch):
        """left = left times the first factors + right times the second: f32 [rank / 4][HEADS][4]; [2][16 heads]."""
        store_by_quads(scratch, load(f32x16, factors))
        store_by_quads(scratch + 16 * HEADS, load(f32x16, factors + 64))
        for place in range(0, 16 * HEADS, 64):
            old, new = load(f32x16, scratch + place), load(f32x16, scratch + 16 * HEADS + place)
            for i in range(place, 16 * HEADS * _quads(rank), 16 * HEADS):
                store(left + i, fma(load(f32x16, right + i), new, load(f32x16, left + i) * old))

    return join_contexts


@kernel_method(QuadsFormat, "write_contexts")
def _write_contexts(fmt, contexts, factors, rank, n_heads, out, out_head):
    def write_contexts(fmt, contexts, factors, rank, n_heads, out, out_head):
        """Each head's context times its factor -> f32[rank] at `out`, `out_head` bytes from one to the next."""
        for h in range(n_heads):
            factor, context = load(types.float32, factors + 4 * h), contexts + 16 * h
            for i in range(0, rank & ~3, 4):
                store(out + h * out_head + 4 * i, load(f32x4, context + 4 * HEADS * i) * factor)
            for i in range(rank & ~3, rank):
                value = load(types.float32, context + 4 * HEADS * (i & ~3) + 4 * (i % 4))
                store(out + h * out_head + 4 * i, value * factor)

    return write_contexts


@kernel_method(CodeFormat, "attend_chunk")
def _attend_chunk(fmt, cache, first, n, then, query, partial, rank, rope, scratch):
    n_chunk_blocks = CHUNK_TOKENS // BLOCK_TOKENS

    def attend_chunk(fmt, cache, first, n, then, query, partial, rank, rope, scratch):
        block_bytes = _block_bytes(rank, rope)
        block, n_blocks = cache + first // BLOCK_TOKENS * block_bytes, (n + BLOCK_TOKENS - 1) // BLOCK_TOKENS
        factors, largest, sums = scratch, scratch + 128, scratch + 192
        by_quads, steps = scratch + 256, scratch + 512
        scores = steps + 64 * n_chunk_blocks
        weights = scores + 64 * HEADS * n_chunk_blocks
        _scores(block, n_blocks, query, rank, rope, scores)
        hide_behind(scores, n, n_blocks)
        softmax_of_blocks(scores, n_blocks, partial, factors, largest, sums)
        new = load(f32x16, factors + 64)
        in_one_byte = _one_byte_is_enough(sums)
        store_by_quads(by_quads, load(f32x16, factors))
        ahead = (then - first) // BLOCK_TOKENS * block_bytes
        for g in range(_groups(rank)):
            scales = block + _scales(rank, rope) + 64 * g
            for b in range(n_blocks):
                store(steps + 64 * b, load(f32x16, scales + b * block_bytes))
                clear_behind(steps + 64 * b, n - BLOCK_TOKENS * b)  # tokens that are not seen may not matter
            worth = weigh_blocks(scores, n_blocks, weights, steps, in_one_byte)
            store_by_quads(by_quads + 16 * HEADS, new * worth)
            # of an odd number of quads the last has a neighbour that is none, and whose sums nobody reads
            for k in range(GROUP // 4 * g, min(GROUP // 4 * (g + 1), _quads(rank)), 2 if PAIRS else 1):
                place, context = block + 64 * k, partial + CONTEXT + 16 * HEADS * k
                add_values(place, block_bytes, n_blocks, weights, in_one_byte, ahead, context, by_quads)

    return attend_chunk
