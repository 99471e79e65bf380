"""Choosing the next token from a model's logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_moe.errors import FormatError, OptionError, ShapeError

HEAD = 1024  # candidates looked at first when the nucleus of a whole vocabulary is wanted


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens; the filters apply in the order top-k, top-p, min-p, then temperature.

    `temperature` 0: always the likeliest; `top_k` 0, `top_p` 1, `min_p` 0, `repeat_penalty` 1: that filter is off;
    `repeat_last_n`: tokens that the penalty looks back on (0 none, -1 all); `seed` None: a new one each time.
    Raises OptionError.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("--temp", self.temperature, "a number from 0 up", 0 <= self.temperature < math.inf)
        _check_whole("--top-k", self.top_k, 0)
        _check("--top-p", self.top_p, "a number above 0 and at most 1", 0 < self.top_p <= 1)
        _check("--min-p", self.min_p, "a number from 0 to 1", 0 <= self.min_p <= 1)
        _check("--repeat-penalty", self.repeat_penalty, "a number above 0", 0 < self.repeat_penalty < math.inf)
        _check_whole("--repeat-last-n", self.repeat_last_n, -1)
        if self.seed is not None:
            _check_whole("--seed", self.seed, 0)


def _check(name: str, value: object, expected: str, fits: bool) -> None:
    if not fits:
        raise OptionError(f"{name} {value}: expected {expected}")


def _check_whole(name: str, value: object, least: int) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    _check(name, value, f"a whole number from {least} up", whole and value >= least)  # type: ignore[operator]


class Sampler:
    """Draws tokens one after the other; with the same seed and logits always the same ones."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._random = np.random.Generator(np.random.PCG64(options.seed))

    def sample(self, logits: np.ndarray, history: Sequence[int]) -> int:
        """The next token. logits f32[vocab], history: the ids so far -> id. Raises what `distribution` raises."""
        ids, probabilities = self.distribution(logits, history)
        if len(ids) == 1:
            return int(ids[0])
        heaps = np.cumsum(probabilities)
        chosen = int(np.searchsorted(heaps, self._random.random() * heaps[-1], side="right"))
        return int(ids[min(chosen, len(ids) - 1)])

    def distribution(self, logits: np.ndarray, history: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """What the next token is drawn from. logits f32[vocab], history: the ids so far -> ids i64[n], probabilities
        f64[n].

        Raises ShapeError for anything but a vector, FormatError if the logits are no numbers.
        """
        if logits.ndim != 1 or not logits.size:
            raise ShapeError(f"logits have shape {logits.shape}, expected one vector with an entry for each token")
        logits = self._penalize(logits, history)
        likeliest = int(np.argmax(logits))  # the lowest id among equals; a NaN comes out first
        if not math.isfinite(logits[likeliest]):
            raise FormatError(f"the model computed {logits[likeliest]} for a logit; its file is probably damaged")
        if self.options.temperature == 0 or self.options.top_k == 1:
            return np.array([likeliest]), np.ones(1)
        ids, kept = self._filter(logits, float(logits[likeliest]))
        # In double precision throughout, so that the choice does not hang on how a sum is ordered.
        with np.errstate(over="ignore"):  # a temperature near 0 makes every other weight 0
            weights = np.exp((kept.astype(np.float64) - float(logits[likeliest])) / self.options.temperature)
        return ids, weights / weights.sum()

    def _penalize(self, logits: np.ndarray, history: Sequence[int]) -> np.ndarray:
        """Make tokens of the recent history less likely. Source: Keskar et al., arXiv 1909.05858, section 4.1."""
        penalty, last_n = self.options.repeat_penalty, self.options.repeat_last_n
        recent = np.unique(np.asarray(history[-last_n:] if last_n > 0 else history, np.int64)) if last_n else ()
        if penalty == 1 or not len(recent):
            return logits
        logits = logits.copy()
        seen = logits[recent]
        # Dividing a negative logit would make the token more likely, so it is multiplied.
        logits[recent] = np.where(seen <= 0, seen * np.float32(penalty), seen / np.float32(penalty))
        return logits

    def _filter(self, logits: np.ndarray, highest: float) -> tuple[np.ndarray, np.ndarray]:
        """Ids and logits that top-k, top-p and min-p leave over, the likeliest first where an order is needed."""
        options = self.options
        ids: np.ndarray | None = None
        if 0 < options.top_k < len(logits):
            ids = _top(logits, options.top_k)
        if options.top_p < 1:
            ids = _nucleus(logits, ids, options.top_p, highest)
        kept = logits if ids is None else logits[ids]
        if ids is None:
            ids = np.arange(len(logits))
        if options.min_p > 0:
            likely = kept >= highest + math.log(options.min_p)
            ids, kept = ids[likely], kept[likely]
        return ids, kept


def _top(logits: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` highest logits, highest first, the lower id first among equals."""
    if count < len(logits):
        # Selecting values and comparing is faster than selecting indices, and leaves the ids in order.
        least = np.partition(logits, len(logits) - count)[len(logits) - count]
        ids = np.flatnonzero(logits >= least)
    else:
        ids = np.arange(len(logits))
    return ids[np.argsort(-logits[ids], kind="stable")][:count]


def _nucleus(logits: np.ndarray, ids: np.ndarray | None, top_p: float, highest: float) -> np.ndarray:
    """The fewest likeliest ids that together hold `top_p` of the probability (of `ids`, which are sorted, or of all).

    Source: Holtzman et al., arXiv 1904.09751, section 3.1.
    """
    total = np.exp((logits if ids is None else logits[ids]).astype(np.float64) - highest).sum()
    for count in (HEAD, 16 * HEAD, len(logits)):
        head = _top(logits, count) if ids is None else ids
        heaps = np.cumsum(np.exp(logits[head].astype(np.float64) - highest))
        enough = int(np.searchsorted(heaps, top_p * total, side="left")) + 1
        if enough <= len(head) or ids is not None:
            break
    return head[:enough]
