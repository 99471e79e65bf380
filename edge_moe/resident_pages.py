"""Maps those pages of a file that are in memory already, so that kernels need not fault them in one after the other.

On Linux (from 5.14 on) only, where the page cache can be asked what it holds. What Windows and macOS offer
(PrefetchVirtualMemory, MADV_WILLNEED) would read from the disk what no token may ever want.
"""

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread, get_native_id

import numpy as np

_POPULATE_READ = 22  # MADV_POPULATE_READ, which Python 3.11 does not name
_STEP_BYTES = 128 << 20  # mapped by one call: a few milliseconds
# A page may carry the mark at which the system reads on behind it. So a piece is mapped only where the next one is in
# memory, too, and pieces are longer than what is read ahead.
_PIECE_BYTES = 16 << 20

SystemCall = Callable[[int, int, int], int]  # address, bytes, and what the call takes besides


def map_resident_pages(owner: object, maps: Mapping[Path, np.ndarray]) -> Thread | None:
    """Start mapping what is in memory of mapped files u8[n_bytes], in a thread that ends when `owner` is gone.

    Nothing is read from the disk, and nothing fails: where it cannot be done (None) or goes wrong, pages are mapped
    when they are used. Source: Linux man pages madvise(2), mincore(2).
    """
    if sys.platform != "linux":
        return None
    stop = Event()
    try:
        library = ctypes.CDLL(None, use_errno=True)
        ask, advise = _system_call(library.mincore, ctypes.c_void_p), _system_call(library.madvise, ctypes.c_int)
        known = [data for path, data in maps.items() if _can_ask(path)]
        thread = Thread(target=_map_all, args=(known, ask, advise, stop), name="resident pages", daemon=True)
        thread.start()
    except (OSError, AttributeError, RuntimeError):  # no file, no such call, no thread to be had
        return None
    weakref.finalize(owner, stop.set)
    return thread


def _system_call(function: "ctypes._NamedFuncPointer", last: type) -> SystemCall:
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, last)
    return function


def _can_ask(path: Path) -> bool:
    """Whether this process is told the truth: of a file of others that it may not write, all is said to be there."""
    return path.stat().st_uid == os.geteuid() or os.access(path, os.W_OK, effective_ids=True)


def _map_all(maps: list[np.ndarray], ask: SystemCall, advise: SystemCall, stop: Event) -> None:
    with suppress(OSError, MemoryError):
        os.setpriority(os.PRIO_PROCESS, get_native_id(), 19)  # of this thread alone: only when a core has nothing to do
        for data in maps:
            for first in range(0, data.size, _STEP_BYTES):
                if stop.is_set():
                    return
                _map_step(data, first, ask, advise)


def _map_step(data: np.ndarray, first: int, ask: SystemCall, advise: SystemCall) -> None:
    """Raises OSError for a system that knows no such call, and a file that was cut."""
    address = int(data.ctypes.data) + first
    n_bytes = min(_STEP_BYTES + _PIECE_BYTES, data.size - first)
    states = np.empty(-(-n_bytes // mmap.PAGESIZE), np.uint8)
    _check(ask(address, n_bytes, states.ctypes.data))
    is_in = np.logical_and.reduceat(states & 1, range(0, len(states), _PIECE_BYTES // mmap.PAGESIZE))
    is_safe = (is_in & np.append(is_in[1:], True))[: _STEP_BYTES // _PIECE_BYTES]  # behind the file is nothing to read
    bounds = np.flatnonzero(np.diff(np.concatenate(([False], is_safe, [False])))) * _PIECE_BYTES
    for start, stop in bounds.reshape(-1, 2).tolist():
        _check(advise(address + start, min(stop, n_bytes) - start, _POPULATE_READ))


def _check(status: int) -> None:
    if status != 0:
        raise OSError(ctypes.get_errno(), "a page cannot be mapped ahead")
