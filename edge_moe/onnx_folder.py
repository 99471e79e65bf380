"""Runs a model that was exported to an ONNX folder, through onnxruntime, with the interface of a model pass."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_moe.config import DeepseekV2Config
from edge_moe.errors import FormatError, OptionError, UnsupportedError
from edge_moe.gguf import open_gguf
from edge_moe.metadata import read_config

GRAPH_FILE = "model.onnx"
SETTINGS_FILE = "settings.gguf"  # metadata alone: the configuration and the tokenizer


def is_onnx_folder(path: Path) -> bool:
    """Whether `path` is a folder with a graph in it."""
    return (path / GRAPH_FILE).is_file()


class OnnxFolder:
    """An open folder: `config`, and the tokenizer's metadata. Raises OptionError, FormatError, UnsupportedError."""

    def __init__(self, path: Path) -> None:
        if not is_onnx_folder(path):
            raise OptionError(f"{path}: has no {GRAPH_FILE}; give a folder of `edge-moe export onnx`, or a .gguf file")
        if not (path / SETTINGS_FILE).is_file():
            raise OptionError(
                f"{path}: has no {SETTINGS_FILE}, so it is not a folder that `edge-moe export onnx` wrote; "
                "export the model again"
            )
        settings = open_gguf(path / SETTINGS_FILE)
        self.path = path
        self.metadata: Mapping[str, Any] = settings.metadata
        config = read_config(settings, has_weights=False)
        if not isinstance(config, DeepseekV2Config):
            raise UnsupportedError(f"{path}: architecture {config.architecture}, expected deepseek2; export it again")
        self.config = config
        self.size_bytes = sum(file.stat().st_size for file in path.iterdir())


@dataclass(frozen=True)
class Int8Row:
    """Half a token's latent in 8 bits: `half` codes, then `n_scales` codes of the scales of `block` numbers each."""

    half: int
    block: int

    @property
    def n_scales(self) -> int:
        return self.half // self.block

    @property
    def width(self) -> int:
        return self.half + self.n_scales


def int8_row(config: DeepseekV2Config) -> Int8Row:
    """The layout for a model. A block holds either latents or rope keys, whose sizes differ."""
    half = config.latent_dim // 2
    return Int8Row(half, max(n for n in range(1, 129) if math.gcd(half, config.kv_lora_rank) % n == 0))


class OnnxCache:
    """Latents of the tokens seen so far, as onnxruntime gave them out: two halves [1,1,length,width] a layer."""

    def __init__(self, config: DeepseekV2Config, context_length: int, dtype: type, width: int) -> None:
        if not 1 <= context_length <= config.max_position_embeddings:
            raise OptionError(
                f"context length {context_length}: the model takes 1 to {config.max_position_embeddings} tokens"
            )
        self.context_length = context_length
        self.length = 0
        empty: np.ndarray = np.zeros((1, 1, 0, width), dtype)
        self.halves: list[Any] = [_to_ort(empty)] * (2 * config.num_hidden_layers)

    @property
    def free(self) -> int:
        """Tokens that still fit."""
        return self.context_length - self.length

    @property
    def n_bytes(self) -> int:
        """Bytes of the tokens seen."""
        return sum(half.numpy().nbytes for half in self.halves)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        if not 0 <= length <= self.length:
            raise OptionError(f"cannot cut the cache to {length} tokens: it holds {self.length}")
        if length < self.length:
            self.halves = [_to_ort(half.numpy()[:, :, :length]) for half in self.halves]
            self.length = length


class OnnxPass:
    """The model: token ids in, logits out, the latent cache passed in."""

    def __init__(self, folder: OnnxFolder, threads: int) -> None:
        self.config = folder.config
        runtime = _onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # threads that wait by spinning take the cores from each other where anything else runs: half the speed
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors; its warnings are about graphs of others
        path = self._path = folder.path / GRAPH_FILE
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's errors have no common type
            raise FormatError(f"{path}: onnxruntime cannot load it: {_first_line(error)}; export it again") from None
        self._past = [f"past_key_values.{i}.{part}" for i in self._layers for part in ("key", "value")]
        self._present = [f"present.{i}.{part}" for i in self._layers for part in ("key", "value")]
        self._dtype, self._width = self._check_interface(path)

    @property
    def _layers(self) -> range:
        return range(self.config.num_hidden_layers)

    def new_cache(self, context_length: int, kind: str = "") -> OnnxCache:
        """An empty latent cache, of the kind that the graph has."""
        return OnnxCache(self.config, context_length, self._dtype, self._width)

    def forward(self, token_ids: np.ndarray, cache: OnnxCache, *, all_logits: bool = False) -> np.ndarray:
        """Run T tokens behind those in the cache. token_ids i64[T] -> f32[T, vocab], or f32[1, vocab] of the last."""
        n_tokens, end = len(token_ids), cache.length + len(token_ids)
        if n_tokens > cache.free:
            raise OptionError(f"{n_tokens} tokens do not fit into the cache, which has room for {cache.free}")
        feeds = {
            "input_ids": _to_ort(np.asarray(token_ids, np.int64)[None]),
            "attention_mask": _to_ort(np.ones((1, end), np.int64)),
            "position_ids": _to_ort(np.arange(cache.length, end, dtype=np.int64)[None]),
            "num_logits_to_keep": _to_ort(np.array([0 if all_logits else 1], np.int64)),
            **dict(zip(self._past, cache.halves, strict=True)),
        }
        try:
            logits, *halves = self._session.run_with_ort_values(["logits", *self._present], feeds)
        except Exception as error:  # the library's errors have no common type
            raise FormatError(
                f"{self._path}: onnxruntime cannot run it: {_first_line(error)}; export it again"
            ) from None
        cache.halves = halves
        cache.length = end
        return np.asarray(logits.numpy()[0])

    def _check_interface(self, path: Path) -> tuple[type, int]:
        """The cache's type and the width of its rows. Raises FormatError unless inputs and outputs are those we use."""
        inputs = {each.name: each for each in self._session.get_inputs()}
        inputs |= {each.name: each for each in self._session.get_overridable_initializers()}
        expected = {"input_ids", "attention_mask", "position_ids", "num_logits_to_keep", *self._past}
        outputs = {each.name for each in self._session.get_outputs()}
        if set(inputs) != expected or outputs != {"logits", *self._present}:
            raise FormatError(f"{path}: its inputs and outputs are not those of an edge-moe export; export it again")
        past = inputs[self._past[0]]
        dtype = _CACHE_TYPES.get(past.type)
        width = int8_row(self.config).width if dtype is np.int8 else self.config.latent_dim // 2
        if dtype is None or past.shape[-1] != width:
            raise FormatError(
                f"{path}: its cache is {past.type} of width {past.shape[-1]}, expected {width} by {SETTINGS_FILE}; "
                "export it again"
            )
        return dtype, width


_CACHE_TYPES: dict[str, type] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def _to_ort(array: np.ndarray) -> Any:
    return _onnxruntime().OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise OptionError("an ONNX folder needs onnxruntime; install it by `pip install 'edge-moe[onnx]'`") from None
    return onnxruntime


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
