// The splits of an attention made one: each has its maximum, the sum of its weights and its weighted values.

struct Params {
    n_splits: u32,
    value_dims: u32,
    x_at: u32,
    y_at: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> arena: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x >= p.value_dims) {
        return;
    }
    let width = p.value_dims + 2u;
    let x_at = p.x_at + id.y * p.n_splits * width;
    var maximum = arena[x_at];
    for (var s = 1u; s < p.n_splits; s++) {
        maximum = max(maximum, arena[x_at + s * width]);
    }
    var sum = 0.0;
    var value = 0.0;
    for (var s = 0u; s < p.n_splits; s++) {
        let weight = exp(arena[x_at + s * width] - maximum);
        sum += weight * arena[x_at + s * width + 1u];
        value += weight * arena[x_at + s * width + 2u + id.x];
    }
    arena[p.y_at + id.y * p.value_dims + id.x] = value / sum;
}
