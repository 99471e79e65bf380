"""What a model takes: weights by part and format, and the memory it needs for a context length."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_moe.config import KV_KINDS, ModelConfig
from edge_moe.models.architectures import Weights, cache_bytes_by_kind, scratch_bytes
from edge_moe.weights import Weight

# Parts by the name of the field that holds them or what they consist of.
_PARTS = {
    "embed_tokens": "embeddings",
    "self_attn": "attention",
    "mlp": "dense layers",
    "gate": "router",
    "e_score_correction_bias": "router",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "lm_head": "output head",
}
_USUAL_CONTEXTS = (4096, 16384, 65536)


@dataclass
class Part:
    """The weights of one part of a model, over all layers; bytes by the name of their block format."""

    name: str
    n_weights: int = 0
    bytes_by_format: dict[str, int] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        return sum(self.bytes_by_format.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights if self.n_weights else 0.0

    def add(self, format_name: str, n_weights: int, n_bytes: int) -> None:
        """Count one tensor."""
        self.n_weights += n_weights
        self.bytes_by_format[format_name] = self.bytes_by_format.get(format_name, 0) + n_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes that a context of `context_length` tokens needs beside the file's own pages.

    `cache_bytes` is the default cache, `cache_bytes_by_kind` that of each kind there is.
    """

    context_length: int
    cache_bytes: int
    cache_bytes_by_kind: dict[str, int]
    scratch_bytes: int


def parts(weights: Weights) -> list[Part]:
    """The parts of a model in the order of the pass; a part that the model does not have is left out."""
    found: dict[str, Part] = {}
    for name, tensor in _tensors(weights, ""):
        if name == "output head" and tensor is weights.embed_tokens:
            continue
        part = found.setdefault(name, Part(name))
        if isinstance(tensor, Weight):
            part.add(tensor.format.name, int(np.prod(tensor.shape, dtype=np.int64)), tensor.n_bytes)
        else:  # norms and biases are held as f32 arrays
            part.add("F32", tensor.size, tensor.nbytes)
    return list(found.values())


def active_weights(config: ModelConfig, model_parts: list[Part]) -> tuple[int, int]:
    """Weights that one token is multiplied with, and their bytes: all but the embeddings and the idle experts."""
    n_weights = n_bytes = 0
    tied = all(part.name != "output head" for part in model_parts)
    for part in model_parts:
        if part.name == "embeddings" and not tied:
            continue
        n, b = part.n_weights, part.n_bytes
        if part.name == "routed experts":
            n = n * config.num_experts_per_tok // config.n_routed_experts
            b = b * config.num_experts_per_tok // config.n_routed_experts
        n_weights, n_bytes = n_weights + n, n_bytes + b
    return n_weights, n_bytes


def memory(config: ModelConfig, context_length: int, chunk_size: int) -> Memory:
    """Memory of a context, when prompts are read in chunks of `chunk_size` tokens."""
    cache_bytes = cache_bytes_by_kind(config, context_length)
    return Memory(
        context_length,
        cache_bytes[KV_KINDS[0]],
        cache_bytes,
        scratch_bytes(config, min(chunk_size, context_length)),
    )


def usual_contexts(config: ModelConfig) -> list[int]:
    """Context lengths worth showing: some usual ones within the model's own, and that one."""
    limit = config.max_position_embeddings
    return [length for length in _USUAL_CONTEXTS if length < limit] + [limit]


def _tensors(value: Any, part: str, name: str = "") -> Iterator[tuple[str, Weight | np.ndarray]]:
    """Every tensor below a part of the weights, with the name of its part."""
    if isinstance(value, Weight):
        yield part, value
    elif isinstance(value, np.ndarray):
        if name not in _PARTS:
            yield "norms", value
        elif value.any():  # zeros stand for a bias that the file does not have
            yield _PARTS[name], value
    elif isinstance(value, tuple):
        for each in value:
            yield from _tensors(each, part)
    elif dataclasses.is_dataclass(value):
        for each in dataclasses.fields(value):
            yield from _tensors(getattr(value, each.name), _PARTS.get(each.name, part), each.name)
