"""The coarse operations of a model pass in MLX: arrays that are not computed before somebody wants them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_moe.backends.mlx.cache import MlxCache
from edge_moe.backends.mlx.weights import MlxWeights
from edge_moe.backends.rotations import rotations_at
from edge_moe.backends.streaming import stream_experts
from edge_moe.expert_store import ExpertStore
from edge_moe.weights import Weight


class MlxOperations:
    """Operations on mx.array; all f32."""

    def __init__(self, mx: Any, weights: MlxWeights, store: ExpertStore | None) -> None:
        """With a store experts come from there, and our own kernels run them: unified memory has no way between."""
        self._mx, self._weights, self._store = mx, weights, store
        self.position = 0  # of the pass's first token
        self.n_tokens = 0
        self.is_only_named = False  # a pass that nobody computes: it names the weights
        self.n_evaluations = 0

    def evaluate(self, *arrays: Any) -> None:
        """Compute arrays now."""
        self._mx.eval(*arrays)
        self.n_evaluations += 1

    def rotations(self, cache: MlxCache, n_tokens: int, inv_freq: np.ndarray, factor: float) -> tuple[Any, Any]:
        """cos and sin [T,P/2] of the pass's positions."""
        cos, sin = rotations_at(self.position, n_tokens, inv_freq, factor)
        return self._mx.array(cos), self._mx.array(sin)

    def embed(self, weight: Weight, token_ids: Any) -> Any:
        """Rows of the embedding matrix. token_ids [T] -> [T,D]."""
        return self._weights.rows(weight, token_ids)

    def add(self, a: Any, b: Any) -> Any:
        """a + b, both [T,D]."""
        return a + b

    def norm(self, x: Any, weight: np.ndarray, eps: float) -> Any:
        """RMSNorm of each row. x [T,D], weight f32[D] -> [T,D]."""
        return self._mx.fast.rms_norm(x, self._weights.vector(weight), eps)

    def linear(self, x: Any, *weights: Weight, fine: Sequence[Weight] = ()) -> list[Any]:
        """Products of one input with several matrices, all fine: x is not rounded. x [T,C] -> a list of [T,n_rows]."""
        return [self._weights.product(x, weight) for weight in (*weights, *fine)]

    def per_head(self, x: Any, weight: Weight) -> Any:
        """A matrix of its own for each head. x [T,H,C], weight [H,n_rows,C] -> [T,H,n_rows]."""
        return self._weights.product(x.swapaxes(0, 1), weight).swapaxes(0, 1)

    def per_head_transposed(self, x: Any, weight: Weight) -> Any:
        """The same with each matrix transposed. x [T,H,n_rows], weight [H,n_rows,C] -> [T,H,C]."""
        return self._weights.product(x.swapaxes(0, 1), weight, transpose=False).swapaxes(0, 1)

    def rope(self, x: Any, cos: Any, sin: Any) -> Any:
        """Rotate adjacent pairs. x [T,H,P], cos and sin [T,P/2] -> [T,H,P]."""
        even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, None], sin[:, None]
        return self._mx.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)

    def latent_attention(
        self, q_latent: Any, q_pe: Any, c_kv: Any, k_pe: Any, cache: MlxCache, layer: int, scale: float
    ) -> Any:
        """Append the new latents to the cache, then attend to all of it; shapes as of the protocol."""
        mx, (n_tokens, n_heads, rank) = self._mx, q_latent.shape
        rows = cache.store(layer, self.position, mx.concatenate([c_kv, k_pe], axis=-1)).astype(mx.float32)
        q = mx.concatenate([q_latent, q_pe], axis=-1).reshape(n_tokens * n_heads, -1)
        scores = (scale * (q @ rows.T)).reshape(n_tokens, n_heads, -1)
        probs = mx.softmax(self._masked(scores, cache), axis=-1, precise=True)
        return (probs.reshape(n_tokens * n_heads, -1) @ rows[:, :rank]).reshape(n_tokens, n_heads, rank)

    def expands(self, n_tokens: int, cache: MlxCache) -> bool:
        """Never: one form of attention is enough here."""
        return False

    def expanded_attention(self, *arguments: object) -> Any:
        """Never asked for."""
        raise NotImplementedError

    def grouped_attention(self, q: Any, k: Any, v: Any, cache: MlxCache, layer: int, scale: float) -> Any:
        """Append the new keys and values to the cache, then attend; shapes as of the protocol."""
        mx, (n_tokens, n_heads, dims), n_keys = self._mx, q.shape, k.shape[1]
        new = mx.concatenate([k.reshape(n_tokens, -1), v.reshape(n_tokens, -1)], axis=-1)
        rows = cache.store(layer, self.position, new).astype(mx.float32).reshape(-1, 2, n_keys, dims)
        keys, values = (rows[:, i].swapaxes(0, 1) for i in range(2))  # [K,S,N]
        groups = n_heads // n_keys
        q = q.reshape(n_tokens, n_keys, groups, dims).transpose(1, 2, 0, 3).reshape(n_keys, groups * n_tokens, dims)
        scores = (scale * (q @ keys.swapaxes(1, 2))).reshape(n_heads, n_tokens, -1).swapaxes(0, 1)
        probs = mx.softmax(self._masked(scores, cache), axis=-1, precise=True).swapaxes(0, 1)
        out = probs.reshape(n_keys, groups * n_tokens, -1) @ values
        return out.reshape(n_heads, n_tokens, dims).swapaxes(0, 1)

    def route(
        self,
        logits: Any,
        bias: Any,
        *,
        sigmoid: bool,
        n_group: int,
        topk_group: int,
        group_score_experts: int,
        top_k: int,
        norm: bool,
        scale: float,
    ) -> tuple[Any, Any]:
        """Choose experts. logits [T,E], bias [E] of `favour` -> ids [T,K], weights [T,K]."""
        mx, (n_tokens, n_experts) = self._mx, logits.shape
        probs = mx.sigmoid(logits) if sigmoid else mx.softmax(logits, axis=-1, precise=True)
        selection = probs + bias
        if n_group > 1:
            groups = selection.reshape(n_tokens, n_group, -1)
            score = mx.sort(groups, axis=-1)[..., -group_score_experts:].sum(-1)
            order = mx.argsort(mx.argsort(-score, axis=-1), axis=-1)  # each group's rank
            lowest = mx.array(-np.inf, mx.float32)
            selection = mx.where((order < topk_group)[..., None], groups, lowest).reshape(n_tokens, n_experts)
        ids = mx.argsort(-selection, axis=-1)[:, :top_k]
        weights = mx.take_along_axis(probs, ids, axis=-1)
        if norm:  # the smallest normal f16, as the reference clamps
            weights = weights / mx.maximum(weights.sum(-1, keepdims=True), 6.103515625e-5)
        return ids, weights * scale

    @property
    def looks_ahead(self) -> bool:
        """Experts are not guessed here: each guess would have to be computed at once."""
        return False

    def request(self, ids: Any, down: Weight) -> None:
        """Of a store: the experts of `ids` [T,K] begin to come, for which they must be known now."""
        if self._store is not None and not self.is_only_named:
            self.evaluate(ids)
            self._store.request(self._store.layer_of(down), np.array(ids).astype(np.int64))

    def prefetch(self, ids: Any, down: Weight) -> None:
        """Never asked for."""

    def favour(self, bias: np.ndarray, down: Weight) -> Any:
        """The router's bias [E]; of a store with a slack, experts in memory are favoured for single tokens."""
        store = self._store
        if store is None or not store.route_slack or self.n_tokens > 1:
            return self._weights.vector(bias)
        return self._mx.array(store.favoured(store.layer_of(down), bias))

    def gated_mlp(self, x: Any, gate: Weight, up: Weight, down: Weight, *, fine: bool = False) -> Any:
        """down(silu(gate x) * (up x)). x [T,D] -> [T,D]."""
        return self.linear(self._gated(*self.linear(x, gate, up)), down)[0]

    def experts(self, x: Any, ids: Any, weights: Any, gate: Weight, up: Weight, down: Weight) -> Any:
        """The chosen experts' gated MLPs, weighted and summed. x [T,D], ids [T,K], weights [T,K] -> [T,D]."""
        if self._store is not None:
            if self.is_only_named:
                return x
            self.evaluate(x, ids, weights)
            arrays = np.array(x), np.array(ids).astype(np.int64), np.array(weights)
            return self._mx.array(stream_experts(self._store, *arrays, gate, up, down))
        x = x[:, None, None]
        gated = self._gated(*(self._weights.gathered(x, stack, ids) for stack in (gate, up)))
        return (weights[..., None] * self._weights.gathered(gated, down, ids)[:, :, 0]).sum(1)

    # ---- parts of the above

    def _gated(self, gate: Any, up: Any) -> Any:
        return gate * self._mx.sigmoid(gate) * up

    def _masked(self, scores: Any, cache: MlxCache) -> Any:
        """scores [T,H,S] with what a token does not see at minus infinity."""
        mx, (n_tokens, _, end) = self._mx, scores.shape
        if n_tokens == 1 and not cache.window:
            return scores
        ahead = mx.arange(end)[None] - mx.arange(self.position, end)[:, None]
        hidden = ahead > 0
        if cache.window:
            hidden = hidden | (ahead <= -cache.window)
        return mx.where(hidden[:, None], mx.array(-np.inf, mx.float32), scores)
