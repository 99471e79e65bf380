"""Quantizes a model layer by layer with error compensation, by what its matrices really take in on a calibration text.

Each layer is fed by the layers before it as they are quantized, and aims at what it gives in the original model, which
runs beside it: so it makes good what those before it got wrong, as far as its inputs allow. Within a layer, attention
comes first, then gate and up, then down behind the quantized gate and up. An expert counts the tokens that the router
sends it, by the square of the gate; its second moments are drawn towards those of all tokens of its layer by how few
they are. Only one layer's moments are held at a time.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from edge_moe.backends.cpu import CpuBackend
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import FormatError, OptionError
from edge_moe.formats import BlockFormat
from edge_moe.models.architectures import load_pass
from edge_moe.models.feed_forward import MLP, MoE
from edge_moe.tokenizer import Tokenizer
from edge_moe.weights import Weight
from edge_moe_quant.compensate import Aim, Factor, encode_compensated
from edge_moe_quant.encode import encode_rows
from edge_moe_quant.moments import MOST_COLUMNS, Inputs, Moments, MomentsOf, Pair, RoutedMoments, SparingBackend
from edge_moe_quant.pages import forget_pages
from edge_moe_quant.store import EncodedStore

LEAST_HITS = 256  # tokens of an expert below which its weights are searched only: its moments say too little

Attention = TypeVar("Attention", bound=Any)  # the weights of an architecture's attention, a dataclass

_VALUES_AT_ONCE = 1 << 21  # of a matrix, so that the largest ones take little memory
_STREAM_BYTES = 1 << 29  # of all windows on their way through the layers, when no number is asked for
_FACTORS_BYTES = 5 << 27  # of all matrices that are encoded at a time, for what is made of their moments


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
    """The first `limit` windows of a text, side by side, each a text of its own: i64[N,length] (see most_windows).

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


def most_windows(hidden_size: int, length: int) -> int:
    """Windows that can be on their way in half a gigabyte of memory."""
    return max(1, _STREAM_BYTES // (length * hidden_size * 16))


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

    What the store has already is taken from there. Experts that were seldom hit are searched with the moments as
    importance; tensors that a layer holds in parts (a fused gate_up or kv_b) are left out.
    Raises FormatError for weights or activations that are not finite.
    """
    job = _Job(checkpoint, windows, formats, store, n_threads)
    total = len(job.layers) + 1
    embedding = job.embedding()
    streams = [_Stream(job.ops.embed(embedding, ids), job.ops.embed(job.weights.embed_tokens, ids)) for ids in windows]
    for index in range(len(job.layers)):
        if progress:
            progress(index, total, f"layer {index}")
        job.layer(index, streams)
        if not all(np.isfinite(stream.h).all() for stream in streams):
            raise FormatError(f"{checkpoint.path}: layer {index} gives numbers that are not finite; make the file anew")
    if progress:
        progress(total - 1, total, "head")
    job.head(streams)
    return job.coverage


@dataclass
class _Stream:
    """A window on its way through the quantized model, and through the original (0). f32[L,D] each."""

    h: np.ndarray
    h0: np.ndarray
    x: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    x0: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    def norm(self, ops: CpuBackend, weight: np.ndarray, eps: float) -> None:
        self.x, self.x0 = ops.norm(self.h, weight, eps), ops.norm(self.h0, weight, eps)

    def add(self, out: np.ndarray, out0: np.ndarray) -> None:
        self.h, self.h0 = self.h + out, self.h0 + out0


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
        self.ops = SparingBackend(n_threads)
        self.model = load_pass(checkpoint, self.ops)
        self.weights = self.model.weights
        self.layers = self.weights.layers
        self.cache = self.model.new_cache(windows.shape[1], "f32")  # stays empty: every layer is run as the first one
        self.coverage = Coverage(windows.size)

    # ---- the pass ----

    def embedding(self) -> Weight:
        """The quantized embeddings."""
        return self._encode([self.weights.embed_tokens], lambda weight, matrix: None)[0]

    def layer(self, index: int, streams: list[_Stream]) -> None:
        """Quantize a layer and run both streams of each window through it."""
        c, layer = self.checkpoint.config, self.layers[index]
        for stream in streams:
            stream.norm(self.ops, layer.input_layernorm, c.rms_norm_eps)
        attention = self._attention(layer.self_attn, streams)
        for stream in streams:
            stream.add(self._attend(self.ops, attention, stream.x), self._attend(self.ops, layer.self_attn, stream.x0))
            stream.norm(self.ops, layer.post_attention_layernorm, c.rms_norm_eps)
        feed_forward = self._feed_forward(index, layer.mlp, streams)
        for stream in streams:
            run = self.model.feed_forward
            stream.add(run(self.ops, feed_forward, stream.x), run(self.ops, layer.mlp, stream.x0))
            self._forget()

    def head(self, streams: list[_Stream]) -> None:
        """Quantize the head, where it is not the embeddings themselves."""
        if self.weights.lm_head is self.weights.embed_tokens:
            return
        moments = Moments()
        for stream in streams:
            stream.norm(self.ops, self.weights.norm, self.checkpoint.config.rms_norm_eps)
            both = Inputs(self.n_threads), Inputs(self.n_threads)
            both[0].of[id(self.weights.lm_head)], both[1].of[id(self.weights.lm_head)] = stream.x, stream.x0
            moments.add(*both)
        self._encode([self.weights.lm_head], moments.moments)

    def _attend(self, ops: CpuBackend, w: Any, x: np.ndarray) -> np.ndarray:
        cos, sin = self.model.rotations(ops, self.cache, len(x))
        return self.model.attention(ops, w, x, cos, sin, self.cache, 0)

    def _attention(self, w: Attention, streams: list[_Stream]) -> Attention:
        """Whatever matrices an architecture's attention has, each by its inputs in the original."""
        moments = Moments()
        for stream in streams:
            both = Inputs(self.n_threads), Inputs(self.n_threads)
            self._attend(both[0], w, stream.x)
            self._attend(both[1], w, stream.x0)
            moments.add(*both)

        return _with_weights(w, lambda weight: self._encode([weight], moments.moments)[0])

    def _feed_forward(self, index: int, original: MLP | MoE, streams: list[_Stream]) -> MLP | MoE:
        """First all gates and ups by their inputs, then all downs by what the quantized gates and ups give them."""
        w = original
        for is_down in (False, True):
            moments, calls = Moments(), []
            for stream in streams:
                both = Inputs(self.n_threads), Inputs(self.n_threads)
                self.model.feed_forward(both[0], w, stream.x)
                self.model.feed_forward(both[1], original, stream.x0)
                moments.add(*both)
                if both[0].routed is not None:
                    calls.append((*both[0].routed, stream.x0))
                self._forget()
            if isinstance(w, MLP):
                w = self._mlp(w, moments.moments, is_down)
                continue
            assert isinstance(original, MoE)
            routed = RoutedMoments(calls, w.experts, original.experts, is_down)
            self.coverage.hits[index] = routed.hits
            shared = w.shared_experts
            w = replace(
                w,
                experts=self._mlp(w.experts, routed.moments, is_down, routed.hits),
                shared_experts=None if shared is None else self._mlp(shared, moments.moments, is_down),
            )
        return w

    def _mlp(self, w: MLP, moments_of: MomentsOf, is_down: bool, hits: np.ndarray | None = None) -> MLP:
        if is_down:
            return replace(w, down_proj=self._encode([w.down_proj], moments_of, hits)[0])
        gate, up = self._encode([w.gate_proj, w.up_proj], moments_of, hits)
        return replace(w, gate_proj=gate, up_proj=up)

    def _forget(self) -> None:
        """Let go of what was read of the source: a layer's experts alone can be more than the memory there is."""
        for entry in self.checkpoint.tensors.values():
            forget_pages(entry.data)

    # ---- one tensor ----

    def _is_left_out(self, weight: Weight) -> bool:
        fmt = self._format(weight)
        is_part = weight.first_byte or weight.stride_bytes or weight.n_bytes != weight.data.nbytes
        return bool(is_part) or fmt is weight.format or fmt.name in ("F32", "F16", "BF16")

    def _encode(self, weights: list[Weight], moments_of: MomentsOf, hits: np.ndarray | None = None) -> list[Weight]:
        """Weights of one input, quantized: from the store or made now; each is itself where it is left out."""
        wanted = [weight for weight in weights if not self._is_left_out(weight)]
        missing = [weight for weight in wanted if self._name(weight) not in self.store]
        encoded = [
            self.store.begin(self._name(w), (_n_matrices(w), w.shape[-2], self._format(w).row_bytes(w.shape[-1])))
            for w in missing
        ]

        def encode(k: int) -> None:
            is_known = hits is None or bool(hits[k] >= LEAST_HITS)
            encode_values = _encoder(moments_of(missing[0], k), is_known)
            for weight, whole in zip(missing, encoded, strict=True):
                n_rows, n_cols = weight.shape[-2:]
                data = weight.data.reshape(len(whole), n_rows, -1)[k]
                step = max(1, _VALUES_AT_ONCE // n_cols)
                for row in range(0, n_rows, step):
                    rows, encoded_rows = data[row : row + step], whole[k, row : row + step]
                    encoded_rows[:] = encode_values(weight.format.decode(rows), self._format(weight))
                    forget_pages(rows)
                    forget_pages(encoded_rows)

        if missing:
            # at most as many matrices at once as have room for what is made of their moments
            most = max(1, _FACTORS_BYTES // (64 * min(missing[0].shape[-1], MOST_COLUMNS) ** 2))
            with ThreadPoolExecutor(min(self.n_threads, most)) as pool:
                for _ in pool.map(encode, range(_n_matrices(missing[0]))):
                    pass
        for weight in missing:
            self.store.finish(self._name(weight))
        return [
            Weight(weight.name, self._format(weight), weight.shape, self.store.get(self._name(weight)))
            if weight in wanted
            else weight
            for weight in weights
        ]

    def _name(self, weight: Weight) -> str:
        return self.checkpoint.tensor_name(weight.name)

    def _format(self, weight: Weight) -> BlockFormat:
        return self.formats[self._name(weight)]


def _with_weights(part: Attention, new: Callable[[Weight], Weight]) -> Attention:
    """A dataclass of weights, and of others that hold some, with each weight replaced."""
    changed: dict[str, Any] = {}
    for each in fields(part):
        value = getattr(part, each.name)
        if isinstance(value, Weight):
            changed[each.name] = new(value)
        elif is_dataclass(value):
            changed[each.name] = _with_weights(value, new)
    return replace(part, **changed)


def _n_matrices(weight: Weight) -> int:
    return weight.shape[0] if len(weight.shape) == 3 else 1


def _encoder(moments: Pair | None, is_known: bool) -> Callable[[np.ndarray, BlockFormat], np.ndarray]:
    """What encodes rows of matrices with these moments: f32[R,C] in a format -> u8[R,row_bytes]."""
    if moments is None:
        return encode_rows
    own, cross = moments
    diagonal = own if own.ndim == 1 else np.diagonal(own)
    if not diagonal.sum() > 0:
        return encode_rows
    if own.ndim == 1 or not is_known:
        return partial(encode_rows, importance=np.maximum(diagonal / diagonal.mean(), 1e-3).astype(np.float32))
    factor, aim = Factor(own), Aim(own, cross)
    return lambda values, fmt: encode_compensated(aim.at(values), fmt, factor)
