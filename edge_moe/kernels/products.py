"""Products of activations with weight matrices that stay in the file's blocks.

Inputs of quantized weights are brought to int8 first; then all matrices of one format are multiplied in one parallel
region. Fine products add a second one, of what the rounding to int8 left of the input. Results do not depend on the
number of threads.
"""

from collections.abc import Sequence
from functools import cache
from operator import index

import numpy as np
from numba import get_num_threads

from edge_moe.errors import ShapeError
from edge_moe.formats import BlockFormat
from edge_moe.kernels import product_units as units
from edge_moe.kernels.activations import QUANTIZE_ROWS, interleave_units, quantize_units, record_bytes, tiled_bytes
from edge_moe.kernels.blocks import TAGS
from edge_moe.kernels.jit import kernel
from edge_moe.kernels.launch import NUMBERS, SHARE_BYTES, compiled_address, launch, run_units
from edge_moe.kernels.simd import address_of
from edge_moe.kernels.tiles import TILE_ROWS, TILE_TOKENS

EVERY_ROW = np.empty(0, np.int64)
FINE_TOKENS, FINE_NUMBERS = 64, 1 << 23  # at a time, where results are many: both terms are in memory


@kernel
def _quantize(quantize, group, x, records, stride, is_fine, n_threads):
    """x f32[M, C] -> records of activations at an address, behind them if fine those of what they leave of x."""
    plan = np.array([0, x.shape[0], address_of(x), records, stride, x.shape[1], group, is_fine, 4 * x.shape[1]])
    launch(quantize, address_of(plan), (x.shape[0] + QUANTIZE_ROWS - 1) // QUANTIZE_ROWS, 4 * x.size, n_threads)
    return plan.size  # the plan must live until here


@kernel
def _interleave(interleave, matrices, tokens, tiled, tiles, tile_bytes, n_threads):
    """Records at addresses i64[M] -> tiles at an address, for the matrices with many entries."""
    table, n = np.empty(tiles.size // tile_bytes * TILE_TOKENS, np.int64), 0
    for g in range(len(matrices)):
        begin, end = matrices[g, 2], matrices[g, 3]
        if end - begin >= units.PANEL_TOKENS:
            for m in range(begin, begin + (end - begin + TILE_TOKENS - 1) // TILE_TOKENS * TILE_TOKENS):
                table[n] = tokens[min(m, end - 1)]  # a last tile that is not full repeats its last token
                n += 1
    plan = np.array([0, n // TILE_TOKENS, address_of(table), tiled, address_of(tiles), tile_bytes])
    launch(interleave, address_of(plan), n // TILE_TOKENS, n * tiled, n_threads)
    return plan.size + table.size  # these must live until here


@kernel
def _multiply(codes, group, x, rows, matrices, row_bytes, out, n_threads):
    """Matrices i64[G, 5] (address, n_rows, first and last + 1 entry, place in out) times x[rows]; no rows: times x.

    Without rows, entries behind those of x are those of what int8 leaves of it.
    """
    multiply, quantize, interleave = codes
    n_cols = x.shape[1]
    stride = record_bytes(n_cols, group) if group else 4 * n_cols
    is_fine = rows.size == 0 and matrices[:, 3].max() > x.shape[0]
    n_inputs = 2 * x.shape[0] if is_fine else x.shape[0]
    records = np.empty(n_inputs * stride + 64 if group else 0, np.uint8)
    first = address_of(x)
    if group:
        first = (address_of(records) + 63) & ~63
        _quantize(quantize, group, x, first, stride, is_fine, n_threads)
    n_entries = rows.size if rows.size else n_inputs
    tokens = np.empty(n_entries, np.int64)
    for m in range(n_entries):
        tokens[m] = first + stride * (rows[m] if rows.size else m)
    most, n_products, n_tiles = 0, 0, 0
    for g in range(len(matrices)):
        n_tokens = matrices[g, 3] - matrices[g, 2]
        most = max(most, n_tokens)
        n_products += n_tokens * matrices[g, 1]
        if n_tokens >= units.PANEL_TOKENS:
            n_tiles += (n_tokens + TILE_TOKENS - 1) // TILE_TOKENS
    tiled = tiled_bytes(n_cols, group) if group else stride
    tile_bytes = TILE_TOKENS * ((tiled + 63) & ~63)
    tiles = np.empty(n_tiles * tile_bytes, np.uint8)
    if n_tiles:
        _interleave(interleave, matrices, tokens, tiled, tiles, tile_bytes, n_threads)
    panels = most >= units.PANEL_TOKENS
    plan = np.empty(units.GROUPS + units.GROUP_FIELDS * len(matrices), np.int64)
    plan[units.COUNTER], plan[units.N_COLS], plan[units.ROW_BYTES] = 0, n_cols, row_bytes
    plan[units.SHARES], plan[units.TOKENS] = -n_threads if panels else n_threads, address_of(tokens)
    counts = np.zeros((n_threads + 1) * SHARE_BYTES, np.uint8)
    plan[units.TILES], plan[units.TILE_BYTES] = address_of(tiles), tile_bytes
    if not panels:
        plan[units.COUNTS] = (address_of(counts) + SHARE_BYTES - 1) & -SHARE_BYTES
    n_groups, n_rows, n_tiles = 0, 0, 0
    for g in range(len(matrices)):
        n_tokens = matrices[g, 3] - matrices[g, 2]
        if n_tokens:
            n_rows += (matrices[g, 1] + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS if panels else matrices[g, 1]
            place = units.GROUPS + units.GROUP_FIELDS * n_groups
            for i in range(units.OUT):
                plan[place + i] = matrices[g, i]
            plan[place + units.OUT] = address_of(out) + 4 * matrices[g, 4]
            plan[place + units.ROWS_END], plan[place + units.FIRST_TILE] = n_rows, n_tiles
            plan[place + units.STRIDE] = 0
            if n_tokens >= units.PANEL_TOKENS:
                n_tiles += (n_tokens + TILE_TOKENS - 1) // TILE_TOKENS
            n_groups += 1
    plan[units.N_GROUPS] = n_groups
    launch(multiply, address_of(plan), (n_rows + TILE_ROWS - 1) // TILE_ROWS, n_products * n_cols, n_threads)
    return records.size + tokens.size + tiles.size + counts.size + plan.size  # these must live until here


@kernel
def _multiply_groups(codes, group, x, rows, offsets, addresses, n_rows, row_bytes, out, n_threads):
    """addresses i64[W, G], out f32[W, M, n_rows]; False for rows or offsets that do not fit."""
    if offsets[0] != 0 or offsets[-1] != rows.size:
        return False
    for g in range(offsets.size - 1):
        if offsets[g + 1] < offsets[g]:
            return False
    for m in range(rows.size):
        if rows[m] < 0 or rows[m] >= x.shape[0]:
            return False
    matrices = np.empty((addresses.size, 5), np.int64)
    for w in range(addresses.shape[0]):
        for g in range(addresses.shape[1]):
            row = matrices[w * addresses.shape[1] + g]
            row[0], row[1], row[2], row[3] = addresses[w, g], n_rows, offsets[g], offsets[g + 1]
            row[4] = w * rows.size * n_rows
    if rows.size:
        _multiply(codes, group, x, rows, matrices, row_bytes, out, n_threads)
    return True


# ---- Python side


@cache
def _kernels(fmt: BlockFormat) -> tuple[tuple[int, int, int], int]:
    """Machine code of a format's product, of quantizing and interleaving, by address; and its group of activations."""
    group = fmt.activation_group
    quantize = compiled_address(quantize_units, NUMBERS) if group else 0
    interleave = compiled_address(interleave_units, NUMBERS)
    return (compiled_address(units.product_units, TAGS[fmt.name]), quantize, interleave), group


def _matrix(x: np.ndarray) -> np.ndarray:
    if type(x) is not np.ndarray or x.dtype != np.float32 or x.ndim != 2:
        found = f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
        raise ShapeError(f"x must be a float32 array of two dimensions, found {found}")
    return x if x.flags.c_contiguous else np.ascontiguousarray(x)


def _integers(values: np.ndarray) -> np.ndarray:
    if values.dtype != np.int64:
        if values.dtype.kind not in "iu":
            raise ShapeError(f"rows, offsets and addresses must be whole numbers, found {values.dtype}")
        values = values.astype(np.int64)
    return np.ascontiguousarray(values)


def linear(
    x: np.ndarray, weights: Sequence[tuple[BlockFormat, int, int]], fine: Sequence[tuple[BlockFormat, int, int]] = ()
) -> list[np.ndarray]:
    """Several matrices times one input. x f32[T, C]; weights (format, address, n_rows) -> list of f32[T, n_rows].

    Behind them those of `fine` weights, for which x has the precision of 15 bits instead of 8. The address is that of
    n_rows rows of C columns in the format's blocks; the caller answers for the memory there.
    Raises ShapeError for an x that is no float32 matrix, FormatError for a C that the blocks do not divide.
    """
    x = _matrix(x)
    n_tokens, n_cols = x.shape
    wanted = [*weights, *fine]
    n_numbers = sum(n_rows for _, _, n_rows in fine)
    if n_tokens > FINE_TOKENS and n_tokens * n_numbers > FINE_NUMBERS:  # logits of many tokens: never twice in memory
        outputs: list[np.ndarray] = [np.empty((n_tokens, n_rows), np.float32) for _, _, n_rows in wanted]
        for i in range(0, n_tokens, FINE_TOKENS):
            for out, part in zip(outputs, linear(x[i : i + FINE_TOKENS], weights, fine), strict=True):
                out[i : i + FINE_TOKENS] = part
        return outputs
    outputs = [x] * len(wanted)
    for fmt in {weight[0] for weight in wanted}:
        chosen, matrices, place = [], [], 0
        for i, (other, address, n_rows) in enumerate(wanted):
            if other is fmt:
                chosen.append(i)
                n_entries = 2 * n_tokens if i >= len(weights) and fmt.activation_group else n_tokens
                matrices.append((index(address), index(n_rows), 0, n_entries, place))
                place += n_entries * n_rows
        out = np.empty(place, np.float32)
        row_bytes = fmt.row_bytes(n_cols)
        if n_tokens:
            table = np.array(matrices, np.int64)
            _multiply(*_kernels(fmt), x, EVERY_ROW, table, row_bytes, out, get_num_threads())
        for i, (_, n_rows, _, n_entries, place) in zip(chosen, matrices, strict=True):
            entries = out[place : place + n_entries * n_rows].reshape(n_entries, n_rows)
            outputs[i] = entries[:n_tokens]
            if n_entries > n_tokens:
                with np.errstate(all="ignore"):  # weights of nonsense give infinities, as they do without a second term
                    outputs[i] += entries[n_tokens:]
    return outputs


def grouped_linear(
    x: np.ndarray,
    rows: np.ndarray,
    offsets: np.ndarray,
    fmt: BlockFormat,
    addresses: np.ndarray,
    n_rows: int,
) -> np.ndarray:
    """Each entry times its group's matrix. x f32[M0,C], rows i64[M], offsets i64[G+1] -> f32[M,n_rows].

    Entry m of offsets[g]:offsets[g+1] is x[rows[m]] times the n_rows x C matrix at addresses[g] (i64[G]), for whose
    memory the caller answers. With addresses i64[W,G], as of gate and up of each expert, the result is f32[W,M,n_rows].
    Raises ShapeError for arrays that do not fit together, FormatError for a C that the blocks do not divide.
    """
    x, rows, offsets, addresses = _matrix(x), _integers(rows), _integers(offsets), _integers(addresses)
    if offsets.shape != (addresses.shape[-1] + 1,):
        raise ShapeError(f"{addresses.shape[-1]} groups need one offset more, found {offsets.shape}")
    out = np.empty((*addresses.shape[:-1], rows.size, n_rows), np.float32)
    row_bytes = fmt.row_bytes(x.shape[1])
    places = addresses.reshape(-1, addresses.shape[-1])
    fits = _multiply_groups(
        *_kernels(fmt), x, rows, offsets, places, n_rows, row_bytes, out.reshape(-1), get_num_threads()
    )
    if not fits:
        raise ShapeError(
            f"offsets must rise from 0 to {rows.size} and rows be from 0 to {len(x) - 1}, "
            f"found offsets {offsets[:8].tolist()} and rows {rows[:8].tolist()}"
        )
    return out


def grouped_linear_transposed(
    x: np.ndarray,
    offsets: np.ndarray,
    fmt: BlockFormat,
    addresses: np.ndarray,
    n_rows: int,
    n_cols: int,
) -> np.ndarray:
    """Each entry as a row vector times its group's matrix. x f32[M,n_rows], offsets i64[G+1] -> f32[M,n_cols].

    addresses i64[G] are those of the n_rows x n_cols matrices.
    Raises ShapeError for arrays that do not fit together, FormatError for n_cols that the blocks do not divide.
    """
    x = _matrix(x)
    if x.shape[1] != n_rows:
        raise ShapeError(f"x must have {n_rows} columns, one for each row of the matrices, found {x.shape[1]}")
    bounds, places = _integers(offsets).tolist(), _integers(addresses).tolist()
    if len(bounds) != len(places) + 1 or bounds[0] != 0 or bounds[-1] != len(x) or bounds != sorted(bounds):
        raise ShapeError(f"offsets must rise from 0 to {len(x)} in {len(places)} steps, found {bounds[:8]}")
    out = np.empty((len(x), n_cols), np.float32)
    plan = [0, len(places), n_cols, fmt.row_bytes(n_cols), 0, x.ctypes.data, 0, 0]
    for place, begin, end in zip(places, bounds, bounds[1:], strict=False):
        plan += (place, n_rows, begin, end, out.ctypes.data, 0, 0, 0, 0)
    n_units = len(places) * -(-n_cols // units.CHUNK_COLUMNS)
    run_units(units.transposed_units, TAGS[fmt.name], plan, n_units, 2 * x.size * n_cols)
    return out


def decode_rows(fmt: BlockFormat, address: int, row_ids: np.ndarray, n_cols: int) -> np.ndarray:
    """Chosen rows of a matrix as floats. row_ids i64[T] -> f32[T, n_cols].

    Raises FormatError for n_cols that the blocks do not divide.
    """
    row_ids = _integers(row_ids)
    out = np.empty((row_ids.size, n_cols), np.float32)
    plan = [0, 1, n_cols, fmt.row_bytes(n_cols), 0, row_ids.ctypes.data, 0, 0]
    plan += (index(address), 0, 0, row_ids.size, out.ctypes.data, 0, 0, 0, 0)
    run_units(units.decode_units, TAGS[fmt.name], plan, row_ids.size, out.size)
    return out
