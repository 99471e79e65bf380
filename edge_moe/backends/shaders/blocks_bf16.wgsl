const TAIL = true;

fn unit_of(row: u32, u: u32) -> Unit {
    return Unit(row + 64u * u, 0u, vec2<f32>(1.0), vec2<f32>(0.0));
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    let low = word(unit.at + 8u * i);
    let high = word(unit.at + 8u * i + 4u);
    return bitcast<vec4<f32>>(vec4<u32>(low << 16u, low & 0xffff0000u, high << 16u, high & 0xffff0000u));
}
