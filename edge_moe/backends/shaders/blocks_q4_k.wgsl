const TAIL = false;

fn unit_of(row: u32, u: u32) -> Unit {
    let at = row + 144u * (u >> 3u);
    let g = u & 7u;
    let both = vec2<f32>(half(at), half(at + 2u)) * scale_and_minimum(at + 4u, g);
    return Unit(at + 16u + 32u * (g >> 1u), 4u * (g & 1u), vec2<f32>(both.x), vec2<f32>(-both.y));
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    return unsigned4((word(unit.at + 4u * i) >> unit.bits) & 0x0f0f0f0fu);
}
