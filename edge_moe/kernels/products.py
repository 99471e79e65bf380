"""Products of activations with weight matrices that stay in the file's blocks.

Each product is one parallel region over units of a few rows. For few tokens a row's blocks are multiplied as they are; for many,
16 rows at a time are unpacked to a panel in scratch memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import types

from edge_moe.errors import ShapeError
from edge_moe.formats import BlockFormat
from edge_moe.kernels import panels, rows  # noqa: F401 (their methods of the formats)
from edge_moe.kernels.activations import quantize_units, record_bytes
from edge_moe.kernels.blocks import TAGS
from edge_moe.kernels.dots import TILE_ROWS, TILE_TOKENS, tile_pointers, tile_store
from edge_moe.kernels.jit import inline_kernel, kernel, spliced_kernel
from edge_moe.kernels.launch import run
from edge_moe.kernels.simd import f32x16, fetch_add, fma, load, splat, store

PANEL_TOKENS = 4  # from so many tokens on a panel pays
UNIT_BYTES = 16384  # of weights; smaller units would spend too much on fetching the next
CHUNK_COLUMNS = 256

# A plan is int64[8] followed by int64[6] for each group: where to find all that a kernel needs.
COUNTER, N_GROUPS, N_COLS, ROW_BYTES, UNIT_ROWS, TOKENS = range(6)
GROUPS, GROUP_FIELDS = 8, 6
ADDRESS, N_ROWS, BEGIN, END, OUT, UNITS_END = range(GROUP_FIELDS)


@inline_kernel
def _field(plan, i):
    return load(types.int64, plan + 8 * i)


@spliced_kernel
def _few_tokens(fmt, plan, group, row, row_end):
    """Rows times tokens, straight from the blocks."""
    n_cols, row_bytes, tokens = _field(plan, N_COLS), _field(plan, ROW_BYTES), _field(plan, TOKENS)
    n_rows, out = _field(group, N_ROWS), _field(group, OUT)
    for r in range(row, row_end):
        address = _field(group, ADDRESS) + r * row_bytes
        for m in range(_field(group, BEGIN), _field(group, END)):
            x = load(types.int64, tokens + 8 * m)
            store(out + 4 * (m * n_rows + r), fmt.row_dot(address, x, n_cols))


@spliced_kernel
def _many_tokens(fmt, plan, group, row, row_end, scratch, panel):
    """Rows times tokens, by way of a panel of 16 rows."""
    n_cols, row_bytes, tokens = _field(plan, N_COLS), _field(plan, ROW_BYTES), _field(plan, TOKENS)
    n_rows, begin, end = _field(group, N_ROWS), _field(group, BEGIN), _field(group, END)
    for first in range(row, row_end, TILE_ROWS):
        n_valid = min(TILE_ROWS, row_end - first)
        fmt.unpack(_field(group, ADDRESS) + first * row_bytes, row_bytes, n_valid, n_cols, panel, scratch)
        for m in range(begin, end, TILE_TOKENS):
            for t in range(TILE_TOKENS):  # a last tile that is not full repeats its last token
                store(scratch + 8 * t, load(types.int64, tokens + 8 * min(m + t, end - 1)))
            tile_store(scratch, fmt.tile(panel, tile_pointers(scratch), n_cols))
            for t in range(min(TILE_TOKENS, end - m)):
                out = _field(group, OUT) + 4 * ((m + t) * n_rows + first)
                if n_valid == TILE_ROWS:
                    store(out, load(f32x16, scratch + 64 * t))
                else:
                    for r in range(n_valid):
                        store(out + 4 * r, load(types.float32, scratch + 64 * t + 4 * r))


@kernel
def product_units(fmt, plan):
    """Multiply units of rows as long as the plan has some."""
    n_groups, unit_rows = _field(plan, N_GROUPS), _field(plan, UNIT_ROWS)
    group, g, units_begin = plan + 8 * GROUPS, 0, 0
    memory = np.empty(fmt.panel_bytes(_field(plan, N_COLS)) + 2048 if unit_rows == TILE_ROWS else 0, np.uint8)
    scratch = (memory.ctypes.data + 63) & ~63
    while True:
        unit = fetch_add(plan, 1)
        while g < n_groups and unit >= _field(group, UNITS_END):
            units_begin = _field(group, UNITS_END)
            group += 8 * GROUP_FIELDS
            g += 1
        if g == n_groups:
            return memory.size  # the memory must live until here
        row = (unit - units_begin) * unit_rows
        row_end = min(row + unit_rows, _field(group, N_ROWS))
        if unit_rows == TILE_ROWS and _field(group, END) - _field(group, BEGIN) >= PANEL_TOKENS:
            _many_tokens(fmt, plan, group, row, row_end, scratch, scratch + 1024)
        else:
            _few_tokens(fmt, plan, group, row, row_end)


@kernel
def transposed_units(fmt, plan):
    """Add decoded rows times numbers, by chunks of columns, as long as the plan has some."""
    n_cols, row_bytes = _field(plan, N_COLS), _field(plan, ROW_BYTES)
    chunks = (n_cols + CHUNK_COLUMNS - 1) // CHUNK_COLUMNS
    memory = np.empty(4 * CHUNK_COLUMNS, np.uint8)
    decoded = memory.ctypes.data
    while True:
        unit = fetch_add(plan, 1)
        g = unit // chunks
        if g >= _field(plan, N_GROUPS):
            return memory.size  # the memory must live until here
        group = plan + 8 * (GROUPS + g * GROUP_FIELDS)
        n_rows, begin, end = _field(group, N_ROWS), _field(group, BEGIN), _field(group, END)
        start = (unit - g * chunks) * CHUNK_COLUMNS
        stop = min(start + CHUNK_COLUMNS, n_cols)
        out = _field(group, OUT) + 4 * start
        if begin == end:
            continue
        for m in range(begin, end):
            for i in range(stop - start):
                store(out + 4 * (m * n_cols + i), types.float32(0.0))
        for r in range(n_rows):
            fmt.decode(_field(group, ADDRESS) + r * row_bytes, start, stop, decoded)
            for m in range(begin, end):
                target = out + 4 * m * n_cols
                x = load(types.float32, _field(plan, TOKENS) + 4 * (m * n_rows + r))
                whole = (stop - start) & ~15
                for i in range(0, whole, 16):
                    weights = load(f32x16, decoded + 4 * i)
                    store(target + 4 * i, fma(weights, splat(f32x16, x), load(f32x16, target + 4 * i)))
                for i in range(whole, stop - start):
                    weight = load(types.float32, decoded + 4 * i)
                    store(target + 4 * i, load(types.float32, target + 4 * i) + weight * x)


@kernel
def decode_units(fmt, plan):
    """Decode rows as long as the plan has some; row ids are in the place of token addresses."""
    group = plan + 8 * GROUPS
    n_cols = _field(plan, N_COLS)
    while True:
        unit = fetch_add(plan, 1)
        if unit >= _field(group, END):
            return 0
        row = load(types.int64, _field(plan, TOKENS) + 8 * unit)
        address = _field(group, ADDRESS) + row * _field(plan, ROW_BYTES)
        fmt.decode(address, 0, n_cols, _field(group, OUT) + 4 * unit * n_cols)


# ---- Python side


@dataclass(frozen=True)
class Activations:
    """Inputs in the form that one kind of weights meets: `addresses` i64[M] of each token's record or row of floats."""

    addresses: np.ndarray
    n_cols: int
    group: int  # 32 or 256: int8 with a scale for so many columns; 0: float32
    memory: np.ndarray  # that the addresses point to


def n_bytes_needed(fmt: BlockFormat, n_rows: int, n_cols: int) -> int:
    """Bytes that a matrix of n_rows x n_cols takes in a format. Raises FormatError for broken blocks."""
    return n_rows * fmt.row_bytes(n_cols)


def _checked(x: np.ndarray, what: str) -> np.ndarray:
    if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.ndim != 2:
        found = f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
        raise ShapeError(f"{what} must be a float32 array of two dimensions, found {found}")
    return np.ascontiguousarray(x)


def quantize_activations(x: np.ndarray, group: int) -> Activations:
    """Bring inputs into the form for weights of one kind. x f32[M, C]; group as the format's `activation_group`.

    Raises ShapeError when C is no multiple of the group.
    """
    x = _checked(x, "activations")
    n_tokens, n_cols = x.shape
    if group == 0:
        addresses = np.arange(n_tokens, dtype=np.int64) * (4 * n_cols) + x.ctypes.data
        return Activations(addresses, n_cols, 0, x)
    if group not in (32, 256) or n_cols % group:
        raise ShapeError(f"{n_cols} columns cannot be quantized in groups of {group}")
    stride = record_bytes(n_cols, group)
    memory = np.empty(n_tokens * stride + 64, np.uint8)
    start = (memory.ctypes.data + 63) & ~63
    plan = np.array([0, n_tokens, x.ctypes.data, start, stride, n_cols, group], np.int64)
    run(quantize_units, TAGS["F32"], plan, (n_tokens + 7) // 8, 4 * x.size)
    return Activations(np.arange(n_tokens, dtype=np.int64) * stride + start, n_cols, group, memory)


def linear(x: np.ndarray, weights: Sequence[tuple[BlockFormat, int, int]]) -> list[np.ndarray]:
    """Several matrices times one input. x f32[T, C]; weights (format, address, n_rows) -> list of f32[T, n_rows].

    The address is that of n_rows rows of C columns in the format's blocks; the caller answers for the memory there.
    Raises ShapeError for an x that is no float32 matrix, FormatError for a C that the blocks do not divide.
    """
    x = _checked(x, "x")
    n_tokens, n_cols = x.shape
    outputs = [np.empty((n_tokens, n_rows), np.float32) for _, _, n_rows in weights]
    if n_tokens == 0:
        return outputs
    kinds: dict[int, Activations] = {}
    for fmt in dict.fromkeys(fmt for fmt, _, _ in weights):
        group = fmt.activation_group
        if group not in kinds:
            kinds[group] = quantize_activations(x, group)
        jobs = [
            (int(address), n_rows, 0, n_tokens, out.ctypes.data)
            for (other, address, n_rows), out in zip(weights, outputs, strict=True)
            if other is fmt
        ]
        _multiply(fmt, kinds[group], jobs, n_cols, n_tokens)
    return outputs


def _multiply(fmt, activations, jobs, n_cols, max_tokens) -> None:
    row_bytes = fmt.row_bytes(n_cols)
    if max_tokens >= PANEL_TOKENS:
        unit_rows = TILE_ROWS
    else:  # one more than a panel's rows tells the kernel that it needs no panel
        unit_rows = max(TILE_ROWS + 1, UNIT_BYTES // row_bytes)
    plan = [0, len(jobs), n_cols, row_bytes, unit_rows, activations.addresses.ctypes.data, 0, 0]
    n_units, n_products = 0, 0
    for address, n_rows, begin, end, out in jobs:
        n_units += -(-n_rows // unit_rows) if end > begin else 0
        n_products += n_rows * (end - begin)
        plan += (address, n_rows, begin, end, out, n_units)
    run(product_units, TAGS[fmt.name], np.array(plan, np.int64), n_units, n_products * n_cols)


def _groups(offsets: np.ndarray, addresses: np.ndarray, n_entries: int) -> tuple[list[int], list[int]]:
    bounds, places = offsets.tolist(), addresses.tolist()
    if len(bounds) != len(places) + 1 or bounds[0] != 0 or bounds[-1] != n_entries or bounds != sorted(bounds):
        raise ShapeError(f"offsets must rise from 0 to {n_entries} in {len(places) + 1} steps, found {bounds[:8]}")
    return bounds, places


def grouped_linear(
    x: np.ndarray,
    rows: np.ndarray,
    offsets: np.ndarray,
    fmt: BlockFormat,
    addresses: np.ndarray,
    n_rows: int,
) -> np.ndarray:
    """Each entry times its group's matrix. x f32[M0, C], rows i64[M], offsets i64[G+1], addresses i64[G] -> f32[M, n_rows].

    Entry m of offsets[g]:offsets[g+1] is x[rows[m]] times the n_rows x C matrix at addresses[g]; for that memory the caller
    answers. Raises ShapeError for arrays that do not fit together, FormatError for a C that the blocks do not divide.
    """
    x = _checked(x, "x")
    bounds, places = _groups(offsets, addresses, len(rows))
    out = np.empty((len(rows), n_rows), np.float32)
    if not len(rows):
        return out
    if rows.min() < 0 or rows.max() >= len(x):
        raise ShapeError(f"rows must be from 0 to {len(x) - 1}, found {rows.min()} to {rows.max()}")
    every = quantize_activations(x, fmt.activation_group)
    chosen = Activations(every.addresses[rows], every.n_cols, every.group, every.memory)
    jobs = [
        (place, n_rows, begin, end, out.ctypes.data)
        for place, begin, end in zip(places, bounds, bounds[1:], strict=False)
        if end > begin
    ]
    _multiply(fmt, chosen, jobs, x.shape[1], max(job[3] - job[2] for job in jobs))
    return out


def grouped_linear_transposed(
    x: np.ndarray,
    offsets: np.ndarray,
    fmt: BlockFormat,
    addresses: np.ndarray,
    n_rows: int,
    n_cols: int,
) -> np.ndarray:
    """Each entry times its group's matrix from the left. x f32[M, n_rows], offsets i64[G+1], addresses i64[G] -> f32[M, n_cols].

    Raises ShapeError for arrays that do not fit together, FormatError for n_cols that the blocks do not divide.
    """
    x = _checked(x, "x")
    bounds, places = _groups(offsets, addresses, len(x))
    if x.shape[1] != n_rows:
        raise ShapeError(f"x must have {n_rows} columns, one for each row of the matrices, found {x.shape[1]}")
    out = np.empty((len(x), n_cols), np.float32)
    plan = [0, len(places), n_cols, fmt.row_bytes(n_cols), 0, x.ctypes.data, 0, 0]
    for place, begin, end in zip(places, bounds, bounds[1:], strict=False):
        plan += (place, n_rows, begin, end, out.ctypes.data, 0)
    n_units = len(places) * -(-n_cols // CHUNK_COLUMNS)
    run(transposed_units, TAGS[fmt.name], np.array(plan, np.int64), n_units, 2 * x.size * n_cols)
    return out


def decode_rows(fmt: BlockFormat, address: int, row_ids: np.ndarray, n_cols: int) -> np.ndarray:
    """Chosen rows of a matrix as floats. row_ids i64[T] -> f32[T, n_cols].

    Raises FormatError for n_cols that the blocks do not divide.
    """
    row_ids = np.ascontiguousarray(row_ids, np.int64)
    out = np.empty((len(row_ids), n_cols), np.float32)
    plan = [0, 1, n_cols, fmt.row_bytes(n_cols), 0, row_ids.ctypes.data, 0, 0]
    plan += (int(address), 0, 0, len(row_ids), out.ctypes.data, 0)
    run(decode_units, TAGS[fmt.name], np.array(plan, np.int64), len(row_ids), out.size)
    return out
