const TAIL = false;

fn unit_of(row: u32, u: u32) -> Unit {
    let at = row + 20u * u;
    return Unit(at + 4u, 0u, vec2<f32>(half(at)), vec2<f32>(half(at + 2u)));
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    return unsigned4(nibbles_of_32(unit.at, i));
}
