"""Quantizes a model layer by layer with error compensation, by what its matrices really take in on a calibration text.

Each layer is fed by the layers before it as they are quantized. Within one, attention comes first, then gate and up,
then down behind the quantized gate and up. An expert counts the tokens that the router sends it, by the square of the
gate; its second moments are drawn towards those of all tokens of its layer by how few they are. Only one layer's
moments are held at a time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from edge_moe.backends.cpu import CpuBackend
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import FormatError, OptionError
from edge_moe.formats import BlockFormat
from edge_moe.latent_cache import LatentCache
from edge_moe.models.deepseek2 import (
    MLP,
    Attention,
    DeepseekV2,
    LowRankQuery,
    MoE,
    load_weights,
    rope_frequencies,
)
from edge_moe.tokenizer import Tokenizer
from edge_moe.weights import Weight
from edge_moe_quant.compensate import Factor, encode_compensated
from edge_moe_quant.encode import encode_rows
from edge_moe_quant.grids import has_grid
from edge_moe_quant.importance import TRUSTED_HITS
from edge_moe_quant.store import EncodedStore

LEAST_HITS = 256  # tokens of an expert below which its weights are searched only: its moments say too little
_MomentsOf = Callable[[Weight, int], np.ndarray | None]


@dataclass
class Coverage:
    """How often the router chose each expert: hits by layer, i64[E]."""

    n_tokens: int
    hits: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def seldom(self) -> int:
        """Experts, of all layers, with fewer hits than compensation asks for."""
        return int(sum((hits < LEAST_HITS).sum() for hits in self.hits.values()))

    @property
    def least(self) -> int:
        """Hits of the expert that had the fewest."""
        return int(min((hits.min() for hits in self.hits.values()), default=self.n_tokens))


def text_windows(tokenizer: Tokenizer, text: str, length: int, limit: int | None = None) -> np.ndarray:
    """The first `limit` windows of a text, side by side, each a text of its own: i64[N,length].

    Raises OptionError when the text is shorter than one window.
    """
    ids = np.array(tokenizer.encode(text), np.int64)
    n_windows = len(ids) // length
    if limit is not None:
        n_windows = min(n_windows, limit)
    if n_windows < 1:
        raise OptionError(f"the calibration text has {len(ids)} tokens, expected at least {length}; give a longer text")
    windows = ids[: n_windows * length].reshape(n_windows, length)
    if ids[0] == tokenizer.bos_id:
        windows[:, 0] = ids[0]
    return windows


def calibrate(
    checkpoint: Checkpoint,
    windows: np.ndarray,
    formats: Mapping[str, BlockFormat],
    store: EncodedStore,
    *,
    n_threads: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> Coverage:
    """Encode the matrices of all layers and the head into `store`. windows i64[N,L] token ids; formats by file name.

    What the store has already is taken from there. Formats without an even grid, and experts that were seldom hit, are
    searched with the moments as importance; tensors that a layer holds in parts (a fused gate_up or kv_b) are left out.
    Raises FormatError for weights or activations that are not finite.
    """
    job = _Job(checkpoint, windows, formats, store, n_threads)
    total = len(job.layers) + 1
    hidden = [job.ops.embed(job.weights.embed_tokens, ids) for ids in windows]
    for index in range(len(job.layers)):
        if progress:
            progress(index, total, f"layer {index}")
        hidden = job.layer(index, hidden)
        if not all(np.isfinite(each).all() for each in hidden):
            raise FormatError(f"{checkpoint.path}: layer {index} gives numbers that are not finite; make the file anew")
    if progress:
        progress(total - 1, total, "head")
    job.head(hidden)
    return job.coverage


class _Moments(CpuBackend):
    """Runs operations and adds up the second moments of what goes into each matrix."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.of: dict[int, np.ndarray] = {}  # by identity of the weight: f64[K,C,C]
        self.routed: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # inputs, ids, gates of the experts

    def note(self, x: np.ndarray, *weights: Weight) -> None:
        """Add the moments of x f32[T,C], which goes into all these weights."""
        moments = self.of.get(id(weights[0]), 0.0) + (x.T @ x).astype(np.float64)[None]
        for weight in weights:
            self.of[id(weight)] = moments

    def linear(self, x: np.ndarray, *weights: Weight) -> list[np.ndarray]:
        self.note(x, *weights)
        return super().linear(x, *weights)

    def per_head(self, x: np.ndarray, weight: Weight) -> np.ndarray:
        by_head = x.transpose(1, 0, 2)
        added = np.asarray(by_head.transpose(0, 2, 1) @ by_head, np.float64)
        self.of[id(weight)] = self.of.get(id(weight), 0.0) + added
        return super().per_head(x, weight)

    def experts(
        self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Weight, up: Weight, down: Weight
    ) -> np.ndarray:
        self.routed.append((x, ids, weights))
        return super().experts(x, ids, weights, gate, up, down)

    def moments(self, weight: Weight, matrix: int) -> np.ndarray | None:
        """f64[C,C] of what went into one matrix of a weight, or None if nothing did."""
        all_of_it = self.of.get(id(weight))
        return None if all_of_it is None else all_of_it[min(matrix, len(all_of_it) - 1)]


class _Job:
    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: np.ndarray,
        formats: Mapping[str, BlockFormat],
        store: EncodedStore,
        n_threads: int,
    ) -> None:
        self.checkpoint, self.formats, self.store, self.n_threads = checkpoint, formats, store, n_threads
        self.weights = load_weights(checkpoint)
        self.layers = self.weights.layers
        self.ops = CpuBackend(n_threads)
        self.model = DeepseekV2(checkpoint.config, self.weights, self.ops)
        self.n_tokens_of_window = windows.shape[1]
        self.coverage = Coverage(windows.size)

    # ---- the pass ----

    def layer(self, index: int, hidden: list[np.ndarray]) -> list[np.ndarray]:
        """Quantize a layer and run it. hidden f32[L,D] of each window -> the same behind the layer."""
        c, layer = self.checkpoint.config, self.layers[index]
        normed = [self.ops.norm(h, layer.input_layernorm, c.rms_norm_eps) for h in hidden]
        attention = self._attention(layer.self_attn, normed)
        hidden = [h + self._attend(self.ops, attention, x) for h, x in zip(hidden, normed, strict=True)]
        normed = [self.ops.norm(h, layer.post_attention_layernorm, c.rms_norm_eps) for h in hidden]
        feed_forward = self._feed_forward(index, layer.mlp, normed)
        return [h + self.model.feed_forward(self.ops, feed_forward, x) for h, x in zip(hidden, normed, strict=True)]

    def head(self, hidden: list[np.ndarray]) -> None:
        """Quantize the head, where it is not the embeddings themselves."""
        if self.weights.lm_head is self.weights.embed_tokens:
            return
        c = self.checkpoint.config
        ops = _Moments(self.n_threads)
        if not self._all_stored([self.weights.lm_head]):
            for h in hidden:
                ops.note(self.ops.norm(h, self.weights.norm, c.rms_norm_eps), self.weights.lm_head)
        self._encode(self.weights.lm_head, ops.moments)

    def _attend(self, ops: CpuBackend, w: Attention, x: np.ndarray) -> np.ndarray:
        config = replace(self.checkpoint.config, num_hidden_layers=1)
        cache = LatentCache(config, self.n_tokens_of_window, "f32")
        scaling = config.rope_scaling
        factor = scaling.attention_factor if scaling else 1.0
        cos, sin = ops.rotations(cache, len(x), rope_frequencies(config), factor)
        return self.model.attention(ops, w, x, cos, sin, cache, 0)

    def _attention(self, w: Attention, normed: list[np.ndarray]) -> Attention:
        query = w.q_proj
        first = [query.q_a_proj, query.q_b_proj] if isinstance(query, LowRankQuery) else [query]
        ops = _Moments(self.n_threads)
        if not self._all_stored([*first, w.kv_a_proj_with_mqa, w.k_b_proj, w.v_b_proj, w.o_proj]):
            for x in normed:
                self._attend(ops, w, x)
        return replace(
            w,
            q_proj=replace(
                query,
                q_a_proj=self._encode(query.q_a_proj, ops.moments),
                q_b_proj=self._encode(query.q_b_proj, ops.moments),
            )
            if isinstance(query, LowRankQuery)
            else self._encode(query, ops.moments),
            kv_a_proj_with_mqa=self._encode(w.kv_a_proj_with_mqa, ops.moments),
            k_b_proj=self._encode(w.k_b_proj, ops.moments),
            v_b_proj=self._encode(w.v_b_proj, ops.moments),
            o_proj=self._encode(w.o_proj, ops.moments),
        )

    def _feed_forward(self, index: int, w: MLP | MoE, normed: list[np.ndarray]) -> MLP | MoE:
        """First all gates and ups by their inputs, then all downs by what the quantized gates and ups give them."""
        for is_down in (False, True):
            ops = _Moments(self.n_threads)
            for x in normed:
                self.model.feed_forward(ops, w, x)
            if isinstance(w, MLP):
                w = self._mlp(w, ops.moments, is_down)
                continue
            routed = _Routed(ops.routed, w.experts, is_down)
            self.coverage.hits[index] = routed.hits
            shared = w.shared_experts
            w = replace(
                w,
                experts=self._mlp(w.experts, routed.moments, is_down, routed.hits),
                shared_experts=None if shared is None else self._mlp(shared, ops.moments, is_down),
            )
        return w

    def _mlp(self, w: MLP, moments_of: _MomentsOf, is_down: bool, hits: np.ndarray | None = None) -> MLP:
        if is_down:
            return replace(w, down_proj=self._encode(w.down_proj, moments_of, hits))
        return replace(
            w,
            gate_proj=self._encode(w.gate_proj, moments_of, hits),
            up_proj=self._encode(w.up_proj, moments_of, hits),
        )

    # ---- one tensor ----

    def _is_left_out(self, weight: Weight) -> bool:
        fmt = self.formats[self.checkpoint.tensor_name(weight.name)]
        is_part = weight.first_byte or weight.stride_bytes or weight.n_bytes != weight.data.nbytes
        return bool(is_part) or fmt is weight.format or fmt.name in ("F32", "F16", "BF16")

    def _all_stored(self, weights: Iterable[Weight]) -> bool:
        return all(self._is_left_out(w) or self.checkpoint.tensor_name(w.name) in self.store for w in weights)

    def _encode(self, weight: Weight, moments_of: _MomentsOf, hits: np.ndarray | None = None) -> Weight:
        """The quantized weight, from the store or made now; itself where it is left out."""
        name = self.checkpoint.tensor_name(weight.name)
        fmt = self.formats[name]
        if self._is_left_out(weight):
            return weight
        if name not in self.store:
            n_matrices = weight.shape[0] if len(weight.shape) == 3 else 1
            whole = np.empty((n_matrices, weight.shape[-2], fmt.row_bytes(weight.shape[-1])), np.uint8)

            def encode(k: int) -> None:
                data = weight.data.reshape(n_matrices, weight.shape[-2], -1)[k]
                is_known = hits is None or bool(hits[k] >= LEAST_HITS)
                whole[k] = _encode_matrix(weight.format.decode(data), fmt, moments_of(weight, k), is_known)

            with ThreadPoolExecutor(self.n_threads) as pool:
                for _ in pool.map(encode, range(n_matrices)):
                    pass
            self.store.put(name, whole.reshape(-1))
        return Weight(weight.name, fmt, weight.shape, self.store.get(name))


def _encode_matrix(values: np.ndarray, fmt: BlockFormat, moments: np.ndarray | None, is_known: bool) -> np.ndarray:
    if moments is None or not np.trace(moments) > 0:
        return encode_rows(values, fmt)
    if not (is_known and has_grid(fmt)):
        diagonal = np.diagonal(moments)
        return encode_rows(values, fmt, np.maximum(diagonal / diagonal.mean(), 1e-3).astype(np.float32))
    return encode_compensated(values, fmt, Factor(moments))


class _Routed:
    """What the router sent to each expert of a layer, and the second moments of an expert's inputs."""

    def __init__(self, calls: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], experts: MLP, is_down: bool) -> None:
        n_experts = experts.down_proj.shape[0]
        self.x, self.ids, self.gates = (np.concatenate([call[part] for call in calls]) for part in range(3))
        self.experts, self.is_down = experts, is_down
        self.hits = np.bincount(self.ids.ravel(), minlength=n_experts)
        self._common = self._mean_of_all(n_experts)

    def moments(self, _: Weight, expert: int) -> np.ndarray:
        """f64[C,C] of one expert's inputs, weighted by gate^2 and drawn towards those of the layer."""
        own, weight, n_hits = self._own(expert)
        if not weight > 0:
            return self._common
        return (own * (n_hits / weight) + TRUSTED_HITS * self._common) / (n_hits + TRUSTED_HITS)

    def _own(self, expert: int) -> tuple[np.ndarray, float, int]:
        rows, places = np.nonzero(self.ids == expert)
        x, gates = self.x[rows], self.gates[rows, places]
        if self.is_down:
            gate, up = (_decoded(each, expert) for each in (self.experts.gate_proj, self.experts.up_proj))
            before, beside = x @ gate.T, x @ up.T
            with np.errstate(over="ignore"):
                x = before / (1 + np.exp(-before)) * beside
        x = x * gates[:, None]
        return (x.T @ x).astype(np.float64), float(np.square(gates, dtype=np.float64).sum()), len(rows)

    def _mean_of_all(self, n_experts: int) -> np.ndarray:
        if not self.is_down:
            # every choice counts by its gate, whichever expert was chosen
            counts = np.square(self.gates, dtype=np.float64).sum(axis=1)
            x = self.x * np.sqrt(counts)[:, None].astype(np.float32)
            return (x.T @ x).astype(np.float64) / counts.sum()
        total, weight = np.zeros((self.experts.down_proj.shape[-1],) * 2), 0.0
        for expert in range(n_experts):
            own, own_weight, _ = self._own(expert)
            total, weight = total + own, weight + own_weight
        return total / weight


def _decoded(stack: Weight, matrix: int) -> np.ndarray:
    first = stack.first_byte + matrix * (stack.stride_bytes or stack.matrix_bytes)
    data = stack.data.reshape(-1)[first : first + stack.matrix_bytes]
    return stack.format.decode(data.reshape(stack.shape[-2], -1))
