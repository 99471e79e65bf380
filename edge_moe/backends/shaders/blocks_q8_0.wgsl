const TAIL = false;

fn unit_of(row: u32, u: u32) -> Unit {
    let at = row + 34u * u;
    return Unit(at + 2u, 0u, vec2<f32>(half(at)), vec2<f32>(0.0));
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    return signed4(word(unit.at + 4u * i));
}
