const TAIL = false;

fn unit_of(row: u32, u: u32) -> Unit {
    let at = row + 176u * (u >> 3u);
    let g = u & 7u;
    let both = vec2<f32>(half(at), half(at + 2u)) * scale_and_minimum(at + 4u, g);
    return Unit(at, g, vec2<f32>(both.x), vec2<f32>(-both.y));
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    let g = unit.bits;
    let low = (word(unit.at + 48u + 32u * (g >> 1u) + 4u * i) >> (4u * (g & 1u))) & 0x0f0f0f0fu;
    let fifth = (word(unit.at + 16u + 4u * i) >> g) & 0x01010101u;
    return unsigned4(low | (fifth << 4u));
}
