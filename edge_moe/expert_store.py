"""Experts in a bounded set of slots: those not there are read from the file when the router chooses them.

Only the thread that runs the model keeps books; readers but fill slots. Ctrl-C may come between any two instructions:
`_resident` alone says what is in a slot, and after a pass that was cut all else is made anew from it (`begin`).
"""

import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_moe.direct_io import ALIGNMENT, aligned_bytes, aligned_memory
from edge_moe.errors import OptionError, ReadError
from edge_moe.eviction import AgedFrequency
from edge_moe.lookahead import Lookahead
from edge_moe.slice_reader import Slice, SliceReader
from edge_moe.weights import Weight

MOST_LOADING = 16  # experts on their way
MOST_AT_ONCE = 8  # experts given out together, so that the next ones are asked for before long
Key = tuple[int, int]  # layer, expert


@dataclass
class StoreStats:
    """What a store did: for single tokens, and in all."""

    tokens: int = 0
    hits: int = 0  # experts that a single token found in memory
    misses: int = 0
    token_bytes_read: int = 0  # while single tokens were run
    bytes_read: int = 0
    wait_s: float = 0.0
    predicted: dict[int, int] = field(default_factory=dict)  # by layer: experts used where some were predicted
    predicted_right: dict[int, int] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """The figures as `--json` names them; None where nothing was counted."""
        predicted, right = self.predicted, self.predicted_right

        def share(part: float, whole: float) -> float | None:
            return part / whole if whole else None

        return {
            "expert_hit_rate": share(self.hits, self.hits + self.misses),
            "bytes_read_per_token": share(self.token_bytes_read, self.tokens),
            "disk_wait_s": self.wait_s,
            "prediction_accuracy": share(sum(right.values()), sum(predicted.values())),
            "prediction_accuracy_by_layer": {layer: right[layer] / predicted[layer] for layer in sorted(predicted)},
        }


@dataclass(eq=False)
class _Load:
    """An expert on its way to a slot."""

    key: Key
    slot: int
    predicted: bool
    slices: list[Slice] = field(default_factory=list)
    n_pending: int = 0
    error: ReadError | None = None


@dataclass(eq=False)
class _Pool:
    """Slots for the layers whose experts are of one size."""

    sizes: tuple[int, ...]  # bytes of each slice, aligned outward
    layers: list[int]
    n_slots: int = 0
    memory: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    free: list[int] = field(default_factory=list)

    @property
    def slot_bytes(self) -> int:
        return sum(self.sizes)


def slot_sizes(layer: Sequence[Weight]) -> tuple[int, ...]:
    """Bytes that an expert's slices take in a slot."""
    return tuple(aligned_bytes(weight.matrix_bytes) for weight in layer)


def least_bytes(layers: Sequence[Sequence[Weight]], top_k: int) -> int:
    """The smallest set of slots that can work: in each pool one token's experts and two on their way."""
    return sum((top_k + 2) * sum(sizes) for sizes in {slot_sizes(layer) for layer in layers})


class ExpertStore:
    """The experts of all layers, at most `n_bytes` of them in memory. One thread at a time may use it."""

    def __init__(
        self,
        layers: Sequence[tuple[Weight, ...]],
        n_bytes: int,
        top_k: int,
        *,
        eviction: AgedFrequency | None = None,
        predict: bool = True,
        route_slack: float = 0.0,
    ) -> None:
        """layers: each layer's stacks [E, rows, cols] (gate, up, down), which must lie in files.

        With `route_slack` a single token's router takes an expert in memory for one that is not, if its score is less
        by no more than that: fewer reads, other answers.

        Raises OptionError when n_bytes is less than `least_bytes`, ReadError when a file cannot be opened.
        """
        if n_bytes < least_bytes(layers, top_k):
            raise OptionError(f"{n_bytes} bytes for experts, expected at least {least_bytes(layers, top_k)}")
        self.n_experts = layers[0][0].shape[0]
        self.stats = StoreStats()
        self.lookahead = Lookahead(predict)
        self.eviction = eviction or AgedFrequency(len(layers), self.n_experts)
        self.route_slack = route_slack
        self.routes: list[list[np.ndarray]] | None = None  # by layer i16[T,K] of each pass, if `keep_routes` was called
        self._layers = list(layers)
        self._index = {layer[-1].name: index for index, layer in enumerate(layers)}
        self._offsets = [np.stack([weight.file_offsets for weight in layer]) for layer in layers]  # i64[slices, E]
        self._pools = _make_pools(layers, n_bytes, top_k, self.n_experts)
        self._pool_of = {layer: pool for pool in self._pools for layer in pool.layers}
        self._resident: dict[Key, int] = {}
        self._is_resident = np.zeros((len(layers), self.n_experts), np.bool_)
        self._loading: dict[Key, _Load] = {}
        self._needed: set[Key] = set()  # must stay until they are used
        self._guessed: set[Key] = set()  # stay if nothing needed wants their place
        self._ahead: dict[int, set[int]] = {}  # a token's predicted experts by layer
        self._n_tokens = 0
        self._is_dirty = False
        self._reader = SliceReader(sorted({weight.path for layer in layers for weight in layer}))
        weakref.finalize(self, self._reader.close)

    # ---- what a model pass asks

    @property
    def n_slots(self) -> int:
        """Experts that fit."""
        return sum(pool.n_slots for pool in self._pools)

    @property
    def slots_bytes(self) -> int:
        """Memory of all slots."""
        return sum(pool.memory.size for pool in self._pools)

    def layer_of(self, weight: Weight) -> int:
        """The layer whose last stack is `weight`."""
        return self._index[weight.name]

    def begin(self, n_tokens: int) -> None:
        """Before each pass. After one that ended by an error or Ctrl-C, what is not sure is forgotten."""
        if self._is_dirty:
            self._recover()
        self._is_dirty = True
        self._n_tokens = n_tokens
        self._needed.clear()
        self._guessed.clear()
        self._ahead.clear()

    def finish(self, seconds: float) -> None:
        """After each pass that came to its end, and how long it took."""
        if self._n_tokens == 1:
            self.stats.tokens += 1
            self.lookahead.count(seconds)
        self._is_dirty = False

    def request(self, layer: int, ids: np.ndarray) -> None:
        """The experts i64[T,K] of a layer: those not in memory are on their way when this returns."""
        experts = np.unique(ids).tolist()
        self._collect()
        self.eviction.used(layer, ids)
        if self.routes is not None:
            self.routes[layer].append(ids.astype(np.int16))
        missing = [expert for expert in experts if (layer, expert) not in self._resident]
        if self._n_tokens == 1:
            guessed = self._ahead.pop(layer, None)
            if guessed is not None:
                predicted, right = self.stats.predicted, self.stats.predicted_right
                predicted[layer] = predicted.get(layer, 0) + len(experts)
                right[layer] = right.get(layer, 0) + len(guessed.intersection(experts))
            self.stats.hits += len(experts) - len(missing)
            self.stats.misses += len(missing)
        self._needed = {(layer, expert) for expert in experts}
        self._guessed.clear()
        self._start(layer, deque(missing))

    def keep_routes(self) -> None:
        """From now on remember every token's experts."""
        self.routes = [[] for _ in self._layers]

    def kept_routes(self) -> np.ndarray:
        """What was remembered: i16[T, layers, K], without a token that was cut short."""
        whole = [np.concatenate(parts) if parts else np.zeros((0, 1), np.int16) for parts in self.routes or []]
        n_tokens = min(map(len, whole), default=0)
        return np.stack([part[:n_tokens] for part in whole], axis=1)

    def seed(self, shares: np.ndarray) -> None:
        """Begin with the experts that an earlier session used most, f64[layers, experts] uses per token.

        They are read now, as many as there is room for, and stay until others are used more. Raises OptionError for
        shares of another model, ReadError.
        """
        if shares.shape != self._is_resident.shape:
            expected = " x ".join(map(str, self._is_resident.shape))
            found = " x ".join(map(str, shares.shape))
            raise OptionError(f"the routes are of {found} experts, the model has {expected}; give those of this model")
        self.eviction.seed(shares)
        self.begin(0)
        order = [divmod(int(place), self.n_experts) for place in (-shares).argsort(axis=None, kind="stable")]
        for key in order:
            pool = self._pool_of[key[0]]
            if shares[key] and pool.free and key not in self._resident:
                self._needed.add(key)
                self._send_for(_Load(key, pool.free.pop(), predicted=False))
                while len(self._loading) >= MOST_LOADING:
                    self._wait()
        while self._loading:
            self._wait()
        self.stats = StoreStats()
        self.finish(0.0)

    def favoured(self, layer: int, bias: np.ndarray) -> np.ndarray:
        """The router's bias f32[E] with `route_slack` more for experts in memory."""
        return bias + np.float32(self.route_slack) * self._is_resident[layer]

    def prefetch(self, layer: int, ids: np.ndarray) -> None:
        """Experts i64[T,K] that a layer will probably want: they are read when nothing else is."""
        if not self.lookahead.is_on:
            return
        experts = set(np.unique(ids).tolist())
        if self._n_tokens == 1:
            self._ahead[layer] = experts
        self._collect()
        self._guessed = {(layer, expert) for expert in experts}
        missing = sorted(self._guessed - self._resident.keys() - self._loading.keys())
        self._start(layer, deque(expert for _, expert in missing), predicted=True)

    def arrivals(self, layer: int, experts: Sequence[int]) -> Iterator[list[int]]:
        """All `experts` of a layer, some at a time, as soon as they are in memory: they stay there until the next.

        Raises ReadError when one of them cannot be read.
        """
        self._collect()
        self._needed |= {(layer, expert) for expert in experts}
        waiting = dict.fromkeys(experts)
        missing = deque(expert for expert in experts if (layer, expert) not in self._resident)
        while waiting:
            self._start(layer, missing)
            ready = [expert for expert in waiting if (layer, expert) in self._resident][:MOST_AT_ONCE]
            if not ready:
                self._wait()
                continue
            yield ready
            for expert in ready:
                del waiting[expert]
                self._needed.discard((layer, expert))
            self._collect()

    def holds(self, layer: int, experts: Sequence[int]) -> bool:
        """Whether all of a layer's `experts` are in memory."""
        self._collect()
        return all((layer, expert) in self._resident for expert in experts)

    def addresses(self, layer: int, experts: Sequence[int]) -> np.ndarray:
        """Where the slices of experts in memory begin, i64[slices, n]."""
        pool = self._pool_of[layer]
        slots = np.array([self._resident[layer, expert] for expert in experts], np.int64)
        places = np.cumsum((0, *pool.sizes[:-1]))[:, None] + self._offsets[layer][:, experts] % ALIGNMENT
        return int(pool.memory.ctypes.data) + slots * pool.slot_bytes + places

    # ---- books

    def _start(self, layer: int, missing: deque[int], *, predicted: bool = False) -> None:
        """Send for experts, as many as there are slots for."""
        while missing and len(self._loading) < MOST_LOADING:
            key = (layer, missing[0])
            if key in self._loading:
                self._hurry(self._loading[key])
            elif key not in self._resident:
                slot = self._empty_slot(layer, predicted)
                if slot is None:
                    return
                self._send_for(_Load(key, slot, predicted))
            missing.popleft()

    def _send_for(self, load: _Load) -> None:
        layer, expert = load.key
        pool = self._pool_of[layer]
        first = load.slot * pool.slot_bytes
        for weight, n_bytes, offset in zip(
            self._layers[layer], pool.sizes, self._offsets[layer][:, expert].tolist(), strict=True
        ):
            memory = pool.memory[first : first + n_bytes]
            load.slices.append(Slice(load, weight.path, offset, weight.matrix_bytes, memory))
            first += n_bytes
        load.n_pending = len(load.slices)
        self._loading[load.key] = load
        for each in load.slices:
            self._reader.read(each, urgent=not load.predicted)

    def _hurry(self, load: _Load) -> None:
        """What was only predicted is wanted now."""
        if load.predicted:
            load.predicted = False
            for each in load.slices:
                self._reader.hurry(each)

    def _empty_slot(self, layer: int, predicted: bool) -> int | None:
        pool = self._pool_of[layer]
        if pool.free:
            return pool.free.pop()
        values = np.where(self._is_resident, self.eviction.values(layer), np.inf)
        if len(self._pools) > 1:
            values[[other for other in range(len(self._layers)) if self._pool_of[other] is not pool]] = np.inf
        for key in (*self._needed, *self._guessed) if predicted else self._needed:
            values[key] = np.inf
        least = int(values.argmin())
        key = divmod(least, self.n_experts)
        if values[key] == np.inf:
            return None
        self._is_resident[key] = False
        return self._resident.pop(key)

    def _collect(self) -> None:
        """Take note of all that arrived."""
        while not self._reader.done.empty():
            self._note(*self._reader.done.get())

    def _wait(self) -> None:
        """Until something arrives."""
        started = time.perf_counter()
        arrived = self._reader.done.get()
        self.stats.wait_s += time.perf_counter() - started
        self._note(*arrived)
        self._collect()

    def _note(self, arrived: Slice, error: ReadError | None) -> None:
        self.stats.bytes_read += arrived.n_bytes
        if self._n_tokens == 1:
            self.stats.token_bytes_read += arrived.n_bytes
        load = arrived.owner
        assert isinstance(load, _Load)
        load.error = load.error or error
        load.n_pending -= 1
        if load.n_pending:
            return
        del self._loading[load.key]
        if load.error is None:
            self._resident[load.key] = load.slot
            self._is_resident[load.key] = True
            return
        self._pool_of[load.key[0]].free.append(load.slot)
        if load.key in self._needed:  # what was only predicted is asked for again, should it be needed
            raise load.error

    def _recover(self) -> None:
        self._reader.forget()
        self._loading.clear()
        self._is_resident[:] = False
        for key in self._resident:
            self._is_resident[key] = True
        for pool in self._pools:
            taken = {slot for key, slot in self._resident.items() if key[0] in pool.layers}
            pool.free = [slot for slot in range(pool.n_slots) if slot not in taken]


def _make_pools(layers: Sequence[Sequence[Weight]], n_bytes: int, top_k: int, n_experts: int) -> list[_Pool]:
    """Slots for each size of expert, their number by its share of all experts' bytes."""
    pools: dict[tuple[int, ...], _Pool] = {}
    for index, layer in enumerate(layers):
        sizes = slot_sizes(layer)
        pools.setdefault(sizes, _Pool(sizes, [])).layers.append(index)
    spare = n_bytes - least_bytes(layers, top_k)
    whole = sum(pool.slot_bytes * len(pool.layers) for pool in pools.values())
    for pool in pools.values():
        extra = spare * len(pool.layers) // whole
        pool.n_slots = min(top_k + 2 + extra, len(pool.layers) * n_experts)
        pool.memory = aligned_memory(pool.n_slots * pool.slot_bytes)
        pool.free = list(range(pool.n_slots))
    return list(pools.values())
