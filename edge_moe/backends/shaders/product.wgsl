// Products of inputs with the rows of matrices: y[e,t,r] = sum over c of W[m(e)][r,c] x[e,t,c].
// A workgroup has 4 rows, 16 lanes for each, and up to TOKENS inputs: each unit of weights is decoded once for them.

struct Params {
    n_rows: u32,
    n_cols: u32,
    row_bytes: u32,
    first_byte: u32,     // of the first matrix in the binding
    matrix_bytes: u32,   // from one matrix to the next
    n_tokens: u32,
    x_at: u32,           // all in numbers, not bytes
    x_token: u32,
    x_entry: u32,
    x_shared: u32,       // so many entries have the same input
    y_at: u32,
    y_token: u32,
    y_entry: u32,
    has_slots: u32,      // 0: matrix m(e) is e; else the slot of expert state[ids_at + e]
    ids_at: u32,
    slots_at: u32,
    first_slot: u32,     // those in the binding
    n_slots: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> arena: array<f32>;
@group(0) @binding(2) var<storage, read_write> state: array<u32>;

var<workgroup> sums: array<f32, 64u * TOKENS>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let lane = index & 15u;
    let row = 4u * group.x + (index >> 4u);
    let first_token = TOKENS * group.y;
    let entry = group.z;
    var matrix = entry;
    var is_here = row < p.n_rows;
    if (p.has_slots != 0u) {
        let slot = state[p.slots_at + state[p.ids_at + entry]];
        matrix = slot - p.first_slot;
        is_here = is_here && slot >= p.first_slot && matrix < p.n_slots;
    }
    var totals: array<f32, TOKENS>;
    if (is_here) {
        let row_at = p.first_byte + matrix * p.matrix_bytes + row * p.row_bytes;
        let x_at = p.x_at + (entry / p.x_shared) * p.x_entry;
        let n_units = (p.n_cols + 31u) >> 5u;
        for (var u = lane; u < n_units; u += 16u) {
            let unit = unit_of(row_at, u);
            for (var i = 0u; i < 8u; i++) {
                let is_second = i >= 4u;
                let scale = select(unit.scale.x, unit.scale.y, is_second);
                let offset = select(unit.offset.x, unit.offset.y, is_second);
                let w = quants(unit, i) * scale + vec4<f32>(offset);
                let c = 32u * u + 4u * i;
                for (var m = 0u; m < TOKENS; m++) {
                    let at = x_at + min(first_token + m, p.n_tokens - 1u) * p.x_token + c;
                    if (TAIL && c + 4u > p.n_cols) {
                        for (var j = 0u; j < 4u && c + j < p.n_cols; j++) {
                            totals[m] += w[j] * arena[at + j];
                        }
                    } else {
                        totals[m] += dot(w, vec4<f32>(arena[at], arena[at + 1u], arena[at + 2u], arena[at + 3u]));
                    }
                }
            }
        }
    }
    for (var m = 0u; m < TOKENS; m++) {
        sums[64u * m + index] = totals[m];
    }
    workgroupBarrier();
    let token = first_token + lane;
    if (is_here && lane < TOKENS && token < p.n_tokens) {
        var total = 0.0;
        for (var j = 0u; j < 16u; j++) {
            total += sums[64u * lane + (index & 48u) + j];
        }
        arena[p.y_at + entry * p.y_entry + token * p.y_token + row] = total;
    }
}
