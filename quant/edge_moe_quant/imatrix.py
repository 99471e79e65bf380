"""Collects and writes importance matrices as llama-imatrix does: sums of the squares of what each matrix takes in.

Experts count the tokens that the router sends them, all alike. The head is left out. Source: imatrix.cpp of llama.cpp.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from edge_moe_export.gguf import NewTensor, write_gguf

from edge_moe.backends.cpu import CpuBackend
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import FormatError
from edge_moe.formats import F32
from edge_moe.kernels import routing
from edge_moe.models.architectures import load_pass
from edge_moe.token_cache import TokenCache
from edge_moe.weights import Weight


class SquareSums(CpuBackend):
    """Runs operations and adds up squares, by the weights' own names."""

    def expands(self, n_tokens: int, cache: TokenCache) -> bool:
        """Never: in absorbed form every matrix has an input of its own."""
        return False

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.sums: dict[str, np.ndarray] = {}  # f64[K,C]: K = 1, or heads (of k_b and v_b), or experts
        self.counts: dict[str, np.ndarray] = {}  # f64[1], or f64[E] for experts

    def note(self, weight: Weight, sums: np.ndarray, counts: np.ndarray) -> None:
        """Add sums f64[K,C] of squares and the counts of tokens."""
        self.sums[weight.name] = self.sums.get(weight.name, 0.0) + sums
        self.counts[weight.name] = self.counts.get(weight.name, 0.0) + counts

    def linear(self, x: np.ndarray, *weights: Weight, fine: Sequence[Weight] = ()) -> list[np.ndarray]:
        squares = np.square(x, dtype=np.float64).sum(axis=0, keepdims=True)
        for weight in (*weights, *fine):
            self.note(weight, squares, np.array([len(x)], np.float64))
        return super().linear(x, *weights, fine=fine)

    def per_head(self, x: np.ndarray, weight: Weight) -> np.ndarray:
        self.note(weight, np.square(x, dtype=np.float64).sum(axis=0), np.array([len(x)], np.float64))
        return super().per_head(x, weight)

    def experts(
        self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Weight, up: Weight, down: Weight
    ) -> np.ndarray:
        grouping = routing.group_by_expert(ids, down.shape[0])
        active, offsets, rows, _ = grouping
        gated = self.gated_by_expert(x, grouping, gate, up)
        n_experts = down.shape[0]
        counts = np.bincount(ids.ravel(), minlength=n_experts).astype(np.float64)
        sums = [np.zeros((n_experts, each.shape[-1])) for each in (x, gated)]
        for place, expert in enumerate(active):
            span = slice(offsets[place], offsets[place + 1])
            sums[0][expert] = np.square(x[rows[span]], dtype=np.float64).sum(axis=0)
            sums[1][expert] = np.square(gated[span], dtype=np.float64).sum(axis=0)
        for weight, squares in ((gate, sums[0]), (up, sums[0]), (down, sums[1])):
            self.note(weight, squares, counts)
        return super().experts(x, ids, weights, gate, up, down)


def collect(
    checkpoint: Checkpoint,
    windows: np.ndarray,
    *,
    n_threads: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> SquareSums:
    """Run a model over windows i64[N,L] of token ids. Raises FormatError for activations that are not finite."""
    sums = SquareSums(n_threads)
    model = load_pass(checkpoint, sums)
    for number, ids in enumerate(windows):
        if progress:
            progress(number, len(windows), "")
        logits = model.forward(ids, model.new_cache(len(ids)), all_logits=True)  # the last layer, too, of all tokens
        if not np.isfinite(logits).all():
            raise FormatError(f"{checkpoint.path}: gives logits that are not finite; make the file anew")
    for name in (model.weights.lm_head.name, model.weights.embed_tokens.name):
        sums.sums.pop(name, None)
        sums.counts.pop(name, None)
    return sums


def write_imatrix(path: Path, checkpoint: Checkpoint, sums: SquareSums, windows: np.ndarray, text_name: str) -> int:
    """Write the sums in llama.cpp's GGUF form; returns the bytes. Raises OptionError when it cannot be written."""
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [text_name],
        "imatrix.chunk_count": len(windows),
        "imatrix.chunk_size": windows.shape[1],
    }
    tensors = []
    for name in sorted(sums.sums):
        counts = sums.counts[name].astype(np.float32)
        values = sums.sums[name].astype(np.float32).reshape(len(counts), -1)
        stem = checkpoint.tensor_name(name)
        for suffix, data in (("in_sum2", values), ("counts", counts[:, None])):
            parts = [np.ascontiguousarray(data).reshape(-1).view(np.uint8)]
            tensors.append(NewTensor(f"{stem}.{suffix}", F32, data.shape, partial(list, parts)))
    return write_gguf(path, metadata, tensors)
