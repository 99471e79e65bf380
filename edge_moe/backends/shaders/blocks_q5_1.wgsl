const TAIL = false;

fn unit_of(row: u32, u: u32) -> Unit {
    let at = row + 24u * u;
    return Unit(at + 8u, word(at + 4u), vec2<f32>(half(at)), vec2<f32>(half(at + 2u)));
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    return unsigned4(nibbles_of_32(unit.at, i)) + 16.0 * bits4(unit.bits >> (4u * i));
}
