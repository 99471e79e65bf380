"""Converts a Hugging Face checkpoint of a DeepSeek-V2 or -V3 kind to a `deepseek2` GGUF file, part by part.

The keys and tensors are those that llama.cpp's convert_hf_to_gguf.py writes, with two differences: DeepSeek-V3
configurations that leave out the router's scoring function get sigmoid, as in transformers, and layers for multi-token
prediction are left out for every model.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from edge_moe.checkpoint import TENSOR_NAMES
from edge_moe.errors import FormatError, OptionError, UnsupportedError
from edge_moe.formats import BF16, F16, F32, Q8_0, BlockFormat
from edge_moe.safetensors import SafetensorsModel, open_safetensors, read_json
from edge_moe_export.encode import encode
from edge_moe_export.gguf import NewTensor, write_gguf
from edge_moe_export.hyperparameters import HyperParameters, read_hyperparameters
from edge_moe_export.model_card import describe_model
from edge_moe_export.vocabularies import read_vocabulary

OUTPUT_TYPES: dict[str, tuple[BlockFormat, int]] = {  # and the number that `general.file_type` has for it
    "f32": (F32, 0),
    "f16": (F16, 1),
    "bf16": (BF16, 32),
    "q8_0": (Q8_0, 7),
}
_PART_VALUES = 1 << 22  # decoded at a time: 16 MiB of f32
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_IGNORED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class Conversion:
    """What was written: the file's size, its tensors, and remarks for the user, one line each."""

    size_bytes: int
    n_tensors: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Encoding:
    """Other formats than those of OUTPUT_TYPES, and who makes them."""

    file_type: int  # of the key general.file_type
    choose: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, object]], Mapping[str, BlockFormat]]  # by name
    encode: Callable[[Iterable[np.ndarray], BlockFormat], Iterator[np.ndarray]]  # f32[R,C] parts -> u8 parts


def convert(
    folder: Path,
    out: Path,
    output_type: str | Encoding = "bf16",
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Conversion:
    """Convert the checkpoint in `folder` to the GGUF file `out`; matrices become f32, f16, bf16, q8_0, or as encoded.

    Norms, router and biases stay F32; rows that are not whole blocks of Q8_0 become F16.
    Raises OptionError (paths, options, no space), FormatError (damaged, or tensors missing), UnsupportedError (other
    architectures, tokenizers or tensors).
    """
    if isinstance(output_type, str) and output_type not in OUTPUT_TYPES:
        raise OptionError(f"type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
    if not folder.is_dir():
        raise OptionError(f"{folder}: is no folder; name the folder of a Hugging Face checkpoint")
    encoding = None if isinstance(output_type, str) else output_type
    fmt, file_type = OUTPUT_TYPES[output_type] if isinstance(output_type, str) else (F32, output_type.file_type)
    params = read_hyperparameters(read_json(folder / "config.json"), folder / "config.json")
    architecture = params.metadata()
    vocabulary = read_vocabulary(folder, params)
    model = open_safetensors(folder, scale_block=params.scale_block)
    plan = _Plan(model, params, fmt)
    tensors = plan.tensors()
    notes = plan.check_rest()
    if encoding is not None:
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        formats = encoding.choose(shapes, {"general.architecture": "deepseek2", **architecture})
        tensors = _Plan(model, params, fmt, formats, encoding.encode).tensors()
    metadata = {
        "general.architecture": "deepseek2",
        "general.type": "model",
        **describe_model(folder, {tensor.name: tensor.shape for tensor in tensors}, params.values),
        **architecture,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        **vocabulary,
    }
    size_bytes = write_gguf(out, metadata, tensors, progress=progress)
    return Conversion(size_bytes, len(tensors), notes)


class _Plan:
    """Walks the model's layers and takes each tensor it needs from the checkpoint, shapes checked."""

    def __init__(
        self,
        model: SafetensorsModel,
        params: HyperParameters,
        fmt: BlockFormat,
        formats: Mapping[str, BlockFormat] | None = None,
        encode_parts: Callable[[Iterable[np.ndarray], BlockFormat], Iterator[np.ndarray]] | None = None,
    ) -> None:
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
        n_layers = self.params.integer("num_hidden_layers")
        dropped: set[int] = set()
        for name in self.model.entries.keys() - self._used:
            layer = _LAYER.match(name)
            if layer and int(layer[1]) >= n_layers:
                dropped.add(int(layer[1]))
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

    # ---- the parts of a layer ----

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
            shape = (D, F) if part == "down" else (F, D)
            sources = [f"model.{at}experts.{expert}.{part}_proj.weight" for expert in range(E)]
            for source in sources:
                self._take(source, shape)
            name = _gguf_name(f"{at}experts.{part}_proj")
            yield self._new(name, (E, *shape), partial(self._stacked_parts, sources))
        if n_shared := p.get("n_shared_experts"):
            yield from self._gated(f"{at}shared_experts.", n_shared * F)

    def _gated(self, at: str, width: int) -> Iterator[NewTensor]:
        D = self.params.integer("hidden_size")
        yield self._plain(f"{at}gate_proj", width, D)
        yield self._plain(f"{at}up_proj", width, D)
        yield self._plain(f"{at}down_proj", D, width)

    # ---- one tensor ----

    def _plain(self, name: str, *shape: int) -> NewTensor:
        """A tensor that stays as it is, by its name in the runtime."""
        return self._matrix(f"model.{name}.weight", _gguf_name(name), shape)

    def _matrix(self, source: str, name: str, shape: tuple[int, ...]) -> NewTensor:
        self._take(source, shape)
        return self._new(name, shape, partial(self._stacked_parts, [source]))

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

    def _head_parts(self, source: str, n_heads: int, low: int, high: int, *, transposed: bool) -> Iterator[np.ndarray]:
        """Rows low:high of each head of kv_b [H (N+V), R], head by head."""
        head_rows = self.model.entries[source].shape[0] // n_heads
        for head in range(n_heads):
            rows = self.model.decode(source, head * head_rows + low, head * head_rows + high)
            yield rows.T if transposed else rows


def _encode_parts(parts: Iterable[np.ndarray], fmt: BlockFormat) -> Iterator[np.ndarray]:
    return (encode(part, fmt) for part in parts)


def _gguf_name(name: str) -> str:
    """The name in the file of a tensor that the runtime knows as `name`."""
    if not name.startswith("layers."):
        return TENSOR_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{TENSOR_NAMES[rest]}"
