"""The feed-forward part of a layer as the architectures share it: a gated MLP, or a mixture of such experts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge_moe.backends.protocol import Array, Operations
from edge_moe.checkpoint import Checkpoint
from edge_moe.config import ModelConfig
from edge_moe.weights import Weight

_F32_BYTES = 4
_INDICES = 8  # f32-sized words per chosen expert to sort tokens by expert


@dataclass(frozen=True, slots=True)
class MLP:
    """Weights of a gated MLP: gate and up [F, D], down [D, F]; for a stack of experts with E in front."""

    gate_proj: Weight
    up_proj: Weight
    down_proj: Weight


@dataclass(frozen=True, slots=True)
class MoE:
    """Weights of one mixture: router, routed experts, and experts that every token shares."""

    gate: Weight  # [E, D]
    e_score_correction_bias: np.ndarray  # f32[E], zero where the model has none
    experts: MLP
    shared_experts: MLP | None = None


class Layer(Protocol):
    """What is asked of the following layer."""

    @property
    def post_attention_layernorm(self) -> np.ndarray: ...

    @property
    def mlp(self) -> MLP | MoE: ...


Route = Callable[[Operations, MoE, Array], tuple[Array, Array]]  # x f32[T,D] -> ids i64[T,K], f32[T,K]


def feed_forward(
    ops: Operations,
    route: Route,
    eps: float,
    w: MLP | MoE,
    x: Array,
    h: Array | None = None,
    following: Layer | None = None,
    *,
    fine: bool = False,
) -> Array:
    """A dense MLP, or routed experts plus the shared ones, an MLP, too. x f32[T,D] -> f32[T,D].

    The products of an MLP are fine if wanted. Where experts may have to be read, those of the following layer are
    guessed from h f32[T,D], what x is made of.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.2; without shared experts Mixtral, arXiv 2401.04088, section 2.1.
    """
    if isinstance(w, MLP):
        return ops.gated_mlp(x, w.gate_proj, w.up_proj, w.down_proj, fine=fine)
    ids, gates = route(ops, w, x)
    experts = w.experts
    ops.request(ids, experts.down_proj)
    if w.shared_experts is not None:  # while the others arrive
        s = w.shared_experts
        shared = ops.gated_mlp(x, s.gate_proj, s.up_proj, s.down_proj, fine=fine)
    if ops.looks_ahead and h is not None and following is not None and isinstance(following.mlp, MoE):
        next_x = ops.norm(h, following.post_attention_layernorm, eps)
        ops.prefetch(route(ops, following.mlp, next_x)[0], following.mlp.experts.down_proj)
    out = ops.experts(x, ids, gates, experts.gate_proj, experts.up_proj, experts.down_proj)
    return out if w.shared_experts is None else ops.add(out, shared)


def load_mlp(checkpoint: Checkpoint, name: str, stack: tuple[int, ...], width: int) -> MLP:
    """The MLP `name`, gate and up apart or in one tensor; `stack` (E,) for experts. Raises FormatError."""
    hidden = checkpoint.config.hidden_size
    if f"{name}.gate_up_proj" in checkpoint:
        gate_proj, up_proj = checkpoint.weight(f"{name}.gate_up_proj", *stack, 2 * width, hidden).split_rows(
            width, width
        )
    else:
        gate_proj = checkpoint.weight(f"{name}.gate_proj", *stack, width, hidden)
        up_proj = checkpoint.weight(f"{name}.up_proj", *stack, width, hidden)
    return MLP(gate_proj, up_proj, checkpoint.weight(f"{name}.down_proj", *stack, hidden, width))


def activation_bytes(c: ModelConfig, n_tokens: int, attention: int, dense_width: int, expert_width: int) -> int:
    """Most bytes of f32 activations in a pass: `attention` numbers for each token, or those of the feed-forward."""
    widest = max(attention, 3 * dense_width)  # gate, up and their product
    if c.n_routed_experts:
        gated = max(3 * expert_width, expert_width + c.hidden_size)
        widest = max(widest, c.num_experts_per_tok * (gated + _INDICES) + c.hidden_size)
    residual = 4 * c.hidden_size  # h, its norm, what is added to it and the sum
    # a product holds its input a second time, quantized to a byte or a little more each
    return _F32_BYTES * (n_tokens * (residual + widest * 9 // 8) + c.vocab_size)
