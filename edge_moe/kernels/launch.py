"""Running compiled kernels on all threads: a job is a function and a plan in memory that says what to do.

One parallel loop serves every kernel, so that only one must be compiled: a kernel is compiled for a block format as a
plain function of a plan's address, and takes units of work until none is left: from the plan's counter, or from the
thread's own share and then from others'. A slow or late thread takes fewer units. Each unit owns its output and adds in
a fixed order: results do not depend on the number of threads.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from edge_moe.kernels.ahead import Workers
from edge_moe.kernels.blocks import TAGS, FormatTag
from edge_moe.kernels.jit import inline_kernel, kernel, parallel_kernel
from edge_moe.kernels.simd import fetch_add, load

WORTH_A_THREAD = 500_000  # operations; about 50 microseconds
NUMBERS = TAGS["F32"]  # stands for the block format where a kernel has none

_ARGUMENTS = (types.Opaque("edge_moe format"), types.int64)


@intrinsic
def call(typingctx: Any, function: Any, plan: Any) -> Any:
    """Call a compiled `int64 f(FormatTag, int64 plan)` by its address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function_type = context.call_conv.get_function_type(types.int64, _ARGUMENTS)
        pointer = builder.inttoptr(args[0], function_type.as_pointer())
        nothing = context.get_constant_null(_ARGUMENTS[0])
        _, result = context.call_conv.call_function(builder, pointer, types.int64, _ARGUMENTS, [nothing, args[1]])
        return result

    return types.int64(types.int64, types.int64), codegen


@inline_kernel
def first_of_unit(unit, n_items, shares, least):
    """Where a unit of items that lie one behind the other begins: for few long runs and yet an even end.

    There is one unit for each of `shares` threads, of half the items in all, then one for each of half of what is left,
    and so on until units have `least` items.
    """
    first, size = 0, n_items // (2 * shares)
    while unit >= shares and size > least:
        first += shares * size
        unit -= shares
        size //= 2
    return first + unit * max(size, least)


SHARE_BYTES = 64  # of each thread's count: a cache line, which others write to only when they have finished their own


@inline_kernel
def take_items(counts, home, n_finished, n_items, shares, least):
    """Some of the items that lie one behind the other, so that threads have few long runs and yet an even end.

    Items are cut into `shares`, one for each thread. A thread takes half of what is left of its own from the front,
    down to `least` items, then as much of others' from the back. Where all take from one counter instead, each waits
    for a line of the other's cache every time. counts: the address of SHARE_BYTES for each share, zeros at first; home:
    the thread's own share; n_finished: how many shares it has found finished, 0 at first.
    Returns the first item taken, the one behind the last (both n_items when all are taken), and the new n_finished.
    """
    while n_finished < shares:
        share = (home + n_finished) % shares
        begin, end = n_items * share // shares, n_items * (share + 1) // shares
        count = counts + SHARE_BYTES * share  # i64: items taken from the front, and from the back times 2**32
        taken = load(types.int64, count)
        left = end - begin - (taken & 0xFFFFFFFF) - (taken >> 32)
        if left > 0:
            size = max(left // 2, least)
            taken = fetch_add(count, size << 32 if n_finished else size)
            front, back = begin + (taken & 0xFFFFFFFF), end - (taken >> 32)
            if front < back:
                if n_finished:
                    return max(front, back - size), back, n_finished
                return front, min(front + size, back), n_finished
        n_finished += 1
    return n_items, n_items, n_finished


@cache
def float_bits(value: float) -> int:
    """A number as the int64 with the bits of its f64, as plans hold it."""
    return int(np.float64(value).view(np.int64))


@parallel_kernel
def _on_threads(function, plan, n_threads):
    for _ in numba.prange(n_threads):
        call(function, plan)


@kernel
def launch(function, plan, n_units, operations, n_threads):
    """Run a kernel on a plan of n_units; work of few operations is not worth waking other threads for."""
    n_threads = min(n_threads, n_units) if operations > WORTH_A_THREAD else 1
    if n_threads > 1:
        _on_threads(function, plan, n_threads)
    else:
        call(function, plan)


_addresses: dict[tuple[Any, FormatTag], int] = {}
_workers = Workers()


def compile_ahead(jobs: Sequence[tuple[Any, FormatTag]], n_workers: int) -> None:
    """Have kernels that will be wanted by `compiled_address` compiled by other processes, the last ones first."""
    _workers.start(jobs, n_workers)


def compiled_address(function: Any, fmt: FormatTag) -> int:
    """Address of a kernel's machine code for a block format, compiled now if it is not in the cache."""
    address = _addresses.get((function, fmt))
    if address is None:
        _workers.leave_to_caller(function, fmt)
        numba.get_thread_id()  # only then numba makes it known to machine code from the cache
        function.compile((fmt, types.int64))
        result = function.overloads[fmt, types.int64]
        address = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
        _addresses[function, fmt] = address
    return address


def run_units(function: Any, fmt: FormatTag, plan: Sequence[int], n_units: int, operations: int) -> None:
    """Run a kernel on a plan of these numbers, with the threads that `set_threads` gave the calling Python thread."""
    numbers = np.array(plan, np.int64)
    launch(compiled_address(function, fmt), numbers.ctypes.data, n_units, operations, numba.get_num_threads())
