"""What happens between the products when one token is run, as kernels on plans (see launch.py).

A plan is int64[]: field 0 counts the units taken, the others are numbers and addresses; floats are given by their f64
bits. Most of these steps are too small to share between threads: they are one unit.
"""

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from edge_moe.kernels.activations import quantize_row
from edge_moe.kernels.elementwise import rms_norm_row, rope_row, silu_multiply_row, weighted_sum_row
from edge_moe.kernels.jit import inline_kernel, kernel
from edge_moe.kernels.routing import route_row
from edge_moe.kernels.simd import address_of, fetch_add, load

_FLOATS, _INTEGERS = types.CPointer(types.float32), types.CPointer(types.int64)


@intrinsic
def _pointer(typingctx: Any, kind: Any, address: Any) -> Any:
    """An address as a pointer of the type `kind`."""
    result = kind.instance_type

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(result))

    return result(kind, types.int64), codegen


@inline_kernel
def _floats(address, n):
    """The f32[n] at an address."""
    return carray(_pointer(_FLOATS, address), n)


@inline_kernel
def _integers(address, n):
    """The i64[n] at an address."""
    return carray(_pointer(_INTEGERS, address), n)


@inline_kernel
def _number(plan, i):
    return load(types.int64, plan + 8 * i)


@inline_kernel
def _float(plan, i):
    return types.float32(load(types.float64, plan + 8 * i))


@kernel
def copy_step(fmt, plan):
    """Rows one behind the other. Plan: counter, n_rows, n_cols, x, bytes between its rows, out."""
    if fetch_add(plan, 1) > 0:
        return 0
    n_cols = _number(plan, 2)
    for r in range(_number(plan, 1)):
        out = _floats(_number(plan, 5) + 4 * r * n_cols, n_cols)
        out[:] = _floats(_number(plan, 3) + r * _number(plan, 4), n_cols)
    return 0


@kernel
def add_step(fmt, plan):
    """a + b. Plan: counter, n, a, b, out."""
    if fetch_add(plan, 1) > 0:
        return 0
    n = _number(plan, 1)
    a, b, out = _floats(_number(plan, 2), n), _floats(_number(plan, 3), n), _floats(_number(plan, 4), n)
    for i in range(n):
        out[i] = a[i] + b[i]
    return 0


@kernel
def norm_step(fmt, plan):
    """RMSNorm. Plan: counter, n, x, weight, eps, out."""
    if fetch_add(plan, 1) > 0:
        return 0
    n = _number(plan, 1)
    weight, out = _floats(_number(plan, 3), n), _floats(_number(plan, 5), n)
    rms_norm_row(_floats(_number(plan, 2), n), weight, _float(plan, 4), out)
    return 0


@kernel
def rope_step(fmt, plan):
    """Rotated pairs of each row. Plan: counter, n_rows, n_pairs, x, bytes between its rows, cos, sin, out."""
    if fetch_add(plan, 1) > 0:
        return 0
    n = _number(plan, 2)
    cos, sin = _floats(_number(plan, 5), n), _floats(_number(plan, 6), n)
    for r in range(_number(plan, 1)):
        x, out = _floats(_number(plan, 3) + r * _number(plan, 4), 2 * n), _floats(_number(plan, 7) + 8 * r * n, 2 * n)
        rope_row(x, cos, sin, out)
    return 0


@kernel
def silu_step(fmt, plan):
    """silu(gate) * up. Plan: counter, n, gate, up, out."""
    if fetch_add(plan, 1) > 0:
        return 0
    n = _number(plan, 1)
    silu_multiply_row(_floats(_number(plan, 2), n), _floats(_number(plan, 3), n), _floats(_number(plan, 4), n))
    return 0


@kernel
def gated_units(fmt, plan):
    """silu(gate) * up, a row a unit, as records of int8.

    Plan: counter, n_rows, gate, up, records, record_bytes, n_cols, group, is_fine. If fine, the records of what is left
    of the rows lie behind those of all rows.
    """
    n_rows, n_cols, records, stride = _number(plan, 1), _number(plan, 6), _number(plan, 4), _number(plan, 5)
    memory = np.empty((2, n_cols), np.float32)
    x, rest = address_of(memory), address_of(memory) + 4 * n_cols
    while True:
        i = fetch_add(plan, 1)
        if i >= n_rows:
            return memory.size  # the memory must live until here
        gate = _floats(_number(plan, 2) + 4 * i * n_cols, n_cols)
        silu_multiply_row(gate, _floats(_number(plan, 3) + 4 * i * n_cols, n_cols), memory[0])
        rest_record = records + (n_rows + i) * stride if _number(plan, 8) else types.int64(0)
        quantize_row(x, records + i * stride, rest_record, rest, n_cols, _number(plan, 7))


@kernel
def weighted_sum_step(fmt, plan):
    """Rows times their weights, added. Plan: counter, n_rows, n_cols, rows, positions, weights, out."""
    if fetch_add(plan, 1) > 0:
        return 0
    n_rows, n_cols = _number(plan, 1), _number(plan, 2)
    rows = carray(_pointer(_FLOATS, _number(plan, 3)), (n_rows, n_cols))
    positions, weights = _integers(_number(plan, 4), n_rows), _floats(_number(plan, 5), n_rows)
    weighted_sum_row(rows, positions, weights, _floats(_number(plan, 6), n_cols))
    return 0


@kernel
def route_step(fmt, plan):
    """A token's experts.

    Plan: counter, n_experts, top_k, logits, bias, sigmoid, n_group, topk_group, group_score_experts, norm, scale, ids,
    weights.
    """
    if fetch_add(plan, 1) > 0:
        return 0
    n_experts, top_k = _number(plan, 1), _number(plan, 2)
    logits, bias = _floats(_number(plan, 3), n_experts), _floats(_number(plan, 4), n_experts)
    ids, weights = _integers(_number(plan, 11), top_k), _floats(_number(plan, 12), top_k)
    scratch = np.empty((2, n_experts), np.float32)
    sigmoid, norm = _number(plan, 5) != 0, _number(plan, 9) != 0
    groups = _number(plan, 6), _number(plan, 7), _number(plan, 8)
    route_row(logits, bias, sigmoid, groups, norm, _float(plan, 10), scratch, ids, weights)
    return 0
