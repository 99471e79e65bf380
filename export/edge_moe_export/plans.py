"""Which tensors of a checkpoint become which tensors of a GGUF file, one plan for each architecture.

Which tensors a model has, and of which shapes, is said by the runtime that loads it: here it loads from nothing, and
what it asks for is noted. A plan says where in the checkpoint each of them is, and gives its values in parts, so that
no tensor is ever held as a whole.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from edge_moe.checkpoint import TENSOR_NAMES, Checkpoint
from edge_moe.config import ModelConfig
from edge_moe.errors import FormatError, UnsupportedError
from edge_moe.formats import F16, F32, BlockFormat
from edge_moe.gguf import GGUFFile, TensorEntry
from edge_moe.metadata import read_config
from edge_moe.models.architectures import load_weights
from edge_moe.safetensors import SafetensorsModel
from edge_moe.weights import Weight
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
        metadata = {"general.architecture": self.params.gguf_architecture, **self.params.metadata()}
        nothing = GGUFFile(self.params.path, metadata, {}, size_bytes=0, version=3, alignment=32)
        asked = _Requests(read_config(nothing, has_weights=False), self.params.path, self._has)
        load_weights(asked)
        return [self._tensor(name, shape) for name, shape in asked.shapes.items()]

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

    def _has(self, name: str) -> bool:
        """Whether the file will have a tensor that not every model has."""
        return name == "lm_head" and not self.tied

    def _tensor(self, name: str, shape: tuple[int, ...]) -> NewTensor:
        """A tensor by its name and shape in the runtime."""
        if ".mlp.experts." in name:
            n_experts, *own_shape = shape
            sources = [self._source(name.replace("experts", f"experts.{i}")) for i in range(n_experts)]
            return self._new(name, shape, partial(self._stacked_parts, self._take_all(sources, *own_shape)))
        return self._new(name, shape, partial(self._stacked_parts, self._take_all([self._source(name)], *shape)))

    def _source(self, name: str) -> str:
        """What the checkpoint calls a tensor."""
        return f"{name}.weight" if name == "lm_head" else f"model.{name}.weight"

    def _speculative_layer(self, name: str) -> int | None:
        """The layer of a tensor that only speculation needs."""
        return None

    # ---- one tensor, or a few

    def _take_all(self, names: list[str], *shape: int) -> list[str]:
        for name in names:
            self._take(name, shape)
        return names

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
        """A tensor of the file, by its name in the runtime."""
        name, fmt = _gguf_name(name), self.fmt
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

    def _has(self, name: str) -> bool:
        if name.endswith("e_score_correction_bias"):
            return self._source(name) in self.model.entries
        return super()._has(name)

    def _source(self, name: str) -> str:
        return f"model.{name}" if name.endswith("e_score_correction_bias") else super()._source(name)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> NewTensor:
        at, _, part = name.rpartition(".")
        if part not in ("k_b_proj", "v_b_proj"):
            return super()._tensor(name, shape)
        H, N, V = (self.params.integer(key) for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
        source = self._source(f"{at}.kv_b_proj")
        self._take(source, (H * (N + V), self.params.integer("kv_lora_rank")))
        # The keys' half is transposed, since absorbed attention multiplies the queries by it.
        low, high, transposed = (0, N, True) if part == "k_b_proj" else (N, N + V, False)
        return self._new(name, shape, partial(self._head_parts, source, H, low, high, transposed=transposed))

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

    def _has(self, name: str) -> bool:
        return self.params.rope_divisors() is not None if name == "rope_freqs" else super()._has(name)

    def _source(self, name: str) -> str:
        parts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        if ".mlp.experts." in name:
            name, _, part = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".")
            return f"model.{name}.{parts[part]}.weight"
        if name.endswith(".mlp.gate"):  # the router
            name = name.replace(".mlp.", ".block_sparse_moe.")
        return super()._source(name)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> NewTensor:
        divisors = self.params.rope_divisors() if name == "rope_freqs" else None
        if divisors is not None:
            return self._new(name, shape, lambda: [divisors])
        if not name.endswith((".q_proj", ".k_proj")):
            return super()._tensor(name, shape)
        (source,) = self._take_all([self._source(name)], *shape)
        return self._new(name, shape, partial(self._paired_parts, source, shape[0] // self.params.head_dim))

    def _paired_parts(self, source: str, n_heads: int) -> Iterator[np.ndarray]:
        """Rows of each head [2, N/2] as transformers rotates them -> [N/2, 2], some heads at a time."""
        n_rows, n_cols = self.model.entries[source].shape
        head_dim = n_rows // n_heads
        step = max(1, _PART_VALUES // (head_dim * n_cols))
        for head in range(0, n_heads, step):
            rows = self.model.decode(source, head * head_dim, min(head + step, n_heads) * head_dim)
            yield rows.reshape(-1, 2, head_dim // 2, n_cols).swapaxes(1, 2).reshape(-1, n_cols)


class _Requests(Checkpoint):
    """Stands in for a file while the runtime loads a model from it, and notes what that asks for."""

    def __init__(self, config: ModelConfig, path: Path, has: Callable[[str], bool]) -> None:
        """`has` says which of the tensors that may be missing there are."""
        self.config, self.path, self._has = config, path, has
        self.shapes: dict[str, tuple[int, ...]] = {}  # by the names of the runtime

    def __contains__(self, name: str) -> bool:
        return self._has(name)

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        return {}

    def weight(self, name: str, *shape: int) -> Weight:
        self.shapes[name] = shape
        return Weight(name, F32, shape, np.zeros(0, np.uint8))

    def vector(self, name: str, size: int) -> np.ndarray:
        self.shapes[name] = (size,)
        return np.zeros(size, np.float32)


def _encode_parts(parts: Iterable[np.ndarray], fmt: BlockFormat) -> Iterator[np.ndarray]:
    return (encode(part, fmt) for part in parts)


def _gguf_name(name: str) -> str:
    """The name in the file of a tensor that the runtime knows as `name`."""
    if not name.startswith("layers."):
        return TENSOR_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{TENSOR_NAMES[rest]}"
