"""Chooses a format for each tensor under a budget of bytes, by how far each tensor alone moves the model's answers.

Each tensor in turn is put into coarse blocks and taken out again, all others as they are; the divergence from the whole
model over a text is its sensitivity. The divergence of another format is taken to grow with the squared error.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from edge_moe_export.encode import encode as encode_plain

from edge_moe.api import Model
from edge_moe.checkpoint import Checkpoint
from edge_moe.divergence import kl_divergences, live_log_probs, normalizers
from edge_moe.errors import FormatError, OptionError
from edge_moe.formats import BlockFormat
from edge_moe.gguf import GGUFFile, TensorEntry
from edge_moe_quant.encode import encode_rows
from edge_moe_quant.recipe import FORMATS_BY_NAME, Rule, fits, fitting_format, is_quantizable
from edge_moe_quant.store import EncodedStore

_CANDIDATES = ("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_PROBE = "Q3_K"  # coarse, so that the divergence stands out from rounding
_SAMPLED_VALUES = 1 << 18  # of a tensor, to compare the errors of formats
_ROWS_VALUES = 1 << 20  # encoded at a time
_PROBED_WINDOWS = 4
_LOGITS_BYTES = 1 << 29  # of all probed windows: with a large vocabulary they are fewer
# Without error compensation the divergence is this many times larger. Source: 3.0e-5 beside 7.6e-5 in a trial on the
# experts of a model of 26 million weights.
_WITHOUT_COMPENSATION = 2.5


@dataclass(frozen=True)
class Choice:
    """A format that a tensor may become, its bytes there, and the divergence that it is expected to cost, in nats."""

    format: BlockFormat
    n_bytes: int
    divergence: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget_bytes: int) -> dict[str, BlockFormat]:
    """One choice for each tensor, together at most budget_bytes, such that the divergences add up to little.

    From the smallest on, the step that saves most divergence for its bytes is taken first; steps that do not fit are
    passed over. Raises OptionError when even the smallest choices are too large.
    """
    hulls = {name: _lower_hull(of_name) for name, of_name in choices.items()}
    used = sum(hull[0].n_bytes for hull in hulls.values())
    if used > budget_bytes:
        raise OptionError(f"the smallest types need {used} bytes of weights, the budget is {budget_bytes}; allow more")
    at = dict.fromkeys(hulls, 0)
    steps: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        here, hull = at[name], hulls[name]
        if here + 1 < len(hull):
            heapq.heappush(steps, (_slope(hull[here], hull[here + 1]), name))

    for name in hulls:
        offer(name)
    while steps:
        _, name = heapq.heappop(steps)
        more = hulls[name][at[name] + 1].n_bytes - hulls[name][at[name]].n_bytes
        if used + more <= budget_bytes:
            used += more
            at[name] += 1
            offer(name)
    return {name: hulls[name][i].format for name, i in at.items()}


def _slope(low: Choice, high: Choice) -> float:
    """Divergence for each byte from one choice to a larger one: below 0, the less the better."""
    return (high.divergence - low.divergence) / (high.n_bytes - low.n_bytes)


def _lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that are best for some price of a byte, from small to large."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda each: (each.n_bytes, each.divergence)):
        if hull and choice.divergence >= hull[-1].divergence:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def probed_windows(windows: np.ndarray, vocab_size: int) -> np.ndarray:
    """The windows to measure on, from all over a text. i64[N,L] -> i64[M,L]."""
    most = max(1, _LOGITS_BYTES // (4 * vocab_size * windows.shape[1]))
    n_probed = min(_PROBED_WINDOWS, most, len(windows))
    return windows[np.arange(n_probed) * len(windows) // n_probed]


def measured_choices(
    source: GGUFFile,
    windows: np.ndarray,
    rules: Sequence[Rule] = (),
    *,
    n_threads: int,
    store: EncodedStore | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, list[Choice]]:
    """What each tensor of a model may become. windows i64[N,L]: the tokens that the divergence is measured on.

    Tensors that a rule fits have the choice of its format only; norms and the router stay F32. What is measured goes
    into the store at once, and is taken from there where it is known already.
    Raises FormatError for a source that is not all floats, or gives no finite numbers.
    """
    for entry in source.tensors.values():
        if entry.format.name not in ("F32", "F16", "BF16"):
            raise FormatError(f"{source.path}: tensor {entry.name} is {entry.format.name}; start from F16, BF16 or F32")
    model = Model(Checkpoint(source), threads=n_threads)
    right = [_logits(model, ids) for ids in windows]
    found: dict[str, list[Choice]] = {}
    for done, (name, entry) in enumerate(source.tensors.items()):
        if progress:
            progress(done, len(source.tensors), name)
        fixed = [rule.format for rule in rules if fits(rule.pattern, name, source.tensors)]
        if not is_quantizable(name, entry.shape):
            fixed = [FORMATS_BY_NAME["F32"]]
        if fixed:
            fmt = fitting_format(fixed[-1].name, entry.shape[-1])
            found[name] = [Choice(fmt, _n_bytes(entry, fmt), 0.0)]
            continue
        probe = fitting_format(_PROBE, entry.shape[-1])
        if store is not None and name in store:
            divergence = float(store.get(name).view(np.float64)[0])
        else:
            divergence = _divergence_of(source, entry, probe, windows, right, n_threads)
            if store is not None:
                store.put(name, np.array([divergence]).view(np.uint8))
        errors = {fmt: _squared_error(entry, fmt) for fmt in _formats(entry)}
        reference = errors.get(probe) or _squared_error(entry, probe)
        found[name] = [
            Choice(fmt, _n_bytes(entry, fmt), divergence * (error / reference if reference else 0.0) * _factor(name))
            for fmt, error in errors.items()
        ]
    return found


def _formats(entry: TensorEntry) -> list[BlockFormat]:
    return list(dict.fromkeys(fitting_format(name, entry.shape[-1]) for name in _CANDIDATES))


def _factor(name: str) -> float:
    return 1.0 if name != "token_embd.weight" else _WITHOUT_COMPENSATION


def _n_bytes(entry: TensorEntry, fmt: BlockFormat) -> int:
    return int(np.prod(entry.shape[:-1], dtype=np.int64)) * fmt.row_bytes(entry.shape[-1])


def _logits(model: Model, ids: np.ndarray) -> np.ndarray:
    return model.forward(ids, model.new_cache(len(ids)), all_logits=True)


def _divergence_of(
    source: GGUFFile,
    entry: TensorEntry,
    fmt: BlockFormat,
    windows: np.ndarray,
    right: Sequence[np.ndarray],
    n_threads: int,
) -> float:
    """Mean divergence in nats of the model with one tensor in another format from what was right, f32[L,V] each."""
    blurred = replace(entry, data=_blurred(entry, fmt))
    model = Model(Checkpoint(replace(source, tensors={**source.tensors, entry.name: blurred})), threads=n_threads)
    total = 0.0
    for ids, expected in zip(windows, right, strict=True):
        logits = _logits(model, ids)
        divergences, _ = kl_divergences(live_log_probs(expected, normalizers(expected)), logits, normalizers(logits))
        total += float(divergences.sum())
    if not np.isfinite(total):
        raise FormatError(f"{source.path}: gives logits that are not finite numbers; make the file anew")
    return max(total / windows.size, 0.0)


def _blurred(entry: TensorEntry, fmt: BlockFormat) -> np.ndarray:
    """A tensor's bytes in its own format, after it has been through another."""
    rows = entry.data.reshape(-1, entry.format.row_bytes(entry.shape[-1]))
    step = max(1, _ROWS_VALUES // entry.shape[-1])
    out = np.empty_like(rows)
    for first in range(0, len(rows), step):
        values = entry.format.decode(rows[first : first + step])
        blurred = encode_plain(fmt.decode(encode_rows(values, fmt)), entry.format)
        out[first : first + step] = blurred.reshape(len(values), -1)
    return out.reshape(-1)


def _squared_error(entry: TensorEntry, fmt: BlockFormat) -> float:
    """Mean squared error of a format on rows from all over a tensor."""
    rows = entry.data.reshape(-1, entry.format.row_bytes(entry.shape[-1]))
    step = max(1, len(rows) * entry.shape[-1] // _SAMPLED_VALUES)
    values = entry.format.decode(np.ascontiguousarray(rows[::step]))
    return float(np.square(fmt.decode(encode_rows(values, fmt)) - values, dtype=np.float64).mean())
