// How the block formats read weights as they lie in the file. Each of blocks_*.wgsl adds, for its format,
//   fn unit_of(row: u32, u: u32) -> Unit        the 32 elements from 32 u on of the row at byte `row`
//   fn quants(unit: Unit, i: u32) -> vec4<f32>  elements 4 i to 4 i + 3 of them, before scale and offset
// and the constant TAIL: whether a row may end amid a unit. Definitions: edge_moe/formats.py.

@group(0) @binding(3) var<storage, read> weights: array<u32>;

struct Unit {
    at: u32,            // a byte that `quants` counts from
    bits: u32,          // whatever else it needs
    scale: vec2<f32>,   // of elements 0 to 15 and of 16 to 31
    offset: vec2<f32>,
}

// Four bytes from any place: blocks of 18, 34 or 210 bytes do not begin at whole words.
fn word(at: u32) -> u32 {
    let i = at >> 2u;
    let shift = (at & 3u) << 3u;
    if (shift == 0u) {
        return weights[i];
    }
    return (weights[i] >> shift) | (weights[i + 1u] << (32u - shift));
}

fn byte(at: u32) -> u32 {
    return (weights[at >> 2u] >> ((at & 3u) << 3u)) & 255u;
}

// An f16 by whole-number arithmetic: devices may take subnormal ones, which small scales are, for zero.
fn f16_of(bits: u32) -> f32 {
    let magnitude = bits & 0x7fffu;
    var value = bitcast<f32>((magnitude << 13u) + 0x38000000u);
    if (magnitude < 0x400u) {
        value = f32(magnitude) * 5.9604644775390625e-8;
    } else if (magnitude >= 0x7c00u) {
        value = bitcast<f32>((magnitude << 13u) | 0x7f800000u);
    }
    return select(value, -value, (bits & 0x8000u) != 0u);
}

// The f16 at an even byte.
fn half(at: u32) -> f32 {
    return f16_of((weights[at >> 2u] >> ((at & 2u) << 3u)) & 0xffffu);
}

fn unsigned4(packed: u32) -> vec4<f32> {
    return vec4<f32>((vec4<u32>(packed) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(255u));
}

fn signed4(packed: u32) -> vec4<f32> {
    return vec4<f32>(bitcast<vec4<i32>>(vec4<u32>(packed) << vec4<u32>(24u, 16u, 8u, 0u)) >> vec4<u32>(24u));
}

fn signed_byte(at: u32) -> f32 {
    return f32(bitcast<i32>(byte(at) << 24u) >> 24u);
}

// Elements 4 i to 4 i + 3 of 32 nibbles in 16 bytes: the low ones are the first half. A byte for each.
fn nibbles_of_32(at: u32, i: u32) -> u32 {
    return (word(at + ((i & 3u) << 2u)) >> (i & 4u)) & 0x0f0f0f0fu;
}

// Four bits, the lowest first, as 0 or 1.
fn bits4(bits: u32) -> vec4<f32> {
    return vec4<f32>((vec4<u32>(bits) >> vec4<u32>(0u, 1u, 2u, 3u)) & vec4<u32>(1u));
}

// Scale and minimum, in whole numbers, of group g of a Q4_K or Q5_K block whose 12 bytes of them begin at `at`.
fn scale_and_minimum(at: u32, g: u32) -> vec2<f32> {
    let first = byte(at + (g & 3u));
    let second = byte(at + 4u + (g & 3u));
    if (g < 4u) {
        return vec2<f32>(vec2<u32>(first, second) & vec2<u32>(63u));
    }
    let third = byte(at + 4u + g);
    return vec2<f32>(f32((third & 15u) | ((first >> 6u) << 4u)), f32((third >> 4u) | ((second >> 6u) << 4u)));
}

// The 16 levels of IQ4_NL and IQ4_XS, from four numbers of 4 bits.
fn iq4_levels(packed: u32) -> vec4<f32> {
    var levels = array<f32, 16>(
        -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0);
    return vec4<f32>(
        levels[packed & 15u], levels[(packed >> 8u) & 15u], levels[(packed >> 16u) & 15u], levels[(packed >> 24u) & 15u]);
}
