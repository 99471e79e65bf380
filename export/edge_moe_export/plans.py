"""Which tensors of a checkpoint become which tensors of a GGUF file, one plan for each architecture.

A plan walks the layers as the model's pass does, takes each tensor it needs, shapes checked, and gives the values in
parts, so that no tensor is ever held as a whole.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import numpy as np

from edge_moe.checkpoint import TENSOR_NAMES
from edge_moe.errors import FormatError, UnsupportedError
from edge_moe.formats import F16, F32, BlockFormat
from edge_moe.safetensors import SafetensorsModel
from edge_moe_export.encode import encode
from edge_moe_export.gguf import NewTensor
from edge_moe_export.hyperparameters import DeepseekParameters, HyperParameters, LlamaParameters

Formats = Mapping[str, BlockFormat]
EncodeParts = Callable[[Iterable[np.ndarray], BlockFormat], Iterator[np.ndarray]]  # f32[R,C] parts -> u8 parts

_PART_VALUES = 1 << 22  # decoded at a time: 16 MiB of f32
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_IGNORED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


class Plan:
    """What the plans share: the embeddings, the layers one after the other, and how one tensor is taken."""

    def __init__(
        self,
        model: SafetensorsModel,
        params: HyperParameters,
        fmt: BlockFormat,
        formats: Formats | None = None,
        encode_parts: EncodeParts | None = None,
    ) -> None:
        """Matrices become `fmt`, or what `formats` says by the name in the file, made by `encode_parts`."""
        self.model, self.params, self.fmt, self.formats = model, params, fmt, formats
        self.encode_parts = encode_parts or _encode_parts
        self.tied = bool(params.get("tie_word_embeddings", False))
        self._used: set[str] = set()

    def tensors(self) -> list[NewTensor]:
        """All tensors of the file. Raises FormatError when one is missing or has another shape."""
        p = self.params
        D = p.integer("hidden_size")
        out = [self._plain("embed_tokens", p.integer("vocab_size"), D), self._plain("norm", D)]
        if not self.tied:
            out.append(self._matrix("lm_head.weight", TENSOR_NAMES["lm_head"], (p.integer("vocab_size"), D)))
        for layer in range(p.integer("num_hidden_layers")):
            out += self._attention(layer)
            out += self._feed_forward(layer)
        return out

    def check_rest(self) -> tuple[str, ...]:
        """Remarks on the tensors that were not taken. Raises UnsupportedError when one of them matters."""
        dropped: set[int] = set()
        for name in self.model.entries.keys() - self._used:
            if (layer := self._speculative_layer(name)) is not None:
                dropped.add(layer)
            elif not name.endswith(_IGNORED) and not (self.tied and name in ("lm_head.weight", "model.lm_head.weight")):
                raise UnsupportedError(
                    f"{self.model.entries[name].path}: tensor {name} has no place in the model "
                    "that config.json describes"
                )
        if not dropped:
            return ()
        layers = ", ".join(map(str, sorted(dropped)))
        return (
            f"left out layer {layers}: it predicts further tokens for speculation and has no part in plain decoding",
        )

    # ---- what an architecture says

    def _attention(self, layer: int) -> Iterator[NewTensor]:
        """The tensors of a layer's attention, and of its norms."""
        raise NotImplementedError

    def _feed_forward(self, layer: int) -> Iterator[NewTensor]:
        """The tensors of a layer's MLP or mixture."""
        raise NotImplementedError

    def _speculative_layer(self, name: str) -> int | None:
        """The layer of a tensor that only speculation needs."""
        return None

    # ---- one tensor, or a few

    def _gated(self, at: str, width: int) -> Iterator[NewTensor]:
        D = self.params.integer("hidden_size")
        yield self._plain(f"{at}gate_proj", width, D)
        yield self._plain(f"{at}up_proj", width, D)
        yield self._plain(f"{at}down_proj", D, width)

    def _plain(self, name: str, *shape: int) -> NewTensor:
        """A tensor that stays as it is, by its name in the runtime."""
        return self._matrix(f"model.{name}.weight", _gguf_name(name), shape)

    def _matrix(self, source: str, name: str, shape: tuple[int, ...]) -> NewTensor:
        self._take(source, shape)
        return self._new(name, shape, partial(self._stacked_parts, [source]))

    def _stack(self, sources: list[str], name: str, shape: tuple[int, int]) -> NewTensor:
        """Matrices of one shape as a stack, by its name in the runtime."""
        for source in sources:
            self._take(source, shape)
        return self._new(_gguf_name(name), (len(sources), *shape), partial(self._stacked_parts, sources))

    def _take(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self.model.entries.get(name)
        if entry is None:
            raise FormatError(
                f"{self.model.path}: tensor {name} {list(shape)} is missing, but config.json asks for it; "
                "download the checkpoint again"
            )
        if entry.shape != shape:
            raise FormatError(
                f"{entry.path}: tensor {name} has shape {list(entry.shape)}, expected {list(shape)} by config.json"
            )
        self._used.add(name)

    def _new(self, name: str, shape: tuple[int, ...], values: Callable[[], Iterable[np.ndarray]]) -> NewTensor:
        fmt = self.fmt
        if self.formats is not None:
            fmt = self.formats[name]
        elif len(shape) == 1 or "ffn_gate_inp" in name:
            fmt = F32
        elif shape[-1] % fmt.block_size:
            fmt = F16
        return NewTensor(name, fmt, shape, lambda: self.encode_parts(values(), fmt))

    def _stacked_parts(self, sources: list[str]) -> Iterator[np.ndarray]:
        """The values of tensors one after the other, some rows at a time."""
        for source in sources:
            shape = self.model.entries[source].shape
            n_rows = max(1, _PART_VALUES // math.prod(shape[1:]))
            for start in range(0, shape[0], n_rows):
                yield self.model.decode(source, start, min(start + n_rows, shape[0]))


class DeepseekPlan(Plan):
    """DeepSeek-V2 and its family: kv_b comes apart into keys, transposed, and values."""

    params: DeepseekParameters

    def _attention(self, layer: int) -> Iterator[NewTensor]:
        p = self.params
        D, H, R, P = (p.integer(k) for k in ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_rope_head_dim"))
        N, V = p.integer("qk_nope_head_dim"), p.integer("v_head_dim")
        at = f"layers.{layer}."
        yield self._plain(f"{at}input_layernorm", D)
        if q_rank := p.get("q_lora_rank"):
            yield self._plain(f"{at}self_attn.q_a_proj", q_rank, D)
            yield self._plain(f"{at}self_attn.q_a_layernorm", q_rank)
            yield self._plain(f"{at}self_attn.q_b_proj", H * (N + P), q_rank)
        else:
            yield self._plain(f"{at}self_attn.q_proj", H * (N + P), D)
        yield self._plain(f"{at}self_attn.kv_a_proj_with_mqa", R + P, D)
        yield self._plain(f"{at}self_attn.kv_a_layernorm", R)
        source = f"model.{at}self_attn.kv_b_proj.weight"
        self._take(source, (H * (N + V), R))
        k_b, v_b = (_gguf_name(f"{at}self_attn.{part}_b_proj") for part in "kv")
        # The keys' half is transposed, since absorbed attention multiplies the queries by it.
        yield self._new(k_b, (H, R, N), partial(self._head_parts, source, H, 0, N, transposed=True))
        yield self._new(v_b, (H, V, R), partial(self._head_parts, source, H, N, N + V, transposed=False))
        yield self._plain(f"{at}self_attn.o_proj", D, H * V)
        yield self._plain(f"{at}post_attention_layernorm", D)

    def _feed_forward(self, layer: int) -> Iterator[NewTensor]:
        p = self.params
        D, E = p.integer("hidden_size"), p.n_routed_experts
        at = f"layers.{layer}.mlp."
        if layer < p.first_k_dense_replace:
            yield from self._gated(at, p.integer("intermediate_size"))
            return
        yield self._plain(f"{at}gate", E, D)
        bias = f"{at}gate.e_score_correction_bias"
        if f"model.{bias}" in self.model.entries:
            yield self._matrix(f"model.{bias}", _gguf_name(bias), (E,))
        F = p.integer("moe_intermediate_size")
        for part in ("gate", "up", "down"):
            sources = [f"model.{at}experts.{expert}.{part}_proj.weight" for expert in range(E)]
            yield self._stack(sources, f"{at}experts.{part}_proj", (D, F) if part == "down" else (F, D))
        if n_shared := p.get("n_shared_experts"):
            yield from self._gated(f"{at}shared_experts.", n_shared * F)

    def _speculative_layer(self, name: str) -> int | None:
        layer = _LAYER.match(name)
        return int(layer[1]) if layer and int(layer[1]) >= self.params.integer("num_hidden_layers") else None

    def _head_parts(self, source: str, n_heads: int, low: int, high: int, *, transposed: bool) -> Iterator[np.ndarray]:
        """Rows low:high of each head of kv_b [H (N+V), R], head by head."""
        head_rows = self.model.entries[source].shape[0] // n_heads
        for head in range(n_heads):
            rows = self.model.decode(source, head * head_rows + low, head * head_rows + high)
            yield rows.T if transposed else rows


class LlamaPlan(Plan):
    """Llama, Mistral and Mixtral: rows of queries and keys go from halves to adjacent rope pairs."""

    params: LlamaParameters

    def tensors(self) -> list[NewTensor]:
        """All tensors of the file. Raises FormatError when one is missing or has another shape."""
        divisors = self.params.rope_divisors()
        if divisors is None:
            return super().tensors()
        return [self._new(TENSOR_NAMES["rope_freqs"], divisors.shape, lambda: [divisors]), *super().tensors()]

    def _attention(self, layer: int) -> Iterator[NewTensor]:
        p = self.params
        D, H, K, N = p.integer("hidden_size"), p.integer("num_attention_heads"), p.num_key_value_heads, p.head_dim
        at = f"layers.{layer}."
        yield self._plain(f"{at}input_layernorm", D)
        for part, n_heads in (("q", H), ("k", K)):
            source = f"model.{at}self_attn.{part}_proj.weight"
            self._take(source, (n_heads * N, D))
            name = _gguf_name(f"{at}self_attn.{part}_proj")
            yield self._new(name, (n_heads * N, D), partial(self._paired_parts, source, n_heads))
        yield self._plain(f"{at}self_attn.v_proj", K * N, D)
        yield self._plain(f"{at}self_attn.o_proj", D, H * N)
        yield self._plain(f"{at}post_attention_layernorm", D)

    def _feed_forward(self, layer: int) -> Iterator[NewTensor]:
        p = self.params
        D, E, F = p.integer("hidden_size"), p.n_routed_experts, p.integer("intermediate_size")
        at = f"layers.{layer}.mlp."
        if not E:
            yield from self._gated(at, F)
            return
        theirs = f"model.layers.{layer}.block_sparse_moe."
        yield self._matrix(f"{theirs}gate.weight", _gguf_name(f"{at}gate"), (E, D))
        for part, their_part in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            sources = [f"{theirs}experts.{expert}.{their_part}.weight" for expert in range(E)]
            yield self._stack(sources, f"{at}experts.{part}_proj", (D, F) if part == "down" else (F, D))

    def _paired_parts(self, source: str, n_heads: int) -> Iterator[np.ndarray]:
        """Rows of each head [2, N/2] as transformers rotates them -> [N/2, 2], some heads at a time."""
        n_rows, n_cols = self.model.entries[source].shape
        head_dim = n_rows // n_heads
        step = max(1, _PART_VALUES // (head_dim * n_cols))
        for head in range(0, n_heads, step):
            rows = self.model.decode(source, head * head_dim, min(head + step, n_heads) * head_dim)
            yield rows.reshape(-1, 2, head_dim // 2, n_cols).swapaxes(1, 2).reshape(-1, n_cols)


def _encode_parts(parts: Iterable[np.ndarray], fmt: BlockFormat) -> Iterator[np.ndarray]:
    return (encode(part, fmt) for part in parts)


def _gguf_name(name: str) -> str:
    """The name in the file of a tensor that the runtime knows as `name`."""
    if not name.startswith("layers."):
        return TENSOR_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{TENSOR_NAMES[rest]}"
