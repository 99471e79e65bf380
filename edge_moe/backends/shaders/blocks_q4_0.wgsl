const TAIL = false;

fn unit_of(row: u32, u: u32) -> Unit {
    let at = row + 18u * u;
    let scale = half(at);
    return Unit(at + 2u, 0u, vec2<f32>(scale), vec2<f32>(-8.0 * scale));
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    return unsigned4(nibbles_of_32(unit.at, i));
}
