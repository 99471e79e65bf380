"""Error compensation: the grids of formats, codes in blocks, and the walk against a slow twin in f64."""

import numpy as np
import pytest
from edge_moe_quant.compensate import AIM_DAMPING, DAMPING, SWEEPS, Aim, Factor, encode_compensated
from edge_moe_quant.encode import encode_rows
from edge_moe_quant.grids import LEVELS, grid, has_grid, with_codes

from edge_moe.formats import FORMATS

GRIDS = [fmt for fmt in FORMATS if has_grid(fmt)]


def moments(rng, n_cols, n=600):
    """Second moments of inputs that hang together, and the inputs."""
    x = rng.standard_normal((n, n_cols)) @ (rng.standard_normal((n_cols, n_cols)) / np.sqrt(n_cols))
    x *= np.exp(rng.standard_normal(n_cols))
    return x.T @ x / n, x


def test_every_such_format_is_here():
    assert {fmt.name for fmt in GRIDS} == set(LEVELS)


@pytest.mark.parametrize("fmt", GRIDS, ids=repr)
def test_codes_in_blocks(fmt):
    rng = np.random.default_rng(1)
    data = encode_rows(rng.standard_normal((5, 512)).astype(np.float32), fmt)
    base, step = grid(data, fmt)
    levels = LEVELS[fmt.name]
    codes = rng.integers(0, len(levels), (5, 512)).astype(np.uint8)
    values = fmt.decode(with_codes(data, fmt, codes))
    np.testing.assert_allclose(values, base + levels[codes] * step, rtol=0, atol=3e-6 * np.abs(values).max())
    own = np.abs(((fmt.decode(data) - base) / np.where(step == 0, 1, step))[..., None] - levels).argmin(-1)
    np.testing.assert_array_equal(fmt.decode(with_codes(data, fmt, own.astype(np.uint8))), fmt.decode(data))


def nearest(wanted, base, step, levels):
    """Codes i64[R] of the values base + level * step next to what is wanted f64[R]."""
    return np.abs(base[:, None] + np.outer(step, levels) - wanted[:, None]).argmin(axis=1)


def walk(values, base, step, levels, h):
    """Column by column by the plain definition: after each, the rest is moved to the best it can still be."""
    work, codes = values.astype(np.float64), np.zeros(values.shape, int)
    order = np.argsort(-np.diagonal(h), kind="stable")
    for position, j in enumerate(order):
        codes[:, j] = nearest(work[:, j], base[:, j], step[:, j], levels)
        error = work[:, j] - (base[:, j] + levels[codes[:, j]] * step[:, j])
        rest = order[position + 1 :]
        if len(rest):  # least squares: the rest answers for -error at column j
            work[:, rest] += np.outer(error, np.linalg.solve(h[np.ix_(rest, rest)], h[rest, j]))
    return codes


def descend(values, base, step, levels, h, codes):
    """Sweeps over the columns, each code the best one while all others stay."""
    for _ in range(SWEEPS):
        for j in np.argsort(-np.diagonal(h), kind="stable"):
            error = values - (base + levels[codes] * step)
            error[:, j] = 0
            codes[:, j] = nearest(values[:, j] + error @ h[:, j] / h[j, j], base[:, j], step[:, j], levels)
    return codes


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "IQ4_NL"])
def test_against_the_plain_definition(name):
    fmt = next(each for each in FORMATS if each.name == name)
    rng = np.random.default_rng(2)
    values, (h, _) = rng.standard_normal((6, 160)).astype(np.float32), moments(rng, 160)
    factor = Factor(h)
    base, step = (each.astype(float) for each in grid(encode_rows(values, fmt, factor.importance), fmt))
    levels, damped = LEVELS[name].astype(float), h + np.eye(len(h)) * DAMPING * np.diagonal(h).mean()
    expected = walk(values, base, step, levels, damped)

    def loss(codes):
        error = values - (base + levels[codes] * step)
        return np.einsum("ri,ij,rj->r", error, damped, error)

    better = descend(values, base, step, levels, damped, expected.copy())
    restored = fmt.decode(encode_compensated(values, fmt, factor))
    codes = np.abs(((restored - base) / step)[..., None] - levels).argmin(-1)
    # a weight in the middle between two codes may fall to either, and what follows it in its row moves along
    assert (codes == better).mean() > 0.97
    assert (codes == better).all(axis=1).sum() >= 3
    assert loss(codes).sum() < 0.99 * loss(expected).sum()


@pytest.mark.parametrize("fmt", GRIDS, ids=repr)
def test_outputs_are_nearer(fmt):
    rng = np.random.default_rng(3)
    values, (h, x) = rng.standard_normal((40, 256)).astype(np.float32), moments(rng, 256)
    factor = Factor(h)
    plain = fmt.decode(encode_rows(values, fmt, factor.importance)) - values
    mended = fmt.decode(encode_compensated(values, fmt, factor)) - values
    assert np.square(x @ mended.T).sum() < 0.7 * np.square(x @ plain.T).sum()


def test_dead_columns_and_no_inputs():
    rng = np.random.default_rng(4)
    h, _ = moments(rng, 64)
    h[7] = h[:, 7] = 0
    fmt = next(each for each in FORMATS if each.name == "Q4_0")
    values = rng.standard_normal((3, 64)).astype(np.float32)
    assert np.abs(fmt.decode(encode_compensated(values, fmt, Factor(h))) - values).max() < 2
    with pytest.raises(ValueError, match="zero"):
        Factor(np.zeros((64, 64)))


def test_aim():
    """Against least squares over the tokens themselves, with rows for the damping."""
    rng = np.random.default_rng(5)
    _, y = moments(rng, 48)
    x = y + 0.3 * rng.standard_normal(y.shape) * np.abs(y).mean()
    values = rng.standard_normal((5, 48)).astype(np.float32)
    own, cross = x.T @ x, y.T @ x
    damping = np.sqrt(AIM_DAMPING * np.diagonal(own).mean()) * np.eye(48)
    right, *_ = np.linalg.lstsq(np.vstack([x, damping]), np.vstack([y @ values.T, damping @ values.T]), rcond=None)
    moved = Aim(own, cross).at(values)
    np.testing.assert_allclose(moved, right.T, atol=1e-4)
    assert np.square(x @ moved.T - y @ values.T).sum() < np.square(x @ values.T - y @ values.T).sum()
    np.testing.assert_allclose(Aim(own, own).at(values), values, atol=1e-6)
