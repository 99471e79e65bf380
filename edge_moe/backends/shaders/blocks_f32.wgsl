const TAIL = true;

fn unit_of(row: u32, u: u32) -> Unit {
    return Unit(row + 128u * u, 0u, vec2<f32>(1.0), vec2<f32>(0.0));
}

fn quants(unit: Unit, i: u32) -> vec4<f32> {
    let at = (unit.at >> 2u) + 4u * i;
    return bitcast<vec4<f32>>(vec4<u32>(weights[at], weights[at + 1u], weights[at + 2u], weights[at + 3u]));
}
