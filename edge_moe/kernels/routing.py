"""Kernels of the router: which experts a token goes to, with what weight, and tokens sorted by expert."""

import numpy as np

from edge_moe.kernels.jit import inline_kernel, kernel


@inline_kernel
def _probabilities(logits, sigmoid, out):
    if sigmoid:
        for e in range(logits.shape[0]):
            out[e] = np.float32(1.0) / (np.float32(1.0) + np.exp(-logits[e]))
        return
    top = logits.max()
    total = np.float32(0.0)
    for e in range(logits.shape[0]):
        out[e] = np.exp(logits[e] - top)
        total += out[e]
    for e in range(logits.shape[0]):
        out[e] /= total


@inline_kernel
def _argmax(values):
    """Index of the largest value, the first of equals; a NaN never wins over a number."""
    best, best_value = 0, np.float32(-np.inf)
    for i in range(values.shape[0]):
        if values[i] > best_value:
            best, best_value = i, values[i]
    return best


@inline_kernel
def _mask_groups(selection, n_group, topk_group, group_score_experts):
    """Leave only the experts of the best groups; the others become -inf."""
    group_size = selection.shape[0] // n_group
    scores = np.empty(n_group, np.float32)
    for g in range(n_group):
        members = selection[g * group_size : (g + 1) * group_size].copy()
        scores[g] = 0
        for _ in range(group_score_experts):
            best = _argmax(members)
            scores[g] += members[best]
            members[best] = -np.inf
    keep = np.zeros(n_group, np.bool_)
    for _ in range(topk_group):
        best = _argmax(scores)
        keep[best] = True
        scores[best] = -np.inf
    for e in range(selection.shape[0]):
        if not keep[e // group_size]:
            selection[e] = -np.inf


@inline_kernel
def route_row(logits, bias, sigmoid, groups, norm, scale, scratch, ids, weights):
    """One token's experts: ids i64[K], weights f32[K]. groups (n_group, topk_group, experts in a group's score)."""
    n_experts, (n_group, topk_group, group_score_experts) = logits.shape[0], groups
    probs, selection = scratch[0], scratch[1]
    _probabilities(logits, sigmoid, probs)
    for e in range(n_experts):
        selection[e] = probs[e] + bias[e]
    if n_group > 1:
        _mask_groups(selection, n_group, topk_group, group_score_experts)
    total = np.float32(0.0)
    for k in range(ids.shape[0]):
        best = -1
        for e in range(n_experts):
            chosen = False
            for i in range(k):
                chosen |= ids[i] == e
            if not chosen and (best < 0 or selection[e] > selection[best]):
                best = e
        ids[k] = best
        weights[k] = probs[best]
        total += probs[best]
    factor = np.float32(scale)
    if norm:
        factor /= max(total, np.float32(6.103515625e-5))  # the smallest normal f16, as the reference clamps
    for k in range(ids.shape[0]):
        weights[k] *= factor


@kernel
def group_by_expert(ids, n_experts):
    """Sort (token, choice) pairs by expert.

    ids i64[T,K] -> active i64[G], offsets i64[G+1], rows i64[T*K], positions i64[T,K].
    Entry m in offsets[g]:offsets[g+1] is token rows[m] going to expert active[g]; positions is the inverse, so that
    entry positions[t,k] belongs to choice k of token t.
    """
    n_tokens, top_k = ids.shape
    counts = np.zeros(n_experts, np.int64)
    for t in range(n_tokens):
        for k in range(top_k):
            counts[ids[t, k]] += 1
    n_active = 0
    for e in range(n_experts):
        n_active += counts[e] > 0
    active = np.empty(n_active, np.int64)
    offsets = np.zeros(n_active + 1, np.int64)
    next_slot = np.zeros(n_experts, np.int64)
    g = 0
    for e in range(n_experts):
        if counts[e] > 0:
            active[g] = e
            next_slot[e] = offsets[g]
            offsets[g + 1] = offsets[g] + counts[e]
            g += 1
    rows = np.empty(n_tokens * top_k, np.int64)
    positions = np.empty((n_tokens, top_k), np.int64)
    for t in range(n_tokens):
        for k in range(top_k):
            slot = next_slot[ids[t, k]]
            rows[slot] = t
            positions[t, k] = slot
            next_slot[ids[t, k]] = slot + 1
    return active, offsets, rows, positions
