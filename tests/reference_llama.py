"""A slow, obvious Llama, Mistral and Mixtral in numpy float64: the twin that models/llama.py is tested against.

It imports nothing of the engine. Letters: T tokens, H heads, K heads of keys, N head size.
Source: arXiv 2302.13971 (Llama), 2310.06825 (Mistral), 2401.04088 (Mixtral).
"""

import math

import numpy as np
from reference import read_gguf, rms_norm, rotate_pairs, softmax, swiglu, to_bf16


class ReferenceLlama:
    """The whole model; `logits(token_ids)` is its one use."""

    def __init__(self, metadata, tensors, *, bf16_cache=False):
        self.meta, self.w = metadata, tensors
        self.kept = to_bf16 if bf16_cache else np.asarray
        self.min_router_margin = math.inf  # the smallest gap between a chosen expert's logit and one left out

    @classmethod
    def from_gguf(cls, path, **options):
        return cls(*read_gguf(path), **options)

    def get(self, key, default=None):
        return self.meta.get(f"llama.{key}", default)

    def logits(self, token_ids):
        """Next-token logits after every position. token_ids [T] -> f64[T,vocab]."""
        x = self.w["token_embd.weight"][np.asarray(token_ids)]
        for layer in range(self.get("block_count")):
            x = x + self.attention(layer, self.norm(x, f"blk.{layer}.attn_norm.weight"))
            x = x + self.feed_forward(layer, self.norm(x, f"blk.{layer}.ffn_norm.weight"))
        x = self.norm(x, "output_norm.weight")
        return x @ self.w.get("output.weight", self.w["token_embd.weight"]).T

    def norm(self, x, name):
        return rms_norm(x, self.w[name], self.get("attention.layer_norm_rms_epsilon"))

    def turns(self, n_tokens, head_dim):
        freq = self.get("rope.freq_base", 10000.0) ** (-np.arange(0, head_dim, 2) / head_dim)
        if self.get("rope.scaling.type") == "linear":
            freq = freq / self.get("rope.scaling.factor")
        freq = freq / self.w.get("rope_freqs.weight", 1.0)
        return np.exp(1j * np.outer(np.arange(n_tokens), freq))

    def attention(self, layer, x):
        n_tokens, n_heads = len(x), self.get("attention.head_count")
        n_kv_heads = self.get("attention.head_count_kv", n_heads)
        q, k, v = (x @ self.w[f"blk.{layer}.attn_{part}.weight"].T for part in "qkv")
        q = q.reshape(n_tokens, n_heads, -1)
        k, v = k.reshape(n_tokens, n_kv_heads, -1), v.reshape(n_tokens, n_kv_heads, -1)
        turns = self.turns(n_tokens, q.shape[-1])
        q, k, v = rotate_pairs(q, turns), self.kept(rotate_pairs(k, turns)), self.kept(v)
        position = np.arange(n_tokens)
        seen = position[None, :] <= position[:, None]
        if window := self.get("attention.sliding_window", 0):
            seen &= position[None, :] > position[:, None] - window
        out = np.empty_like(q)
        for h in range(n_heads):
            shared = h // (n_heads // n_kv_heads)
            scores = q[:, h] @ k[:, shared].T / math.sqrt(q.shape[-1])
            out[:, h] = softmax(np.where(seen, scores, -np.inf)) @ v[:, shared]
        return out.reshape(n_tokens, -1) @ self.w[f"blk.{layer}.attn_output.weight"].T

    def feed_forward(self, layer, x):
        if not self.get("expert_count", 0):
            return swiglu(x, *(self.w[f"blk.{layer}.ffn_{part}.weight"] for part in ("gate", "up", "down")))
        logits = x @ self.w[f"blk.{layer}.ffn_gate_inp.weight"].T
        n_used, out = self.get("expert_used_count"), np.zeros_like(x)
        for t, row in enumerate(logits):
            order = np.argsort(-row, kind="stable")
            if n_used < len(row):
                self.min_router_margin = min(self.min_router_margin, row[order[n_used - 1]] - row[order[n_used]])
            for expert, weight in zip(order[:n_used], softmax(row[order[:n_used]]), strict=True):
                parts = (self.w[f"blk.{layer}.ffn_{part}_exps.weight"][expert] for part in ("gate", "up", "down"))
                out[t] += weight * swiglu(x[t : t + 1], *parts)[0]
        return out
