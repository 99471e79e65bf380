"""The backend itself: passes built lazily and computed once for each token."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

from edge_moe.backends.mlx.cache import MlxCache
from edge_moe.backends.mlx.operations import MlxOperations
from edge_moe.backends.mlx.weights import MlxWeights
from edge_moe.backends.protocol import Compute
from edge_moe.config import DeepseekV2Config, LlamaConfig
from edge_moe.errors import DeviceError
from edge_moe.expert_store import ExpertStore
from edge_moe.kernels import elementwise

MISSING = "mlx is not installed: pip install 'edge-moe[mlx]'"
CHUNK_TOKENS = 128  # of a prompt at a time: scores of all its tokens and heads are held at once


def import_mlx() -> Any:
    """mlx.core. Raises DeviceError, which says what is missing."""
    try:
        import mlx.core as mx
    except ImportError as error:
        missing = MISSING if error.name in ("mlx", "mlx.core", None) else f"mlx cannot be used: {error}"
        raise DeviceError(missing) from None
    return mx


class MlxBackend:
    """Runs passes by MLX on its default device."""

    def __init__(self, threads: int, store: ExpertStore | None = None) -> None:
        """With a store, experts come from there and are run by our own kernels. Raises DeviceError."""
        self._mx = import_mlx()
        self.threads = threads
        self.weights = MlxWeights(self._mx)
        self.operations = MlxOperations(self._mx, self.weights, store)
        self._store = store

    @property
    def name(self) -> str:
        """The device's."""
        return f"mlx, {self._mx.default_device().type.name}"

    def latent_cache(
        self, config: DeepseekV2Config, context_length: int, kind: str, gains: np.ndarray | None
    ) -> MlxCache:
        """An empty cache of latents in bf16 or f32. Raises OptionError."""
        return MlxCache(self._mx, config, context_length, kind, config.latent_dim)

    def kv_cache(self, config: LlamaConfig, context_length: int, kind: str) -> MlxCache:
        """An empty cache of keys and values in bf16 or f32. Raises OptionError."""
        row = 2 * config.num_key_value_heads * config.head_dim
        return MlxCache(self._mx, config, context_length, kind, row, config.sliding_window or 0)

    def prepare(self, compute: Compute, cache: MlxCache, width: int = 0) -> None:
        """Make all weights' forms: a pass that is built names them, and need not be computed. Raises DeviceError."""
        with _errors():
            self.operations.position, self.operations.n_tokens = 0, 1
            self.operations.is_only_named = True
            try:
                source = self._mx.zeros((1, width)) if width else self._mx.array([0])
                compute(self.operations, source, cache, False)
            finally:
                self.operations.is_only_named = False

    def run(self, compute: Compute, source: np.ndarray, cache: MlxCache, all_logits: bool) -> np.ndarray:
        """Run a pass chunk by chunk. source i64[T] or f32[T,D] -> f32[T,vocab] or f32[1,vocab].

        Raises DeviceError, and ReadError of a store.
        """
        elementwise.set_threads(self.threads)  # of our kernels, which run a store's experts
        parts: list[np.ndarray] = []
        for first in range(0, len(source), CHUNK_TOKENS):
            chunk = source[first : first + CHUNK_TOKENS]
            self.operations.position, self.operations.n_tokens = cache.length + first, len(chunk)
            started = perf_counter()
            if self._store is not None:
                self._store.begin(len(chunk))
            with _errors():
                kind = np.int32 if chunk.ndim == 1 else np.float32
                logits = compute(self.operations, self._mx.array(chunk.astype(kind)), cache, all_logits)
                self.operations.evaluate(logits, *cache.rows)
            if self._store is not None:
                self._store.finish(perf_counter() - started)
            part = np.array(logits)
            parts = [*parts, part] if all_logits else [part]
        return np.concatenate(parts)


@contextmanager
def _errors() -> Iterator[None]:
    """The library's errors as ours."""
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(f"mlx: {' '.join(str(error).split())[:300]}; --backend cpu needs no device") from None
