"""What happens between the products, as kernels on plans (see launch.py): norms, rotations, gates, sums, the router.

One kernel serves both ways of running a model: a program has it as a step for one token, and for the tokens of a prompt
it is called from here, a row or token a unit. A plan is int64[]: field 0 counts the units taken, the others are numbers
and addresses; floats are given by their f64 bits.
"""

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from edge_moe.errors import ShapeError
from edge_moe.kernels.activations import quantize_row
from edge_moe.kernels.elementwise import rms_norm_row, rope_row, silu_multiply_row, weighted_sum_row
from edge_moe.kernels.jit import inline_kernel, kernel
from edge_moe.kernels.launch import NUMBERS, float_bits, run_units
from edge_moe.kernels.routing import route_row
from edge_moe.kernels.simd import address_of, fetch_add, load

VALUE_OPERATIONS = 8  # what a value costs beside a multiplication, where there is a division or memory to wait for
UNIT_VALUES = 4096  # taken at a time: threads that count rows of a few hundred would wait for the counter

_FLOATS, _INTEGERS = types.CPointer(types.float32), types.CPointer(types.int64)


@intrinsic
def _pointer(typingctx: Any, kind: Any, address: Any) -> Any:
    """An address as a pointer of the type `kind`."""
    result = kind.instance_type

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], context.get_value_type(result))

    return result(kind, types.int64), codegen


@inline_kernel
def _floats(address, shape):
    """The f32[shape] at an address. Rows are better cut from the whole than made one by one, which costs 100 ns."""
    return carray(_pointer(_FLOATS, address), shape)


@inline_kernel
def _integers(address, shape):
    """The i64[shape] at an address."""
    return carray(_pointer(_INTEGERS, address), shape)


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


@inline_kernel
def _at_once(n_values):
    """Rows of so many values that are taken at a time."""
    return max(UNIT_VALUES // max(n_values, 1), 1)


@kernel
def norm_units(fmt, plan):
    """RMSNorm of each row. Plan: counter, n_rows, n_cols, x, weight, eps, out."""
    n_rows, n_cols = _number(plan, 1), _number(plan, 2)
    shape, at_once = (n_rows, n_cols), _at_once(n_cols)
    x, out = _floats(_number(plan, 3), shape), _floats(_number(plan, 6), shape)
    weight, eps = _floats(_number(plan, 4), n_cols), _float(plan, 5)
    while True:
        first = fetch_add(plan, at_once)
        if first >= n_rows:
            return 0
        for i in range(first, min(first + at_once, n_rows)):
            rms_norm_row(x[i], weight, eps, out[i])


@kernel
def rope_units(fmt, plan):
    """Rotated pairs of each token's heads.

    Plan: counter, n_tokens, n_heads, n_pairs, x, bytes between its tokens, and between its heads, cos, sin, out.
    """
    n_tokens, n_heads, n = _number(plan, 1), _number(plan, 2), _number(plan, 3)
    at_once = _at_once(2 * n_heads * n)
    while True:
        first = fetch_add(plan, at_once)
        if first >= n_tokens:
            return 0
        for t in range(first, min(first + at_once, n_tokens)):
            cos, sin = _floats(_number(plan, 7) + 4 * t * n, n), _floats(_number(plan, 8) + 4 * t * n, n)
            x, out = _number(plan, 4) + t * _number(plan, 5), _number(plan, 9) + 8 * t * n_heads * n
            for h in range(n_heads):
                rope_row(_floats(x + h * _number(plan, 6), 2 * n), cos, sin, _floats(out + 8 * h * n, 2 * n))


@kernel
def silu_units(fmt, plan):
    """silu(gate) * up of each row. Plan: counter, n_rows, n_cols, gate, up, out."""
    n_rows, n_cols = _number(plan, 1), _number(plan, 2)
    shape, at_once = (n_rows, n_cols), _at_once(n_cols)
    gate, up = _floats(_number(plan, 3), shape), _floats(_number(plan, 4), shape)
    out = _floats(_number(plan, 5), shape)
    while True:
        first = fetch_add(plan, at_once)
        if first >= n_rows:
            return 0
        for i in range(first, min(first + at_once, n_rows)):
            silu_multiply_row(gate[i], up[i], out[i])


@kernel
def gated_units(fmt, plan):
    """silu(gate) * up, a row a unit, as records of int8.

    Plan: counter, n_rows, gate, up, records, record_bytes, n_cols, group, is_fine. If fine, the records of what is left
    of the rows lie behind those of all rows.
    """
    n_rows, n_cols, records, stride = _number(plan, 1), _number(plan, 6), _number(plan, 4), _number(plan, 5)
    memory = np.empty((2, n_cols), np.float32)
    x, rest = address_of(memory), address_of(memory) + 4 * n_cols
    gate, up = _floats(_number(plan, 2), (n_rows, n_cols)), _floats(_number(plan, 3), (n_rows, n_cols))
    while True:
        i = fetch_add(plan, 1)
        if i >= n_rows:
            return memory.size  # the memory must live until here
        silu_multiply_row(gate[i], up[i], memory[0])
        rest_record = records + (n_rows + i) * stride if _number(plan, 8) else types.int64(0)
        quantize_row(x, records + i * stride, rest_record, rest, n_cols, _number(plan, 7))


@kernel
def weighted_sum_units(fmt, plan):
    """Each token's rows times their weights, added.

    Plan: counter, n_tokens, top_k, n_rows of all, n_cols, rows, positions, weights, out.
    """
    n_tokens, top_k, n_cols = _number(plan, 1), _number(plan, 2), _number(plan, 4)
    rows, out = _floats(_number(plan, 5), (_number(plan, 3), n_cols)), _floats(_number(plan, 8), (n_tokens, n_cols))
    shape, at_once = (n_tokens, top_k), _at_once(top_k * n_cols)
    positions, weights = _integers(_number(plan, 6), shape), _floats(_number(plan, 7), shape)
    while True:
        first = fetch_add(plan, at_once)
        if first >= n_tokens:
            return 0
        for t in range(first, min(first + at_once, n_tokens)):
            weighted_sum_row(rows, positions[t], weights[t], out[t])


@kernel
def route_units(fmt, plan):
    """Each token's experts.

    Plan: counter, n_tokens, n_experts, top_k, logits, bias, sigmoid, n_group, topk_group, group_score_experts, norm,
    scale, ids, weights.
    """
    n_tokens, n_experts, top_k = _number(plan, 1), _number(plan, 2), _number(plan, 3)
    logits, ids = _floats(_number(plan, 4), (n_tokens, n_experts)), _integers(_number(plan, 12), (n_tokens, top_k))
    weights = _floats(_number(plan, 13), (n_tokens, top_k))
    bias, scratch = _floats(_number(plan, 5), n_experts), np.empty((2, n_experts), np.float32)
    sigmoid, norm = _number(plan, 6) != 0, _number(plan, 10) != 0
    groups, at_once = (_number(plan, 7), _number(plan, 8), _number(plan, 9)), _at_once(n_experts * top_k)
    while True:
        first = fetch_add(plan, at_once)
        if first >= n_tokens:
            return 0
        for t in range(first, min(first + at_once, n_tokens)):
            route_row(logits[t], bias, sigmoid, groups, norm, _float(plan, 11), scratch, ids[t], weights[t])


# ---- for the tokens of a prompt


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Root-mean-square norm of each row. x f32[T,D], weight f32[D] -> f32[T,D]. Raises ShapeError."""
    x, weight = _contiguous(x), _contiguous(weight)
    _check(x, (len(x), weight.size))
    out = np.empty(x.shape, np.float32)
    plan = [0, *x.shape, x.ctypes.data, weight.ctypes.data, float_bits(eps), out.ctypes.data]
    run_units(norm_units, NUMBERS, plan, len(x), x.size)
    return out


def rope_pairs(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate adjacent pairs of the last axis. x f32[T,H,P], cos and sin f32[T,P/2] -> f32[T,H,P]. Raises ShapeError.

    There may be gaps between the heads of x, as where they are cut off longer ones.
    Source: RoFormer, arXiv 2104.09864, equation 34, in the paper's own order of dimensions.
    """
    cos, sin = _contiguous(cos), _contiguous(sin)
    if x.dtype != np.float32 or x.strides[-1] != x.itemsize:
        x = _contiguous(x)
    _check(x, (len(cos), x.shape[1], 2 * cos.shape[1]))
    _check(sin, cos.shape)
    out = np.empty(x.shape, np.float32)
    plan = [0, *x.shape[:2], cos.shape[1], x.ctypes.data, *x.strides[:2]]
    plan += [cos.ctypes.data, sin.ctypes.data, out.ctypes.data]
    run_units(rope_units, NUMBERS, plan, len(x), x.size)
    return out


def silu_multiply(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, the gated activation of each expert. f32[M,F], f32[M,F] -> f32[M,F]. Raises ShapeError."""
    gate, up = _contiguous(gate), _contiguous(up)
    _check(up, gate.shape)
    out = np.empty(gate.shape, np.float32)
    plan = [0, *gate.shape, gate.ctypes.data, up.ctypes.data, out.ctypes.data]
    run_units(silu_units, NUMBERS, plan, len(gate), VALUE_OPERATIONS * gate.size)
    return out


def weighted_sum(values: np.ndarray, positions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum each token's expert outputs. values f32[M,D], positions i64[T,K], weights f32[T,K] -> f32[T,D].

    Raises ShapeError for weights of another shape, and for positions that are not of values.
    """
    values, positions, weights = _contiguous(values), np.ascontiguousarray(positions, np.int64), _contiguous(weights)
    _check(weights, positions.shape)
    if positions.size and not 0 <= positions.min() <= positions.max() < len(values):
        raise ShapeError(f"positions must be from 0 to {len(values) - 1}, found {positions.min()} to {positions.max()}")
    (n_tokens, top_k), n_cols = positions.shape, values.shape[1]
    out = np.empty((n_tokens, n_cols), np.float32)
    plan = [0, n_tokens, top_k, *values.shape, values.ctypes.data, positions.ctypes.data, weights.ctypes.data]
    run_units(weighted_sum_units, NUMBERS, [*plan, out.ctypes.data], n_tokens, VALUE_OPERATIONS * values.size)
    return out


def route(
    logits: np.ndarray,
    bias: np.ndarray,
    sigmoid: bool,
    n_group: int,
    topk_group: int,
    group_score_experts: int,
    top_k: int,
    norm: bool,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose experts. logits f32[T,E], bias f32[E] -> expert ids i64[T,K], weights f32[T,K]. Raises ShapeError.

    The bias takes part in the choice only, never in the weight. Source: DeepSeek-V2 (arXiv 2405.04434) section 2.2.2,
    DeepSeek-V3 (arXiv 2412.19437) equations 12 to 16.
    """
    logits, bias = _contiguous(logits), _contiguous(bias)
    n_tokens, n_experts = logits.shape
    _check(bias, (n_experts,))
    ids, weights = np.empty((n_tokens, top_k), np.int64), np.empty((n_tokens, top_k), np.float32)
    plan = [0, n_tokens, n_experts, top_k, logits.ctypes.data, bias.ctypes.data, sigmoid, n_group, topk_group]
    plan += [group_score_experts, norm, float_bits(scale), ids.ctypes.data, weights.ctypes.data]
    run_units(route_units, NUMBERS, plan, n_tokens, logits.size * (VALUE_OPERATIONS + top_k))
    return ids, weights


def _contiguous(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32)


def _check(x: np.ndarray, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ShapeError(f"expected {list(shape)} to fit the other arrays, found {list(x.shape)}")
