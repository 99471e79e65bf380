"""Routing and elementwise kernels against slow numpy twins."""

import numpy as np
import pytest

from edge_moe.errors import ShapeError
from edge_moe.kernels import elementwise, routing, steps


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def bf16_values(values):
    """Nearest bf16 of each value (ties to even), as f32: by searching the two neighbours in f64."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    lower, upper = (bits >> 16) << 16, ((bits >> 16) + 1) << 16
    lower_f, upper_f = (x.astype(np.uint32).view(np.float32).astype(np.float64) for x in (lower, upper))
    exact = np.asarray(values, np.float64)
    take_upper = np.abs(upper_f - exact) < np.abs(exact - lower_f)
    tie = np.abs(upper_f - exact) == np.abs(exact - lower_f)
    take_upper |= tie & ((lower >> 16) & 1 == 1)
    return np.where(take_upper, upper_f, lower_f).astype(np.float32)


def test_rms_norm(rng):
    x, weight = rng.standard_normal((5, 96), np.float32) * 3, rng.standard_normal(96, np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(steps.rms_norm(x, weight, 1e-5), expected, rtol=2e-6, atol=1e-6)


def test_rope_turns_adjacent_pairs(rng):
    x = rng.standard_normal((3, 2, 8), np.float32)
    angles = rng.standard_normal((3, 4))
    pairs = x.astype(np.float64)[..., 0::2] + 1j * x.astype(np.float64)[..., 1::2]
    turned = pairs * np.exp(1j * angles)[:, None, :]
    expected = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    got = steps.rope_pairs(x, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_rope_takes_a_part_of_each_head(rng):
    """As models cut it off: rows with gaps."""
    x, angles = rng.standard_normal((3, 2, 12), np.float32), rng.standard_normal((3, 4)).astype(np.float32)
    part = x[..., 4:]
    np.testing.assert_array_equal(
        steps.rope_pairs(part, np.cos(angles), np.sin(angles)),
        steps.rope_pairs(part.copy(), np.cos(angles), np.sin(angles)),
    )


def test_threads_do_not_change_results(rng):
    """Of arrays large enough to be shared."""
    x, y = rng.standard_normal((2, 300, 512), np.float32)
    positions, weights = rng.permutation(300).reshape(100, 3), rng.random((100, 3), np.float32)
    angles, logits = rng.standard_normal((300, 32), np.float32), rng.standard_normal((3000, 64), np.float32)
    found = []
    for n_threads in (1, elementwise.max_threads()):
        elementwise.set_threads(n_threads)
        found.append(
            [
                steps.rms_norm(x, y[0], 1e-5),
                steps.rope_pairs(x.reshape(300, 8, 64), np.cos(angles), np.sin(angles)),
                steps.silu_multiply(x, y),
                steps.weighted_sum(x, positions, weights),
                *steps.route(logits, logits[0], True, 8, 4, 2, 6, True, 2.5),
            ]
        )
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


def test_arrays_that_do_not_fit_are_refused(rng):
    x, few = np.zeros((4, 8), np.float32), np.zeros((4, 6), np.float32)
    angles = np.zeros((4, 2), np.float32)
    for call in (
        lambda: steps.rms_norm(x, few[0], 1e-5),
        lambda: steps.rope_pairs(few.reshape(4, 1, 6), angles, angles),
        lambda: steps.rope_pairs(np.zeros((4, 1, 4), np.float32), angles, angles[:3]),
        lambda: steps.silu_multiply(x, few),
        lambda: steps.weighted_sum(x, np.zeros((2, 2), np.int64), angles),
        lambda: steps.weighted_sum(x, np.full((4, 2), 4), angles),
        lambda: steps.weighted_sum(x, np.full((4, 2), -1), angles),
        lambda: steps.route(x, few[0], False, 1, 1, 1, 2, False, 1.0),
    ):
        with pytest.raises(ShapeError):
            call()


def test_store_bf16_rounds_to_nearest_even(rng):
    values = np.concatenate(
        [rng.standard_normal(1000) * 10.0 ** rng.integers(-30, 30, 1000), [0.0, -0.0, 1.0, 1.00390625, 1.01171875]]
    ).astype(np.float32)[None]
    out = np.zeros(values.shape, np.uint16)
    elementwise.store_bf16(values, out)
    got = (out.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(got, bf16_values(values))


def test_store_bf16_keeps_nan_and_infinity():
    values = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    out = np.zeros(values.shape, np.uint16)
    elementwise.store_bf16(values, out)
    np.testing.assert_array_equal((out.astype(np.uint32) << 16).view(np.float32), values)


@pytest.mark.parametrize("shape", [(1, 24), (37, 24), (41, 2048)])
def test_silu_multiply(rng, shape):
    gate, up = rng.standard_normal(shape, np.float32) * 5, rng.standard_normal(shape, np.float32)
    gate[0, 0], gate[0, 1] = -200, 200
    wide = gate.astype(np.float64)
    expected = wide / (1 + np.exp(-wide)) * up
    np.testing.assert_allclose(steps.silu_multiply(gate, up), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n_tokens", "width"), [(1, 10), (40, 10), (40, 1000)])
def test_weighted_sum(rng, n_tokens, width):
    values = rng.standard_normal((n_tokens * 3, width), np.float32)
    positions = rng.permutation(n_tokens * 3).reshape(n_tokens, 3)
    weights = rng.random((n_tokens, 3), np.float32)
    expected = (values[positions].astype(np.float64) * weights[..., None]).sum(1)
    np.testing.assert_allclose(steps.weighted_sum(values, positions, weights), expected, rtol=1e-5, atol=1e-6)


def slow_route(logits, bias, sigmoid, n_group, topk_group, group_score_experts, top_k, norm, scale):
    """One token at a time, by sorting."""
    all_ids, all_weights = [], []
    for row in logits.astype(np.float64):
        probs = 1 / (1 + np.exp(-row)) if sigmoid else np.exp(row) / np.exp(row).sum()
        selection = probs + bias
        if n_group > 1:
            groups = selection.reshape(n_group, -1)
            scores = np.sort(groups, -1)[:, ::-1][:, :group_score_experts].sum(-1)
            dropped = np.argsort(-scores)[topk_group:]
            groups[dropped] = -np.inf
            selection = groups.ravel()
        ids = np.argsort(-selection)[:top_k]
        weights = probs[ids]
        if norm:
            weights = weights / max(weights.sum(), 2.0**-14)
        all_ids.append(ids)
        all_weights.append(weights * scale)
    return np.array(all_ids), np.array(all_weights)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize(("n_group", "topk_group", "group_score_experts"), [(1, 1, 1), (4, 2, 1), (4, 2, 2), (8, 3, 2)])
def test_route(rng, norm, sigmoid, n_group, topk_group, group_score_experts):
    logits = rng.standard_normal((50, 32), np.float32) * 3
    bias = rng.standard_normal(32, np.float32) * 0.3
    rule = (sigmoid, n_group, topk_group, group_score_experts, 5, norm, 2.5)
    ids, weights = steps.route(logits, bias, *rule)
    expected_ids, expected_weights = slow_route(logits, bias, *rule)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-5)


def test_route_survives_nan():
    ids, _ = steps.route(np.full((2, 8), np.nan, np.float32), np.zeros(8, np.float32), False, 4, 2, 1, 3, True, 1.0)
    assert ids.min() >= 0
    assert all(len(set(row)) == 3 for row in ids.tolist())


def test_group_by_expert(rng):
    ids = np.array([rng.choice(12, 3, replace=False) for _ in range(20)])
    active, offsets, rows, positions = routing.group_by_expert(ids, 12)
    assert active.tolist() == sorted(set(ids.ravel().tolist()))
    for g, expert in enumerate(active):
        tokens = rows[offsets[g] : offsets[g + 1]]
        assert tokens.tolist() == [t for t in range(20) if expert in ids[t]]
    for t in range(20):
        for k in range(3):
            m = positions[t, k]
            assert rows[m] == t
            assert active[np.searchsorted(offsets, m, side="right") - 1] == ids[t, k]
