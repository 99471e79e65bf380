"""Generation: token ids in, token ids out, the cache kept between calls."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edge_moe.config import ModelConfig
from edge_moe.errors import OptionError, ShapeError

PREFILL_CHUNK = 1024  # tokens per pass of a prompt: enough to reuse each expert's weights, little enough scratch


class Cache(Protocol):
    """What generation needs of the memory of the tokens seen; `TokenCache` says what each part means."""

    context_length: int

    @property
    def length(self) -> int: ...

    @property
    def free(self) -> int: ...

    def truncate(self, length: int) -> None: ...


class LanguageModel(Protocol):
    """What generation needs of a model pass; the cache is one of its own kind."""

    @property
    def config(self) -> ModelConfig: ...

    def new_cache(self, context_length: int, kind: str = ...) -> Any: ...

    def forward(self, token_ids: np.ndarray, cache: Any, *, all_logits: bool = False) -> np.ndarray: ...


class TokenSampler(Protocol):
    """Chooses the next token from logits f32[vocab] and all tokens so far."""

    def sample(self, logits: np.ndarray, history: Sequence[int]) -> int: ...


@dataclass
class GenerationStats:
    """What one generation did, filled in while it runs. `stop_reason`: eos, length, context, stop or interrupted."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    prefill_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    stop_reason: str = ""

    @property
    def prefill_tok_per_s(self) -> float:
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_per_s(self) -> float:
        """Tokens after the first per second; the first comes out of the prefill."""
        return max(0, self.completion_tokens - 1) / self.decode_s if self.decode_s else 0.0


class Session:
    """One conversation: a cache and the token ids it holds. Not for use by two threads at once."""

    def __init__(self, model: LanguageModel, context_length: int, cache: Cache | None = None) -> None:
        self.model = model
        self.cache = model.new_cache(context_length) if cache is None else cache
        self.token_ids: list[int] = []
        self.stats = GenerationStats()

    def prefill(
        self,
        token_ids: Sequence[int],
        *,
        all_logits: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """Bring the cache to exactly `token_ids`, chunk by chunk, keeping what it already holds of them.

        Yields f32[1,vocab] of each chunk's last token, or f32[T,vocab] of all its tokens.
        Raises OptionError, ShapeError.
        """
        self._check(token_ids)
        kept = self._common_prefix(token_ids)
        self.cache.truncate(kept)
        del self.token_ids[kept:]
        self.stats.reused_tokens = kept
        for first in range(kept, len(token_ids), PREFILL_CHUNK):
            if on_progress:
                on_progress(first, len(token_ids))
            chunk = token_ids[first : first + PREFILL_CHUNK]
            logits = self.model.forward(np.array(chunk, np.int64), self.cache, all_logits=all_logits)
            self.token_ids += chunk
            yield logits
        if on_progress:
            on_progress(len(token_ids), len(token_ids))

    def generate(
        self,
        token_ids: Sequence[int],
        sampler: TokenSampler,
        *,
        max_new_tokens: int,
        eos_ids: Collection[int] = (),
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[int]:
        """Continue `token_ids`, one id at a time, until an end token (not given out), the length or the context ends.

        Raises OptionError when the prompt does not fit, ShapeError for ids outside the vocabulary.
        """
        stats = self.stats = GenerationStats(prompt_tokens=len(token_ids))
        start = time.perf_counter()
        *_, logits = self.prefill(token_ids, on_progress=on_progress)
        first = time.perf_counter()
        stats.prefill_s = first - start
        history = list(token_ids)
        while stats.completion_tokens < max_new_tokens:
            token = sampler.sample(logits[-1], history)
            now = time.perf_counter()
            if stats.completion_tokens == 0:
                stats.first_token_s, first = now - start, now
            stats.decode_s = now - first
            if token in eos_ids:
                stats.stop_reason = "eos"
                return
            stats.completion_tokens += 1
            history.append(token)
            yield token
            if stats.completion_tokens == max_new_tokens:
                break
            if self.cache.free == 0:
                stats.stop_reason = "context"
                return
            logits = self.model.forward(np.array([token], np.int64), self.cache)
            self.token_ids.append(token)
        stats.stop_reason = "length"

    def _check(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise OptionError("the prompt has no tokens; give at least one")
        if len(token_ids) > self.cache.context_length:
            longest = self.model.config.max_position_embeddings
            remedy = "shorten it" + (" or raise -c/--ctx-size" if self.cache.context_length < longest else "")
            raise OptionError(
                f"the prompt has {len(token_ids)} tokens, the context takes {self.cache.context_length}; {remedy}"
            )
        low, high, vocab_size = min(token_ids), max(token_ids), self.model.config.vocab_size
        if low < 0 or high >= vocab_size:
            raise ShapeError(f"token id {low if low < 0 else high} is outside the vocabulary, 0 to {vocab_size - 1}")

    def _common_prefix(self, token_ids: Sequence[int]) -> int:
        """Tokens of `token_ids` already in the cache; the last one is always run again, since it gives the logits."""
        kept = 0
        for ours, theirs in zip(self.token_ids, token_ids[:-1], strict=False):
            if ours != theirs:
                break
            kept += 1
        return kept
