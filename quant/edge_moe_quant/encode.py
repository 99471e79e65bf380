"""Encodes f32 rows to any block format, weighted by the importance of each input channel."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from edge_moe.errors import FormatError, ShapeError
from edge_moe.formats import FORMATS, BlockFormat
from edge_moe_quant import blocks32, kquants
from edge_moe_quant.lanes import IQ4_CODES, IQ4_NEAREST, LANES

N_ROUNDS = 2  # of the joint refinement of small and common scales
# Large weights count more than the importance of their column alone says: by measured divergence from the unquantized
# model a little better than 0 (Q4_K_M of the reference model 4.02e-3 rather than 4.09e-3 with an importance matrix).
EMPHASIS = 2.0


def encode_rows(
    values: np.ndarray, fmt: BlockFormat, importance: np.ndarray | None = None, *, emphasis: float = EMPHASIS
) -> np.ndarray:
    """Encode rows. values f32[R, C], importance f32[C] above 0 (None: all alike) -> u8[R, row_bytes].

    The weighted squared error of each row is made small. With emphasis e > 0 the importance of a weight x counts times
    sqrt(e * mean(x^2) + x^2), the mean over its block of 256 or, in formats of 32, over its row.
    Raises FormatError for values that are not finite and row lengths that the format cannot hold.
    """
    n_cols = values.shape[-1]
    out = np.empty((len(values), fmt.row_bytes(n_cols)), np.uint8)
    if importance is not None and importance.shape != (n_cols,):
        raise ShapeError(f"importance has shape {importance.shape}, expected ({n_cols},)")
    # writable, since numba compiles a kernel anew for an array that is not
    rows = np.require(values, np.float32, ["C", "W"])
    if not np.isfinite(np.abs(rows).max(initial=0)):
        raise FormatError("holds weights that are infinite or not a number")
    weights = np.ones(n_cols, np.float32) if importance is None else np.require(importance, np.float32, ["C", "W"])
    _encoder(fmt.name)(rows, weights, np.float32(emphasis), out)
    return out


def _affine_tables(cuts: Sequence[float], stop: int, far: float) -> np.ndarray:
    """For encode_affine: common scales that make the largest stop - far to stop, 15 neighbours of sc and mn, cuts."""
    common = stop + 0.9 - np.arange(LANES) * (far / LANES)
    sc, mn = [*np.repeat((-1, 0, 1), 5), 0], [*np.tile((-2, -1, 0, 1, 2), 3), 3]
    return np.concatenate([np.array([common, sc, mn], np.float32), _cut_pairs(cuts)])


def _cut_pairs(cuts: Sequence[float]) -> np.ndarray:
    """For each four cuts, all pairs of them: f32[2 n,16]."""
    fours = np.array(cuts, np.float32).reshape(-1, 4)
    return np.concatenate([[np.repeat(four, 4), np.tile(four, 4)] for four in fours])


def _scaled_trials(low: float, high: float, most: float, least: float) -> np.ndarray:
    """First codes of the largest weight, f32[16]: from `most` to `least` of the low end of the range, and of the high.

    Above 1 the largest weight is clipped.
    """
    part = np.linspace(most, least, LANES // 2)
    return np.concatenate([low * part, high * part]).astype(np.float32)


def _scaled_tables(trials: Sequence[np.ndarray], least: int, most: int, part: float) -> np.ndarray:
    """For encode_scaled: trials of the common scale, 16 neighbours of sc, the groups' trials."""
    return np.array([_scaled_trials(least, most, 1.005, part), np.arange(LANES) - 8, *trials], np.float32)


_CUTS = (-0.3, 0.1, 0.5, 1.1, -0.5, 0.0, 0.3, 0.75)
_CUTS_OF_2_BITS = (-0.1, 0.15, 0.4, 0.7, 0.0, 0.25, 0.55, -0.25)
# Format -> the ends of its codes, and of each set of trials.
_TRIALS: dict[str, tuple[int, int, tuple[tuple[float, float], ...]]] = {
    "Q4_0": (-8, 7, ((1.15, 0.85), (1.4, 0.72))),
    "Q5_0": (-16, 15, ((1.1, 0.92), (1.3, 0.8))),
    "IQ4_NL": (-127, 113, ((1.12, 0.85), (1.3, 0.8))),
    "IQ4_XS": (-127, 113, ((1.12, 0.85), (1.3, 0.8))),
    "Q6_K": (-32, 31, ((1.3, 0.8),)),
    "Q3_K": (-4, 3, ((1.3, 0.8),)),
}


@cache
def _encoder(name: str) -> Callable[..., Any]:
    """The encoder of a format, ready with its tables: f(rows, importance, emphasis, out)."""
    levels = np.array([IQ4_NEAREST, IQ4_CODES], np.float32)
    low, high, ends = _TRIALS.get(name, (0, 0, ()))
    trials = [_scaled_trials(low, high, *pair) for pair in ends]
    if name in ("Q4_K", "Q5_K", "Q2_K"):
        function = {"Q4_K": kquants.encode_q4_k, "Q5_K": kquants.encode_q5_k, "Q2_K": kquants.encode_q2_k}[name]
        tables = _affine_tables(_CUTS_OF_2_BITS, 15, 4) if name == "Q2_K" else _affine_tables(_CUTS, 63, 6)
        return lambda rows, weights, emphasis, out: function(rows, weights, emphasis, N_ROUNDS, tables, out)
    if name == "Q6_K":
        tables = _scaled_tables(trials, -128, 127, 0.9)
        return lambda rows, weights, emphasis, out: kquants.encode_q6_k(rows, weights, emphasis, N_ROUNDS, tables, out)
    if name == "Q3_K":
        tables = _scaled_tables(trials, -32, 31, 0.8)
        return lambda rows, weights, emphasis, out: kquants.encode_q3_k(rows, weights, emphasis, N_ROUNDS, tables, out)
    if name == "IQ4_XS":
        tables = _scaled_tables(trials, -32, 31, 0.8)
        return lambda rows, weights, emphasis, out: kquants.encode_iq4_xs(
            rows, weights, emphasis, N_ROUNDS, tables, levels, out
        )
    if name == "Q8_0":
        return blocks32.encode_q8_0
    if name in ("Q4_1", "Q5_1"):
        tables = _cut_pairs(_CUTS)
        return lambda rows, weights, emphasis, out: blocks32.encode_affine_32(
            rows, weights, emphasis, int(name[1]), tables, out
        )
    tables = np.array(trials)
    if name != "IQ4_NL":
        levels = blocks32.NO_LEVELS
    bits = 5 if name == "Q5_0" else 4
    return lambda rows, weights, emphasis, out: blocks32.encode_scaled_32(
        rows, weights, emphasis, bits, tables, levels, out
    )


def prepare(names: set[str]) -> None:
    """Compile the encoders of these formats, or load them, before several threads ask for the same one."""
    for fmt in FORMATS:
        if fmt.name in names:
            encode_rows(np.zeros((1, fmt.block_size), np.float32), fmt)
