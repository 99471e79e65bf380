const TAIL = false;

fn unit_of(row: u32, u: u32) -> Unit {
    let at = row + 210u * (u >> 3u);
    let g = u & 7u;
    let scale = half(at + 208u) * vec2<f32>(signed_byte(at + 192u + 2u * g), signed_byte(at + 193u + 2u * g));
    return Unit(at, g, scale, -32.0 * scale);
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    let n = unit.bits >> 2u;
    let q = unit.bits & 3u;
    let low = (word(unit.at + 64u * n + 32u * (q & 1u) + 4u * i) >> (4u * (q >> 1u))) & 0x0f0f0f0fu;
    let high = (word(unit.at + 128u + 32u * n + 4u * i) >> (2u * q)) & 0x03030303u;
    return unsigned4(low | (high << 4u));
}
