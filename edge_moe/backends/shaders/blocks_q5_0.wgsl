const TAIL = false;

fn unit_of(row: u32, u: u32) -> Unit {
    let at = row + 22u * u;
    let scale = half(at);
    return Unit(at + 6u, word(at + 2u), vec2<f32>(scale), vec2<f32>(-16.0 * scale));
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    return unsigned4(nibbles_of_32(unit.at, i)) + 16.0 * bits4(unit.bits >> (4u * i));
}
