"""Running compiled kernels on all threads: a job is a function and a plan in memory that says what to do.

One parallel loop serves every kernel, so that only one must be compiled: a kernel is compiled for a block format as a
plain function of a plan's address, and takes units of work from the plan's counter until none is left. A slow or late
thread takes fewer units. Each unit owns its output and adds in a fixed order: results do not depend on the number of
threads.
"""

from typing import Any

import numba
from numba import types
from numba.extending import intrinsic

from edge_moe.kernels.blocks import FormatTag
from edge_moe.kernels.jit import inline_kernel, kernel, parallel_kernel

WORTH_A_THREAD = 500_000  # operations; about 50 microseconds

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


def compiled_address(function: Any, fmt: FormatTag) -> int:
    """Address of a kernel's machine code for a block format, compiled now if it is not in the cache."""
    address = _addresses.get((function, fmt))
    if address is None:
        function.compile((fmt, types.int64))
        result = function.overloads[fmt, types.int64]
        address = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
        _addresses[function, fmt] = address
    return address
