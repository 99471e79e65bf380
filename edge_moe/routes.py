"""Where the router sends the tokens of a text, and what a store of a given size would make of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_moe.backends.cpu import CpuBackend
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import FormatError
from edge_moe.eviction import Eviction
from edge_moe.files import replacing
from edge_moe.generate import PREFILL_CHUNK
from edge_moe.models.architectures import load_pass
from edge_moe.weights import Weight


class _RouteWatcher(CpuBackend):
    """Runs a pass and keeps which experts it asks for."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.ids: dict[str, list[np.ndarray]] = {}  # by the layer's last stack: i64[T,K] of each chunk

    def request(self, ids: np.ndarray, down: Weight) -> None:
        self.ids.setdefault(down.name, []).append(ids)


def record_routes(checkpoint: Checkpoint, token_ids: Sequence[int], threads: int, window: int = 2048) -> np.ndarray:
    """The experts of each token of a text, run in windows: i16[T, layers with experts, K]."""
    watcher = _RouteWatcher(threads)
    model = load_pass(checkpoint, watcher)
    ids = np.asarray(token_ids, np.int64)
    window = min(window, checkpoint.config.max_position_embeddings)
    for first in range(0, len(ids), window):
        part = ids[first : first + window]
        cache = model.new_cache(len(part))
        for start in range(0, len(part), PREFILL_CHUNK):
            chunk = part[start : start + PREFILL_CHUNK]
            if len(chunk) > 1:  # a single one would be replayed, and nothing seen of it
                model.forward(chunk, cache, all_logits=True)  # the last layer, too, of all tokens
    return np.stack([np.concatenate(each) for each in watcher.ids.values()], axis=1).astype(np.int16)


def save_routes(path: Path, routes: np.ndarray, n_experts: int) -> None:
    """Keep routes i16[T, layers, K] in a file."""
    with replacing(path, routes.nbytes) as file:
        np.savez_compressed(file, routes=routes, n_experts=np.array(n_experts))


def load_routes(path: Path) -> tuple[np.ndarray, int]:
    """Routes i16[T, layers, K] of a file and the number of experts in a layer. Raises FormatError."""
    try:
        with np.load(path) as saved:
            routes, n_experts = saved["routes"], int(saved["n_experts"])
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{path}: is no file of routes ({error}); record one with `edge-moe experts`") from None
    if routes.ndim != 3 or routes.dtype != np.int16 or not routes.size or routes.min() < 0 or routes.max() >= n_experts:
        raise FormatError(f"{path}: holds routes {routes.dtype}{list(routes.shape)}, expected int16[tokens, layers, K]")
    return routes, n_experts


def shares(routes: np.ndarray, n_experts: int) -> np.ndarray:
    """How often a token uses each expert: f64[layers, experts]."""
    n_tokens, n_layers, _ = routes.shape
    counts = [np.bincount(routes[:, layer].ravel(), minlength=n_experts) for layer in range(n_layers)]
    return np.stack(counts) / n_tokens


def replay(routes: np.ndarray, n_experts: int, n_slots: int, rule: Eviction) -> float:
    """Share of the experts that a store of `n_slots` would have in memory, token by token, from empty."""
    n_tokens, n_layers, _ = routes.shape
    resident = np.zeros((n_layers, n_experts), np.bool_)
    hits = taken = 0
    for token in range(n_tokens):
        for layer in range(n_layers):
            ids = routes[token, layer].astype(np.int64)
            rule.used(layer, ids[None])
            here = resident[layer, ids]
            hits += int(here.sum())
            missing = ids[~here]
            n_out = taken + len(missing) - n_slots
            if n_out > 0:
                values = np.where(resident, rule.values(layer), np.inf)
                values[layer, ids] = np.inf
                out = values.argsort(axis=None, kind="stable")[:n_out]
                resident.ravel()[out] = False
                taken -= n_out
            resident[layer, missing] = True
            taken += len(missing)
    return hits / routes.size


class Farthest:
    """Belady's optimum: the one whose next use is farthest goes. It knows the routes, so nothing does better."""

    def __init__(self, routes: np.ndarray, n_experts: int) -> None:
        n_tokens, n_layers, _ = routes.shape
        self._next = np.full((n_tokens + 1, n_layers, n_experts), np.inf)  # time of the next use after each token
        for token in range(n_tokens - 1, -1, -1):
            self._next[token] = self._next[token + 1]
            for layer in range(n_layers):
                self._next[token, layer, routes[token, layer]] = token * n_layers + layer
        self._token, self._layer = -1, n_layers

    def used(self, layer: int, ids: np.ndarray) -> None:
        if layer <= self._layer:
            self._token += 1
        self._layer = layer

    def values(self, layer: int) -> np.ndarray:
        done = np.arange(self._next.shape[1])[:, None] <= layer  # layers that this token has passed
        return -np.where(done, self._next[self._token + 1], self._next[self._token])
