"""Divergences against float64 from the definition, down to where f32 sums drown them; error bars against theory."""

import math

import numpy as np
import pytest

from edge_moe import divergence as dv


def log_softmax(logits):
    """f64 from the definition; -inf stays -inf."""
    shifted = logits.astype(np.float64) - logits.astype(np.float64).max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def plain_divergences(reference, logits):
    p, q = log_softmax(reference), log_softmax(logits)
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q)).sum(axis=-1)


def compare(reference, logits):
    expected = dv.live_log_probs(reference, dv.normalizers(reference))
    return dv.kl_divergences(expected, logits, dv.normalizers(logits))


@pytest.mark.parametrize("vocab", [1, 7, 64, 8192])
@pytest.mark.parametrize("noise", [3e-4, 2e-3, 0.05, 1.0, 8.0])
def test_divergences_at_every_size(vocab, noise):
    """Mean KL is about noise^2 / 2: the first is 5e-8, far below the divergence of any quantized file."""
    rng = np.random.default_rng(vocab)
    reference = rng.normal(0, 3, (40, vocab)).astype(np.float32)
    logits = (reference + rng.normal(0, noise, reference.shape)).astype(np.float32)
    found, mass = compare(reference, logits)
    expected = plain_divergences(reference, logits)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=3e-11)
    assert found.mean() == pytest.approx(expected.mean(), rel=2e-5, abs=1e-12)
    np.testing.assert_allclose(mass, 1, atol=2e-6)


def test_a_mean_of_1e_6_where_f32_sums_are_wrong():
    """The sum of p (log p - log q) in f32 is off by more than the divergence itself in places; ours never by 1e-4."""
    rng = np.random.default_rng(5)
    reference = rng.normal(0, 2, (300, 4096)).astype(np.float32) + np.float32(20)
    logits = (reference + rng.normal(0, 1.4e-3, reference.shape)).astype(np.float32)
    expected = plain_divergences(reference, logits)
    assert expected.mean() == pytest.approx(1e-6, rel=0.1)
    found, _ = compare(reference, logits)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert found.mean() == pytest.approx(expected.mean(), rel=1e-4)
    p, q = log_softmax(reference).astype(np.float32), log_softmax(logits).astype(np.float32)
    naive = (np.exp(p) * (p - q)).sum(axis=-1, dtype=np.float32)
    assert np.abs(naive / expected - 1).max() > 0.05


def test_normalizers_and_surprises():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (50, 1000)).astype(np.float32)
    ids = rng.integers(0, 1000, 50)
    found = dv.surprises(logits, dv.normalizers(logits), ids)
    np.testing.assert_allclose(found, -log_softmax(logits)[np.arange(50), ids], rtol=0, atol=3e-7)


def test_extreme_logits():
    logits = np.array([[1000.0, 1000.0, 900.0], [-1e30, 0.0, -np.inf], [3e38, -3e38, 0]], np.float32)
    np.testing.assert_allclose(dv.normalizers(logits), [1000 + math.log(2), 0, np.float32(3e38)], rtol=1e-9, atol=1e-30)
    for broken in ([0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3):
        assert np.isnan(dv.normalizers(np.array([broken], np.float32)))


def test_a_token_ruled_out_by_the_reference_adds_no_divergence():
    reference = np.array([[0.0, -np.inf]], dtype=np.float32)
    other = np.array([[0.0, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(compare(reference, other)[0], [math.log(2)], rtol=1e-6)
    np.testing.assert_allclose(compare(reference, reference)[0], [0], atol=1e-37)
    assert compare(other, reference)[0] == np.inf


def test_far_distributions():
    reference = np.array([[0.0, -200.0], [0, -20]], dtype=np.float32)
    other = np.array([[-200.0, 0.0], [-20, 0]], dtype=np.float32)
    np.testing.assert_allclose(compare(reference, other)[0], plain_divergences(reference, other), rtol=1e-6)


# ---- figures and error bars


def scores(nll, reference_nll=(), kld=(), windows=None, n_bytes=None):
    n = len(nll)
    return dv.Scores(
        windows=np.arange(n) if windows is None else windows,
        n_bytes=np.ones(n, np.int64) if n_bytes is None else n_bytes,
        nll=np.asarray(nll, float),
        reference_nll=np.asarray(reference_nll, float),
        kld=np.asarray(kld, float),
        same_top=np.arange(len(kld)) % 4 != 0,
    )


def test_error_bars_of_independent_positions_are_those_of_theory():
    rng = np.random.default_rng(1)
    n = 4000
    nll, kld = rng.gamma(2, 1, n), rng.exponential(0.01, n)
    result = dv.summarize(scores(nll, nll + rng.normal(0, 0.01, n), kld))
    assert result.kld_mean_stderr == pytest.approx(0.01 / math.sqrt(n), rel=0.15)
    assert result.top1_agreement == 0.75
    assert result.top1_agreement_stderr == pytest.approx(math.sqrt(0.75 * 0.25 / n), rel=0.15)
    assert result.ppl_ratio_stderr == pytest.approx(0.01 / math.sqrt(n), rel=0.15)
    # of an exponential: sqrt(q (1 - q) / n) / density, the density being (1 - q) / scale
    assert result.kld_median_stderr == pytest.approx(0.01 * math.sqrt(0.25 / n) / 0.5, rel=0.25)
    assert result.kld_p99_stderr == pytest.approx(0.01 * math.sqrt(0.99 * 0.01 / n) / 0.01, rel=0.4)


def test_positions_of_a_window_count_as_one_where_they_agree():
    """100 windows of 50 equal positions: the error is that of 100 values, not of 5000."""
    values = np.random.default_rng(2).exponential(1.0, 100)
    windows, kld = np.repeat(np.arange(100), 50), np.repeat(values, 50)
    result = dv.summarize(scores(kld, kld, kld, windows))
    assert result.windows == 100
    assert result.kld_mean_stderr == pytest.approx(values.std() / 10, rel=0.15)
    assert result.ppl_ratio == 1
    assert result.ppl_ratio_stderr == 0


def test_few_windows_are_cut_into_positions():
    values = np.random.default_rng(3).exponential(1.0, 900)
    result = dv.summarize(scores(values, values, values, np.repeat(np.arange(3), 300)))
    assert result.windows == 3
    assert result.kld_mean_stderr == pytest.approx(values.std() / 30, rel=0.15)


def test_same_figures_each_time():
    rng = np.random.default_rng(4)
    nll = rng.gamma(2, 1, 500)
    arguments = (nll, nll + rng.normal(0, 0.1, 500), rng.exponential(0.01, 500))
    assert dv.summarize(scores(*arguments)) == dv.summarize(scores(*arguments))


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_weighted_quantiles_are_those_of_the_repeated_values(n):
    rng = np.random.default_rng(n)
    ordered = np.sort(rng.exponential(1, n))
    times = rng.multinomial(n, np.full(n, 1 / n))
    fractions = np.array([0, 0.1, 0.5, 0.99, 0.999, 1])
    found = dv._weighted_quantiles(ordered, times, fractions)
    np.testing.assert_allclose(found, np.quantile(np.repeat(ordered, times), fractions), rtol=1e-12)


def test_bits_per_byte_of_tokens_of_several_bytes():
    n_bytes = np.array([1, 3, 0, 4] * 50)
    result = dv.summarize(scores(np.full(200, math.log(2)), n_bytes=n_bytes))
    assert (result.tokens, result.scored_bytes, result.bits_per_byte) == (200, 400, pytest.approx(0.5))
    assert result.kld_mean is None
    assert result.bits_per_byte_stderr > 0
