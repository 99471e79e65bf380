// New rows [a | b] behind those in the cache, two numbers for each invocation.

struct Params {
    n_tokens: u32,
    a_dims: u32,
    b_dims: u32,
    a_at: u32,
    a_token: u32,
    b_at: u32,
    b_token: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> arena: array<f32>;
@group(0) @binding(5) var<uniform> length: vec4<u32>;  // x: tokens in the cache

fn value(t: u32, d: u32) -> f32 {
    if (d < p.a_dims) {
        return arena[p.a_at + t * p.a_token + d];
    }
    return arena[p.b_at + t * p.b_token + d - p.a_dims];
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let d = 2u * id.x;
    let row = p.a_dims + p.b_dims;
    if (d < row) {
        keep_pair((length.x + id.y) * row + d, value(id.y, d), value(id.y, d + 1u));
    }
}
