"""The units of work of a product: some rows times the tokens of their group, taken from a plan until none is left.

For few tokens a row's blocks are multiplied as they are; for many, 16 rows at a time are unpacked to a panel.
"""

import numpy as np
from numba import types

from edge_moe.kernels import panels, rows  # noqa: F401 (their methods of the formats)
from edge_moe.kernels.jit import inline_kernel, kernel, spliced_kernel
from edge_moe.kernels.launch import first_of_unit
from edge_moe.kernels.simd import address_of, f32x16, fetch_add, fma, load, splat, store
from edge_moe.kernels.tiles import TILE_ROWS, TILE_TOKENS, tile_store

PANEL_TOKENS = 4  # from so many tokens on a panel pays
CHUNK_COLUMNS = 256

# A plan is int64[8] followed by int64[7] for each group: where to find all that a kernel needs. Rows are counted
# through all groups; where panels are wanted, each group's are counted up to a multiple of 16.
COUNTER, N_GROUPS, N_COLS, ROW_BYTES, SHARES, TOKENS, TILES, TILE_BYTES = range(8)
GROUPS, GROUP_FIELDS = 8, 7
ADDRESS, N_ROWS, BEGIN, END, OUT, ROWS_END, FIRST_TILE = range(GROUP_FIELDS)

# Without panels the memory is the limit, and long runs of it are read faster: units are those of `first_of_unit`, down
# to such as are just worth fetching. SHARES is 0 where panels are wanted: these units are 16 rows.
LEAST_UNIT_BYTES = 16384


@inline_kernel
def field(plan, i):
    """A number of a plan or of one of its groups."""
    return load(types.int64, plan + 8 * i)


@spliced_kernel
def _few_tokens(fmt, plan, group, row, row_end):
    """Rows times tokens, straight from the blocks."""
    n_cols, row_bytes, tokens = field(plan, N_COLS), field(plan, ROW_BYTES), field(plan, TOKENS)
    n_rows, out = field(group, N_ROWS), field(group, OUT)
    for r in range(row, row_end):
        address = field(group, ADDRESS) + r * row_bytes
        for m in range(field(group, BEGIN), field(group, END)):
            x = load(types.int64, tokens + 8 * m)
            store(out + 4 * (m * n_rows + r), fmt.row_dot(address, x, n_cols))


@spliced_kernel
def _many_tokens(fmt, plan, group, row, row_end, scratch, panel):
    """16 rows times tokens, by way of a panel."""
    n_cols, row_bytes, tile_bytes = field(plan, N_COLS), field(plan, ROW_BYTES), field(plan, TILE_BYTES)
    n_rows, begin, end, n_valid = field(group, N_ROWS), field(group, BEGIN), field(group, END), row_end - row
    fmt.unpack(field(group, ADDRESS) + row * row_bytes, row_bytes, n_valid, n_cols, panel, scratch)
    tile = field(plan, TILES) + field(group, FIRST_TILE) * tile_bytes
    for m in range(begin, end, TILE_TOKENS):
        tile_store(scratch, fmt.tile(panel, tile, n_cols))
        tile += tile_bytes
        for t in range(min(TILE_TOKENS, end - m)):
            out = field(group, OUT) + 4 * ((m + t) * n_rows + row)
            if n_valid == TILE_ROWS:
                store(out, load(f32x16, scratch + 64 * t))
            else:
                for r in range(n_valid):
                    store(out + 4 * r, load(types.float32, scratch + 64 * t + 4 * r))


@kernel
def product_units(fmt, plan):
    """Multiply units of rows as long as the plan has some."""
    n_groups, row_bytes, shares = field(plan, N_GROUPS), field(plan, ROW_BYTES), field(plan, SHARES)
    group, rows_begin = plan + 8 * GROUPS, 0
    n_rows = field(group + 8 * GROUP_FIELDS * (n_groups - 1), ROWS_END)
    least = (LEAST_UNIT_BYTES + row_bytes - 1) // row_bytes
    memory = np.empty(fmt.panel_bytes(field(plan, N_COLS)) + 2048 if shares == 0 else 0, np.uint8)
    scratch = (address_of(memory) + 63) & ~63
    while True:
        unit = fetch_add(plan, 1)
        row, stop = TILE_ROWS * unit, TILE_ROWS * (unit + 1)
        if shares:
            row, stop = first_of_unit(unit, n_rows, shares, least), first_of_unit(unit + 1, n_rows, shares, least)
        if row >= n_rows:
            return memory.size  # the memory must live until here
        stop = min(stop, n_rows)
        while row < stop:
            while row >= field(group, ROWS_END):
                rows_begin = field(group, ROWS_END)
                group += 8 * GROUP_FIELDS
            own_row, own_end = row - rows_begin, min(stop - rows_begin, field(group, N_ROWS))
            if shares == 0 and field(group, END) - field(group, BEGIN) >= PANEL_TOKENS:
                _many_tokens(fmt, plan, group, own_row, own_end, scratch, scratch + 1024)
            else:
                _few_tokens(fmt, plan, group, own_row, own_end)
            row = min(stop, field(group, ROWS_END))


@kernel
def transposed_units(fmt, plan):
    """Add decoded rows times numbers, by chunks of columns, as long as the plan has some."""
    n_cols, row_bytes = field(plan, N_COLS), field(plan, ROW_BYTES)
    chunks = (n_cols + CHUNK_COLUMNS - 1) // CHUNK_COLUMNS
    memory = np.empty(4 * CHUNK_COLUMNS, np.uint8)
    decoded = address_of(memory)
    while True:
        unit = fetch_add(plan, 1)
        g = unit // chunks
        if g >= field(plan, N_GROUPS):
            return memory.size  # the memory must live until here
        group = plan + 8 * (GROUPS + g * GROUP_FIELDS)
        n_rows, begin, end = field(group, N_ROWS), field(group, BEGIN), field(group, END)
        start = (unit - g * chunks) * CHUNK_COLUMNS
        stop = min(start + CHUNK_COLUMNS, n_cols)
        out = field(group, OUT) + 4 * start
        if begin == end:
            continue
        for m in range(begin, end):
            for i in range(stop - start):
                store(out + 4 * (m * n_cols + i), types.float32(0.0))
        for r in range(n_rows):
            fmt.decode(field(group, ADDRESS) + r * row_bytes, start, stop, decoded)
            for m in range(begin, end):
                target = out + 4 * m * n_cols
                x = load(types.float32, field(plan, TOKENS) + 4 * (m * n_rows + r))
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
    n_cols = field(plan, N_COLS)
    while True:
        unit = fetch_add(plan, 1)
        if unit >= field(group, END):
            return 0
        row = load(types.int64, field(plan, TOKENS) + 8 * unit)
        address = field(group, ADDRESS) + row * field(plan, ROW_BYTES)
        fmt.decode(address, 0, n_cols, field(group, OUT) + 4 * unit * n_cols)
