const TAIL = false;

// Scale j of the 16 of a block: a nibble and two bits above it, less 32.
fn scale_of(at: u32, j: u32) -> f32 {
    let low = (byte(at + 96u + (j & 7u)) >> ((j >> 3u) << 2u)) & 15u;
    let high = (byte(at + 104u + (j & 3u)) >> ((j >> 2u) << 1u)) & 3u;
    return f32(low | (high << 4u)) - 32.0;
}

fn unit_of(row: u32, u: u32) -> Unit {
    let at = row + 110u * (u >> 3u);
    let g = u & 7u;
    let scale = half(at + 108u) * vec2<f32>(scale_of(at, 2u * g), scale_of(at, 2u * g + 1u));
    return Unit(at, g, scale, -4.0 * scale);
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    let g = unit.bits;
    let low = (word(unit.at + 32u + 32u * (g >> 2u) + 4u * i) >> (2u * (g & 3u))) & 0x03030303u;
    let third = (word(unit.at + 4u * i) >> g) & 0x01010101u;
    return unsigned4(low | (third << 2u));
}
