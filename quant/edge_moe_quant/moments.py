"""Second moments of what a model's matrices take in, in the quantized model and crossed with the original one."""

from collections.abc import Callable, Sequence

import numpy as np

from edge_moe.backends.cpu import CpuBackend, Grouping
from edge_moe.models.feed_forward import MLP
from edge_moe.token_cache import TokenCache
from edge_moe.weights import Weight
from edge_moe_quant.importance import TRUSTED_HITS
from edge_moe_quant.pages import forget_pages

# Columns of a matrix whose moments are kept for each pair; with what is made of them, 64 bytes a pair. Of wider
# ones only each column's own are kept, twice, as f64[C]; nothing can be made good among them.
MOST_COLUMNS = 4096
_EXPERTS_BYTES = 1 << 27  # run at a time
Pair = tuple[np.ndarray, np.ndarray]  # sums over tokens of x x^T and y x^T, f64[C,C]: x quantized, y original
MomentsOf = Callable[[Weight, int], Pair | None]  # of one matrix of a weight


class SparingBackend(CpuBackend):
    """Runs experts a few at a time, and lets go of their pages: a layer's can be more than the memory there is."""

    def expands(self, n_tokens: int, cache: TokenCache) -> bool:
        """Never: in absorbed form every matrix has an input of its own."""
        return False

    def by_expert(self, x: np.ndarray, grouping: Grouping, gate: Weight, up: Weight, down: Weight) -> np.ndarray:
        active, offsets, rows, positions = grouping
        stacks = (gate, up, down)
        at_once = max(1, _EXPERTS_BYTES // sum(stack.matrix_bytes for stack in stacks))
        parts = [np.empty((0, down.shape[1]), np.float32)]
        for first in range(0, len(active), at_once):
            ends = offsets[first : first + at_once + 1]
            part = active[first : first + at_once], ends - ends[0], rows[ends[0] : ends[-1]], positions
            parts.append(super().by_expert(x, part, gate, up, down))
            for stack in stacks:
                forget_pages(stack.data)
        return np.concatenate(parts)


class Inputs(SparingBackend):
    """Runs operations and keeps what goes into each matrix."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.of: dict[int, np.ndarray] = {}  # by identity of the weight: f32[T,C], or f32[H,T,C]
        self.routed: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # inputs, ids, gates of the experts

    def linear(self, x: np.ndarray, *weights: Weight, fine: Sequence[Weight] = ()) -> list[np.ndarray]:
        self.of |= {id(weight): x for weight in (*weights, *fine)}
        return super().linear(x, *weights, fine=fine)

    def per_head(self, x: np.ndarray, weight: Weight) -> np.ndarray:
        self.of[id(weight)] = x.transpose(1, 0, 2)
        return super().per_head(x, weight)

    def experts(
        self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Weight, up: Weight, down: Weight
    ) -> np.ndarray:
        self.routed = (x, ids, weights)
        return super().experts(x, ids, weights, gate, up, down)


class Moments:
    """Second moments of what goes into each matrix, and of that with what would go into it in the original model."""

    def __init__(self) -> None:
        self._sums: dict[int, Pair] = {}  # by identity of the weight: f64[K,C,C] each

    def add(self, quantized: Inputs, original: Inputs) -> None:
        """Take in a window."""
        done: dict[int, Pair] = {}  # matrices that share their input share its moments
        for key, x in quantized.of.items():
            y = original.of.get(key)
            if y is None:
                continue
            if id(x) not in done:
                done[id(x)] = _products(x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *x.shape[-2:]))
            own, cross = done[id(x)]
            old = self._sums.get(key)
            self._sums[key] = (own, cross) if old is None else (old[0] + own, old[1] + cross)

    def moments(self, weight: Weight, matrix: int) -> Pair | None:
        """Of one matrix of a weight, or None if nothing went into it."""
        sums = self._sums.get(id(weight))
        return (
            None if sums is None else (sums[0][min(matrix, len(sums[0]) - 1)], sums[1][min(matrix, len(sums[1]) - 1)])
        )


def _products(x: np.ndarray, y: np.ndarray) -> Pair:
    """x, y f32[...,T,C] -> x^T x and y^T x f64[...,C,C], or of wide ones the sums of squares f64[...,C], twice."""
    if x.shape[-1] > MOST_COLUMNS:
        squares = np.square(x, dtype=np.float64).sum(axis=-2)
        return squares, squares
    return (x.swapaxes(-1, -2) @ x).astype(np.float64), (y.swapaxes(-1, -2) @ x).astype(np.float64)


class RoutedMoments:
    """What the router sent to each expert of a layer, and the second moments of an expert's inputs."""

    def __init__(
        self,
        calls: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
        experts: MLP,
        original: MLP,
        is_down: bool,
    ) -> None:
        # the last of a call: what the original model has at the same tokens, sent to the experts that were chosen here
        self.calls = calls
        self.experts, self.original, self.is_down = experts, original, is_down
        n_experts = experts.down_proj.shape[0]
        self.hits = sum(
            (np.bincount(ids.ravel(), minlength=n_experts) for _, ids, _, _ in calls), np.zeros(n_experts, int)
        )
        width = (experts.down_proj if is_down else experts.gate_proj).shape[-1]
        shape = (width,) if width > MOST_COLUMNS else (width, width)
        total_own, total_cross, total_weight = np.zeros(shape), np.zeros(shape), 0.0
        for expert in range(n_experts):
            own, cross, weight = self._sums(expert)
            total_own, total_cross, total_weight = total_own + own, total_cross + cross, total_weight + weight
        self._common = total_own / total_weight, total_cross / total_weight

    def moments(self, _: Weight, expert: int) -> Pair:
        """Of one expert: weighted by gate^2, drawn towards those of the layer by how few its hits are."""
        own, cross, weight = self._sums(expert)
        if not weight > 0:
            return self._common
        n = int(self.hits[expert])
        share, weight_of_own = n + TRUSTED_HITS, n / weight
        common_own, common_cross = self._common
        return (
            (own * weight_of_own + TRUSTED_HITS * common_own) / share,
            (cross * weight_of_own + TRUSTED_HITS * common_cross) / share,
        )

    def _sums(self, expert: int) -> tuple[np.ndarray, np.ndarray, float]:
        places = [np.nonzero(ids == expert) for _, ids, _, _ in self.calls]
        x = np.concatenate([call[0][rows] for call, (rows, _) in zip(self.calls, places, strict=True)])
        y = np.concatenate([call[3][rows] for call, (rows, _) in zip(self.calls, places, strict=True)])
        gates = np.concatenate([call[2][place] for call, place in zip(self.calls, places, strict=True)])
        if self.is_down:
            x, y = _gated(self.experts, expert, x), _gated(self.original, expert, y)
        x, y = x * gates[:, None], y * gates[:, None]
        weight = float(np.square(gates, dtype=np.float64).sum())
        return *_products(x, y), weight


def _gated(experts: MLP, expert: int, x: np.ndarray) -> np.ndarray:
    """What an expert's down takes in for its inputs x f32[T,D]: f32[T,F]."""
    before, beside = x @ _decoded(experts.gate_proj, expert).T, x @ _decoded(experts.up_proj, expert).T
    with np.errstate(over="ignore"):
        return before / (1 + np.exp(-before)) * beside


def _decoded(stack: Weight, matrix: int) -> np.ndarray:
    first = stack.first_byte + matrix * (stack.stride_bytes or stack.matrix_bytes)
    data = stack.data.reshape(-1)[first : first + stack.matrix_bytes]
    return stack.format.decode(data.reshape(stack.shape[-2], -1))
