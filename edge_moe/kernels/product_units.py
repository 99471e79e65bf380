"""The units of work of a product: some rows times the tokens of their group, taken from a plan until none is left.

For few tokens a row's blocks are multiplied as they are; for many, 16 rows at a time are unpacked to a panel.
"""

import numba
import numpy as np
from numba import types

from edge_moe.kernels import panels, short_rows  # noqa: F401 (their methods of the formats)
from edge_moe.kernels.fetches import FAR_BYTES, prefetch_far
from edge_moe.kernels.jit import inline_kernel, kernel, spliced_kernel
from edge_moe.kernels.launch import take_items
from edge_moe.kernels.rows import ROWS_AT_ONCE, store_sums
from edge_moe.kernels.simd import address_of, f32x16, fetch_add, fma, load, splat, store
from edge_moe.kernels.tiles import TILE_ROWS, TILE_TOKENS, tile_store

PANEL_TOKENS = 4  # from so many tokens on a panel pays
CHUNK_COLUMNS = 256

# A plan is int64[8] followed by int64[9] for each group: where to find all that a kernel needs. Rows are counted
# through all groups; where panels are wanted, each group's are counted up to a multiple of 16. With a STRIDE a group's
# matrix is one of a stack, chosen while the plan waits: the int64 at CHOICE times the stride behind ADDRESS.
COUNTER, N_GROUPS, N_COLS, ROW_BYTES, SHARES, TOKENS, TILES, TILE_BYTES = range(8)
COUNTS = TILES  # instead of tiles, where there are shares: the address of what `take_items` counts
GROUPS, GROUP_FIELDS = 8, 9
ADDRESS, N_ROWS, BEGIN, END, OUT, ROWS_END, FIRST_TILE, STRIDE, CHOICE = range(GROUP_FIELDS)

# Without panels the memory is the limit, and long runs of it are read faster: units are those of `take_items`, down to
# such as are just worth fetching. SHARES is one for each thread; where panels are wanted it is minus the number of
# threads, and units are 16 rows.
LEAST_UNIT_BYTES = 16384


@inline_kernel
def field(plan, i):
    """A number of a plan or of one of its groups."""
    return load(types.int64, plan + 8 * i)


@inline_kernel
def _matrix(group):
    """Address of a group's matrix."""
    address, stride = field(group, ADDRESS), field(group, STRIDE)
    return address + stride * load(types.int64, field(group, CHOICE)) if stride else address


@inline_kernel
def _few_tokens(fmt, plan, group, row, row_end, ahead, scratch):
    """Rows times tokens, straight from the blocks, while what lies `ahead` bytes behind them is fetched."""
    n_cols, row_bytes, tokens = field(plan, N_COLS), field(plan, ROW_BYTES), field(plan, TOKENS)
    n_rows, out, begin, end = field(group, N_ROWS), field(group, OUT), field(group, BEGIN), field(group, END)
    address = _matrix(group) + row * row_bytes
    if fmt.multiply_short_rows(address, row_end - row, n_cols, tokens, begin, end, out + 4 * row, n_rows, ahead):
        return
    if end - begin == 2:
        x, y = load(types.int64, tokens + 8 * begin), load(types.int64, tokens + 8 * begin + 8)
        out_x = out + 4 * (begin * n_rows + row)
        if fmt.multiply_for_two(
            address, row_bytes, row_end - row, x, y, n_cols, ahead, scratch, out_x, out_x + 4 * n_rows
        ):
            return
    for r in range(row, row_end, ROWS_AT_ONCE):
        n = min(row_end - r, ROWS_AT_ONCE)
        for m in range(begin, end):
            x = load(types.int64, tokens + 8 * m)
            sums = fmt.sums_of_rows(address, row_bytes, n, x, n_cols, address + ahead, scratch)
            store_sums(out + 4 * (m * n_rows + r), sums, n)
        address += ROWS_AT_ONCE * row_bytes


@spliced_kernel
def _many_tokens(fmt, plan, group, row, row_end, scratch, panel, ahead, ahead_end):
    """16 rows times tokens, by way of a panel, while what lies at ahead:ahead_end is fetched, a part for each tile."""
    n_cols, row_bytes, tile_bytes = field(plan, N_COLS), field(plan, ROW_BYTES), field(plan, TILE_BYTES)
    n_rows, begin, end, n_valid = field(group, N_ROWS), field(group, BEGIN), field(group, END), row_end - row
    fmt.unpack(field(group, ADDRESS) + row * row_bytes, row_bytes, n_valid, n_cols, panel, scratch)
    tile = field(plan, TILES) + field(group, FIRST_TILE) * tile_bytes
    part = ((ahead_end - ahead) // ((end - begin + TILE_TOKENS - 1) // TILE_TOKENS) + 64) & ~63
    for m in range(begin, end, TILE_TOKENS):
        for line in range(ahead, min(ahead + part, ahead_end), 64):
            prefetch_far(line)
        ahead += part
        tile_store(scratch, fmt.tile(panel, tile, n_cols))
        tile += tile_bytes
        for t in range(min(TILE_TOKENS, end - m)):
            out = field(group, OUT) + 4 * ((m + t) * n_rows + row)
            if n_valid == TILE_ROWS:
                store(out, load(f32x16, scratch + 64 * t))
            else:
                for r in range(n_valid):
                    store(out + 4 * r, load(types.float32, scratch + 64 * t + 4 * r))


@inline_kernel
def _group_of(row, group, begin, first_group):
    """The group of a row, counted through all groups, and the row at which it begins; looked for from a group on."""
    if row < begin:
        group, begin = first_group, 0
    while row >= field(group, ROWS_END):
        begin = field(group, ROWS_END)
        group += 8 * GROUP_FIELDS
    return group, begin


@inline_kernel
def _fetch_inputs(fmt, plan, group):
    """Ask for the inputs of a group that will soon be multiplied."""
    for m in range(field(group, BEGIN), field(group, END)):
        fmt.fetch_input(load(types.int64, field(plan, TOKENS) + 8 * m), field(plan, N_COLS))


@spliced_kernel
def _units_of_rows(fmt, plan, n_rows, scratch):
    """Multiply units of rows straight from the blocks; what comes next is always being fetched."""
    row_bytes, shares, at_once = field(plan, ROW_BYTES), field(plan, SHARES), ROWS_AT_ONCE
    n_items, step_bytes = (n_rows + at_once - 1) // at_once, row_bytes * at_once
    least = (LEAST_UNIT_BYTES + step_bytes - 1) // step_bytes
    reach = max(FAR_BYTES // row_bytes, 1)
    counts, home, first_group = field(plan, COUNTS), numba.get_thread_id() % shares, plan + 8 * GROUPS
    item, end_item, n_finished = take_items(counts, home, 0, n_items, shares, least)
    row = item * at_once
    if row >= n_rows:
        return
    group, rows_begin = _group_of(row, first_group, 0, first_group)
    ahead_group, ahead_begin = group, rows_begin
    _fetch_inputs(fmt, plan, group)
    while row < n_rows:
        stop = min(end_item * at_once, n_rows)
        following = -1
        while row < stop:
            if following < 0 and row + reach >= stop:  # the next unit is taken when its first rows are to be fetched
                item, end_item, n_finished = take_items(counts, home, n_finished, n_items, shares, least)
                following = item * at_once
            group, rows_begin = _group_of(row, group, rows_begin, first_group)
            end = min(stop, field(group, ROWS_END))
            # rows from here to `end`, as far as those to be fetched meanwhile lie one behind the other
            ahead = row + reach
            if following < 0:
                end = min(end, stop - reach)
            else:
                ahead += following - stop
            address = _matrix(group) + (row - rows_begin) * row_bytes
            distance = 0
            if ahead < n_rows:
                before = ahead_group
                ahead_group, ahead_begin = _group_of(ahead, ahead_group, ahead_begin, first_group)
                if ahead_group != before:
                    _fetch_inputs(fmt, plan, ahead_group)
                end = min(end, row + field(ahead_group, ROWS_END) - ahead)
                distance = _matrix(ahead_group) + (ahead - ahead_begin) * row_bytes - address
                if distance == row_bytes:  # behind this row, which may be a long one
                    distance = min(distance, types.int64(FAR_BYTES))
            _few_tokens(fmt, plan, group, row - rows_begin, end - rows_begin, distance, scratch)
            row = end
        row = following


@spliced_kernel
def _units_of_panels(fmt, plan, n_rows, scratch):
    """Multiply units of 16 rows by way of panels, where a group has tokens enough.

    Meanwhile the unit is fetched that will be taken as many units later as there are threads: by this one, or by
    another that shares a cache with it. Unpacking, which jumps from row to row, would wait for the memory.
    """
    first_group, row_bytes = plan + 8 * GROUPS, field(plan, ROW_BYTES)
    group, rows_begin = first_group, 0
    ahead_group, ahead_begin = first_group, 0
    while True:
        row = TILE_ROWS * fetch_add(plan, 1)
        if row >= n_rows:
            return
        ahead = row - TILE_ROWS * field(plan, SHARES)
        group, rows_begin = _group_of(row, group, rows_begin, first_group)
        row -= rows_begin
        end = min(row + TILE_ROWS, field(group, N_ROWS))
        if field(group, END) - field(group, BEGIN) >= PANEL_TOKENS:
            begin_bytes = end_bytes = types.int64(0)
            if ahead < n_rows:
                ahead_group, ahead_begin = _group_of(ahead, ahead_group, ahead_begin, first_group)
                ahead -= ahead_begin
                begin_bytes = field(ahead_group, ADDRESS) + ahead * row_bytes
                end_bytes = begin_bytes + min(TILE_ROWS, field(ahead_group, N_ROWS) - ahead) * row_bytes
            _many_tokens(fmt, plan, group, row, end, scratch, scratch + 1024, begin_bytes, end_bytes)
            continue
        _few_tokens(fmt, plan, group, row, end, types.int64(FAR_BYTES), scratch)


@kernel
def product_units(fmt, plan):
    """Multiply units of rows as long as the plan has some."""
    n_rows = field(plan + 8 * (GROUPS + GROUP_FIELDS * (field(plan, N_GROUPS) - 1)), ROWS_END)
    has_panels = field(plan, SHARES) < 0
    memory = np.empty(2048 + (fmt.panel_bytes(field(plan, N_COLS)) if has_panels else 0), np.uint8)
    scratch = (address_of(memory) + 63) & ~63
    if has_panels:
        _units_of_panels(fmt, plan, n_rows, scratch)
    else:
        _units_of_rows(fmt, plan, n_rows, scratch)
    return memory.size  # the memory must live until here


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
