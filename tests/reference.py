"""A slow, obvious DeepSeek-V2/V3 in numpy float64, written after the papers: the twin our engine is tested against.

It imports nothing of the engine. Weights and settings are a plain dict each, under the names a `deepseek2` GGUF file
gives them; attention is the expanded form of the papers (keys and values of every head), without a cache.

Letters: T tokens, H heads, D hidden, R kv_lora_rank, P rope, N nope, V value head, E experts, K active, F expert width.
Source: DeepSeek-V2, arXiv 2405.04434, section 2; DeepSeek-V3, arXiv 2412.19437, section 2.1; YaRN, arXiv 2309.00071.
"""

import math
from pathlib import Path

import gguf
import numpy as np


def read_gguf(path):
    """Read a GGUF file with the gguf package -> (metadata dict, tensors dict of f64 arrays in numpy order)."""
    reader = gguf.GGUFReader(Path(path))
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        tensors[tensor.name] = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(shape)
    return metadata, tensors


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def to_bf16(x):
    """Round to bfloat16's 8 bits of precision, ties to even."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float32).astype(np.float64))
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def softmax(x):
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def swiglu(x, gate, up, down):
    """x f64[T,D], gate and up f64[F,D], down f64[D,F] -> f64[T,D]."""
    g = x @ gate.T
    return (g * sigmoid(g) * (x @ up.T)) @ down.T


def rotate_pairs(x, turns):
    """Multiply each adjacent pair (x0, x1), (x2, x3)... of x f64[T,...,P], as x0 + i x1, by turns c128[T,P/2]."""
    turns = turns.reshape(turns.shape[0], *[1] * (x.ndim - 2), turns.shape[1])
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
    out = np.empty_like(x)
    out[..., 0::2] = turned.real
    out[..., 1::2] = turned.imag
    return out


class ReferenceModel:
    """The whole model; `logits(token_ids)` is its one use."""

    def __init__(self, metadata, tensors, *, bf16_latents=False):
        self.meta = metadata
        self.w = tensors
        self.kept = to_bf16 if bf16_latents else np.asarray  # what a cache does to the latents and rope keys it keeps
        # The smallest gap at a choice of experts or groups seen by `logits`: a golden with a near-tie would be flaky.
        self.min_router_margin = math.inf

    @classmethod
    def from_gguf(cls, path, **options):
        return cls(*read_gguf(path), **options)

    def get(self, key, default=None):
        return self.meta.get(f"deepseek2.{key}", default)

    def logits(self, token_ids):
        """Next-token logits after every position. token_ids [T] -> f64[T,vocab]."""
        ids = np.asarray(token_ids)
        x = self.w["token_embd.weight"][ids]
        n_layers = self.get("block_count") - self.get("nextn_predict_layers", 0)
        for layer in range(n_layers):
            x = x + self.attention(layer, self.norm(x, f"blk.{layer}.attn_norm.weight"))
            h = self.norm(x, f"blk.{layer}.ffn_norm.weight")
            dense = layer < self.get("leading_dense_block_count", 0)
            x = x + (self.dense(layer, h) if dense else self.mixture(layer, h))
        x = self.norm(x, "output_norm.weight")
        return x @ self.w.get("output.weight", self.w["token_embd.weight"]).T

    def norm(self, x, name):
        return rms_norm(x, self.w[name], self.get("attention.layer_norm_rms_epsilon"))

    # ---- attention

    def rope_frequencies(self):
        """Angle per position of each pair -> f64[P/2]."""
        P = self.get("rope.dimension_count")
        base = self.get("rope.freq_base", 10000.0)
        theta = base ** (-np.arange(0, P, 2) / P)
        factor = self.get("rope.scaling.factor", 1.0) or 1.0
        kind = self.get("rope.scaling.type", "linear")
        if kind == "none":
            return theta
        if kind == "linear":
            return theta / factor
        trained_length = self.get("rope.scaling.original_context_length")

        def pair_turning(n_rotations):  # the pair (a fraction) that turns so often within the trained length
            return P * math.log(trained_length / (n_rotations * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(pair_turning(32)), 0)
        high = min(math.ceil(pair_turning(1)), P - 1)
        interpolated = np.clip((np.arange(P // 2) - low) / max(high - low, 0.001), 0, 1)
        return theta / factor * interpolated + theta * (1 - interpolated)

    def rope_size(self):
        """YaRN's temperature is in cos and sin, unless the file puts it into the softmax scale."""
        if self.get("rope.scaling.type") == "yarn" and not self.get("rope.scaling.yarn_log_multiplier"):
            return 1 + 0.1 * math.log(self.get("rope.scaling.factor"))
        return 1.0

    def attention_scale(self):
        scale = 1 / math.sqrt(self.head_sizes()[0] + self.get("rope.dimension_count"))
        if self.get("rope.scaling.type") == "yarn":
            m = self.get("rope.scaling.yarn_log_multiplier", 0.0)  # 0.1 * mscale_all_dim
            scale *= (1 + m * math.log(self.get("rope.scaling.factor"))) ** 2
        return scale

    def head_sizes(self):
        """-> N, V."""
        suffix = "_mla" if self.get("attention.key_length_mla") else ""
        P = self.get("rope.dimension_count")
        return self.get(f"attention.key_length{suffix}") - P, self.get(f"attention.value_length{suffix}")

    def key_and_value_weights(self, layer):
        """-> f64[H,N,R], f64[H,V,R]: what turns a latent into a head's key and value."""
        H = self.get("attention.head_count")
        N, V = self.head_sizes()
        joint = self.w.get(f"blk.{layer}.attn_kv_b.weight")
        if joint is not None:
            joint = joint.reshape(H, N + V, -1)
            return joint[:, :N], joint[:, N:]
        return self.w[f"blk.{layer}.attn_k_b.weight"].transpose(0, 2, 1), self.w[f"blk.{layer}.attn_v_b.weight"]

    def attention(self, layer, x):
        T = x.shape[0]
        H, R = self.get("attention.head_count"), self.get("attention.kv_lora_rank")
        N, _ = self.head_sizes()
        blk = f"blk.{layer}"
        if self.get("attention.q_lora_rank"):
            c_q = self.norm(x @ self.w[f"{blk}.attn_q_a.weight"].T, f"{blk}.attn_q_a_norm.weight")
            q = c_q @ self.w[f"{blk}.attn_q_b.weight"].T
        else:
            q = x @ self.w[f"{blk}.attn_q.weight"].T
        q = q.reshape(T, H, -1)
        kv_a = x @ self.w[f"{blk}.attn_kv_a_mqa.weight"].T
        c_kv = self.kept(self.norm(kv_a[:, :R], f"{blk}.attn_kv_a_norm.weight"))

        turns = self.rope_size() * np.exp(1j * np.outer(np.arange(T), self.rope_frequencies()))
        q_pe = rotate_pairs(q[:, :, N:], turns)
        k_pe = self.kept(rotate_pairs(kv_a[:, R:], turns))

        w_k, w_v = self.key_and_value_weights(layer)
        k_nope = np.einsum("tr,hnr->thn", c_kv, w_k)
        v = np.einsum("tr,hvr->thv", c_kv, w_v)
        q = np.concatenate([q[:, :, :N], q_pe], axis=2)
        k = np.concatenate([k_nope, np.repeat(k_pe[:, None, :], H, axis=1)], axis=2)

        scores = np.einsum("thd,shd->hts", q, k) * self.attention_scale()
        scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
        out = np.einsum("hts,shv->thv", softmax(scores), v)
        return out.reshape(T, -1) @ self.w[f"{blk}.attn_output.weight"].T

    # ---- feed-forward

    def dense(self, layer, x):
        return swiglu(x, *(self.w[f"blk.{layer}.ffn_{part}.weight"] for part in ("gate", "up", "down")))

    def mixture(self, layer, x):
        chosen, weights = self.route(layer, x)
        out = np.zeros_like(x)
        for t in range(x.shape[0]):
            for expert, weight in zip(chosen[t], weights[t], strict=True):
                out[t] += weight * swiglu(x[t : t + 1], *self.expert_weights(layer, expert))[0]
        if self.get("expert_shared_count"):
            out += swiglu(x, *(self.w[f"blk.{layer}.ffn_{part}_shexp.weight"] for part in ("gate", "up", "down")))
        return out

    def expert_weights(self, layer, expert):
        down = self.w[f"blk.{layer}.ffn_down_exps.weight"][expert]
        fused = self.w.get(f"blk.{layer}.ffn_gate_up_exps.weight")
        if fused is not None:
            gate, up = np.split(fused[expert], 2)
            return gate, up, down
        gate, up = (self.w[f"blk.{layer}.ffn_{part}_exps.weight"][expert] for part in ("gate", "up"))
        return gate, up, down

    def is_sigmoid(self):
        return self.get("expert_gating_func", 1) == 2

    def n_best_of_group(self):
        """V3 scores a group of experts by its best two, V2 by its best one."""
        return 2 if self.is_sigmoid() else 1

    def route(self, layer, x):
        """Choose experts. x f64[T,D] -> ids [T][K], weights [T][K]."""
        E, K = self.get("expert_count"), self.get("expert_used_count")
        n_group, topk_group = self.get("expert_group_count", 1), self.get("expert_group_used_count", 1)
        router_logits = x @ self.w[f"blk.{layer}.ffn_gate_inp.weight"].T
        probs = sigmoid(router_logits) if self.is_sigmoid() else softmax(router_logits)
        selection = probs + self.w.get(f"blk.{layer}.exp_probs_b.bias", np.zeros(E))
        chosen, weights = [], []
        for t in range(x.shape[0]):
            allowed = np.arange(E)
            if n_group > 1:
                members = np.split(allowed, n_group)
                n_best = self.n_best_of_group()
                group_scores = np.array([np.sort(selection[t, group])[-n_best:].sum() for group in members])
                allowed = np.concatenate([members[g] for g in self.best(group_scores, topk_group)])
            ids = allowed[self.best(selection[t, allowed], K)]
            weight = probs[t, ids]
            if self.get("expert_weights_norm", False):
                weight = weight / weight.sum()
            chosen.append(ids)
            weights.append(weight * (self.get("expert_weights_scale", 1.0) or 1.0))
        return chosen, weights

    def best(self, scores, count):
        """Indices of the `count` highest scores, highest first."""
        order = np.argsort(-scores, kind="stable")
        if count < len(scores):
            self.min_router_margin = min(self.min_router_margin, scores[order[count - 1]] - scores[order[count]])
        return order[:count]
