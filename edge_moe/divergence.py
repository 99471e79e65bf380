"""Figures of quality from what was measured at each position, with error bars.

The error bars are standard errors by the bootstrap: the figure's spread over texts put together at random from the
windows of this one, since positions of one window are not independent. A text of few windows is cut into positions.
Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 6 and 8.6.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_moe.kernels import distributions
from edge_moe.saved_logits import LogProbs

_REPLICATES = 400  # the error of an error bar is then 1 / sqrt(2 * 400) = 3.5 %
_FEW_WINDOWS = 10
_SEED = 0


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model on one text; the figures below `reference_ppl` compare it with a reference, None without one.

    Divergences are KL(reference || model) in nats per token; delta_p is the probability of the token that came, less
    the reference's. Tokens that a saved reference finds too unlikely to know are left out of ppl_ratio, and
    reference_ppl is ppl / ppl_ratio. `nats` is the surprise of all scored tokens together: bits_per_byte is
    nats / ln(2) / scored_bytes, and ppl exp(nats / tokens). Every `_stderr` is by the bootstrap, but ppl_stderr, which
    is the spread over positions that llama-perplexity prints.
    """

    windows: int
    tokens: int
    scored_bytes: int
    nats: float
    ppl: float
    ppl_stderr: float
    bits_per_byte: float
    bits_per_byte_stderr: float
    reference_ppl: float | None = None
    ppl_ratio: float | None = None
    ppl_ratio_stderr: float | None = None
    kld_mean: float | None = None
    kld_mean_stderr: float | None = None
    kld_median: float | None = None
    kld_median_stderr: float | None = None
    kld_p99: float | None = None
    kld_p99_stderr: float | None = None
    kld_p999: float | None = None
    kld_p999_stderr: float | None = None
    kld_max: float | None = None
    top1_agreement: float | None = None
    top1_agreement_stderr: float | None = None
    delta_p_rms: float | None = None
    delta_p_rms_stderr: float | None = None
    delta_p_mean: float | None = None
    delta_p_mean_stderr: float | None = None


@dataclass(frozen=True)
class Scores:
    """What was measured at each of n positions; the last three are empty when there was no reference."""

    windows: np.ndarray  # i64[n]: the window that a position is of
    n_bytes: np.ndarray  # i64[n]: of the token that came
    nll: np.ndarray  # f64[n]: its surprise
    reference_nll: np.ndarray  # f64[n], inf where a saved reference does not know it
    kld: np.ndarray  # f64[n]
    same_top: np.ndarray  # bool[n]


def normalizers(logits: np.ndarray) -> np.ndarray:
    """log(sum(exp(logits))) of each row, NaN where one is not a finite number. f32[T,V] -> f64[T]."""
    top = logits.max(axis=-1)  # NaN when any is
    found = distributions.log_normalizers(logits, top)
    return np.where(np.isfinite(top), found, np.nan)


def surprises(logits: np.ndarray, log_normalizers: np.ndarray, next_ids: np.ndarray) -> np.ndarray:
    """-log of the probability of the tokens that came. f32[T,V], f64[T], i64[T] -> f64[T], in nats."""
    return log_normalizers - logits[np.arange(len(next_ids)), next_ids]


def live_log_probs(logits: np.ndarray, log_normalizers: np.ndarray) -> LogProbs:
    """The log probabilities of logits f32[T,V] with their normalizers f64[T]."""
    ones = np.ones(len(logits), np.float32)
    offset = -log_normalizers.astype(np.float32)
    return LogProbs(logits, 0, logits.shape[1], ones, offset, np.full_like(ones, np.nan))


def kl_divergences(
    reference: LogProbs, logits: np.ndarray, log_normalizers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """KL(reference || model) at each position, in nats, and the reference's probabilities added up.

    logits f32[T,V] and log_normalizers f64[T] are the model's -> f64[T], f64[T]; a saved reference leaves out what it
    does not know.
    """
    scales = (reference.scale, reference.offset, reference.floor)
    return distributions.divergences(
        reference.values, reference.first, *scales, logits, log_normalizers.astype(np.float32)
    )


def summarize(scores: Scores) -> Evaluation:
    """The figures of a text."""
    n = len(scores.nll)
    resampled = _Resampled(scores)
    nats, n_bytes = float(scores.nll.sum()), int(scores.n_bytes.sum())
    ppl = _exp(nats / n)
    spread = float(scores.nll.std() / math.sqrt(n - 1)) if n > 1 else math.nan
    figures: dict[str, Any] = {
        "windows": len(np.unique(scores.windows)),
        "tokens": n,
        "scored_bytes": n_bytes,
        "nats": nats,
        "ppl": ppl,
        "ppl_stderr": ppl * spread,
    }
    figures |= resampled.ratio("bits_per_byte", scores.nll / math.log(2), scores.n_bytes)
    if len(scores.kld):
        known = np.isfinite(scores.reference_nll)
        difference = np.where(known, scores.nll - scores.reference_nll, 0.0)
        figures |= resampled.ratio("ppl_ratio", difference, known, np.exp)
        figures["reference_ppl"] = ppl / figures["ppl_ratio"]
        figures |= resampled.mean("kld_mean", scores.kld)
        figures |= resampled.quantiles(scores.kld, {"kld_median": 0.5, "kld_p99": 0.99, "kld_p999": 0.999})
        figures["kld_max"] = float(scores.kld.max())
        figures |= resampled.mean("top1_agreement", scores.same_top)
        delta_p = np.exp(-scores.nll) - np.exp(-scores.reference_nll)
        figures |= resampled.mean("delta_p_rms", delta_p**2, np.sqrt)
        figures |= resampled.mean("delta_p_mean", delta_p)
    return Evaluation(**figures)


class _Resampled:
    """How often each unit of the text (a window, or a position) occurs in each replicate."""

    def __init__(self, scores: Scores) -> None:
        n_windows = len(np.unique(scores.windows))
        self.unit_of = np.arange(len(scores.nll))
        if n_windows >= _FEW_WINDOWS:
            self.unit_of = np.unique(scores.windows, return_inverse=True)[1]
        self.n_units = int(self.unit_of.max()) + 1
        rng = np.random.default_rng(_SEED)
        self.times = rng.multinomial(self.n_units, np.full(self.n_units, 1 / self.n_units), _REPLICATES)

    def _sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of values f64[n] in each replicate -> f64[replicates]."""
        return self.times @ np.bincount(self.unit_of, weights=values, minlength=self.n_units)

    def ratio(
        self,
        name: str,
        values: np.ndarray,
        weights: np.ndarray,
        function: Callable[[np.ndarray], np.ndarray] = lambda each: each,
    ) -> dict[str, float]:
        """function(sum of values / sum of weights), and its error bar under the name with `_stderr`."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            figure = function(np.array([values.sum(dtype=np.float64)]) / weights.sum())
            replicates = function(self._sums(values) / self._sums(weights))
            return {name: float(figure[0]), f"{name}_stderr": float(replicates.std(ddof=1))}

    def mean(
        self, name: str, values: np.ndarray, function: Callable[[np.ndarray], np.ndarray] = lambda each: each
    ) -> dict[str, float]:
        """function(mean of values), and its error bar."""
        return self.ratio(name, values, np.ones(len(values)), function)

    def quantiles(self, values: np.ndarray, fractions: dict[str, float]) -> dict[str, float]:
        """Quantiles of values f64[n], linear between neighbours as llama-perplexity's, and their error bars."""
        order = np.argsort(values)
        ordered, units = values[order], self.unit_of[order]
        wanted = np.array(list(fractions.values()))
        replicates = np.array([_weighted_quantiles(ordered, times[units], wanted) for times in self.times])
        figures: dict[str, float] = {}
        found = np.quantile(ordered, wanted)
        for name, value, error in zip(fractions, found, replicates.std(axis=0, ddof=1), strict=True):
            figures |= {name: float(value), f"{name}_stderr": float(error)}
        return figures


def _weighted_quantiles(ordered: np.ndarray, times: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Quantiles of ordered values f64[n] that occur times i64[n] -> f64[fractions]."""
    ends = np.cumsum(times)
    place = fractions * (ends[-1] - 1)
    low = np.floor(place)
    below = ordered[np.searchsorted(ends, low, side="right")]
    above = ordered[np.searchsorted(ends, np.minimum(low + 1, ends[-1] - 1), side="right")]
    return below + (place - low) * (above - below)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
