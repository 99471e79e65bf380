// A cache of bf16, two in each word: the upper halves of f32 numbers, rounded to the nearest, ties to even.

@group(0) @binding(4) var<storage, read_write> cache: array<u32>;

fn cached(i: u32) -> f32 {
    let both = cache[i >> 1u];
    return bitcast<f32>(select(both << 16u, both & 0xffff0000u, (i & 1u) != 0u));
}

fn upper_half(a: f32) -> u32 {
    let bits = bitcast<u32>(a);
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

// i is even.
fn keep_pair(i: u32, a: f32, b: f32) {
    cache[i >> 1u] = upper_half(a) | (upper_half(b) << 16u);
}
