"""The gated MLP, dense or a stack of experts, as the architectures share it."""

from dataclasses import dataclass

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
