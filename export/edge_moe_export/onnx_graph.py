"""The decoder as an ONNX graph, top to bottom as in edge_moe/models/deepseek2.py, its cache the compressed latent.

What a model consists of is said by the runtime's own dataclasses (models.deepseek2.Weights); here is only what each
part computes. Source: DeepSeek-V2, arXiv 2405.04434, section 2; DeepSeek-V3, arXiv 2412.19437, section 2.1.
Shapes: B batch, T tokens, S cached positions and new ones, H heads, D hidden, R kv_lora_rank, N nope, P rope, V value
head, E experts, K active, F expert width.
"""

import math
from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from edge_moe.config import DeepseekV2Config
from edge_moe.models.deepseek2 import MLP, Attention, LowRankQuery, MoE, Weights, rope_frequencies
from edge_moe.onnx_folder import int8_row
from edge_moe_export.onnx_builder import Builder, Shape
from edge_moe_export.onnx_storage import Storage

CACHE_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "int8": TensorProto.INT8}
INT8_STEP = math.log(2) / 8  # between the logarithms of two scales of an int8 cache
MASKED = -1e30  # finite, so that a row without any key stays a number
MIN_WEIGHT_SUM = 6.103515625e-05  # of a token's experts, before they are normed; as in the runtime and llama.cpp


def build_decoder(
    g: Builder,
    config: DeepseekV2Config,
    weights: Weights,
    storage: Storage,
    *,
    kv: str,
    done: Callable[[], None],
) -> None:
    """Add the whole model to `g`. `kv`: one of CACHE_TYPES; `done` is called after each layer."""
    Decoder(g, config, storage, kv).build(weights, done)


class Decoder:
    """Adds one model to a graph. Methods take and return names of f32[B,T,D], where nothing else is said."""

    def __init__(self, g: Builder, config: DeepseekV2Config, storage: Storage, kv: str) -> None:
        self.g, self.c, self.storage = g, config, storage
        self.cache_type = CACHE_TYPES[kv]
        # Latent and rope key lie in one row, cut into two halves: onnxruntime-genai wants keys and values of one shape.
        self.half = config.latent_dim // 2

    def build(self, weights: Weights, done: Callable[[], None]) -> None:
        """token ids, mask and positions in, logits out, past latents in, present ones out."""
        g, c = self.g, self.c
        ids = g.input("input_ids", TensorProto.INT64, ["batch", "tokens"])
        attention_mask = g.input("attention_mask", TensorProto.INT64, ["batch", "total"])
        self.positions = g.input("position_ids", TensorProto.INT64, ["batch", "tokens"])
        kept = g.optional_input("num_logits_to_keep", np.zeros(1, np.int64))
        g.scope("model")
        self.mask = self._mask(ids, attention_mask)
        self.cos, self.sin = self._rotations()
        h = self.storage.embed(ids, weights.embed_tokens)
        for index, layer in enumerate(weights.layers):
            g.scope(f"layers.{index}.self_attn")
            x = self.norm(h, layer.input_layernorm)
            h = g.op("Add", h, self.attention(layer.self_attn, x, index))
            g.scope(f"layers.{index}.mlp")
            x = self.norm(h, layer.post_attention_layernorm)
            h = g.op("Add", h, self.mlp(layer.mlp, x) if isinstance(layer.mlp, MLP) else self.moe(layer.mlp, x))
            done()
        g.scope("lm_head")
        last = np.iinfo(np.int64).max
        h = g.op("Slice", h, g.op("Neg", kept), g.ints(last), g.ints(1))  # -0 is the first token: all are kept
        logits = self.storage.linear(self.norm(h, weights.norm), weights.lm_head)
        g.output("logits", TensorProto.FLOAT, ["batch", "kept", c.vocab_size], "Identity", logits)
        done()

    def norm(self, x: str, gain: np.ndarray) -> str:
        """RMSNorm over the last axis."""
        return self.g.op("RMSNormalization", x, self.g.constant(gain), axis=-1, epsilon=self.c.rms_norm_eps)

    # ---- attention ----

    def attention(self, w: Attention, x: str, layer: int) -> str:
        """Multi-head latent attention in absorbed form. Source: section 2.1, appendix C."""
        g, c, linear = self.g, self.c, self.storage.linear
        H, R, N, P, V = (
            c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        )  # fmt: skip
        if isinstance(w.q_proj, LowRankQuery):
            q_latent = self.norm(linear(x, w.q_proj.q_a_proj), w.q_proj.q_a_layernorm)
            q = linear(q_latent, w.q_proj.q_b_proj)
        else:
            q = linear(x, w.q_proj)
        q = g.op("Transpose", g.op("Reshape", q, g.ints(0, 0, H, N + P)), perm=[0, 2, 1, 3])  # [B,H,T,N+P]
        q_nope, q_pe = g.ops("Split", 2, q, g.ints(N, P), axis=-1)
        kv = g.op("Unsqueeze", linear(x, w.kv_a_proj_with_mqa), g.ints(1))  # [B,1,T,R+P]
        c_kv, k_pe = g.ops("Split", 2, kv, g.ints(R, P), axis=-1)

        new = g.op("Concat", self.norm(c_kv, w.kv_a_layernorm), self.rope(k_pe), axis=-1)
        latent = self.cached(new, layer)
        k_b, v_b = self.storage.absorbed(w)
        q_absorbed = g.op("MatMul", q_nope, k_b)  # [B,H,T,R]: q . (W c) = (W^T q) . c
        context = self.attend(g.op("Concat", q_absorbed, self.rope(q_pe), axis=-1), latent)
        values = g.op("Transpose", g.op("MatMul", context, v_b), perm=[0, 2, 1, 3])  # [B,T,H,V]
        return linear(g.op("Reshape", values, g.ints(0, 0, H * V)), w.o_proj)

    def cached(self, new: str, layer: int) -> list[str]:
        """Append new rows [B,1,T,R+P] to the past ones, which come in and go out in two halves [B,1,S,(R+P)/2]."""
        g, width = self.g, int8_row(self.c).width if self.cache_type == TensorProto.INT8 else self.half
        halves = []
        for part, rows in zip(("key", "value"), g.ops("Split", 2, new, axis=-1, num_outputs=2), strict=True):
            past = g.input(f"past_key_values.{layer}.{part}", self.cache_type, ["batch", 1, "past", width])
            shape: Shape = ["batch", 1, "total", width]
            name, rows = f"present.{layer}.{part}", self.packed_rows(rows)
            halves.append(self.read_rows(g.output(name, self.cache_type, shape, "Concat", past, rows, axis=2)))
        return halves

    def packed_rows(self, rows: str) -> str:
        """Rows of the cache as it keeps them. f32[B,1,T,half] -> the cache's type."""
        g = self.g
        if self.cache_type == TensorProto.FLOAT:
            return rows
        if self.cache_type == TensorProto.FLOAT16:
            return g.op("Cast", rows, to=TensorProto.FLOAT16)
        # A scale is 2^(e/8), and its e a code of the row itself, so that the cache is one tensor of one type.
        n_scales, block = int8_row(self.c).n_scales, int8_row(self.c).block
        peaks = g.op(
            "ReduceMax", g.op("Abs", g.op("Reshape", rows, g.ints(0, 0, 0, n_scales, block))), g.ints(-1), keepdims=0
        )
        steps = g.op("Mul", g.op("Log", g.op("Mul", peaks, g.scalar(1 / 127))), g.scalar(1 / INT8_STEP))
        steps = g.op("Clip", g.op("Ceil", steps), g.scalar(-128), g.scalar(127))
        scales = g.op("Exp", g.op("Mul", steps, g.scalar(INT8_STEP)))
        codes = g.op("QuantizeLinear", rows, scales, axis=-1, block_size=block, output_dtype=TensorProto.INT8)
        return g.op("Concat", codes, g.op("Cast", steps, to=TensorProto.INT8), axis=-1)

    def read_rows(self, rows: str) -> str:
        """The reverse: f32[B,1,S,half]."""
        g = self.g
        if self.cache_type == TensorProto.FLOAT:
            return rows
        if self.cache_type == TensorProto.FLOAT16:
            return g.op("Cast", rows, to=TensorProto.FLOAT)
        codes, steps = g.ops("Split", 2, rows, g.ints(self.half, int8_row(self.c).n_scales), axis=-1)
        scales = g.op("Exp", g.op("Mul", g.op("Cast", steps, to=TensorProto.FLOAT), g.scalar(INT8_STEP)))
        # DequantizeLinear by blocks, which says the same, takes four times as long
        blocks = g.op("Reshape", codes, g.ints(0, 0, 0, int8_row(self.c).n_scales, int8_row(self.c).block))
        values = g.op("Mul", g.op("Cast", blocks, to=TensorProto.FLOAT), g.op("Unsqueeze", scales, g.ints(4)))
        return g.op("Reshape", values, g.ints(0, 0, 0, self.half))

    def attend(self, query: str, latent: list[str]) -> str:
        """Latents weighted by softmax, all heads in one product. query [B,H,T,R+P] -> [B,H,T,R].

        The cache is never joined, cut or transposed, which would copy it for every token: scores are computed as the
        cache times the queries, each half on its own; values are the whole rows, of which the rope keys are dropped.
        """
        g, c = self.g, self.c
        query = g.op("Mul", query, g.scalar(c.softmax_scale))
        parts = []
        for part, half in zip(g.ops("Split", 2, query, axis=-1, num_outputs=2), latent, strict=True):
            rows = g.op("Reshape", part, g.ints(0, 1, -1, self.half))
            parts.append(g.op("MatMul", half, g.op("Transpose", rows, perm=[0, 1, 3, 2])))  # [B,1,S,HT]
        scores = g.op("Transpose", g.op("Add", *parts), perm=[0, 1, 3, 2])
        scores = g.op("Reshape", scores, g.ints(0, c.num_attention_heads, -1, 0))  # [B,H,T,S]
        weights = g.op("Softmax", g.op("Add", scores, self.mask), axis=-1)
        weights = g.op("Reshape", weights, g.ints(0, 1, -1, 0))
        context = g.op("Concat", *(g.op("MatMul", weights, half) for half in latent), axis=-1)
        context = g.op("Slice", context, g.ints(0), g.ints(c.kv_lora_rank), g.ints(-1))
        return g.op("Reshape", context, g.ints(0, c.num_attention_heads, -1, c.kv_lora_rank))

    def rope(self, x: str) -> str:
        """Rotate adjacent pairs of [B,heads,T,P] by the tokens' positions."""
        return self.g.op("RotaryEmbedding", x, self.cos, self.sin, self.positions, interleaved=1)

    def _rotations(self) -> tuple[str, str]:
        """cos and sin f32[positions, P/2], with YaRN's stretching and size, computed in f64."""
        c = self.c
        factor = c.rope_scaling.attention_factor if c.rope_scaling else 1.0
        angles = np.arange(c.max_position_embeddings)[:, None] * rope_frequencies(c)
        shape = angles.shape
        cos, sin = ((turn(angles) * factor).astype(np.float32) for turn in (np.cos, np.sin))
        return self.g.tensor("rope.cos", np.float32, shape, [cos]), self.g.tensor("rope.sin", np.float32, shape, [sin])

    def _mask(self, ids: str, attention_mask: str) -> str:
        """What is added to the attention logits: f32[B,1,T,S], 0 or MASKED (later tokens, and those masked outside)."""
        g = self.g
        n_tokens = g.op("Shape", ids, start=1, end=2)
        total = g.op("Shape", attention_mask, start=1, end=2)
        zero, one = (g.constant(np.array(value, np.int64)) for value in (0, 1))
        end = g.op("Squeeze", total)
        keys = g.op("Range", zero, end, one)
        queries = g.op("Unsqueeze", g.op("Range", g.op("Squeeze", g.op("Sub", total, n_tokens)), end, one), g.ints(1))
        later = g.op("Greater", keys, queries)  # [T,S]
        hidden = g.op("Equal", g.op("Unsqueeze", attention_mask, g.ints(1, 2)), zero)  # [B,1,1,S]
        return g.op("Where", g.op("Or", later, hidden), g.scalar(MASKED), g.scalar(0.0))

    # ---- feed-forward ----

    def mlp(self, w: MLP, x: str) -> str:
        """down(silu(gate x) * (up x))."""
        linear = self.storage.linear
        return linear(self.gated(linear(x, w.gate_proj), linear(x, w.up_proj)), w.down_proj)

    def gated(self, gate: str, up: str) -> str:
        """silu(gate) * up."""
        g = self.g
        return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)

    def moe(self, w: MoE, x: str) -> str:
        """Routed experts plus the shared ones. Source: section 2.2."""
        g, c = self.g, self.c
        logits = g.op("Reshape", self.storage.float_linear(x, w.gate), g.ints(-1, c.n_routed_experts))  # [BT,E]
        scores = g.op("Sigmoid", logits) if c.scoring_func == "sigmoid" else g.op("Softmax", logits, axis=-1)
        choice = scores
        if w.e_score_correction_bias.any():
            choice = g.op("Add", scores, g.constant(w.e_score_correction_bias))
        if c.n_group > 1:
            choice = self.within_best_groups(choice)
        if self.storage.is_float:
            out = self.all_experts(w.experts, x, self.mixing_weights(scores, choice))
        else:
            out = self.storage.experts(w.experts, x, choice, scores, c)
        if c.routed_scaling_factor != 1.0:
            out = g.op("Mul", out, g.scalar(c.routed_scaling_factor))
        return out if w.shared_experts is None else g.op("Add", out, self.mlp(w.shared_experts, x))

    def within_best_groups(self, choice: str) -> str:
        """Rule out the experts of all but the best groups. [BT,E] -> [BT,E] with -inf. Source: section 2.2.2."""
        g, c = self.g, self.c
        groups = g.op("Reshape", choice, g.ints(0, c.n_group, -1))  # [BT,groups,experts of a group]
        best, _ = g.ops("TopK", 2, groups, g.ints(c.group_score_experts), axis=-1)
        group_scores = g.op("ReduceSum", best, g.ints(-1), keepdims=0)  # [BT,groups]
        columns = self.best_columns(group_scores, c.topk_group)
        ones = g.op("Expand", g.scalar(1.0), g.op("Shape", columns))
        kept = g.op("Cast", self.spread(group_scores, columns, ones), to=TensorProto.BOOL)
        masked = g.op("Where", g.op("Unsqueeze", kept, g.ints(2)), groups, g.scalar(-np.inf))
        return g.op("Reshape", masked, g.ints(0, c.n_routed_experts))

    def best_columns(self, scores: str, k: int) -> str:
        """Where the k largest values of each row are. f32[BT,n] -> i64[BT,k]."""
        return self.g.ops("TopK", 2, scores, self.g.ints(k), axis=-1)[1]

    def spread(self, like: str, columns: str, values: str) -> str:
        """A row of zeros for each row of `like` f32[BT,n], with `values` f32[BT,k] in its `columns` -> f32[BT,n]."""
        zeros = self.g.op("Mul", like, self.g.scalar(0.0))
        return self.g.op("ScatterElements", zeros, columns, values, axis=-1)

    def mixing_weights(self, scores: str, choice: str) -> str:
        """Each token's weight of each expert, 0 for all but the chosen. [BT,E], [BT,E] -> [BT,E]."""
        columns = self.best_columns(choice, self.c.num_experts_per_tok)
        chosen = self.g.op("GatherElements", scores, columns, axis=-1)
        return self.spread(scores, columns, self.normed(chosen))

    def normed(self, chosen: str) -> str:
        """The chosen experts' scores [BT,K], normed where the model norms them."""
        g = self.g
        if not self.c.norm_topk_prob:
            return chosen
        total = g.op("ReduceSum", chosen, g.ints(-1), keepdims=1)
        return g.op("Div", chosen, g.op("Max", total, g.scalar(MIN_WEIGHT_SUM)))

    def all_experts(self, w: MLP, x: str, weights: str) -> str:
        """Every expert for every token, weighted by f32[BT,E]: standard operators only, and slow."""
        g, stack = self.g, self.storage.float_stack
        tokens = g.op("Reshape", x, g.ints(1, -1, self.c.hidden_size))
        gated = self.gated(g.op("MatMul", tokens, stack(w.gate_proj)), g.op("MatMul", tokens, stack(w.up_proj)))
        by_expert = g.op("Unsqueeze", g.op("Transpose", weights, perm=[1, 0]), g.ints(2))  # [E,BT,1]
        outputs = g.op("MatMul", g.op("Mul", gated, by_expert), stack(w.down_proj))  # [E,BT,D]
        return g.op("Reshape", g.op("ReduceSum", outputs, g.ints(0), keepdims=0), g.op("Shape", x))
