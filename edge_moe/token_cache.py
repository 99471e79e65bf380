"""What all caches of tokens seen have in common: a kind, a length, and memory that is taken as the context grows."""

import numpy as np

from edge_moe.config import KV_KINDS, ModelConfig
from edge_moe.errors import OptionError, ShapeError
from edge_moe.kernels.attention import Step
from edge_moe.kernels.launch import compiled_address, launch


def check_kind(kind: str) -> str:
    """The kind itself. Raises OptionError for one that there is not."""
    if kind not in KV_KINDS:
        raise OptionError(f"--kv {kind}: expected one of {', '.join(KV_KINDS)}")
    return kind


class TokenCache:
    """Memory for `context_length` tokens, the same for each layer. Pages are taken from the system when written."""

    def __init__(self, config: ModelConfig, context_length: int, kind: str, n_bytes: int) -> None:
        self.kind = check_kind(kind)
        self.context_length = context_length
        self._length = np.zeros(1, np.int64)
        self._n_bytes = n_bytes
        self._layer_bytes = n_bytes // config.num_hidden_layers
        # np.zeros leaves the pages to the system until they are written
        self._memory = np.zeros(n_bytes + 63, np.uint8)
        self._scratch = np.empty(0, np.uint8)  # of attention; kept, since new pages would cost more time

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self._length[0])

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole cache, used or not."""
        return self._n_bytes

    @property
    def free(self) -> int:
        """Tokens that still fit."""
        return self.context_length - self.length

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` that every layer has stored."""
        self._length[0] += n_tokens

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        if not 0 <= length <= self.length:
            raise OptionError(f"cannot cut the cache to {length} tokens: it holds {self.length}")
        self._length[0] = length

    def _layer_address(self, layer: int) -> int:
        return ((self._memory.ctypes.data + 63) & ~63) + layer * self._layer_bytes

    def _check_room(self, n_tokens: int) -> None:
        if n_tokens > self.free:
            raise ShapeError(f"{n_tokens} tokens for a cache with room for {self.free}")

    def _scratch_of(self, n_bytes: int) -> np.ndarray:
        if self._scratch.size < n_bytes:
            self._scratch = np.empty(n_bytes, np.uint8)
        return self._scratch


def check_context_length(config: ModelConfig, context_length: int) -> int:
    """The length itself. Raises OptionError for one that the model was not made for."""
    if not 1 <= context_length <= config.max_position_embeddings:
        raise OptionError(
            f"context length {context_length}: the model takes 1 to {config.max_position_embeddings} tokens"
        )
    return context_length


def run_steps(steps: list[Step], n_threads: int) -> None:
    """Run steps in order, now."""
    for step in steps:
        code = compiled_address(step.function, step.fmt)
        launch(code, step.plan.ctypes.data, step.n_units, step.operations, n_threads)
