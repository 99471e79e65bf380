"""Measure how well a model predicts a text: perplexity, bits per byte and the divergence from a reference model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_moe.errors import FormatError, OptionError, ShapeError
from edge_moe.generate import PREFILL_CHUNK

if TYPE_CHECKING:
    from edge_moe.api import Model

LOGITS_BYTES = 128 << 20  # most logits of one model held at once: 320 positions of a 102,400-token vocabulary
_SOFTMAX_ROWS = 16  # rows in float64 at once: 13 MB for such a vocabulary


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model on one text; the divergences (in nats) are None when there was no reference."""

    tokens: int
    ppl: float
    ppl_stderr: float
    bits_per_byte: float
    kld_mean: float | None = None
    kld_p99: float | None = None
    kld_p999: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Window:
    """Tokens start : start + length are fed; those after the position `first` (counted in the window) are scored."""

    start: int
    length: int
    first: int

    @property
    def scored(self) -> slice:
        """The scored tokens, as a slice of the text's tokens."""
        return slice(self.start + self.first + 1, self.start + self.length)


def windows(n_tokens: int, context_length: int, stride: int | None = None) -> list[Window]:
    """Windows that cover a text.

    Without a stride they are those of llama-perplexity: whole chunks of context_length tokens side by side, the
    second half of each scored, so that every scored token has seen at least half a context. With a stride the
    windows overlap and each scores its last `stride` tokens. A rest that fills no window is left out.

    Raises OptionError when the text is shorter than one window or an option is out of range.
    Source: llama.cpp tools/perplexity/perplexity.cpp, perplexity() and perplexity_v2().
    """
    if context_length < 4:
        raise OptionError(f"evaluation needs a context of at least 4 tokens, found {context_length}")
    if stride is not None and not 1 <= stride < context_length:
        raise OptionError(f"the stride must be from 1 to {context_length - 1} (the context less one), found {stride}")
    if n_tokens < context_length:
        raise OptionError(
            f"the text has {n_tokens} tokens, fewer than one context of {context_length}; "
            "give a longer text or a smaller context"
        )
    step = stride or context_length
    first = context_length - stride - 1 if stride else context_length // 2
    return [Window(start, context_length, first) for start in range(0, n_tokens - context_length + 1, step)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities of each row. f32[T,V] -> f64[T,V]; in float64, since divergences go down to 1e-6."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def negative_log_likelihoods(logits: np.ndarray, next_ids: Sequence[int]) -> np.ndarray:
    """Surprise, in nats, at each token that came. logits f32[T,V], next_ids T token ids -> f64[T]."""
    ids = np.asarray(next_ids, dtype=np.int64)
    out = np.empty(len(ids))
    for rows in _row_blocks(len(ids)):
        log_probs = log_softmax(logits[rows])
        out[rows] = -log_probs[np.arange(len(log_probs)), ids[rows]]
    return out


def kl_divergences(reference_logits: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(reference || model) of each row, in nats. f32[T,V], f32[T,V] -> f64[T]."""
    if reference_logits.shape != logits.shape:
        raise ShapeError(f"logits of the reference {reference_logits.shape} and the model {logits.shape} must match")
    out = np.empty(len(logits))
    for rows in _row_blocks(len(logits)):
        reference, other = log_softmax(reference_logits[rows]), log_softmax(logits[rows])
        # a token that the reference rules out (-inf) adds nothing, where 0 * inf would give nan
        terms = np.exp(reference) * np.where(np.isneginf(reference), 0.0, reference - other)
        out[rows] = terms.sum(axis=-1)
    return np.maximum(out, 0.0)  # rounding can leave -1e-17


def evaluate(
    model: Model,
    text: str,
    *,
    reference: Model | None = None,
    context_length: int = 512,
    stride: int | None = None,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Evaluation:
    """Score a text; with a reference also compare the two distributions at every scored position.

    on_window(done, total, ppl so far) is called after each window. One block of logits per model is held at a time.

    Raises OptionError when the text is too short or the two models differ in vocabulary, FormatError when a model's
    logits are not numbers.
    """
    ids = list(model.tokenizer.encode(text))
    if reference is not None:
        _check_same_vocabulary(model, reference, ids, text)
    plan = windows(len(ids), context_length, stride)
    starts_with_bos = ids[0] == model.tokenizer.bos_id
    surprises: list[np.ndarray] = []
    divergences: list[np.ndarray] = []
    n_bytes = n_agreed = 0
    total = 0.0
    for number, window in enumerate(plan, start=1):
        window_ids = ids[window.start : window.start + window.length]
        if starts_with_bos:
            window_ids[0] = ids[0]  # each window is a text of its own, as in llama-perplexity
        position = window.first
        for logits, expected in _scored_logits(model, reference, window_ids, window.first):
            surprises.append(negative_log_likelihoods(logits, window_ids[position + 1 : position + 1 + len(logits)]))
            _check_finite(surprises[-1], model, window.start + position)
            total += float(surprises[-1].sum())
            if reference is not None and expected is not None:
                divergences.append(kl_divergences(expected, logits))
                _check_finite(divergences[-1], reference, window.start + position)
                n_agreed += int(np.count_nonzero(expected.argmax(axis=-1) == logits.argmax(axis=-1)))
            position += len(logits)
        n_bytes += sum(len(model.tokenizer.token_bytes(each, skip_special=True)) for each in ids[window.scored])
        if on_window is not None:
            on_window(number, len(plan), _exp(total / sum(map(len, surprises))))
    return _summary(np.concatenate(surprises), np.concatenate(divergences) if divergences else None, n_agreed, n_bytes)


def _summary(surprises: np.ndarray, divergences: np.ndarray | None, n_agreed: int, n_bytes: int) -> Evaluation:
    n = len(surprises)
    mean = float(surprises.mean())
    stderr = float(surprises.std() / math.sqrt(n - 1)) if n > 1 else math.nan
    ppl = _exp(mean)
    bits_per_byte = float(surprises.sum()) / math.log(2) / n_bytes if n_bytes else math.nan
    if divergences is None:
        return Evaluation(n, ppl, ppl * stderr, bits_per_byte)
    p99, p999 = (float(value) for value in np.percentile(divergences, [99.0, 99.9]))
    return Evaluation(n, ppl, ppl * stderr, bits_per_byte, float(divergences.mean()), p99, p999, n_agreed / n)


def _scored_logits(
    model: Model, reference: Model | None, ids: Sequence[int], first: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Blocks f32[rows,V] of both models' logits at positions first : len(ids) - 1; the last token has no successor."""
    models = [model] if reference is None else [model, reference]
    caches = [each.new_cache(len(ids)) for each in models]
    token_ids = np.asarray(ids, dtype=np.int64)
    for each, cache in zip(models, caches, strict=True):
        for start in range(0, first, PREFILL_CHUNK):
            each.forward(token_ids[start : min(start + PREFILL_CHUNK, first)], cache)
    rows = min(PREFILL_CHUNK, max(_SOFTMAX_ROWS, LOGITS_BYTES // (4 * model.config.vocab_size)))
    for start in range(first, len(ids) - 1, rows):
        block = token_ids[start : min(start + rows, len(ids) - 1)]
        logits = [each.forward(block, cache, all_logits=True) for each, cache in zip(models, caches, strict=True)]
        yield logits[0], logits[1] if reference is not None else None


def _row_blocks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + _SOFTMAX_ROWS, n)) for start in range(0, n, _SOFTMAX_ROWS))


def _check_same_vocabulary(model: Model, reference: Model, ids: Sequence[int], text: str) -> None:
    sizes = model.config.vocab_size, reference.config.vocab_size
    if sizes[0] != sizes[1]:
        raise OptionError(
            f"the model has {sizes[0]} tokens and the reference {sizes[1]}: both must have the same vocabulary"
        )
    if list(reference.tokenizer.encode(text)) != list(ids):
        raise OptionError(
            "the model and the reference cut the text into different tokens: both must have one tokenizer"
        )


def _check_finite(values: np.ndarray, model: Model, position: int) -> None:
    if not np.isfinite(values).all():
        where = position + int(np.flatnonzero(~np.isfinite(values))[0])
        raise FormatError(
            f"{model.checkpoint.path}: the logits after token {where} are not finite numbers; "
            "the weights are damaged, fetch the file again"
        )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
