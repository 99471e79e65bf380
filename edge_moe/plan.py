"""What a model takes: weights by part and format, and the memory it needs for a context length."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from edge_moe.config import KV_KINDS, ModelConfig
from edge_moe.latent_cache import latent_cache_bytes
from edge_moe.models.deepseek2 import MLP, Attention, LowRankQuery, Weights
from edge_moe.weights import Weight

_F32_BYTES = 4
_INDICES = 8  # f32-sized words per chosen expert to sort tokens by expert
_USUAL_CONTEXTS = (4096, 16384, 65536)


@dataclass
class Part:
    """The weights of one part of a model, over all layers; bytes by the name of their block format."""

    name: str
    n_weights: int = 0
    bytes_by_format: dict[str, int] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        return sum(self.bytes_by_format.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights if self.n_weights else 0.0

    def add(self, format_name: str, n_weights: int, n_bytes: int) -> None:
        """Count one tensor."""
        self.n_weights += n_weights
        self.bytes_by_format[format_name] = self.bytes_by_format.get(format_name, 0) + n_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes that a context of `context_length` tokens needs beside the file's own pages.

    `cache_bytes` is the default latent cache, `cache_bytes_by_kind` that of each kind there is.
    """

    context_length: int
    cache_bytes: int
    cache_bytes_by_kind: dict[str, int]
    scratch_bytes: int


def parts(weights: Weights) -> list[Part]:
    """The parts of a model in the order of the pass; a part that the model does not have is left out."""
    found: dict[str, Part] = {}
    for name, tensor in _tensors(weights):
        part = found.setdefault(name, Part(name))
        if isinstance(tensor, Weight):
            part.add(tensor.format.name, int(np.prod(tensor.shape, dtype=np.int64)), tensor.n_bytes)
        else:  # norms and biases are held as f32 arrays
            part.add("F32", tensor.size, tensor.nbytes)
    return list(found.values())


def active_weights(config: ModelConfig, model_parts: list[Part]) -> tuple[int, int]:
    """Weights that one token is multiplied with, and their bytes: all but the embeddings and the idle experts."""
    n_weights = n_bytes = 0
    tied = all(part.name != "output head" for part in model_parts)
    for part in model_parts:
        if part.name == "embeddings" and not tied:
            continue
        n, b = part.n_weights, part.n_bytes
        if part.name == "routed experts":
            n = n * config.num_experts_per_tok // config.n_routed_experts
            b = b * config.num_experts_per_tok // config.n_routed_experts
        n_weights, n_bytes = n_weights + n, n_bytes + b
    return n_weights, n_bytes


def memory(config: ModelConfig, context_length: int, chunk_size: int) -> Memory:
    """Memory of a context, when prompts are read in chunks of `chunk_size` tokens."""
    cache_bytes = {kind: latent_cache_bytes(config, context_length, kind) for kind in KV_KINDS}
    return Memory(
        context_length,
        cache_bytes[KV_KINDS[0]],
        cache_bytes,
        scratch_bytes(config, min(chunk_size, context_length)),
    )


def usual_contexts(config: ModelConfig) -> list[int]:
    """Context lengths worth showing: some usual ones within the model's own, and that one."""
    limit = config.max_position_embeddings
    return [length for length in _USUAL_CONTEXTS if length < limit] + [limit]


def scratch_bytes(config: ModelConfig, n_tokens: int) -> int:
    """Most bytes of activations at once in a pass of `n_tokens`: the larger of attention and feed-forward.

    Counted from the arrays that models/deepseek2.py holds at the same time, all f32.
    """
    c = config
    heads, rank = c.num_attention_heads, c.kv_lora_rank
    attention = heads * c.qk_head_dim + 2 * c.latent_dim
    attention += heads * (rank + c.latent_dim)  # absorbed queries, and they with their rope part for the cache
    attention += 2 * heads * rank  # contexts, before they are divided and after
    widest = attention
    if c.first_k_dense_replace:
        widest = max(widest, 3 * c.intermediate_size)  # gate, up and their product
    if c.n_routed_experts:
        gated = max(3 * c.moe_intermediate_size, c.moe_intermediate_size + c.hidden_size)
        widest = max(widest, c.num_experts_per_tok * (gated + _INDICES) + c.hidden_size)
    residual = 4 * c.hidden_size  # h, its norm, what is added to it and the sum
    # a product holds its input a second time, quantized to a byte or a little more each
    return _F32_BYTES * (n_tokens * (residual + widest * 9 // 8) + c.vocab_size)


def _tensors(weights: Weights) -> Iterator[tuple[str, Weight | np.ndarray]]:
    """Every tensor with the name of its part."""
    yield "embeddings", weights.embed_tokens
    for layer in weights.layers:
        yield "norms", layer.input_layernorm
        yield from _attention(layer.self_attn)
        yield "norms", layer.post_attention_layernorm
        if isinstance(layer.mlp, MLP):
            yield from _mlp("dense layers", layer.mlp)
            continue
        yield "router", layer.mlp.gate
        if layer.mlp.e_score_correction_bias.any():  # zeros stand for a bias that the file does not have
            yield "router", layer.mlp.e_score_correction_bias
        yield from _mlp("routed experts", layer.mlp.experts)
        if layer.mlp.shared_experts is not None:
            yield from _mlp("shared experts", layer.mlp.shared_experts)
    yield "norms", weights.norm
    if weights.lm_head is not weights.embed_tokens:
        yield "output head", weights.lm_head


def _attention(attention: Attention) -> Iterator[tuple[str, Weight | np.ndarray]]:
    if isinstance(attention.q_proj, LowRankQuery):
        yield "attention", attention.q_proj.q_a_proj
        yield "norms", attention.q_proj.q_a_layernorm
        yield "attention", attention.q_proj.q_b_proj
    else:
        yield "attention", attention.q_proj
    yield "attention", attention.kv_a_proj_with_mqa
    yield "norms", attention.kv_a_layernorm
    for weight in (attention.k_b_proj, attention.v_b_proj, attention.o_proj):
        yield "attention", weight


def _mlp(name: str, mlp: MLP) -> Iterator[tuple[str, Weight]]:
    for weight in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        yield name, weight
