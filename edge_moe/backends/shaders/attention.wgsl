// Attention with online softmax: a workgroup for each head, token and split of the context.
// A row of the cache has keys and values of all its heads. Latent attention is the case of one head of keys that all
// queries share, whose value is the first part of the key: W_UK is in the queries already, W_UV comes afterwards.

const LOWEST = -3.4028234e38;
const MOST_DIMS = 1024u;

struct Params {
    n_splits: u32,
    queries_per_key: u32,
    a_dims: u32,         // the query's first part
    b_dims: u32,         // and its second
    a_at: u32,
    a_token: u32,
    a_head: u32,
    b_at: u32,
    b_token: u32,
    b_head: u32,
    row: u32,            // numbers of the cache for a token
    value_at: u32,       // in a row
    value_dims: u32,
    window: u32,         // tokens that a token sees; 0: all
    scale: f32,
    n_heads: u32,
    y_at: u32,           // for each token, head and split: [maximum, sum, weighted values]
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> arena: array<f32>;
@group(0) @binding(5) var<uniform> length: vec4<u32>;

var<workgroup> query: array<f32, MOST_DIMS>;
var<workgroup> scores: array<f32, 64>;
var<workgroup> reduced: array<f32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let h = group.x;
    let t = group.y;
    let key_dims = p.a_dims + p.b_dims;
    for (var d = index; d < key_dims; d += 64u) {
        if (d < p.a_dims) {
            query[d] = arena[p.a_at + t * p.a_token + h * p.a_head + d];
        } else {
            query[d] = arena[p.b_at + t * p.b_token + h * p.b_head + d - p.a_dims];
        }
    }
    workgroupBarrier();
    let key_at = (h / p.queries_per_key) * key_dims;
    let value_at = p.value_at + (h / p.queries_per_key) * p.value_dims;
    let end = length.x + t + 1u;
    var first = 0u;
    if (p.window > 0u && end > p.window) {
        first = end - p.window;
    }
    let share = (end - first + p.n_splits - 1u) / p.n_splits;
    let start = first + group.z * share;
    let stop = min(start + share, end);

    var maximum = LOWEST;
    var sum = 0.0;
    var values: array<f32, 16>;
    let n_values = (p.value_dims + 63u) / 64u;
    for (var base = start; base < stop; base += 64u) {
        let s = base + index;
        var score = LOWEST;
        if (s < stop) {
            score = 0.0;
            let at = s * p.row + key_at;
            for (var d = 0u; d < key_dims; d++) {
                score += query[d] * cached(at + d);
            }
            score *= p.scale;
        }
        reduced[index] = score;
        for (var half = 32u; half > 0u; half >>= 1u) {
            workgroupBarrier();
            if (index < half) {
                reduced[index] = max(reduced[index], reduced[index + half]);
            }
        }
        workgroupBarrier();
        let new_maximum = max(maximum, reduced[0]);
        scores[index] = select(0.0, exp(score - new_maximum), s < stop);
        workgroupBarrier();
        let factor = exp(maximum - new_maximum);
        maximum = new_maximum;
        sum *= factor;
        for (var v = 0u; v < n_values; v++) {
            values[v] *= factor;
        }
        let n = min(64u, stop - base);
        for (var j = 0u; j < n; j++) {
            let weight = scores[j];
            let at = (base + j) * p.row + value_at + index;
            sum += weight;
            for (var v = 0u; v < n_values; v++) {
                if (64u * v + index < p.value_dims) {
                    values[v] += weight * cached(at + 64u * v);
                }
            }
        }
        workgroupBarrier();
    }
    let y_at = p.y_at + ((t * p.n_heads + h) * p.n_splits + group.z) * (p.value_dims + 2u);
    if (index == 0u) {
        arena[y_at] = maximum;
        arena[y_at + 1u] = sum;
    }
    for (var v = 0u; v < n_values; v++) {
        if (64u * v + index < p.value_dims) {
            arena[y_at + 2u + 64u * v + index] = values[v];
        }
    }
}
