// y = silu(a) b.

struct Params {
    n: u32,
    a_at: u32,
    b_at: u32,
    y_at: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> arena: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) n_groups: vec3<u32>) {
    let i = id.x + id.y * n_groups.x * 64u;
    if (i < p.n) {
        let a = arena[p.a_at + i];
        arena[p.y_at + i] = a / (1.0 + exp(-a)) * arena[p.b_at + i];
    }
}
