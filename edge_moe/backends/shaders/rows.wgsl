// Rows of a matrix as numbers, by the ids in the state: those that lie in the binding.

struct Params {
    n_cols: u32,
    row_bytes: u32,
    first_byte: u32,
    first_row: u32,
    n_rows: u32,
    ids_at: u32,
    y_at: u32,
    y_token: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> arena: array<f32>;
@group(0) @binding(2) var<storage, read_write> state: array<u32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let c = 4u * id.x;
    let token_id = state[p.ids_at + id.y];
    if (c >= p.n_cols || token_id < p.first_row || token_id - p.first_row >= p.n_rows) {
        return;
    }
    let unit = unit_of(p.first_byte + (token_id - p.first_row) * p.row_bytes, c >> 5u);
    let i = (c & 31u) >> 2u;
    let scale = select(unit.scale.x, unit.scale.y, i >= 4u);
    let offset = select(unit.offset.x, unit.offset.y, i >= 4u);
    let values = quants(unit, i) * scale + vec4<f32>(offset);
    for (var j = 0u; j < 4u && c + j < p.n_cols; j++) {
        arena[p.y_at + id.y * p.y_token + c + j] = values[j];
    }
}
