"""Which pass runs a model: what its file declares decides."""

from typing import Any

from edge_moe.backends.protocol import Backend
from edge_moe.checkpoint import Checkpoint
from edge_moe.config import KV_KINDS, DeepseekV2Config, LlamaConfig, ModelConfig
from edge_moe.errors import UnsupportedError
from edge_moe.kv_cache import KINDS, kv_cache_bytes
from edge_moe.latent_cache import latent_cache_bytes
from edge_moe.models import deepseek2, llama

Weights = deepseek2.Weights | llama.Weights


def load_weights(checkpoint: Checkpoint) -> Weights:
    """All weights of the model, as views on the file. Raises FormatError, UnsupportedError."""
    if isinstance(checkpoint.config, LlamaConfig):
        return llama.load_weights(checkpoint)
    return deepseek2.load_weights(checkpoint)


def load_pass(checkpoint: Checkpoint, backend: Backend) -> Any:
    """The model pass of a file: what `generate.LanguageModel` says, with its `weights`.

    Raises FormatError, UnsupportedError.
    """
    match checkpoint.config:
        case DeepseekV2Config() as config:
            return deepseek2.DeepseekV2(config, deepseek2.load_weights(checkpoint), backend)
        case LlamaConfig() as config:
            return llama.Llama(config, llama.load_weights(checkpoint), backend)
    raise UnsupportedError(f"{checkpoint.path}: there is no pass for architecture {checkpoint.config.architecture}")


def cache_bytes(config: ModelConfig, context_length: int, kind: str) -> int:
    """Bytes of a cache for `context_length` tokens. Raises OptionError for a kind that the model cannot have."""
    match config:
        case DeepseekV2Config():
            return latent_cache_bytes(config, context_length, kind)
        case LlamaConfig():
            return kv_cache_bytes(config, context_length, kind)
    raise UnsupportedError(f"there is no cache for architecture {config.architecture}")


def cache_bytes_by_kind(config: ModelConfig, context_length: int) -> dict[str, int]:
    """The same for each kind of cache that the model can have."""
    kinds = KINDS if isinstance(config, LlamaConfig) else KV_KINDS
    return {kind: cache_bytes(config, context_length, kind) for kind in kinds}


def scratch_bytes(config: ModelConfig, n_tokens: int) -> int:
    """Most bytes of activations at once in a pass of `n_tokens`."""
    match config:
        case DeepseekV2Config():
            return deepseek2.scratch_bytes(config, n_tokens)
        case LlamaConfig():
            return llama.scratch_bytes(config, n_tokens)
    raise UnsupportedError(f"there is no pass for architecture {config.architecture}")
