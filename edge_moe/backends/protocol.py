"""What a model pass asks of a backend: a few coarse operations, and a place to run them.

A pass is written in `Operations` alone and never asks which backend it has. What they give and take is the backend's
own (numpy arrays, places in a device's memory): between operations a pass only cuts and reshapes, by `len`, `reshape`
and `[...]`. Weights and gains come as they lie in the file.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from edge_moe.config import DeepseekV2Config, LlamaConfig
from edge_moe.token_cache import TokenCache
from edge_moe.weights import Weight

Array = Any
"""Numbers of a backend, f32 or ids, with `shape`, `len`, `reshape(*shape)`; cut by slices, None and whole numbers."""


class Compute(Protocol):
    """A model pass, or some of its layers."""

    def __call__(
        self, ops: "Operations", source: Array, cache: Any, all_logits: bool, layers: range | None = None
    ) -> Array:
        """source: token ids [T]; where `layers` begins later, the hidden state [T,D] before them.

        Returns logits [T,vocab], or [1,vocab] unless `all_logits`; where `layers` ends earlier, the hidden state [T,D]
        behind them. The cache counts from the first of `layers` on.
        """
        ...


class Operations(Protocol):
    """What a pass is written in. T tokens, H heads, K chosen experts; all numbers f32, ids whole."""

    def rotations(self, cache: Any, n_tokens: int, inv_freq: np.ndarray, factor: float) -> tuple[Array, Array]:
        """cos and sin [T,P/2] of the next positions, times `factor`; angles in f64. inv_freq f64[P/2]."""
        ...

    def embed(self, weight: Weight, token_ids: Array) -> Array:
        """Rows of the embedding matrix, [T,D]."""
        ...

    def add(self, a: Array, b: Array) -> Array:
        """a + b, both [T,D]."""
        ...

    def norm(self, x: Array, weight: np.ndarray, eps: float) -> Array:
        """RMSNorm of each row. x [T,D], weight f32[D] -> [T,D]."""
        ...

    def linear(self, x: Array, *weights: Weight, fine: Sequence[Weight] = ()) -> list[Array]:
        """Products of one input with several matrices, behind them with `fine` ones. x [T,C] -> a list of [T,n_rows].

        For fine ones a backend that rounds x to 8 bits keeps 15, where the weight itself has 8: a coarser one is not
        worth it.
        """
        ...

    def per_head(self, x: Array, weight: Weight) -> Array:
        """A matrix of its own for each head. x [T,H,C], weight [H,n_rows,C] -> [T,H,n_rows]."""
        ...

    def per_head_transposed(self, x: Array, weight: Weight) -> Array:
        """The same with each matrix transposed. x [T,H,n_rows], weight [H,n_rows,C] -> [T,H,C]."""
        ...

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotate adjacent pairs. x [T,H,P], cos and sin [T,P/2] -> [T,H,P]."""
        ...

    def latent_attention(
        self, q_latent: Array, q_pe: Array, c_kv: Array, k_pe: Array, cache: Any, layer: int, scale: float
    ) -> Array:
        """Append the new latents to the cache, then attend to all of it.

        q_latent [T,H,R], q_pe [T,H,P], c_kv [T,R], k_pe [T,P] -> [T,H,R], latents weighted by softmax.
        """
        ...

    def expands(self, n_tokens: int, cache: Any) -> bool:
        """Whether attention of so many new tokens is wanted as `expanded_attention`."""
        ...

    def expanded_attention(
        self,
        q_nope: Array,
        q_pe: Array,
        c_kv: Array,
        k_pe: Array,
        k_b_proj: Weight,
        k_b_is_transposed: bool,
        v_b_proj: Weight,
        cache: Any,
        layer: int,
        scale: float,
    ) -> Array:
        """Append the new latents to the cache, then attend to the keys and values that all of its latents make.

        q_nope [T,H,N], q_pe [T,H,P], c_kv [T,R], k_pe [T,P] -> [T,H,V], values weighted by softmax.
        """
        ...

    def grouped_attention(self, q: Array, k: Array, v: Array, cache: Any, layer: int, scale: float) -> Array:
        """Append the new keys and values to the cache, then attend to those that each token sees.

        q [T,H,N], k and v [T,K,N] -> [T,H,N], values weighted by softmax.
        """
        ...

    def route(
        self,
        logits: Array,
        bias: Any,
        *,
        sigmoid: bool,
        n_group: int,
        topk_group: int,
        group_score_experts: int,
        top_k: int,
        norm: bool,
        scale: float,
    ) -> tuple[Array, Array]:
        """Choose experts. logits [T,E], bias f32[E] or what `favour` made of it -> ids [T,K], weights [T,K]."""
        ...

    @property
    def looks_ahead(self) -> bool:
        """Whether `prefetch` is worth its predictions."""
        ...

    def request(self, ids: Array, down: Weight) -> None:
        """The experts [T,K] of the layer of `down` will be wanted soon."""
        ...

    def prefetch(self, ids: Array, down: Weight) -> None:
        """The same of a layer to come, whose experts are guessed."""
        ...

    def favour(self, bias: np.ndarray, down: Weight) -> Any:
        """The router's bias f32[E] in the layer of `down`, to be given to `route`."""
        ...

    def gated_mlp(self, x: Array, gate: Weight, up: Weight, down: Weight, *, fine: bool = False) -> Array:
        """down(silu(gate x) * (up x)), all products fine or none. x [T,D] -> [T,D]."""
        ...

    def experts(self, x: Array, ids: Array, weights: Array, gate: Weight, up: Weight, down: Weight) -> Array:
        """The chosen experts' gated MLPs, weighted and summed. x [T,D], ids [T,K], weights [T,K] -> [T,D]."""
        ...


class Backend(Protocol):
    """Where passes run, and what remembers the tokens for them."""

    def latent_cache(
        self, config: DeepseekV2Config, context_length: int, kind: str, gains: np.ndarray | None
    ) -> TokenCache:
        """An empty cache of latents; gains f32[layers,R] as of LatentCache. Raises OptionError."""
        ...

    def kv_cache(self, config: LlamaConfig, context_length: int, kind: str) -> TokenCache:
        """An empty cache of keys and values. Raises OptionError."""
        ...

    def prepare(self, compute: Compute, cache: Any, width: int = 0) -> None:
        """Once, before the first run: weights go where they are used, beside a cache like this one.

        width: of the hidden states that are given instead of token ids; 0: ids are given.
        """
        ...

    def run(self, compute: Compute, source: np.ndarray, cache: Any, all_logits: bool) -> np.ndarray:
        """Run a pass; the caller advances the cache. source i64[T] or f32[T,D] -> what `compute` gives, a new array."""
        ...
