// A cache that keeps numbers as they are.

@group(0) @binding(4) var<storage, read_write> cache: array<u32>;

fn cached(i: u32) -> f32 {
    return bitcast<f32>(cache[i]);
}

fn keep_pair(i: u32, a: f32, b: f32) {
    cache[i] = bitcast<u32>(a);
    cache[i + 1u] = bitcast<u32>(b);
}
