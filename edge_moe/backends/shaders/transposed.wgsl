// Products with transposed matrices, one for each head: y[t,h,c] = sum over r of W[h][r,c] x[t,h,r].
// Each invocation has four columns.

struct Params {
    n_rows: u32,
    n_cols: u32,
    row_bytes: u32,
    first_byte: u32,
    matrix_bytes: u32,
    x_at: u32,
    x_token: u32,
    x_head: u32,
    y_at: u32,
    y_token: u32,
    y_head: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> arena: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let c = 4u * id.x;
    if (c >= p.n_cols) {
        return;
    }
    let x_at = p.x_at + id.y * p.x_token + id.z * p.x_head;
    let i = (c & 31u) >> 2u;
    var total = vec4<f32>(0.0);
    for (var r = 0u; r < p.n_rows; r++) {
        let unit = unit_of(p.first_byte + id.z * p.matrix_bytes + r * p.row_bytes, c >> 5u);
        let scale = select(unit.scale.x, unit.scale.y, i >= 4u);
        let offset = select(unit.offset.x, unit.offset.y, i >= 4u);
        total += arena[x_at + r] * (quants(unit, i) * scale + vec4<f32>(offset));
    }
    let y_at = p.y_at + id.y * p.y_token + id.z * p.y_head + c;
    for (var j = 0u; j < 4u && c + j < p.n_cols; j++) {
        arena[y_at + j] = total[j];
    }
}
