const TAIL = false;

fn unit_of(row: u32, u: u32) -> Unit {
    let at = row + 136u * (u >> 3u);
    let g = u & 7u;
    let low = (byte(at + 4u + (g >> 1u)) >> (4u * (g & 1u))) & 15u;
    let high = ((byte(at + 2u) | (byte(at + 3u) << 8u)) >> (2u * g)) & 3u;
    return Unit(at + 8u + 16u * g, 0u, vec2<f32>(half(at) * (f32(low | (high << 4u)) - 32.0)), vec2<f32>(0.0));
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    return iq4_levels(nibbles_of_32(unit.at, i));
}
