"""The forward pass of DeepSeek-V2 and its family, top to bottom as in the paper.

Source: DeepSeek-V2, arXiv 2405.04434, section 2 (MLA 2.1, DeepSeekMoE 2.2); DeepSeek-V3, arXiv 2412.19437, section 2.1.
Shapes: T tokens, H heads, D hidden, R kv_lora_rank, N nope, P rope, V value head, E experts, K active, F expert width.

Products are `fine` where rounding their input to 8 bits would cost most of the accuracy that it costs at all: the dense
layers, whose outputs are large and come before every router; the shared experts, through which all tokens pass; the
latents, of which all keys and values are made; queries that are made of latents of their own; the values that attention
brings back; the head.
"""

from dataclasses import dataclass

import numpy as np

from edge_moe.backends.protocol import Array, Backend, Operations
from edge_moe.checkpoint import Checkpoint
from edge_moe.config import KV_KINDS, DeepseekV2Config
from edge_moe.errors import UnsupportedError
from edge_moe.models import rope
from edge_moe.models.feed_forward import MLP, MoE, activation_bytes, feed_forward, load_mlp
from edge_moe.models.inputs import check_tokens
from edge_moe.token_cache import TokenCache
from edge_moe.weights import Weight


@dataclass(frozen=True, slots=True)
class LowRankQuery:
    """Queries through a narrow latent, as all but the lite models have them."""

    q_a_proj: Weight  # [q_lora_rank, D]
    q_a_layernorm: np.ndarray
    q_b_proj: Weight  # [H(N+P), q_lora_rank]


@dataclass(frozen=True, slots=True)
class Attention:
    """Weights of one layer's latent attention."""

    q_proj: Weight | LowRankQuery  # a plain one is [H(N+P), D]
    kv_a_proj_with_mqa: Weight  # [R+P, D]
    kv_a_layernorm: np.ndarray
    k_b_proj: Weight  # [H, R, N], or [H, N, R] from a file that keeps kv_b whole
    k_b_is_transposed: bool  # the latter
    v_b_proj: Weight  # [H, V, R]
    o_proj: Weight  # [D, HV]


@dataclass(frozen=True, slots=True)
class Layer:
    input_layernorm: np.ndarray
    self_attn: Attention
    post_attention_layernorm: np.ndarray
    mlp: MLP | MoE


@dataclass(frozen=True, slots=True)
class Weights:
    embed_tokens: Weight  # [vocab, D]
    layers: tuple[Layer, ...]
    norm: np.ndarray
    lm_head: Weight  # [vocab, D]; embed_tokens itself where the two are tied


def config_of(checkpoint: Checkpoint) -> DeepseekV2Config:
    """The file's config. Raises UnsupportedError for one of another architecture."""
    if not isinstance(checkpoint.config, DeepseekV2Config):
        raise UnsupportedError(f"{checkpoint.path}: architecture {checkpoint.config.architecture}, expected deepseek2")
    return checkpoint.config


def load_weights(checkpoint: Checkpoint) -> Weights:
    """All weights of the model, as views on the file. Raises FormatError where one is missing or has another shape."""
    c = config_of(checkpoint)
    embed_tokens = checkpoint.weight("embed_tokens", c.vocab_size, c.hidden_size)
    has_lm_head = "lm_head" in checkpoint
    return Weights(
        embed_tokens=embed_tokens,
        layers=tuple(_load_layer(checkpoint, c, index) for index in range(c.num_hidden_layers)),
        norm=checkpoint.vector("norm", c.hidden_size),
        lm_head=checkpoint.weight("lm_head", c.vocab_size, c.hidden_size) if has_lm_head else embed_tokens,
    )


def _load_layer(checkpoint: Checkpoint, c: DeepseekV2Config, index: int) -> Layer:
    name = f"layers.{index}"
    return Layer(
        input_layernorm=checkpoint.vector(f"{name}.input_layernorm", c.hidden_size),
        self_attn=_load_attention(checkpoint, c, f"{name}.self_attn"),
        post_attention_layernorm=checkpoint.vector(f"{name}.post_attention_layernorm", c.hidden_size),
        mlp=_load_moe(checkpoint, c, f"{name}.mlp")
        if c.is_moe_layer(index)
        else load_mlp(checkpoint, f"{name}.mlp", (), c.intermediate_size),
    )


def _load_attention(checkpoint: Checkpoint, c: DeepseekV2Config, name: str) -> Attention:
    n_heads, rank, width = c.num_attention_heads, c.kv_lora_rank, c.num_attention_heads * c.qk_head_dim
    q_proj: Weight | LowRankQuery
    if c.q_lora_rank:
        q_proj = LowRankQuery(
            q_a_proj=checkpoint.weight(f"{name}.q_a_proj", c.q_lora_rank, c.hidden_size),
            q_a_layernorm=checkpoint.vector(f"{name}.q_a_layernorm", c.q_lora_rank),
            q_b_proj=checkpoint.weight(f"{name}.q_b_proj", width, c.q_lora_rank),
        )
    else:
        q_proj = checkpoint.weight(f"{name}.q_proj", width, c.hidden_size)
    k_b_is_transposed = f"{name}.kv_b_proj" in checkpoint
    if k_b_is_transposed:
        head_rows = (c.qk_nope_head_dim, c.v_head_dim)
        kv_b_proj = checkpoint.weight(f"{name}.kv_b_proj", n_heads * sum(head_rows), rank)
        k_b_proj, v_b_proj = kv_b_proj.stacked(n_heads).split_rows(*head_rows)
    else:
        k_b_proj = checkpoint.weight(f"{name}.k_b_proj", n_heads, rank, c.qk_nope_head_dim)
        v_b_proj = checkpoint.weight(f"{name}.v_b_proj", n_heads, c.v_head_dim, rank)
    return Attention(
        q_proj=q_proj,
        kv_a_proj_with_mqa=checkpoint.weight(f"{name}.kv_a_proj_with_mqa", c.latent_dim, c.hidden_size),
        kv_a_layernorm=checkpoint.vector(f"{name}.kv_a_layernorm", rank),
        k_b_proj=k_b_proj,
        k_b_is_transposed=k_b_is_transposed,
        v_b_proj=v_b_proj,
        o_proj=checkpoint.weight(f"{name}.o_proj", c.hidden_size, n_heads * c.v_head_dim),
    )


def _load_moe(checkpoint: Checkpoint, c: DeepseekV2Config, name: str) -> MoE:
    n_experts, bias_name = c.n_routed_experts, f"{name}.gate.e_score_correction_bias"
    bias = checkpoint.vector(bias_name, n_experts) if bias_name in checkpoint else np.zeros(n_experts, np.float32)
    shared_width = c.n_shared_experts * c.moe_intermediate_size
    return MoE(
        gate=checkpoint.weight(f"{name}.gate", n_experts, c.hidden_size),
        e_score_correction_bias=bias,
        experts=load_mlp(checkpoint, f"{name}.experts", (n_experts,), c.moe_intermediate_size),
        shared_experts=load_mlp(checkpoint, f"{name}.shared_experts", (), shared_width) if shared_width else None,
    )


class DeepseekV2:
    """The model: token ids in, logits out, the latent cache passed in."""

    def __init__(self, config: DeepseekV2Config, weights: Weights, backend: Backend) -> None:
        self.config = config
        self.weights = weights
        self.backend = backend
        self._inv_freq = rope_frequencies(config)

    def new_cache(self, context_length: int, kind: str = KV_KINDS[0]) -> TokenCache:
        """An empty cache. In 4 bits latents are kept rotated, unless the file's own are so. Raises OptionError."""
        gains = None
        if kind == "int4" and not self.config.latent_is_rotated:
            gains = np.stack([layer.self_attn.kv_a_layernorm for layer in self.weights.layers])
        return self.backend.latent_cache(self.config, context_length, kind, gains)

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
        return ops.linear(ops.norm(h, self.weights.norm, c.rms_norm_eps), fine=(self.weights.lm_head,))[0]

    def rotations(self, ops: Operations, cache: TokenCache, n_tokens: int) -> tuple[Array, Array]:
        """cos and sin of the next positions, f32[T,P/2] each."""
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
        """Multi-head latent attention. x f32[T,D] -> f32[T,D]. Source: section 2.1, appendix C."""
        c, n_tokens = self.config, len(x)
        if isinstance(w.q_proj, LowRankQuery):
            q_a, kv = ops.linear(x, w.q_proj.q_a_proj, fine=(w.kv_a_proj_with_mqa,))
            q = ops.linear(ops.norm(q_a, w.q_proj.q_a_layernorm, c.rms_norm_eps), fine=(w.q_proj.q_b_proj,))[0]
        else:
            q, kv = ops.linear(x, w.q_proj, fine=(w.kv_a_proj_with_mqa,))
        q = q.reshape(n_tokens, c.num_attention_heads, c.qk_head_dim)
        q_nope, q_pe = q[..., : c.qk_nope_head_dim], q[..., c.qk_nope_head_dim :]
        c_kv, k_pe = kv[:, : c.kv_lora_rank], kv[:, c.kv_lora_rank :]

        c_kv = ops.norm(c_kv, w.kv_a_layernorm, c.rms_norm_eps)
        q_pe = ops.rope(q_pe, cos, sin)
        k_pe = ops.rope(k_pe[:, None, :], cos, sin)[:, 0]

        if ops.expands(n_tokens, cache):  # many queries: keys W_UK c and values W_UV c are worth making
            matrices = w.k_b_proj, w.k_b_is_transposed, w.v_b_proj
            values = ops.expanded_attention(q_nope, q_pe, c_kv, k_pe, *matrices, cache, layer, c.softmax_scale)
        else:  # absorbed form
            absorb = ops.per_head_transposed if w.k_b_is_transposed else ops.per_head
            q_latent = absorb(q_nope, w.k_b_proj)  # q . (W_UK c) = (W_UK^T q) . c: keys are never expanded
            context = ops.latent_attention(q_latent, q_pe, c_kv, k_pe, cache, layer, c.softmax_scale)
            values = ops.per_head(context, w.v_b_proj)  # nor are values: W_UV (sum of p c) = sum of p (W_UV c)
        return ops.linear(values.reshape(n_tokens, -1), fine=(w.o_proj,))[0]

    def feed_forward(
        self, ops: Operations, w: MLP | MoE, x: Array, h: Array | None = None, following: Layer | None = None
    ) -> Array:
        """A dense MLP, or routed experts plus the shared ones. x f32[T,D] -> f32[T,D]. Source: section 2.2."""
        return feed_forward(ops, self.route, self.config.rms_norm_eps, w, x, h, following, fine=True)

    def route(self, ops: Operations, w: MoE, x: Array) -> tuple[Array, Array]:
        """The experts of each token and their weights. x f32[T,D] -> ids i64[T,K], weights f32[T,K]."""
        c = self.config
        return ops.route(
            ops.linear(x, w.gate)[0],
            ops.favour(w.e_score_correction_bias, w.experts.down_proj),
            sigmoid=c.scoring_func == "sigmoid",
            n_group=c.n_group,
            topk_group=c.topk_group,
            group_score_experts=c.group_score_experts,
            top_k=c.num_experts_per_tok,
            norm=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
        )


def rope_frequencies(config: DeepseekV2Config) -> np.ndarray:
    """Radians per position of each pair of rope dimensions, f64[P/2]."""
    return rope.rope_frequencies(config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)


def scratch_bytes(config: DeepseekV2Config, n_tokens: int) -> int:
    """Most bytes of activations at once in a pass of `n_tokens`: the larger of attention and feed-forward.

    Counted from the arrays that the pass holds at the same time, all f32.
    """
    c = config
    heads, rank = c.num_attention_heads, c.kv_lora_rank
    attention = heads * c.qk_head_dim + 2 * c.latent_dim
    attention += heads * (rank + c.latent_dim)  # absorbed queries, and they with their rope part for the cache
    attention += 2 * heads * rank  # contexts, before they are divided and after
    width = c.intermediate_size if c.first_k_dense_replace else 0
    return activation_bytes(c, n_tokens, attention, width, c.moe_intermediate_size)
