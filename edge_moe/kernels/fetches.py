"""When weights are asked for: they are read once and one behind the other, straight from the file's pages."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_moe.kernels.jit import inline_kernel
from edge_moe.kernels.simd import FOR_SOON, ONCE, prefetch_at, prefetch_far
from edge_moe.kernels.target import TARGET

# On a Zen 5, where two cores read 90 GB/s the best of 3,000 to 24,576 bytes is 8,192 to 12,288; where they read 54,
# more than 7,168 cost 2 to 5 %. On an Emerald Rapids 8,192 are 6 % slower than 12,288, 16,384 are 2 %.
FAR_BYTES = 7168 if TARGET.reads_past_l2 else 12288
# Where that is the cache's second level, a line is asked for once more, into the first: else a row waits for it while
# the CPU is busy with other requests (3 to 8 % on an Emerald Rapids; 1,024 bytes and 4,096 gain less).
NEAR_BYTES = 0 if TARGET.reads_past_l2 else 2048
# Looking up where a page lies takes as long as a few lines; virtual machines often have small pages below large ones.
PAGE_BYTES = 4096
PAGES_AHEAD_BYTES = 0 if TARGET.reads_past_l2 else 8192


@inline_kernel
def fetch_pages(ahead, n_bytes):
    """Ask for a line of each page of what will be asked for some time after the n_bytes at `ahead`, an address."""
    if PAGES_AHEAD_BYTES:
        for place in range(PAGES_AHEAD_BYTES, PAGES_AHEAD_BYTES + n_bytes, PAGE_BYTES):
            prefetch_far(ahead + place)


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
