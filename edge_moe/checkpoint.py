"""Opens a model: its config, and its tensors as weights under the model's own names."""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from edge_moe.config import ModelConfig
from edge_moe.errors import FormatError
from edge_moe.formats import BlockFormat
from edge_moe.gguf import GGUFFile, TensorEntry, open_gguf
from edge_moe.metadata import read_config
from edge_moe.weights import Weight

TENSOR_NAMES = {
    "embed_tokens": "token_embd.weight",
    "norm": "output_norm.weight",
    "lm_head": "output.weight",
    "rope_freqs": "rope_freqs.weight",
    "input_layernorm": "attn_norm.weight",
    "self_attn.q_proj": "attn_q.weight",
    "self_attn.q_a_proj": "attn_q_a.weight",
    "self_attn.q_a_layernorm": "attn_q_a_norm.weight",
    "self_attn.q_b_proj": "attn_q_b.weight",
    "self_attn.k_proj": "attn_k.weight",
    "self_attn.v_proj": "attn_v.weight",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj": "attn_kv_b.weight",
    "self_attn.k_b_proj": "attn_k_b.weight",
    "self_attn.v_b_proj": "attn_v_b.weight",
    "self_attn.o_proj": "attn_output.weight",
    "post_attention_layernorm": "ffn_norm.weight",
    "mlp.gate_proj": "ffn_gate.weight",
    "mlp.up_proj": "ffn_up.weight",
    "mlp.down_proj": "ffn_down.weight",
    "mlp.gate": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.gate_proj": "ffn_gate_exps.weight",
    "mlp.experts.up_proj": "ffn_up_exps.weight",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj": "ffn_down_shexp.weight",
}
_FLOAT_FORMATS = ("F32", "F16", "BF16")


class Checkpoint:
    """An open model file: `config`, the tokenizer's metadata, and weights by model name, shapes checked.

    A name is that of transformers without its leading "model.", e.g. "layers.3.self_attn.o_proj".
    """

    def __init__(self, gguf: GGUFFile, load: Callable[[str, TensorEntry], TensorEntry] | None = None) -> None:
        """`load` may give tensors by model name another place than the mapped file."""
        self._gguf = gguf
        self._load = load
        self.path: Path = gguf.path
        self.metadata: Mapping[str, Any] = gguf.metadata
        self.size_bytes: int = gguf.size_bytes
        self.config: ModelConfig = read_config(gguf)

    def __contains__(self, name: str) -> bool:
        return _gguf_name(name) in self._gguf.tensors

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Every tensor of the file under its name there."""
        return self._gguf.tensors

    @property
    def maps(self) -> Mapping[Path, np.ndarray]:
        """The file, or each part of it, as it is mapped, u8[n_bytes]."""
        return self._gguf.maps

    def weight(self, name: str, *shape: int) -> Weight:
        """The matrix or stack of matrices `name`, which must have `shape`. Raises FormatError."""
        entry = self._entry(name, shape)
        return Weight(name, entry.format, entry.shape, entry.data, path=entry.path, data_offset=entry.offset)

    def tensor_name(self, name: str) -> str:
        """What the file calls the tensor `name` of the model."""
        return _gguf_name(name)

    def vector(self, name: str, size: int) -> np.ndarray:
        """A norm's gain or a bias, decoded to f32[size]. Raises FormatError."""
        entry = self._entry(name, (size,))
        if entry.format.name not in _FLOAT_FORMATS:
            raise FormatError(
                f"{self.path}: tensor {entry.name} is {entry.format.name}, "
                f"expected one of {', '.join(_FLOAT_FORMATS)}; convert the model again"
            )
        return entry.format.decode(entry.data)

    def _entry(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        gguf_name = _gguf_name(name)
        entry = self._gguf.tensors.get(gguf_name)
        if entry is None:
            raise FormatError(
                f"{self.path}: tensor {gguf_name} {list(shape)} is missing; "
                "the file is incomplete or holds no such model, download or convert it again"
            )
        if entry.shape != shape:
            raise FormatError(
                f"{self.path}: tensor {gguf_name} has shape {list(entry.shape)}, expected {list(shape)} "
                "by the file's own metadata; download or convert it again"
            )
        return self._load(name, entry) if self._load else entry

    def loaded_by(self, load: Callable[[str, TensorEntry], TensorEntry]) -> "Checkpoint":
        """The same model with its tensors where `load(name, entry)` puts them."""
        return Checkpoint(self._gguf, load)


def product_formats(checkpoint: Checkpoint) -> list[BlockFormat]:
    """The formats of matrices that activations are multiplied with, each once, in the order of the file."""
    only_read = {_gguf_name("embed_tokens")} if "lm_head" in checkpoint else set()
    entries = (entry for name, entry in checkpoint.tensors.items() if name not in only_read)
    return list(dict.fromkeys(entry.format for entry in entries if len(entry.shape) > 1))


def open_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Open a model file, the weights left where they are.

    Raises OptionError (no such file), FormatError (damaged or contradictory), UnsupportedError (another architecture).
    """
    return Checkpoint(open_gguf(path))


def _gguf_name(name: str) -> str:
    if name.startswith("layers."):
        _, index, rest = name.split(".", 2)
        return f"blk.{index}.{TENSOR_NAMES.get(rest, rest)}"
    return TENSOR_NAMES.get(name, name)
