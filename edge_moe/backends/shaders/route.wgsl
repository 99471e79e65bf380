// The experts of each token, a workgroup for each. The bias takes part in the choice only, never in the weight.
// Source: DeepSeek-V2, arXiv 2405.04434, section 2.2.2; DeepSeek-V3, arXiv 2412.19437, equations 12 to 16.

const MOST_EXPERTS = 1024u;
const MOST_GROUPS = 256u;  // all together stays below 16 kB of workgroup memory, which every device has
const LOWEST = -3.4028234e38;

struct Params {
    n_experts: u32,
    top_k: u32,
    x_at: u32,
    ids_at: u32,        // in the state
    y_at: u32,
    is_sigmoid: u32,
    n_group: u32,
    topk_group: u32,
    group_best: u32,    // experts in a group's score: 1 or 2
    is_normed: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> arena: array<f32>;
@group(0) @binding(2) var<storage, read_write> state: array<u32>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;

var<workgroup> probs: array<f32, MOST_EXPERTS>;
var<workgroup> choice: array<f32, MOST_EXPERTS>;
var<workgroup> is_taken: array<u32, MOST_EXPERTS>;
var<workgroup> group_score: array<f32, MOST_GROUPS>;
var<workgroup> best_value: array<f32, 64>;
var<workgroup> best_id: array<u32, 64>;
var<workgroup> total: f32;

fn reduce_sum(index: u32) {
    for (var half = 32u; half > 0u; half >>= 1u) {
        workgroupBarrier();
        if (index < half) {
            best_value[index] += best_value[index + half];
        }
    }
    workgroupBarrier();
}

// The largest value, the first of equals.
fn reduce_best(index: u32) {
    for (var half = 32u; half > 0u; half >>= 1u) {
        workgroupBarrier();
        if (index < half) {
            let value = best_value[index + half];
            let id = best_id[index + half];
            if (value > best_value[index] || (value == best_value[index] && id < best_id[index])) {
                best_value[index] = value;
                best_id[index] = id;
            }
        }
    }
    workgroupBarrier();
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let x_at = p.x_at + group.x * p.n_experts;
    if (p.is_sigmoid != 0u) {
        for (var e = index; e < p.n_experts; e += 64u) {
            probs[e] = 1.0 / (1.0 + exp(-arena[x_at + e]));
        }
    } else {
        best_value[index] = LOWEST;
        best_id[index] = index;
        for (var e = index; e < p.n_experts; e += 64u) {
            best_value[index] = max(best_value[index], arena[x_at + e]);
        }
        reduce_best(index);
        let top = best_value[0];
        workgroupBarrier();
        var sum = 0.0;
        for (var e = index; e < p.n_experts; e += 64u) {
            probs[e] = exp(arena[x_at + e] - top);
            sum += probs[e];
        }
        best_value[index] = sum;
        reduce_sum(index);
        for (var e = index; e < p.n_experts; e += 64u) {
            probs[e] /= best_value[0];
        }
    }
    for (var e = index; e < p.n_experts; e += 64u) {
        choice[e] = probs[e] + bias[e];
        is_taken[e] = 0u;
    }
    workgroupBarrier();

    if (p.n_group > 1u) {
        let size = p.n_experts / p.n_group;
        for (var g = index; g < p.n_group; g += 64u) {
            var first = LOWEST;
            var second = LOWEST;
            for (var e = g * size; e < (g + 1u) * size; e++) {
                second = max(second, min(first, choice[e]));
                first = max(first, choice[e]);
            }
            group_score[g] = select(first, first + second, p.group_best > 1u);
        }
        workgroupBarrier();
        // a group stays if fewer than topk_group are before it: with a higher score, or the same and a lower number
        for (var e = index; e < p.n_experts; e += 64u) {
            let g = e / size;
            var before = 0u;
            for (var other = 0u; other < p.n_group; other++) {
                let is_same = group_score[other] == group_score[g];
                before += select(0u, 1u, group_score[other] > group_score[g] || (is_same && other < g));
            }
            if (before >= p.topk_group) {
                choice[e] = LOWEST;
            }
        }
        workgroupBarrier();
    }

    if (index == 0u) {
        total = 0.0;
    }
    for (var k = 0u; k < p.top_k; k++) {
        best_value[index] = LOWEST;
        best_id[index] = MOST_EXPERTS;
        for (var e = index; e < p.n_experts; e += 64u) {
            if (is_taken[e] == 0u && (choice[e] > best_value[index] || best_id[index] == MOST_EXPERTS)) {
                best_value[index] = choice[e];
                best_id[index] = e;
            }
        }
        reduce_best(index);
        if (index == 0u) {
            let best = min(best_id[0], p.n_experts - 1u);
            is_taken[best] = 1u;
            state[p.ids_at + group.x * p.top_k + k] = best;
            arena[p.y_at + group.x * p.top_k + k] = probs[best];
            total += probs[best];
        }
        workgroupBarrier();
    }
    if (index < p.top_k) {
        // the smallest normal f16, as the reference clamps
        let factor = select(p.scale, p.scale / max(total, 6.103515625e-5), p.is_normed != 0u);
        for (var k = index; k < p.top_k; k += 64u) {
            arena[p.y_at + group.x * p.top_k + k] *= factor;
        }
    }
}
