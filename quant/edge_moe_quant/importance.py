"""Reads importance matrices of llama.cpp: how large the inputs of each tensor's columns are in the mean square.

An expert's own figures are trusted by how often it was hit, and otherwise taken from all experts of its layer.

Source: imatrix.cpp and imatrix-loader.cpp of llama.cpp (both kinds of file).
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_moe.errors import FormatError, OptionError
from edge_moe.gguf import open_gguf

TRUSTED_HITS = 64  # an expert hit this often counts as much as the mean of its layer
_LEAST = 1e-3  # of the mean: columns whose input was always zero still count a little


@dataclass(frozen=True)
class Importance:
    """Mean squares of the inputs by tensor name, f32[K, C]: K = 1, or one row for each matrix of a stack."""

    path: Path
    values: dict[str, np.ndarray]
    n_chunks: int
    datasets: tuple[str, ...]

    def of(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Of the matrices of a tensor, f32[n_matrices, C], or None when it has none.

        Raises FormatError when they are for a tensor of another shape.
        """
        values = self.values.get(name)
        if values is None:
            return None
        n_cols = shape[-1]
        n_matrices = int(np.prod(shape[:-2], dtype=np.int64)) if len(shape) > 2 else 1
        if values.size == n_cols:
            return np.broadcast_to(values.reshape(1, n_cols), (n_matrices, n_cols))
        if values.size == n_cols * n_matrices:
            return values.reshape(n_matrices, n_cols)
        raise FormatError(
            f"{self.path}: has {values.size} values for {name}, expected {n_cols} or {n_cols * n_matrices} for its "
            f"shape {list(shape)}; the file is of another model"
        )


def read_importance(path: Path) -> Importance:
    """Read an importance matrix, GGUF or the older binary file.

    Raises OptionError when there is no file, FormatError when it is damaged or something else.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except (OSError, ValueError) as error:
        raise OptionError(f"{path}: cannot read the importance matrix: {error}") from None
    return _read_gguf(path) if magic == b"GGUF" else _read_old(path)


def _read_gguf(path: Path) -> Importance:
    file = open_gguf(path)
    values = {}
    for name, entry in file.tensors.items():
        if not name.endswith(".in_sum2"):
            continue
        name = name.removesuffix(".in_sum2")
        counted = file.tensors.get(f"{name}.counts")
        if counted is None or entry.format.name != "F32" or counted.format.name != "F32":
            raise FormatError(f"{path}: sums and counts of {name} are not both there in F32; make the file anew")
        counts = counted.format.decode(counted.data).reshape(-1)
        sums = entry.format.decode(entry.data).reshape(-1)
        if sums.size % counts.size:
            raise FormatError(f"{path}: {name} has {counts.size} counts for {sums.size} sums; make the file anew")
        values[name] = _shrunk(sums.reshape(counts.size, -1), counts, path, name)
    if not values:
        raise FormatError(f"{path}: holds no importance matrix (no tensor *.in_sum2); name the file of llama-imatrix")
    n_chunks = file.metadata.get("imatrix.chunk_count", 0)
    datasets = file.metadata.get("imatrix.datasets", ())
    texts = tuple(str(text) for text in datasets) if not isinstance(datasets, str | int | float) else ()
    return Importance(path, values, n_chunks if isinstance(n_chunks, int) else 0, texts)


def _read_old(path: Path) -> Importance:
    data = path.read_bytes()
    at = 0

    def take(n_bytes: int) -> bytes:
        nonlocal at
        if not 0 <= n_bytes <= len(data) - at:
            raise FormatError(f"{path}: is no importance matrix, or cut short at byte {at}; make the file anew")
        at += n_bytes
        return data[at - n_bytes : at]

    def number() -> int:
        value: int = struct.unpack("<i", take(4))[0]
        return value

    values = {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        n_calls, n_values = number(), number()
        means = np.frombuffer(take(4 * n_values), "<f4") / np.float32(max(n_calls, 1))
        values[name] = _usable(_checked(means.reshape(1, -1), path, name).astype(np.float64)).reshape(-1)
    if not values:
        raise FormatError(f"{path}: holds no importance matrix; name the file of llama-imatrix")
    n_chunks = number() if at < len(data) else 0
    datasets = (take(number()).decode("utf-8", "replace"),) if at < len(data) else ()
    return Importance(path, values, n_chunks, datasets)


def _shrunk(sums: np.ndarray, counts: np.ndarray, path: Path, name: str) -> np.ndarray:
    """Mean squares f32[K, C] of sums f32[K, C] over counts f32[K] hits, drawn towards the mean of all hits."""
    n = np.maximum(np.asarray(counts, np.float64), 0)[:, None]
    sums = _checked(sums, path, name).astype(np.float64)
    total = n.sum()
    if not total > 0:
        return np.ones(sums.shape, np.float32)
    common = sums.sum(axis=0) / total
    # (n * own mean + trusted * common mean) / (n + trusted), where own mean = sums / n
    means = (sums + TRUSTED_HITS * common) / (n + TRUSTED_HITS) if len(sums) > 1 else sums / n
    return _usable(means)


def _checked(values: np.ndarray, path: Path, name: str) -> np.ndarray:
    if not np.isfinite(values).all() or (values < 0).any():
        raise FormatError(f"{path}: the importance of {name} is not finite or below zero; make the file anew")
    return values


def _usable(means: np.ndarray) -> np.ndarray:
    """Each row with a mean of 1 and no zeros."""
    average = means.mean(axis=1, keepdims=True)
    scaled = np.where(average > 0, means / np.where(average > 0, average, 1), 1)
    return np.maximum(scaled, _LEAST).astype(np.float32)
