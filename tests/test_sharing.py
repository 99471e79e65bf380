"""How threads share a product's rows: from their own shares, then from others'. And all rows are fetched ahead."""

import os
import subprocess
import sys
from itertools import pairwise

import numba
import numpy as np
import pytest

from edge_moe.kernels.launch import SHARE_BYTES, take_items


@numba.njit
def _take(counts, home, n_finished, n_items, shares, least):
    return take_items(counts, home, n_finished, n_items, shares, least)


class Threads:
    """Some threads that take items in whatever order they are asked to."""

    def __init__(self, n_items, shares, least):
        self.counts = np.zeros(shares * SHARE_BYTES // 8, np.int64)
        self.size = n_items, shares, least
        self.n_finished = [0] * shares
        self.taken = [[] for _ in range(shares)]

    def take(self, thread):
        """Whether there was something left."""
        first, stop, self.n_finished[thread] = _take(
            self.counts.ctypes.data, thread, self.n_finished[thread], *self.size
        )
        if first == self.size[0]:
            assert stop == first
            return False
        self.taken[thread].append((first, stop))
        return True

    def check(self):
        """Each item was taken once, by each thread its own in one run, then those of others."""
        n_items, shares, _ = self.size
        units = sorted(unit for each in self.taken for unit in each)
        assert [first for first, _ in units] == [0, *(stop for _, stop in units[:-1])]
        assert units[-1][1] == n_items
        assert all(first < stop for first, stop in units)
        for thread, units in enumerate(self.taken):
            begin, end = n_items * thread // shares, n_items * (thread + 1) // shares
            own = [unit for unit in units if begin <= unit[0] < end]
            assert own == units[: len(own)]  # its own first,
            assert all(stop == first for (_, stop), (first, _) in pairwise(own))  # in one run


SIZES = [(1, 1), (7, 1), (16, 16), (64, 2), (16896, 14), (100_003, 7)]


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
@pytest.mark.parametrize(("n_items", "least"), SIZES)
def test_items_are_taken_once(n_items, least, shares):
    rng = np.random.default_rng(n_items)
    for _ in range(20):
        threads = Threads(n_items, shares, least)
        speeds = rng.random(shares) ** 4 + 1e-3
        active = list(range(shares))
        while active:
            thread = rng.choice(active, p=speeds[active] / speeds[active].sum())
            if not threads.take(int(thread)):
                active.remove(thread)
        threads.check()


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
@pytest.mark.parametrize(("n_items", "least"), SIZES)
def test_one_thread_takes_all(n_items, least, shares):
    """What another would do that never comes."""
    threads = Threads(n_items, shares, least)
    while threads.take(shares - 1):
        pass
    threads.check()


def test_units_get_shorter():
    """From half of a share down to the least: an even end, yet few units."""
    threads = Threads(100_000, 2, 50)
    while threads.take(0) + threads.take(1):
        pass
    lengths = [stop - first for first, stop in threads.taken[0]]
    assert lengths[0] == 25_000
    assert (np.diff(lengths) <= 0).all()
    assert lengths[-2] == 50 >= lengths[-1]
    assert len(lengths) < 15


# Kernels are compiled with requests that note the line they are given: those of what is read once, those made again
# shortly before, and those of a panel's rows. And how far apart the first two were at most.
_NOTING = """
import sys
import numpy as np
from numba import types
from numba.core import cgutils
from llvmlite import ir
from edge_moe.kernels import fetches, simd
from edge_moe.kernels.jit import inline_kernel

LINES = 1 << 14
far, near, panels = noted = np.zeros((3, LINES), np.uint8)
memory = np.zeros(LINES * 64 + 4096, np.uint8)
FIRST = (memory.ctypes.data + 4095) & ~4095
PANELS = panels.ctypes.data
last, widest = extent = np.zeros((2, 1), np.int64)
I64 = ir.IntType(64)

def note(builder, address, offset, locality):
    is_near = locality == fetches.FOR_SOON
    notes = near if is_near else far
    byte = builder.sub(builder.add(address, I64(offset)), I64(FIRST))
    line = builder.lshr(byte, I64(6))
    with builder.if_then(builder.icmp_unsigned("<", line, I64(LINES))):
        place = builder.inttoptr(builder.add(line, I64(notes.ctypes.data)), ir.IntType(8).as_pointer())
        builder.store(ir.IntType(8)(1), place)
        newest, largest = (builder.inttoptr(I64(each.ctypes.data), I64.as_pointer()) for each in extent)
        if is_near:
            between, before = builder.sub(builder.load(newest), byte), builder.load(largest)
            is_wider = builder.icmp_signed(">", between, before)
            builder.store(builder.select(is_wider, between, before), largest)
        else:
            builder.store(byte, newest)

@inline_kernel
def note_panel(address):
    line = (address - FIRST) >> 6
    if 0 <= line < LINES:
        simd.store(PANELS + line, types.uint8(1))

fetches.prefetch_at, fetches.prefetch_far = note, note_panel
from edge_moe.formats import FORMATS
from edge_moe.kernels import products
from edge_moe.kernels.elementwise import set_threads

fmt = {f.name: f for f in FORMATS}[sys.argv[1]]
n_cols = int(sys.argv[2])
row_bytes = fmt.row_bytes(n_cols)
n_rows = (LINES * 64 - 4096) // row_bytes
end = n_rows * row_bytes
"""
_ROWS = """
for threads in (1, 2):
    set_threads(threads)
    noted[:] = extent[:] = 0
    products.linear(np.ones((1, n_cols), np.float32), [(fmt, FIRST, n_rows)])
    for share in range(threads):  # what a thread begins with nobody could have announced
        start = n_rows * row_bytes * share // threads
        far[max(start - 4 * row_bytes, 0) // 64 : (start + 5 * row_bytes + fetches.FAR_BYTES) // 64] = 1
    assert far.sum() < LINES
    print(np.flatnonzero(far[: end // 64] == 0).tolist())
    if threads == 1 and fetches.NEAR_BYTES:
        assert near.sum() < LINES
        near[: (4 * row_bytes + fetches.NEAR_BYTES) // 64] = 1
        print(np.flatnonzero(near[: end // 64] == 0).tolist())
        print([each for each in widest.tolist() if not 0 < each <= fetches.FAR_BYTES - fetches.NEAR_BYTES + 1024])
    else:
        print([], [], sep="\\n")
"""
_PANELS = """
for threads in (1, 2):
    set_threads(threads)
    noted[:] = 0
    products.linear(np.ones((9, n_cols), np.float32), [(fmt, FIRST, n_rows)])
    before = panels[: threads * 16 * row_bytes // 64].sum()  # what threads begin with nobody could have announced
    panels[: threads * 16 * row_bytes // 64 + 1] = 1
    print(int(before), np.flatnonzero(panels[: end // 64] == 0).tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_cols"), [("F16", 1024), ("Q8_0", 1408), ("Q5_0", 1408), ("Q4_K", 2048), ("Q6_K", 2048)]
)
def test_every_line_is_fetched_ahead(name, n_cols, tmp_path):
    """One that is left out is waited for: rows of Q8_0, of which one in 17 was, took 1.5 times as long.

    And none is asked for too early: a page further, it slows all down by a fifth.
    """
    assert _noted(_ROWS, name, n_cols, tmp_path).split() == ["[]"] * 6


@pytest.mark.slow
def test_long_rows_are_not_fetched_too_early(tmp_path):
    """Of rows longer than what is asked for ahead, the part behind that; but for the ends of two threads' units."""
    assert _noted(_ROWS, "Q8_0", 7168, tmp_path).splitlines()[:3] == ["[]"] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_cols"), [("Q8_0", 1408), ("Q4_K", 2048)])
def test_rows_of_a_panel_are_fetched_ahead(name, n_cols, tmp_path):
    """While one unit is multiplied, the next: unpacking waited for it, a quarter of a product of 48 tokens."""
    assert _noted(_PANELS, name, n_cols, tmp_path).splitlines() == ["0 []"] * 2


def _noted(script, name, n_cols, cache):
    env = os.environ | {"EDGE_MOE_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", _NOTING + script, name, str(n_cols)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
