const TAIL = true;

fn unit_of(row: u32, u: u32) -> Unit {
    return Unit(row + 64u * u, 0u, vec2<f32>(1.0), vec2<f32>(0.0));
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    let low = word(unit.at + 8u * i);
    let high = word(unit.at + 8u * i + 4u);
    return vec4<f32>(f16_of(low & 0xffffu), f16_of(low >> 16u), f16_of(high & 0xffffu), f16_of(high >> 16u));
}
