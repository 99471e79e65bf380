// RMSNorm of each row, a workgroup for each; the gain lies in the weights.

struct Params {
    n_cols: u32,
    x_at: u32,
    x_row: u32,
    y_at: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> arena: array<f32>;
@group(0) @binding(3) var<storage, read> gain: array<f32>;

var<workgroup> sums: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let x_at = p.x_at + group.x * p.x_row;
    var total = 0.0;
    for (var c = index; c < p.n_cols; c += 256u) {
        total += arena[x_at + c] * arena[x_at + c];
    }
    sums[index] = total;
    for (var half = 128u; half > 0u; half >>= 1u) {
        workgroupBarrier();
        if (index < half) {
            sums[index] += sums[index + half];
        }
    }
    workgroupBarrier();
    let scale = 1.0 / sqrt(sums[0] / f32(p.n_cols) + p.eps);
    for (var c = index; c < p.n_cols; c += 256u) {
        arena[p.y_at + group.x * p.n_cols + c] = arena[x_at + c] * scale * gain[c];
    }
}
