"""How near generation comes to what the memory allows: a few tokens and reads of memory in turn, in one process.

What the memory of a shared machine gives may halve within a second. So tokens are compared with what is read right
before and right after them, a few at a time, and of all these comparisons the median counts.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from llama_tools import ToolError
from numba import prange, types

from edge_moe.checkpoint import Checkpoint
from edge_moe.config import LlamaConfig
from edge_moe.kernels.elementwise import set_threads
from edge_moe.kernels.fetches import NEAR_BYTES, prefetch, prefetch_once
from edge_moe.kernels.jit import parallel_kernel
from edge_moe.kernels.simd import address_of, i32x16, load, splat, store

MEMORY, PLAIN, PAGES = "memory", "memory by a plain loop", "the file's pages"
READ_BYTES = 1 << 30  # read at a time: far more than any cache
# Products may be faster than a plain loop, which leaves it to the CPU to ask for what comes next: the bound is the
# speed of the fastest loop known. Where lines are asked for again shortly before, as products do, it is a fifth faster:
# then 2,048 to 4,096 bytes ahead, and 512 to 2,048, are equally good.
READ_AHEAD, READ_NEAR = (3072, 1024) if NEAR_BYTES else (4096, 0)
TOKENS_AT_ONCE = 4  # between reads; as long as these take


@parallel_kernel
def sum_words(words, n_parts, asks):
    """Read all of words u32[N], n_parts side by side; returns their sum modulo 2**32, so that no read is left out.

    In registers: with one sum alone a loop waits for itself before it waits for the memory. asks: whether it asks for
    lines ahead.
    """
    n_lines = words.size // 64
    part = (n_lines + n_parts - 1) // n_parts
    sums = np.zeros((n_parts, 16), np.int32)
    first, out = address_of(words), address_of(sums)
    for p in prange(n_parts):
        a = b = c = d = splat(i32x16, types.int32(0))
        for line in range(p * part, min(n_lines, (p + 1) * part)):
            place = first + 256 * line
            if asks:
                for i in range(READ_AHEAD, READ_AHEAD + 256, 64):
                    prefetch_once(place + i)
            if asks and READ_NEAR:
                for i in range(READ_NEAR, READ_NEAR + 256, 64):
                    prefetch(place + i)
            a, b = a + load(i32x16, place), b + load(i32x16, place + 64)
            c, d = c + load(i32x16, place + 128), d + load(i32x16, place + 192)
        store(out + 64 * p, (a + b) + (c + d))
    return np.uint32((sums.sum() + words[64 * n_lines :].sum()) & 0xFFFFFFFF)


def fits_memory(n_bytes: int) -> bool:
    """Whether a model can stay in memory, without which its bound is another one, the disk's."""
    return n_bytes < psutil.virtual_memory().available


def is_large(n_bytes: int) -> bool:
    """Whether a model is large enough to measure the memory by its pages: no cache holds it."""
    return n_bytes >= READ_BYTES


def pieces_of(maps: Iterable[np.ndarray], n_words: int) -> list[np.ndarray]:
    """Mapped files u8[N], each as pieces u32[n_words], without its rest; a shorter file is one piece."""
    pieces = []
    for mapped in maps:
        words = np.frombuffer(mapped, np.uint32, mapped.size // 4)
        pieces += [words[i * n_words :][:n_words] for i in range(max(1, words.size // n_words))]
    return pieces


class Reads:
    """What is read with `threads` threads: memory of its own and the pages of a model's files u8[N], if there are any.

    At most n_bytes at a time.
    """

    def __init__(self, threads: int, maps: Iterable[np.ndarray], n_bytes: int) -> None:
        set_threads(threads)
        self.threads, self.n_read = threads, 0
        n_words = min(n_bytes, psutil.virtual_memory().available // 4) // 4
        self.words = np.ones(n_words, np.uint32)  # ones, not zeros: untouched pages would all be the same one
        self.totals: dict[int, int] = {-1: n_words & 0xFFFFFFFF}  # by piece of the files; -1: of the memory
        self.pieces = pieces_of(maps, n_words)

    def speeds(self) -> dict[str, float]:
        """Bytes a second: of the memory the same each time, of the files one piece after the other."""
        found = {MEMORY: self._speed(self.words, -1), PLAIN: self._speed(self.words, -1, asks=False)}
        if self.pieces:
            piece = self.n_read % len(self.pieces)
            found[PAGES] = self._speed(self.pieces[piece], piece)
            self.n_read += 1
        return found

    def _speed(self, words: np.ndarray, piece: int, asks: bool = True) -> float:
        started = time.perf_counter()
        total = int(sum_words(words, self.threads, asks))
        seconds = time.perf_counter() - started
        if self.totals.setdefault(piece, total) != total:
            raise RuntimeError(f"{words.nbytes} bytes had the sums {self.totals[piece]} and {total}: they changed")
        return words.nbytes / seconds


@dataclass(frozen=True)
class Traffic:
    """Bytes that one token reads: of the weights always, of the cache for each token of context."""

    weights_bytes: int
    cache_bytes_per_position: float
    has_values: bool = False  # the cache keeps values beside keys

    def bytes_at(self, depth: float) -> float:
        """Bytes read by a token behind `depth` tokens."""
        return self.weights_bytes + depth * self.cache_bytes_per_position


def traffic_of(checkpoint: Checkpoint, kv: str) -> Traffic:
    """What the model's config and tensor sizes say. Raises FormatError, UnsupportedError, ToolError."""
    from edge_moe import plan
    from edge_moe.models.architectures import cache_bytes_by_kind, load_weights

    length = min(1024, checkpoint.config.max_position_embeddings)
    cache_bytes = cache_bytes_by_kind(checkpoint.config, length)
    if kv not in cache_bytes:
        raise ToolError(f"--kv {kv}: the cache of {checkpoint.path.name} is one of {', '.join(cache_bytes)}")
    _, weights_bytes = plan.active_weights(checkpoint.config, plan.parts(load_weights(checkpoint)))
    return Traffic(weights_bytes, cache_bytes[kv] / length, isinstance(checkpoint.config, LlamaConfig))


def in_turn(
    token: Callable[[int], Any], n_tokens: int, at_once: int, read: Callable[[], dict[str, float]]
) -> tuple[list[float], dict[str, list[float]]]:
    """Generate n_tokens, at_once before each read of the memory; a read comes first, too.

    Returns the seconds of a token for each such part, and the speeds of what was read around it.
    """
    seconds: list[float] = []
    reads: dict[str, list[float]] = {}
    before = read()
    for first in range(0, n_tokens, at_once):
        last = min(first + at_once, n_tokens)
        started = time.perf_counter()
        for i in range(first, last):
            token(i)
        seconds.append((time.perf_counter() - started) / (last - first))
        after = read()
        for what in after:
            reads.setdefault(what, []).append((before[what] + after[what]) / 2)
        before = after
    return seconds, reads


class Pacer:
    """A model that generates in turn with reads of the memory; it stays loaded, and so do its caches."""

    def __init__(self, checkpoint: Checkpoint, kv: str, threads: int, traffic: Traffic) -> None:
        self.checkpoint, self.kv, self.threads, self.traffic = checkpoint, kv, threads, traffic
        self.model: Any = None
        self.caches: dict[tuple[int, int], Any] = {}

    def __call__(self, n_tokens: int, depth: int) -> dict[str, Any]:
        """n_tokens behind `depth` others. A model that a cache may hold is not disturbed by reads between its tokens.

        Returns tok_per_s, and for each of what is read bytes a second (`reads`) and the share of that speed at which
        tokens took their bytes (`shares`): medians.
        """
        large, ids = is_large(self.checkpoint.size_bytes), self._ids(n_tokens, depth)
        cache = self._cache(n_tokens, depth)
        reader = Reads(self.threads, self.checkpoint.maps.values() if large else (), READ_BYTES)

        def token(i: int) -> None:
            self.model.forward(ids[i : i + 1], cache)

        for i in range(min(TOKENS_AT_ONCE, n_tokens)):  # to warm up
            token(i)
        reader.speeds()
        cache.truncate(depth)
        seconds, reads = in_turn(token, n_tokens, TOKENS_AT_ONCE if large else n_tokens, reader.speeds)
        cache.truncate(depth)
        n_bytes = self.traffic.bytes_at(depth + (n_tokens - 1) / 2)
        return {
            "tok_per_s": 1 / statistics.median(seconds),
            "reads": {what: statistics.median(speeds) for what, speeds in reads.items()},
            "shares": {
                what: statistics.median(n_bytes / s / speed for s, speed in zip(seconds, speeds, strict=True))
                for what, speeds in reads.items()
            },
        }

    def _ids(self, n: int, seed: int) -> np.ndarray:
        import edge_moe

        if self.model is None:
            self.model = edge_moe.load(self.checkpoint.path, kv=self.kv, threads=self.threads)
        return np.random.default_rng(seed).integers(0, self.model.config.vocab_size, n)

    def _cache(self, n_tokens: int, depth: int) -> Any:
        """One that holds `depth` random tokens and has room for n_tokens."""
        from edge_moe.generate import Session

        if (n_tokens, depth) not in self.caches:
            session = Session(self.model, depth + n_tokens)
            if depth:
                for _ in session.prefill(self._ids(depth, 1).tolist()):
                    pass
            self.caches[n_tokens, depth] = session.cache
        return self.caches[n_tokens, depth]
