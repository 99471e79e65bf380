"""Experts that arrive one after the other: those in memory are run while the others are read."""

import numpy as np

from edge_moe.expert_store import ExpertStore
from edge_moe.kernels import products, routing, steps
from edge_moe.weights import Weight


def stream_experts(
    store: ExpertStore, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Weight, up: Weight, down: Weight
) -> np.ndarray:
    """The chosen experts' gated MLPs, weighted and summed. x f32[T,D], ids i64[T,K], weights f32[T,K] -> f32[T,D].

    The sum's order does not depend on who arrives first. Raises ReadError.
    """
    active, offsets, rows, positions = routing.group_by_expert(ids, down.shape[0])
    layer, place = store.layer_of(down), {expert: i for i, expert in enumerate(active.tolist())}
    out = np.empty((rows.size, down.shape[1]), np.float32)
    for experts in store.arrivals(layer, list(place)):
        entries = [np.arange(offsets[place[e]], offsets[place[e] + 1]) for e in experts]
        chosen, ends = np.concatenate(entries), np.cumsum([0, *map(len, entries)])
        at = store.addresses(layer, experts)
        n_rows, own = gate.shape[1], rows[chosen]
        if gate.format is up.format:  # one parallel region, the inputs quantized once
            gate_out, up_out = products.grouped_linear(x, own, ends, gate.format, at[:2], n_rows)
        else:
            gate_out = products.grouped_linear(x, own, ends, gate.format, at[0], n_rows)
            up_out = products.grouped_linear(x, own, ends, up.format, at[1], n_rows)
        gated = steps.silu_multiply(gate_out, up_out)
        out[chosen] = products.grouped_linear(gated, np.arange(len(own)), ends, down.format, at[2], down.shape[1])
    return steps.weighted_sum(out, positions, weights)
