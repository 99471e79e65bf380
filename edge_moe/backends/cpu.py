"""The coarse operations of a model pass on the CPU, by the numba kernels.

Every operation takes and gives float32 numpy arrays, and weights as they lie in the file. Slices are made contiguous
before a kernel sees them, so that each kernel is compiled for one memory layout only.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from weakref import WeakKeyDictionary

import numpy as np

from edge_moe.backends.protocol import Compute
from edge_moe.backends.recorder import Program
from edge_moe.backends.rotations import rotations_at
from edge_moe.backends.streaming import stream_experts
from edge_moe.config import DeepseekV2Config, LlamaConfig, ModelConfig
from edge_moe.expert_store import ExpertStore
from edge_moe.formats import BlockFormat
from edge_moe.kernels import attention, elementwise, launch, product_units, products, routing, steps
from edge_moe.kernels.attention_expanded import ExpandedAttention
from edge_moe.kernels.blocks import TAGS
from edge_moe.kv_cache import KvCache
from edge_moe.latent_cache import LatentCache
from edge_moe.token_cache import TokenCache
from edge_moe.weights import Weight

Grouping = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of routing.group_by_expert


EXPANDED_QUERIES, EXPANDED_CONTEXT = 64, 256  # from so many on making keys and values costs less than it saves
_EXPANDED_TOKENS = 512  # of the context at a time


def compile_ahead(config: ModelConfig, formats: Sequence[BlockFormat], kv: str, n_processes: int) -> None:
    """Have other processes compile what takes longest of a model's kernels, unless the cache has it."""
    jobs = [(product_units.product_units, TAGS[fmt.name]) for fmt in formats]
    if isinstance(config, DeepseekV2Config):
        jobs += [(kernel, attention.FORMATS[kv]) for kernel in (attention.prepare_units, attention.attend_units)]
    launch.compile_ahead(jobs, n_processes)


class CpuBackend:
    """Operations with `threads` threads; results do not depend on their number."""

    def __init__(self, threads: int, store: ExpertStore | None = None) -> None:
        """With a store, experts come from there and not from where their weights lie."""
        self.threads = threads
        self.store = store
        self._programs: WeakKeyDictionary[TokenCache, Program] = WeakKeyDictionary()

    def latent_cache(
        self, config: DeepseekV2Config, context_length: int, kind: str, gains: np.ndarray | None
    ) -> LatentCache:
        """An empty cache of latents. Raises OptionError."""
        return LatentCache(config, context_length, kind, gains)

    def kv_cache(self, config: LlamaConfig, context_length: int, kind: str) -> KvCache:
        """An empty cache of keys and values. Raises OptionError."""
        return KvCache(config, context_length, kind)

    def prepare(self, compute: Compute, cache: TokenCache, width: int = 0) -> None:
        """Nothing: weights are used where they lie. Single tokens are ids here, never hidden states."""

    def run(self, compute: Compute, source: np.ndarray, cache: TokenCache, all_logits: bool) -> np.ndarray:
        """Run a model pass `compute(operations, token_ids, cache, all_logits)`.

        Of a single token the pass is recorded once for each cache, then replayed without Python between the kernels.
        """
        try:
            if self.store is None:
                return self._run(compute, source, cache, all_logits)
            started = perf_counter()
            self.store.begin(len(source))
            logits = self._run(compute, source, cache, all_logits)
            self.store.finish(perf_counter() - started)
            return logits
        except SystemError as error:  # a Ctrl-C that came as a kernel returned, or returned to a kernel
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, KeyboardInterrupt):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None

    def _run(self, compute: Compute, token_ids: np.ndarray, cache: TokenCache, all_logits: bool) -> np.ndarray:
        if len(token_ids) > 1:
            elementwise.set_threads(self.threads)  # numba keeps the number of threads per calling thread
            return compute(self, token_ids, cache, all_logits)
        program = self._programs.get(cache)
        if program is None:
            elementwise.set_threads(self.threads)
            program = self._programs[cache] = Program(compute, cache, self.threads, self.store)
        return program.run(int(token_ids[0]), cache.length)

    def rotations(
        self, cache: TokenCache, n_tokens: int, inv_freq: np.ndarray, factor: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin f32[T,P/2] of the next positions, times `factor`. inv_freq f64[P/2]."""
        cos, sin = rotations_at(cache.length, n_tokens, inv_freq, factor)
        return cos, sin

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a + b, both f32[T,D]."""
        return a + b

    def embed(self, weight: Weight, token_ids: np.ndarray) -> np.ndarray:
        """Rows of the embedding matrix. token_ids i64[T] -> f32[T,D]."""
        return products.decode_rows(weight.format, weight.address, token_ids, weight.shape[-1])

    def norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """RMSNorm of each row. x f32[T,D], weight f32[D] -> f32[T,D]."""
        return steps.rms_norm(x, weight, eps)

    def linear(self, x: np.ndarray, *weights: Weight, fine: Sequence[Weight] = ()) -> list[np.ndarray]:
        """Products of one input with several matrices, then with `fine` ones. x f32[T,C] -> a list of f32[T,n_rows]."""
        plain = [*weights, *(w for w in fine if not w.has_8_bits)]
        doubled = [w for w in fine if w.has_8_bits]
        parts = ([(w.format, w.address, w.shape[0]) for w in each] for each in (plain, doubled))
        outputs = dict(zip([*plain, *doubled], products.linear(x, *parts), strict=True))
        return [outputs[w] for w in (*weights, *fine)]

    def per_head(self, x: np.ndarray, weight: Weight) -> np.ndarray:
        """A matrix of its own for each head. x f32[T,H,C], weight [H,n_rows,C] -> f32[T,H,n_rows]."""
        n_tokens, n_heads, n_cols = x.shape
        rows = np.arange(n_tokens * n_heads).reshape(n_tokens, n_heads).T.ravel()  # head by head
        offsets = np.arange(n_heads + 1) * n_tokens
        out = products.grouped_linear(
            x.reshape(n_tokens * n_heads, n_cols), rows, offsets, weight.format, weight.addresses, weight.shape[1]
        )
        return out.reshape(n_heads, n_tokens, -1).transpose(1, 0, 2)

    def per_head_transposed(self, x: np.ndarray, weight: Weight) -> np.ndarray:
        """The same with each matrix transposed. x f32[T,H,n_rows], weight [H,n_rows,C] -> f32[T,H,C]."""
        n_tokens, n_heads, n_rows = x.shape
        by_head = x.transpose(1, 0, 2).reshape(n_heads * n_tokens, n_rows)
        offsets = np.arange(n_heads + 1) * n_tokens
        out = products.grouped_linear_transposed(
            by_head, offsets, weight.format, weight.addresses, n_rows, weight.shape[2]
        )
        return out.reshape(n_heads, n_tokens, -1).transpose(1, 0, 2)

    def rope(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """Rotate adjacent pairs. x f32[T,H,P], cos and sin f32[T,P/2] -> f32[T,H,P]."""
        return steps.rope_pairs(x, cos, sin)

    def latent_attention(
        self,
        q_latent: np.ndarray,
        q_pe: np.ndarray,
        c_kv: np.ndarray,
        k_pe: np.ndarray,
        cache: LatentCache,
        layer: int,
        scale: float,
    ) -> np.ndarray:
        """Append the new latents to the cache, then attend to all of it.

        q_latent f32[T,H,R], q_pe f32[T,H,P], c_kv f32[T,R], k_pe f32[T,P] -> f32[T,H,R], latents weighted by softmax.
        """
        return cache.attend(layer, q_latent, q_pe, c_kv, k_pe, scale, self.threads)

    def expands(self, n_tokens: int, cache: LatentCache) -> bool:
        """Whether attention of so many new tokens is cheaper in expanded form: floats have no whole-number products."""
        is_long = n_tokens >= EXPANDED_QUERIES and cache.length + n_tokens >= EXPANDED_CONTEXT
        return is_long and cache.kind in ("bf16", "f32")

    def expanded_attention(
        self,
        q_nope: np.ndarray,
        q_pe: np.ndarray,
        c_kv: np.ndarray,
        k_pe: np.ndarray,
        k_b_proj: Weight,
        k_b_is_transposed: bool,
        v_b_proj: Weight,
        cache: LatentCache,
        layer: int,
        scale: float,
    ) -> np.ndarray:
        """Append the new latents to the cache, then attend to the keys and values that all of its latents make.

        q_nope f32[T,H,N], q_pe f32[T,H,P], c_kv f32[T,R], k_pe f32[T,P] -> f32[T,H,V], values weighted by softmax.
        k_b_proj [H,R,N], or [H,N,R] where it is transposed; v_b_proj [H,V,R].
        """
        start, end = cache.length, cache.length + len(q_nope)
        cache.store(layer, c_kv, k_pe, self.threads)
        key_matrix, value_matrix = _decoded(k_b_proj), _decoded(v_b_proj)
        if not k_b_is_transposed:
            key_matrix = key_matrix.swapaxes(1, 2)
        attention = ExpandedAttention(q_nope, q_pe, key_matrix, value_matrix, start, scale)
        for first in range(0, end, _EXPANDED_TOKENS):
            attention.add(first, *cache.latents(layer, first, min(first + _EXPANDED_TOKENS, end)))
        return attention.result()

    def grouped_attention(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: KvCache, layer: int, scale: float
    ) -> np.ndarray:
        """Append the new keys and values to the cache, then attend to those that each token sees.

        q f32[T,H,N], k and v f32[T,K,N] -> f32[T,H,N], values weighted by softmax.
        """
        return cache.attend(layer, q, k, v, scale, self.threads)

    def route(
        self,
        logits: np.ndarray,
        bias: np.ndarray,
        *,
        sigmoid: bool,
        n_group: int,
        topk_group: int,
        group_score_experts: int,
        top_k: int,
        norm: bool,
        scale: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose experts. logits f32[T,E], bias f32[E] -> ids i64[T,K], weights f32[T,K]."""
        return steps.route(logits, bias, sigmoid, n_group, topk_group, group_score_experts, top_k, norm, scale)

    @property
    def looks_ahead(self) -> bool:
        """Whether `prefetch` is worth its predictions: where experts may have to be read."""
        return self.store is not None

    def request(self, ids: np.ndarray, down: Weight) -> None:
        """The experts i64[T,K] of the layer of `down` will be wanted soon: those not in memory begin to come."""
        if self.store is not None:
            self.store.request(self.store.layer_of(down), ids)

    def prefetch(self, ids: np.ndarray, down: Weight) -> None:
        """The same of a layer to come, whose experts are guessed: when nothing else is read."""
        if self.store is not None:
            self.store.prefetch(self.store.layer_of(down), ids)

    def favour(self, bias: np.ndarray, down: Weight) -> np.ndarray:
        """The router's bias f32[E] in the layer of `down`; experts in memory are favoured for single tokens only."""
        return bias

    def gated_mlp(self, x: np.ndarray, gate: Weight, up: Weight, down: Weight, *, fine: bool = False) -> np.ndarray:
        """down(silu(gate x) * (up x)), all products fine or none. x f32[T,D] -> f32[T,D]."""
        if fine:
            return self.linear(steps.silu_multiply(*self.linear(x, fine=(gate, up))), fine=(down,))[0]
        return self.linear(steps.silu_multiply(*self.linear(x, gate, up)), down)[0]

    def experts(
        self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Weight, up: Weight, down: Weight
    ) -> np.ndarray:
        """The chosen experts' gated MLPs, weighted and summed. x f32[T,D], ids i64[T,K], weights f32[T,K] -> f32[T,D].

        gate and up [E,F,D], down [E,D,F]; only the chosen experts' bytes are read.
        """
        if self.store is not None:
            return stream_experts(self.store, x, ids, weights, gate, up, down)
        grouping = routing.group_by_expert(ids, down.shape[0])
        return steps.weighted_sum(self.by_expert(x, grouping, gate, up, down), grouping[3], weights)

    def by_expert(self, x: np.ndarray, grouping: Grouping, gate: Weight, up: Weight, down: Weight) -> np.ndarray:
        """What each chosen expert gives for each of its tokens, one expert behind the other: f32[T*K,D]."""
        gated = self.gated_by_expert(x, grouping, gate, up)
        return _grouped_product(gated, np.arange(len(grouping[2])), grouping, down)[0]

    def gated_by_expert(self, x: np.ndarray, grouping: Grouping, gate: Weight, up: Weight) -> np.ndarray:
        """silu(gate x) * (up x) of each chosen expert and token, one expert behind the other: f32[T*K,F]."""
        rows = grouping[2]
        if gate.format is up.format:  # one parallel region, the inputs quantized once
            gate_out, up_out = _grouped_product(x, rows, grouping, gate, up)
        else:
            gate_out, up_out = _grouped_product(x, rows, grouping, gate)[0], _grouped_product(x, rows, grouping, up)[0]
        return steps.silu_multiply(gate_out, up_out)


def _decoded(stack: Weight) -> np.ndarray:
    """A stack of matrices as floats f32[n,rows,cols]."""
    rows, n_cols = np.arange(stack.shape[1]), stack.shape[2]
    return np.stack([products.decode_rows(stack.format, int(at), rows, n_cols) for at in stack.addresses])


def _grouped_product(inputs: np.ndarray, input_rows: np.ndarray, grouping: Grouping, *stacks: Weight) -> np.ndarray:
    active, offsets, _, _ = grouping
    addresses = np.stack([stack.addresses[active] for stack in stacks])
    return products.grouped_linear(inputs, input_rows, offsets, stacks[0].format, addresses, stacks[0].shape[1])
