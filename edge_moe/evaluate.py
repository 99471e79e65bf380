"""Measure how well a model predicts a text: perplexity, bits per byte and the divergence from a reference model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_moe.divergence import (
    Evaluation,
    Scores,
    kl_divergences,
    live_log_probs,
    normalizers,
    summarize,
    surprises,
)
from edge_moe.errors import FormatError, OptionError
from edge_moe.generate import PREFILL_CHUNK
from edge_moe.saved_logits import LogitsWriter, LogProbs, SavedLogits, saving_logits

if TYPE_CHECKING:
    from edge_moe.api import Model

LOGITS_BYTES = 128 << 20  # most logits of one model held at once: 320 positions of a 102,400-token vocabulary
_FEWEST_ROWS = 16
_MASS = 0.8, 1.01  # of a saved row: rounding adds up to 1e-4, and tokens too unlikely to be saved are missing


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


def windows(n_tokens: int, context_length: int, stride: int | None = None, limit: int | None = None) -> list[Window]:
    """Windows that cover a text, the first `limit` of them.

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
    return [Window(start, context_length, first) for start in range(0, n_tokens - context_length + 1, step)][:limit]


def evaluate(
    model: Model,
    text: str,
    *,
    reference: Model | SavedLogits | None = None,
    context_length: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    save_logits: Path | None = None,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Evaluation:
    """Score a text; with a reference also compare the two distributions at every scored position.

    The reference is another model, or its distributions over the same text as `save_logits` wrote them.
    on_window(done, total, ppl so far) is called after each window. One block of logits per model is held at a time.

    Raises OptionError when the text is too short, or the reference has another vocabulary or another text, FormatError
    when a model's logits are not numbers or the saved ones are damaged.
    """
    ids = list(model.tokenizer.encode(text))
    if reference is not None and not isinstance(reference, SavedLogits):
        _check_same_vocabulary(model, reference, ids, text)
    plan = windows(len(ids), context_length, stride, max_windows)
    if isinstance(reference, SavedLogits):
        _check_same_text(model, reference, ids, plan, stride)
    if save_logits is not None and stride is not None:
        raise OptionError("--save-logits keeps chunks that lie side by side; leave out --stride")
    starts_with_bos = ids[0] == model.tokenizer.bos_id
    measured: list[Scores] = []
    with contextlib.ExitStack() as exits:
        writer = None
        if save_logits is not None:
            chunks = [ids[window.start : window.start + window.length] for window in plan]
            writer = exits.enter_context(saving_logits(save_logits, context_length, model.config.vocab_size, chunks))
        nats = n_scored = 0.0
        for number, window in enumerate(plan):
            window_ids = np.array(ids[window.start : window.start + window.length], np.int64)
            if starts_with_bos:
                window_ids[0] = ids[0]  # each window is a text of its own, as in llama-perplexity
            for scores in _window_scores(model, reference, window_ids, window, number, writer):
                measured.append(scores)
                nats, n_scored = nats + scores.nll.sum(), n_scored + len(scores.nll)
            if on_window is not None:
                on_window(number + 1, len(plan), float(np.exp(min(nats / n_scored, 700))))
    return summarize(_joined(measured))


def _window_scores(
    model: Model,
    reference: Model | SavedLogits | None,
    ids: np.ndarray,
    window: Window,
    number: int,
    writer: LogitsWriter | None,
) -> Iterator[Scores]:
    """What each position of a window gives, block by block."""
    expected = _reference_blocks(reference, model, ids, window, number)
    position = window.first
    for logits in _scored_logits(model, ids, window.first):
        n = len(logits)
        next_ids = ids[position + 1 : position + 1 + n]
        log_normalizers = normalizers(logits)
        nll = surprises(logits, log_normalizers, next_ids)
        _check_finite(nll, model, window.start + position)
        if writer is not None:
            writer.write(logits, log_normalizers)
        n_bytes = np.array([len(model.tokenizer.token_bytes(int(each), skip_special=True)) for each in next_ids])
        reference_nll = kld = np.empty(0)
        same_top = np.empty(0, bool)
        if reference is not None:
            log_probs = next(expected)
            kld, mass = kl_divergences(log_probs, logits, log_normalizers)
            if isinstance(reference, SavedLogits):
                if not ((mass > _MASS[0]) & (mass < _MASS[1])).all():
                    raise reference.damaged(number)
            else:
                _check_finite(kld, reference, window.start + position)
            reference_nll = -log_probs.of(next_ids)
            same_top = log_probs.likeliest() == logits.argmax(axis=-1)
        yield Scores(np.full(n, number), n_bytes, nll, reference_nll, kld, same_top)
        position += n


def _reference_blocks(
    reference: Model | SavedLogits | None, model: Model, ids: np.ndarray, window: Window, number: int
) -> Iterator[LogProbs]:
    """The reference's distributions in blocks of as many positions as the model's."""
    if isinstance(reference, SavedLogits):
        for start, stop in _blocks(model, window.first, len(ids)):
            yield reference.rows(number, start - window.first, stop - start)
    elif reference is not None:
        for logits in _scored_logits(reference, ids, window.first):
            yield live_log_probs(logits, normalizers(logits))


def _scored_logits(model: Model, ids: np.ndarray, first: int) -> Iterator[np.ndarray]:
    """Blocks f32[rows,V] of the logits at positions first : len(ids) - 1; the last token has no successor."""
    cache = model.new_cache(len(ids))
    if model.runs_tokens_singly:
        for position in range(first):
            model.forward(ids[position : position + 1], cache)
        for start, stop in _blocks(model, first, len(ids)):
            yield np.concatenate([model.forward(ids[i : i + 1], cache) for i in range(start, stop)])
        return
    for start in range(0, first, PREFILL_CHUNK):
        model.forward(ids[start : min(start + PREFILL_CHUNK, first)], cache)
    for start, stop in _blocks(model, first, len(ids)):
        yield model.forward(ids[start:stop], cache, all_logits=True)


def _blocks(model: Model, first: int, length: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions whose logits are held at the same time."""
    rows = min(PREFILL_CHUNK, max(_FEWEST_ROWS, LOGITS_BYTES // (4 * model.config.vocab_size)))
    return ((start, min(start + rows, length - 1)) for start in range(first, length - 1, rows))


def _joined(parts: Sequence[Scores]) -> Scores:
    fields = Scores.__dataclass_fields__
    return Scores(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields})


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


def _check_same_text(
    model: Model, saved: SavedLogits, ids: Sequence[int], plan: Sequence[Window], stride: int | None
) -> None:
    """Raises OptionError unless the saved distributions are those of these windows."""
    path, (n_chunks, length) = saved.path, saved.token_ids.shape
    if saved.vocab_size != model.config.vocab_size:
        raise OptionError(
            f"{path}: is of a vocabulary of {saved.vocab_size} tokens, the model has {model.config.vocab_size}; "
            "both must have the same"
        )
    if stride is not None:
        raise OptionError(f"{path}: holds chunks that lie side by side; leave out --stride")
    if length != plan[0].length:
        raise OptionError(f"{path}: is of chunks of {length} tokens, not {plan[0].length}; give -c {length}")
    if n_chunks < len(plan):
        raise OptionError(
            f"{path}: holds {n_chunks} chunks, the text has {len(plan)}; give the same text, or --chunks {n_chunks}"
        )
    planned = np.array(ids[: len(plan) * length]).reshape(-1, length)
    differs = np.flatnonzero(planned != saved.token_ids[: len(plan)])
    if len(differs):
        raise OptionError(
            f"{path}: is of another text or tokenizer: token {differs[0]} of its text is "
            f"{saved.token_ids.flat[differs[0]]}, of this one {planned.flat[differs[0]]}"
        )


def _check_finite(values: np.ndarray, model: Model, position: int) -> None:
    if not np.isfinite(values).all():
        where = position + int(np.flatnonzero(~np.isfinite(values))[0])
        raise FormatError(
            f"{model.checkpoint.path}: the logits after token {where} are not finite numbers; "
            "the weights are damaged, fetch the file again"
        )
