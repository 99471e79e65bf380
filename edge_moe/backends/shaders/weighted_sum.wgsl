// y[t,c] = sum over k of w[t,k] x[t,k,c].

struct Params {
    n_cols: u32,
    top_k: u32,
    x_at: u32,
    w_at: u32,
    y_at: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> arena: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x >= p.n_cols) {
        return;
    }
    var total = 0.0;
    for (var k = 0u; k < p.top_k; k++) {
        let entry = id.y * p.top_k + k;
        total += arena[p.w_at + entry] * arena[p.x_at + entry * p.n_cols + id.x];
    }
    arena[p.y_at + id.y * p.n_cols + id.x] = total;
}
