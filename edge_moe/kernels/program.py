"""Running a recorded program: many steps, one call, one parallel region.

A step is a kernel on a plan, as in launch.py. All threads walk through the steps together. Those worth sharing are
taken unit by unit by whoever has time; those between them are run by the thread that finishes the step before, while
the others wait. Waiting threads spin for some microseconds, then sleep for some.
"""

import ctypes
import os
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edge_moe.kernels.jit import inline_kernel, kernel, parallel_kernel
from edge_moe.kernels.launch import SHARE_BYTES, call
from edge_moe.kernels.simd import address_of, fetch_add, load, store
from edge_moe.kernels.simd import call as call_intrinsic
from edge_moe.kernels.target import TARGET

# A step of a program is int64[6]. ENTERED and LEFT count the threads that began to take units and found none left. Of a
# step that takes units by `take_items`, COUNTS is the address of its counts.
FUNCTION, PLAN, SHARED, ENTERED, LEFT, COUNTS = range(6)
STEP_FIELDS = 6
_STEP_BYTES = 8 * STEP_FIELDS
_MOVING_ON = -1  # instead of the present step's index while one thread runs what lies between two shared steps
_SPINS = 4000  # some 50 microseconds
_INT64 = ir.IntType(64)


@intrinsic
def _atomic_load(typingctx: Any, address: Any) -> Any:
    """The int64 at an address, and with it all that was written before it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _INT64.as_pointer()), "acquire", 8, typ=_INT64)

    return types.int64(types.int64), codegen


@intrinsic
def _atomic_store(typingctx: Any, address: Any, value: Any) -> Any:
    """Write an int64 after all that was written before."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[1], builder.inttoptr(args[0], _INT64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _exchange_if(typingctx: Any, address: Any, expected: Any, value: Any) -> Any:
    """Replace the int64 at an address if it is the expected one; returns whether it was."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _INT64.as_pointer())
        return builder.extract_value(builder.cmpxchg(pointer, args[1], args[2], "acq_rel", "acquire"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Tell the CPU that this thread only waits."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if TARGET.is_x86:
            call_intrinsic(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call_c(typingctx: Any, address: Any, number: Any) -> Any:
    """Call the C function `int f(int)` at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32)])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])

    return types.int32(types.int64, types.int32), codegen


@intrinsic
def _set_threads(typingctx: Any, n_threads: Any) -> Any:
    """What numba.set_num_threads does. That one is known by an address, with which numba caches no kernel."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "set_num_threads"), args)
        return context.get_dummy_value()

    return types.void(types.int32), codegen


@cache
def sleep_function() -> int:
    """Address of the C function `f(1)` by which a thread lets others have its core for as short as the system can.

    A core left idle takes over a thread that waits for another core: on a busy machine that may be the very one waited
    for. So sleeping is better here than yielding, which keeps the core busy.
    """
    windows = os.name == "nt"
    library = ctypes.CDLL("kernel32" if windows else None)
    function = library.Sleep if windows else library.usleep
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


@inline_kernel
def _run_alone(steps, i, n_steps):
    """Run steps from `i` on until one that is shared; returns its index, or n_steps."""
    while i < n_steps and not load(types.int64, steps + i * _STEP_BYTES + 8 * SHARED):
        step = steps + i * _STEP_BYTES
        call(load(types.int64, step + 8 * FUNCTION), load(types.int64, step + 8 * PLAN))
        i += 1
    return i


@inline_kernel
def _take_part(steps, n_steps, present, sleep):
    """What each thread does: help with the present step, move on when it is done."""
    while True:
        i = _atomic_load(present)
        spins = 0
        while i == _MOVING_ON:
            spins += 1
            _wait(spins, sleep)
            i = _atomic_load(present)
        if i >= n_steps:
            return
        step = steps + i * _STEP_BYTES
        fetch_add(step + 8 * ENTERED, 1)
        call(load(types.int64, step + 8 * FUNCTION), load(types.int64, step + 8 * PLAN))
        # All units are taken now, and done if all that entered have left. One who enters later will find none.
        left = fetch_add(step + 8 * LEFT, 1) + 1
        if left == _atomic_load(step + 8 * ENTERED) and _exchange_if(present, i, _MOVING_ON):
            _atomic_store(present, _run_alone(steps, i + 1, n_steps))
        else:
            spins = 0
            while _atomic_load(present) == i:
                spins += 1
                _wait(spins, sleep)


@inline_kernel
def _wait(spins, sleep):
    if spins < _SPINS:
        _pause()
    else:
        _call_c(sleep, types.int32(1))


@parallel_kernel
def _together(steps, n_steps, present, sleep, n_threads):
    for _ in numba.prange(n_threads):
        _take_part(steps, n_steps, present, sleep)


@kernel
def run_program(steps, sleep, n_threads, out, out_field):
    """Run all steps, i64[N,6], in order. With one thread nothing is shared.

    out f32[1,N]: where the step writes whose plan has `out_field`, an address. The calling thread's kernels have
    n_threads from then on. Both are done here, as Python takes 40 microseconds for each, whose memory is not at hand
    after all those weights.
    """
    store(out_field, address_of(out))
    _set_threads(types.int32(n_threads))
    n_steps, first = steps.shape[0], address_of(steps)
    for i in range(n_steps):
        steps[i, ENTERED] = steps[i, LEFT] = 0
        store(steps[i, PLAN], types.int64(0))
        if steps[i, COUNTS]:
            for share in range(n_threads):
                store(steps[i, COUNTS] + SHARE_BYTES * share, types.int64(0))
    if n_threads == 1:
        for i in range(n_steps):
            call(steps[i, FUNCTION], steps[i, PLAN])
        return
    start = _run_alone(first, 0, n_steps)
    if start < n_steps:
        present = np.array([start])
        _together(first, n_steps, address_of(present), sleep, n_threads)
        present[0] = 0  # it must live until here
