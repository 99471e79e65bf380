"""The forward pass of Llama and its family (Mistral, and Mixtral with experts), top to bottom as in the papers.

Source: Llama, arXiv 2302.13971, section 2.2; grouped queries, arXiv 2305.13245; sliding window, Mistral, arXiv
2310.06825, section 2; experts, Mixtral, arXiv 2401.04088, section 2.1.
Shapes: T tokens, H heads, K heads of keys, N head_dim, D hidden, E experts, F feed-forward width.
"""

import math
from dataclasses import dataclass

import numpy as np

from edge_moe.backends.protocol import Array, Backend, Operations
from edge_moe.checkpoint import Checkpoint
from edge_moe.config import KV_KINDS, LlamaConfig
from edge_moe.errors import UnsupportedError
from edge_moe.models import rope
from edge_moe.models.feed_forward import MLP, MoE, activation_bytes, feed_forward, load_mlp
from edge_moe.models.inputs import check_tokens
from edge_moe.token_cache import TokenCache
from edge_moe.weights import Weight


@dataclass(frozen=True, slots=True)
class Attention:
    """Weights of one layer's attention. Rows of queries and keys are in adjacent rope pairs."""

    q_proj: Weight  # [HN, D]
    k_proj: Weight  # [KN, D]
    v_proj: Weight  # [KN, D]
    o_proj: Weight  # [D, HN]


@dataclass(frozen=True, slots=True)
class Layer:
    input_layernorm: np.ndarray
    self_attn: Attention
    post_attention_layernorm: np.ndarray
    mlp: MLP | MoE


@dataclass(frozen=True, slots=True)
class Weights:
    embed_tokens: Weight  # [vocab, D]
    rope_freqs: np.ndarray | None  # f32[N/2], divisors of the frequencies: how Llama 3 stretches RoPE
    layers: tuple[Layer, ...]
    norm: np.ndarray
    lm_head: Weight  # [vocab, D]; embed_tokens itself where the two are tied


def load_weights(checkpoint: Checkpoint) -> Weights:
    """All weights of the model, as views on the file.

    Raises FormatError where one is missing or has another shape, UnsupportedError for tensors that the pass has no
    place for: leaving out a bias would make a model that looks almost right.
    """
    c = checkpoint.config
    if not isinstance(c, LlamaConfig):
        raise UnsupportedError(f"{checkpoint.path}: architecture {c.architecture}, expected llama")
    unknown = [name for name in checkpoint.tensors if name.endswith(".bias")]
    if unknown:
        raise UnsupportedError(
            f"{checkpoint.path}: tensor {unknown[0]} is a bias, and llama in edge_moe has none; use a model without"
        )
    embed_tokens = checkpoint.weight("embed_tokens", c.vocab_size, c.hidden_size)
    has_lm_head = "lm_head" in checkpoint
    return Weights(
        embed_tokens=embed_tokens,
        rope_freqs=checkpoint.vector("rope_freqs", c.head_dim // 2) if "rope_freqs" in checkpoint else None,
        layers=tuple(_load_layer(checkpoint, c, index) for index in range(c.num_hidden_layers)),
        norm=checkpoint.vector("norm", c.hidden_size),
        lm_head=checkpoint.weight("lm_head", c.vocab_size, c.hidden_size) if has_lm_head else embed_tokens,
    )


def _load_layer(checkpoint: Checkpoint, c: LlamaConfig, index: int) -> Layer:
    name = f"layers.{index}"
    width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    mlp: MLP | MoE
    if c.n_routed_experts:
        mlp = MoE(
            gate=checkpoint.weight(f"{name}.mlp.gate", c.n_routed_experts, c.hidden_size),
            e_score_correction_bias=np.zeros(c.n_routed_experts, np.float32),
            experts=load_mlp(checkpoint, f"{name}.mlp.experts", (c.n_routed_experts,), c.intermediate_size),
        )
    else:
        mlp = load_mlp(checkpoint, f"{name}.mlp", (), c.intermediate_size)
    return Layer(
        input_layernorm=checkpoint.vector(f"{name}.input_layernorm", c.hidden_size),
        self_attn=Attention(
            q_proj=checkpoint.weight(f"{name}.self_attn.q_proj", width, c.hidden_size),
            k_proj=checkpoint.weight(f"{name}.self_attn.k_proj", kv_width, c.hidden_size),
            v_proj=checkpoint.weight(f"{name}.self_attn.v_proj", kv_width, c.hidden_size),
            o_proj=checkpoint.weight(f"{name}.self_attn.o_proj", c.hidden_size, width),
        ),
        post_attention_layernorm=checkpoint.vector(f"{name}.post_attention_layernorm", c.hidden_size),
        mlp=mlp,
    )


class Llama:
    """The model: token ids in, logits out, the cache of keys and values passed in."""

    def __init__(self, config: LlamaConfig, weights: Weights, backend: Backend) -> None:
        self.config = config
        self.weights = weights
        self.backend = backend
        self._inv_freq = rope.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        if weights.rope_freqs is not None:
            self._inv_freq = self._inv_freq / weights.rope_freqs

    def new_cache(self, context_length: int, kind: str = KV_KINDS[0]) -> TokenCache:
        """An empty cache of keys and values. Raises OptionError."""
        return self.backend.kv_cache(self.config, context_length, kind)

    def prepare(self, context_length: int, kind: str = KV_KINDS[0]) -> None:
        """Let the backend put the weights where it uses them, beside a cache of that size. Raises OptionError."""
        self.backend.prepare(self._compute, self.new_cache(context_length, kind))

    def forward(self, token_ids: np.ndarray, cache: TokenCache, *, all_logits: bool = False) -> np.ndarray:
        """Run T tokens behind those in the cache. token_ids i64[T] -> f32[T, vocab], or f32[1, vocab] of the last.

        Raises ShapeError for ids outside the vocabulary and for more tokens than the cache has room for.
        """
        check_tokens(token_ids, cache, self.config)
        logits = self.backend.run(self._compute, token_ids, cache, all_logits)
        cache.advance(len(token_ids))
        return logits

    def _compute(
        self, ops: Operations, source: Array, cache: TokenCache, all_logits: bool, layers: range | None = None
    ) -> Array:
        """The pass itself, or some of its layers, as `Compute` says.

        All arithmetic is done by `ops`: between them arrays are only cut and reshaped.
        """
        c, everything = self.config, range(len(self.weights.layers))
        layers = layers or everything
        cos, sin = self.rotations(ops, cache, len(source))
        h = source if layers.start else ops.embed(self.weights.embed_tokens, source)
        for index in layers:
            layer = self.weights.layers[index]
            x = ops.norm(h, layer.input_layernorm, c.rms_norm_eps)
            h = ops.add(h, self.attention(ops, layer.self_attn, x, cos, sin, cache, index - layers.start))
            if index == everything[-1] and not all_logits:
                h = h[-1:]  # behind the last attention tokens no longer meet
            x = ops.norm(h, layer.post_attention_layernorm, c.rms_norm_eps)
            following = self.weights.layers[index + 1 : min(index + 2, layers.stop)]
            h = ops.add(h, self.feed_forward(ops, layer.mlp, x, h, *following))
        if layers.stop < everything.stop:
            return h
        return ops.linear(ops.norm(h, self.weights.norm, c.rms_norm_eps), self.weights.lm_head)[0]

    def rotations(self, ops: Operations, cache: TokenCache, n_tokens: int) -> tuple[Array, Array]:
        """cos and sin of the next positions, f32[T,N/2] each."""
        scaling = self.config.rope_scaling
        return ops.rotations(cache, n_tokens, self._inv_freq, scaling.attention_factor if scaling else 1.0)

    def attention(
        self,
        ops: Operations,
        w: Attention,
        x: Array,
        cos: Array,
        sin: Array,
        cache: TokenCache,
        layer: int,
    ) -> Array:
        """Grouped-query attention. x f32[T,D] -> f32[T,D]. Source: arXiv 2305.13245, section 2.2."""
        c, n_tokens = self.config, len(x)
        q, k, v = ops.linear(x, w.q_proj, w.k_proj, w.v_proj)
        q = ops.rope(q.reshape(n_tokens, c.num_attention_heads, c.head_dim), cos, sin)
        k = ops.rope(k.reshape(n_tokens, c.num_key_value_heads, c.head_dim), cos, sin)
        v = v.reshape(n_tokens, c.num_key_value_heads, c.head_dim)
        values = ops.grouped_attention(q, k, v, cache, layer, 1 / math.sqrt(c.head_dim))
        return ops.linear(values.reshape(n_tokens, -1), w.o_proj)[0]

    def feed_forward(
        self, ops: Operations, w: MLP | MoE, x: Array, h: Array | None = None, following: Layer | None = None
    ) -> Array:
        """A dense MLP, or routed experts. x f32[T,D] -> f32[T,D]."""
        return feed_forward(ops, self.route, self.config.rms_norm_eps, w, x, h, following)

    def route(self, ops: Operations, w: MoE, x: Array) -> tuple[Array, Array]:
        """The experts of each token and their weights. x f32[T,D] -> ids i64[T,K], weights f32[T,K]."""
        return ops.route(
            ops.linear(x, w.gate)[0],
            ops.favour(w.e_score_correction_bias, w.experts.down_proj),
            sigmoid=False,
            n_group=1,
            topk_group=1,
            group_score_experts=1,
            top_k=self.config.num_experts_per_tok,
            norm=True,  # a softmax over all, brought to a sum of 1 for the chosen, is a softmax over these
            scale=1.0,
        )


def scratch_bytes(config: LlamaConfig, n_tokens: int) -> int:
    """Most bytes of activations at once in a pass of `n_tokens`, counted from the arrays that it holds, all f32."""
    c = config
    attention = 4 * c.num_attention_heads * c.head_dim + 3 * c.num_key_value_heads * c.head_dim
    width = 0 if c.n_routed_experts else c.intermediate_size
    return activation_bytes(c, n_tokens, attention, width, c.intermediate_size)
