// Adjacent pairs rotated: an invocation for each pair of x[t,h,:].

struct Params {
    n_tokens: u32,
    n_heads: u32,
    n_pairs: u32,
    x_at: u32,
    x_token: u32,
    x_head: u32,
    cos_at: u32,
    sin_at: u32,
    y_at: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> arena: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) n_groups: vec3<u32>) {
    let place = id.x + id.y * n_groups.x * 64u;
    let pair = place % p.n_pairs;
    let h = (place / p.n_pairs) % p.n_heads;
    let t = place / (p.n_pairs * p.n_heads);
    if (t >= p.n_tokens) {
        return;
    }
    let x = p.x_at + t * p.x_token + h * p.x_head + 2u * pair;
    let even = arena[x];
    let odd = arena[x + 1u];
    let cos = arena[p.cos_at + t * p.n_pairs + pair];
    let sin = arena[p.sin_at + t * p.n_pairs + pair];
    arena[p.y_at + 2u * place] = even * cos - odd * sin;
    arena[p.y_at + 2u * place + 1u] = even * sin + odd * cos;
}
