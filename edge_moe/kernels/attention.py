"""Attention of queries to the compressed latent cache, in absorbed form: the latent is both key and value."""

import numpy as np
from numba import prange

from edge_moe.kernels.elementwise import from_bf16
from edge_moe.kernels.jit import inline_kernel, parallel_kernel

_TILE = 16  # cached rows widened to f32 at a time: 16 x 576 values stay in the second-level cache
_FEW_TOKENS = 8  # from here on there are tokens enough to occupy the threads without splitting the positions
_SPLIT = 256  # positions per task when few tokens are attended: fixed, so that thread count changes no sum


@inline_kernel
def _attend(query, cache, begin, end, scale, running_max, running_sum, context, tile, scores):
    """Online softmax of one token's heads over cache[begin:end]. query f32[H,L], context f32[H,R] (not yet divided)."""
    n_heads, latent_dim = query.shape
    rank = context.shape[1]
    running_max[:] = -np.inf
    running_sum[:] = 0
    context[:] = 0
    tile[:] = 0
    for first in range(begin, end, _TILE):
        n = min(_TILE, end - first)
        for j in range(n):
            for i in range(latent_dim):
                tile[j, i] = from_bf16(cache[first + j, i])
        for h in range(n_heads):
            top = running_max[h]
            for j in range(n):
                score = np.float32(0.0)
                for i in range(latent_dim):
                    score += query[h, i] * tile[j, i]
                scores[j] = score * scale
                top = max(top, scores[j])
            if top > running_max[h]:
                shrink = np.exp(running_max[h] - top)
                running_max[h] = top
                running_sum[h] *= shrink
                for i in range(rank):
                    context[h, i] *= shrink
            for j in range(n):
                scores[j] = np.exp(scores[j] - top)
                running_sum[h] += scores[j]
            for j in range(n, _TILE):  # rows beyond the end weigh nothing
                scores[j] = 0
            for j in range(0, n, 4):  # four rows at once: one load and store of the context for four products
                p0, p1, p2, p3 = scores[j], scores[j + 1], scores[j + 2], scores[j + 3]
                for i in range(rank):
                    context[h, i] += (p0 * tile[j, i] + p1 * tile[j + 1, i]) + (
                        p2 * tile[j + 2, i] + p3 * tile[j + 3, i]
                    )


@inline_kernel
def _merge(maxima, sums, contexts, out):
    """Join the parts of one token, in order: maxima and sums f32[C,H], contexts f32[C,H,R] -> out f32[H,R]."""
    for h in range(out.shape[0]):
        top = maxima[:, h].max()
        total = np.float32(0.0)
        out[h] = 0
        for c in range(maxima.shape[0]):
            weight = np.exp(maxima[c, h] - top)
            total += weight * sums[c, h]
            for i in range(out.shape[1]):
                out[h, i] += weight * contexts[c, h, i]
        for i in range(out.shape[1]):
            out[h, i] /= total


@parallel_kernel
def latent_attention(query, cache, start, rank, scale):
    """Attend T tokens, the first at position `start`, to a latent cache that already holds them.

    query f32[T,H,R+P] (absorbed query beside rope query), cache u16[S,R+P] (bf16 bits; S >= start+T) -> f32[T,H,R].
    Token t sees positions 0 to start+t. Rows of the output are sums of latents weighted by the softmax.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C; online softmax, arXiv 1805.02867.
    """
    n_tokens, n_heads, latent_dim = query.shape
    n_parts = 1 if n_tokens >= _FEW_TOKENS else (start + n_tokens + _SPLIT - 1) // _SPLIT
    n_tasks = n_tokens * n_parts
    maxima = np.empty((n_tasks, n_heads), np.float32)
    sums = np.empty((n_tasks, n_heads), np.float32)
    contexts = np.empty((n_tasks, n_heads, rank), np.float32)
    for task in prange(n_tasks):
        t = task // n_parts
        part = task - t * n_parts
        end = start + t + 1
        begin = 0
        if n_parts > 1:
            begin = min(end, part * _SPLIT)
            end = min(end, begin + _SPLIT)
        tile = np.empty((_TILE, latent_dim), np.float32)
        scores = np.empty(_TILE, np.float32)
        _attend(query[t], cache, begin, end, scale, maxima[task], sums[task], contexts[task], tile, scores)
    out = np.empty((n_tokens, n_heads, rank), np.float32)
    for t in prange(n_tokens):
        parts = slice(t * n_parts, (t + 1) * n_parts)
        _merge(maxima[parts], sums[parts], contexts[parts], out[t])
    return out
