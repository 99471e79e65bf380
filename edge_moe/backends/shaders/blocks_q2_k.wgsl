const TAIL = false;

fn unit_of(row: u32, u: u32) -> Unit {
    let at = row + 84u * (u >> 3u);
    let g = u & 7u;
    let both = vec2<u32>(byte(at + 2u * g), byte(at + 2u * g + 1u));
    let scale = half(at + 80u) * vec2<f32>(both & vec2<u32>(15u));
    let minimum = half(at + 82u) * vec2<f32>(both >> vec2<u32>(4u));
    return Unit(at + 16u + 32u * (g >> 2u), 2u * (g & 3u), scale, -minimum);
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    return unsigned4((word(unit.at + 4u * i) >> unit.bits) & 0x03030303u);
}
