"""Asking for cache lines before they are read; and when weights are, which are read once and one behind the other."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_moe.kernels.simd import INT32, call
from edge_moe.kernels.target import TARGET

# LLVM's numbers of what is asked for: what will be read soon, into all levels of the cache; what will be read later,
# past the first level; what will be read once, into one level alone: the first or the second.
FOR_SOON, FOR_LATER = 3, 2
ONCE = 0 if TARGET.reads_past_l2 else FOR_LATER


def prefetch_at(builder: ir.IRBuilder, address: ir.Value, offset: int, locality: int) -> None:
    """Ask for a cache line that will be read; any address will do, it never faults."""
    first = builder.inttoptr(address, ir.IntType(8).as_pointer())
    pointer = builder.gep(first, [ir.Constant(INT32, offset)])  # not a sum of integers: LLVM would keep many of these
    hints = [ir.Constant(INT32, v) for v in (0, locality, 1)]  # read, how near, data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *hints])


def _prefetcher(locality: int) -> Any:
    @intrinsic
    def prefetch(typingctx: Any, address: Any) -> Any:
        """Ask for a cache line that will be read; any address will do, it never faults."""

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            prefetch_at(builder, args[0], 0, locality)
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return prefetch


prefetch, prefetch_far, prefetch_once = _prefetcher(FOR_SOON), _prefetcher(FOR_LATER), _prefetcher(ONCE)

# On a Zen 5, where two cores read 90 GB/s the best of 3,000 to 24,576 bytes is 8,192 to 12,288; where they read 54,
# more than 7,168 cost 2 to 5 %.
# On Intel's CPUs that ask for lines by themselves, too, no request may be more than a page ahead of the nearest: a core
# of a Granite Rapids reads 18.5 GB/s so, but 15 if a single line of a page 8 KB ahead is asked for, and 15 without any
# requests. And of these pairs one has to be near, into the first level: those into the second alone give 15, too.
FAR_BYTES = 7168 if TARGET.reads_past_l2 else 5120
NEAR_BYTES = 0 if TARGET.reads_past_l2 else 2048


def fetchers(n_bytes: int, n_parts: int) -> tuple[Any, ...]:
    """Operations that ask for n_bytes, one part each: for a loop to have few requests at a time.

    Of many at once a CPU keeps loads waiting, which follow: two superblocks of Q6_K at a time are 13 % slower.
    """
    return tuple(fetcher(n_bytes * part // n_parts, n_bytes * (part + 1) // n_parts) for part in range(n_parts))


def fetcher(begin: int, end: int) -> Any:
    """Make an operation fetch(ahead, here): ask for the lines that begin in begin:end of what lies ahead.

    ahead, here: addresses, int64, of what will be read later and of what is read now, of which the lines behind
    NEAR_BYTES are asked for again. It has no loop: LLVM leaves some of these as they are, whose ends the CPU then
    guesses wrongly.
    """

    @intrinsic
    def fetch(typingctx: Any, ahead: Any, here: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
            for line in range((begin + 63) & ~63, end, 64):
                prefetch_at(builder, args[0], line, ONCE)
                if NEAR_BYTES:
                    prefetch_at(builder, args[1], line + NEAR_BYTES, FOR_SOON)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return fetch
