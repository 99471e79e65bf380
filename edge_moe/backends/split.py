"""A pass in two parts: the first layers on one backend, the last ones and the head on another."""

import dataclasses
from functools import partial
from typing import Any, TypeVar

import numpy as np

from edge_moe.backends.protocol import Backend, Compute
from edge_moe.config import DeepseekV2Config, LlamaConfig, ModelConfig
from edge_moe.token_cache import TokenCache

Config = TypeVar("Config", DeepseekV2Config, LlamaConfig)


class SplitCache(TokenCache):
    """The caches of both parts, which hold the same tokens."""

    def __init__(self, config: ModelConfig, first: TokenCache, second: TokenCache) -> None:
        super().__init__(config, first.context_length, first.kind, 0)
        self.first, self.second = first, second

    @property
    def n_bytes(self) -> int:
        return self.first.n_bytes + self.second.n_bytes

    def advance(self, n_tokens: int) -> None:
        for cache in (self.first, self.second):
            cache.advance(n_tokens)
        super().advance(n_tokens)

    def truncate(self, length: int) -> None:
        super().truncate(length)
        for cache in (self.first, self.second):
            cache.truncate(length)


class SplitBackend:
    """Runs layers before `at` on the first backend, those from it on and the head on the second."""

    def __init__(self, first: Backend, second: Backend, at: int, config: ModelConfig) -> None:
        """config: of the whole model, of which both parts have at least one layer."""
        self.first, self.second, self.at = first, second, at
        self._n_layers, self._width = config.num_hidden_layers, config.hidden_size

    def latent_cache(
        self, config: DeepseekV2Config, context_length: int, kind: str, gains: np.ndarray | None
    ) -> SplitCache:
        """Empty caches of latents, each for its part's layers. Raises OptionError of either backend."""
        first, second = self._parts(config)
        before, after = (None, None) if gains is None else (gains[: self.at], gains[self.at :])
        return SplitCache(
            config,
            self.first.latent_cache(first, context_length, kind, before),
            self.second.latent_cache(second, context_length, kind, after),
        )

    def kv_cache(self, config: LlamaConfig, context_length: int, kind: str) -> SplitCache:
        """Empty caches of keys and values, each for its part's layers. Raises OptionError of either backend."""
        first, second = self._parts(config)
        return SplitCache(
            config,
            self.first.kv_cache(first, context_length, kind),
            self.second.kv_cache(second, context_length, kind),
        )

    def prepare(self, compute: Compute, cache: SplitCache, width: int = 0) -> None:
        """Prepare both. Raises what they raise."""
        first, second = self._computes(compute)
        self.first.prepare(first, cache.first, width)
        self.second.prepare(second, cache.second, self._width)

    def run(self, compute: Compute, source: np.ndarray, cache: SplitCache, all_logits: bool) -> np.ndarray:
        """Run both parts. source i64[T] -> f32[T,vocab] or f32[1,vocab]. Raises what they raise."""
        first, second = self._computes(compute)
        hidden = self.first.run(first, source, cache.first, True)
        return self.second.run(second, hidden, cache.second, all_logits)

    def _parts(self, config: Config) -> tuple[Config, Config]:
        return (
            dataclasses.replace(config, num_hidden_layers=self.at),
            dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers - self.at),
        )

    def _computes(self, compute: Compute) -> tuple[Any, Any]:
        return partial(compute, layers=range(self.at)), partial(compute, layers=range(self.at, self._n_layers))
