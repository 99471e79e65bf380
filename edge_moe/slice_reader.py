"""Threads that read slices of files into memory: those wanted now first, those only predicted when there is time."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from time import sleep

import numpy as np

from edge_moe.direct_io import DirectFile
from edge_moe.errors import ReadError

READERS = 8  # reads at a time: disks give most from four on, and laptops' not more from sixteen on


@dataclass(frozen=True, eq=False)
class Slice:
    """Bytes of a file and the page-aligned memory u8[aligned_bytes(n_bytes)] they go to; `owner` is the asker's."""

    owner: object
    path: Path
    offset: int
    n_bytes: int
    memory: np.ndarray


class SliceReader:
    """Reads slices; `done` gives each back with its error, if any.

    One thread asks. What it does may be cut by Ctrl-C between any two instructions: `forget` then makes all well.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Raises ReadError when a file cannot be opened."""
        self.done: SimpleQueue[tuple[Slice, ReadError | None]] = SimpleQueue()
        self._files = {path: DirectFile(path, READERS) for path in paths}
        self._urgent: deque[Slice] = deque()
        self._later: deque[Slice] = deque()
        self._tickets: SimpleQueue[bool] = SimpleQueue()  # one for each slice; False ends a reader
        self._reading = [False] * READERS
        self._threads = [Thread(target=self._work, args=(r,), daemon=True) for r in range(READERS)]
        for thread in self._threads:
            thread.start()

    def read(self, wanted: Slice, *, urgent: bool = True) -> None:
        """Have a slice read."""
        (self._urgent if urgent else self._later).append(wanted)
        self._tickets.put(True)

    def hurry(self, wanted: Slice) -> None:
        """A slice asked for without urgency is urgent now."""
        try:
            self._later.remove(wanted)
        except ValueError:  # a reader has it already
            return
        self._urgent.append(wanted)

    def forget(self) -> None:
        """Take back all that was asked for, and wait for what is being read; `done` is empty afterwards."""
        self._urgent.clear()
        self._later.clear()
        while any(self._reading):
            sleep(0.001)
        while not self.done.empty():
            self.done.get()

    def close(self) -> None:
        """End the threads, which close the files; does not wait, since any thread may be collecting garbage."""
        self._urgent.clear()
        self._later.clear()
        for _ in self._threads:
            self._tickets.put(False)

    def _work(self, reader: int) -> None:
        while self._tickets.get():
            self._reading[reader] = True  # before a slice is taken: `forget` clears first, then looks
            wanted = self._take()
            if wanted is not None:
                error = None
                try:
                    self._files[wanted.path].read(reader, wanted.offset, wanted.n_bytes, wanted.memory)
                except ReadError as problem:
                    error = problem
                except Exception as problem:  # nobody else would see it, and who asked would wait for ever
                    error = ReadError(f"{wanted.path}: {wanted.n_bytes} bytes at {wanted.offset}: {problem!r}")
                self.done.put((wanted, error))
            self._reading[reader] = False
        for file in self._files.values():
            file.close_one(reader)

    def _take(self) -> Slice | None:
        """The next slice; None when it was taken back."""
        while True:
            try:
                return self._urgent.popleft()
            except IndexError:
                pass
            try:
                return self._later.popleft()
            except IndexError:
                if not self._urgent:  # one may just have been moved there
                    return None
