"""Sampling equals a slow twin and llama.cpp's sampler chain, draws what the probabilities say, and repeats by seed."""

import ctypes
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.errors import FormatError, OptionError, ShapeError
from edge_moe.sampling import Sampler, SamplingOptions

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def twin(logits, history, options):
    """{id: probability}, by the definitions of the filters, with sorted lists and Python's numbers."""
    logits = [float(x) for x in logits]
    last_n = options.repeat_last_n
    recent = history if last_n == -1 else history[len(history) - min(last_n, len(history)) :]
    for token in set(recent):
        if logits[token] > 0:
            logits[token] /= options.repeat_penalty
        else:
            logits[token] *= options.repeat_penalty
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if options.temperature == 0:
        return {order[0]: 1.0}
    if options.top_k > 0:
        order = order[: options.top_k]
    if options.top_p < 1:
        weights = [math.exp(logits[i] - logits[order[0]]) for i in order]
        kept, held = [], 0.0
        for i, weight in zip(order, weights, strict=True):
            if held >= options.top_p:
                break
            kept.append(i)
            held += weight / sum(weights)
        order = kept
    best = math.exp(0)
    order = [i for i in order if math.exp(logits[i] - logits[order[0]]) >= options.min_p * best]
    weights = [math.exp((logits[i] - logits[order[0]]) / options.temperature) for i in order]
    return {i: weight / sum(weights) for i, weight in zip(order, weights, strict=True)}


def ours(logits, history, options):
    ids, probabilities = Sampler(options).distribution(logits, history)
    return dict(zip(ids.tolist(), probabilities.tolist(), strict=True))


option_sets = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 2, 7, 40, 10_000]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.95, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
        "repeat_penalty": st.sampled_from([0.8, 1.0, 1.1, 2.0]),
        "repeat_last_n": st.sampled_from([-1, 0, 1, 4, 64]),
    }
)


@settings(max_examples=200, deadline=None)
@given(option_sets, st.integers(0, 2**32), st.sampled_from([2, 30, 3000]), st.integers(0, 20))
def test_the_distribution_equals_the_twin(options, seed, vocab_size, history_length):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(vocab_size) * 3).astype(np.float32)
    history = rng.integers(0, vocab_size, history_length).tolist()
    options = SamplingOptions(**options)
    before = logits.copy()
    found, expected = ours(logits, history, options), twin(logits, history, options)
    assert np.array_equal(logits, before)  # the caller's logits stay as they are
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx([expected[token] for token in found], rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 0},
        {"top_k": 0, "top_p": 0.7, "min_p": 0.0, "temperature": 1.7},
        {"top_k": 100, "top_p": 1.0, "min_p": 0.2},
        {"repeat_penalty": 1.3, "repeat_last_n": 16},
        {"repeat_penalty": 0.7, "repeat_last_n": -1, "top_k": 10},
    ],
    ids=str,
)
def test_the_distribution_equals_llama_cpps(seed, options):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is the reference; install the test extra")
    rng = np.random.default_rng(seed)
    vocab_size = 5000
    logits = (rng.standard_normal(vocab_size) * 4).astype(np.float32)
    history = rng.choice(np.argsort(-logits)[:50], 40).tolist()
    options = SamplingOptions(**options)
    last_n = len(history) if options.repeat_last_n == -1 else options.repeat_last_n
    chain = [
        llama_cpp.llama_sampler_init_top_k(options.top_k),
        llama_cpp.llama_sampler_init_top_p(options.top_p, 1),
        llama_cpp.llama_sampler_init_min_p(options.min_p, 1),
        llama_cpp.llama_sampler_init_temp(options.temperature),
        llama_cpp.llama_sampler_init_dist(0),
    ]
    candidates = (llama_cpp.llama_token_data * vocab_size)()
    penalized = logits.copy()
    for token in set(history[-last_n:]):  # the binding's penalty sampler has another signature in each release
        penalty = np.float32(options.repeat_penalty)
        penalized[token] = penalized[token] * penalty if penalized[token] <= 0 else penalized[token] / penalty
    for token in range(vocab_size):
        candidates[token].id, candidates[token].logit = token, float(penalized[token])
    array = llama_cpp.llama_token_data_array(candidates, vocab_size, -1, False)
    for sampler in chain:
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
        llama_cpp.llama_sampler_free(sampler)
    expected = {array.data[i].id: array.data[i].p for i in range(array.size)}
    found = ours(logits, history, options)
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx([expected[token] for token in found], rel=1e-4)


@pytest.mark.parametrize("options", [OFF, {**OFF, "top_k": 12}, {**OFF, "top_p": 0.8, "min_p": 0.02}, {}], ids=str)
def test_tokens_are_drawn_as_often_as_their_probability_says(options):
    logits = np.random.default_rng(3).standard_normal(30).astype(np.float32)
    options = SamplingOptions(**options, seed=11)
    expected = twin(logits, [], options)
    sampler, draws = Sampler(options), 20_000
    counts = Counter(sampler.sample(logits, []) for _ in range(draws))
    assert counts.keys() <= expected.keys()
    chi_square = sum((counts[token] - draws * p) ** 2 / (draws * p) for token, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_the_same_seed_gives_the_same_tokens():
    logits = np.random.default_rng(0).standard_normal((200, 1000)).astype(np.float32)

    def draw(seed):
        sampler = Sampler(SamplingOptions(**OFF, seed=seed))
        return [sampler.sample(row, []) for row in logits]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_draws_stay_the_same_between_releases():
    logits = np.linspace(-1, 1, 50, dtype=np.float32)
    sampler = Sampler(SamplingOptions(seed=42))
    assert [sampler.sample(logits, []) for _ in range(8)] == [29, 40, 24, 32, 48, 16, 29, 28]


def test_greedy_takes_the_likeliest_and_the_lowest_id_among_equals():
    sampler = Sampler(SamplingOptions(temperature=0))
    assert sampler.sample(np.array([0, 3, 1, 3], np.float32), []) == 1
    assert sampler.sample(np.array([-5, -2, -3], np.float32), []) == 1
    penalized = Sampler(SamplingOptions(temperature=0, repeat_penalty=2.0))
    assert penalized.sample(np.array([0, 3, 1, 2.9], np.float32), [1]) == 3
    assert penalized.sample(np.array([-5, -2, -3], np.float32), [1]) == 2


def test_top_k_keeps_exactly_k_even_among_equals():
    assert ours(np.zeros(100, np.float32), [], SamplingOptions(**{**OFF, "top_k": 5})).keys() == set(range(5))
    assert len(ours(np.zeros(100, np.float32), [], SamplingOptions(**{**OFF, "top_p": 0.5}))) == 50


def test_the_penalty_counts_a_token_once_and_only_in_its_window():
    logits = np.full(4, 2.0, np.float32)
    options = SamplingOptions(**OFF, repeat_penalty=2.0, repeat_last_n=2)
    found = ours(logits, [3, 3, 0, 0, 1], options)
    assert found[0] == found[1] < found[2] == found[3]
    assert ours(logits, [0, 0], options)[0] == pytest.approx(math.exp(1) / (math.exp(1) + 3 * math.exp(2)))


def test_a_temperature_near_zero_is_greedy():
    logits = np.array([1.0, 1.5, -3.0], np.float32)
    assert ours(logits, [], SamplingOptions(**{**OFF, "temperature": 1e-320})) == {0: 0.0, 1: 1.0, 2: 0.0}


def test_a_whole_vocabulary_of_minus_infinity_but_one():
    logits = np.full(1000, -np.inf, np.float32)
    logits[77] = 1.0
    for options in (SamplingOptions(), SamplingOptions(**OFF), SamplingOptions(top_k=0)):
        assert Sampler(options).sample(logits, []) == 77


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(bad):
    for options in (SamplingOptions(temperature=0), SamplingOptions()):
        with pytest.raises(FormatError, match=f"computed {bad} for a logit"):
            Sampler(options).sample(np.array([0, bad, 1], np.float32), [])


@pytest.mark.parametrize("shape", [(0,), (2, 3)])
def test_anything_but_a_vector_is_refused(shape):
    with pytest.raises(ShapeError, match="expected one vector"):
        Sampler(SamplingOptions()).sample(np.zeros(shape, np.float32), [])


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("temperature", -0.1, "--temp"),
        ("temperature", math.nan, "--temp"),
        ("temperature", math.inf, "--temp"),
        ("top_k", -1, "--top-k"),
        ("top_k", 1.5, "--top-k"),
        ("top_k", True, "--top-k"),
        ("top_p", 0.0, "--top-p"),
        ("top_p", 1.01, "--top-p"),
        ("top_p", math.nan, "--top-p"),
        ("min_p", -0.01, "--min-p"),
        ("min_p", 2, "--min-p"),
        ("repeat_penalty", 0, "--repeat-penalty"),
        ("repeat_last_n", -2, "--repeat-last-n"),
        ("seed", -1, "--seed"),
        ("seed", "x", "--seed"),
    ],
)
def test_bad_options_are_refused_by_name(name, value, option):
    with pytest.raises(OptionError, match=f"^{option} .*expected"):
        SamplingOptions(**{name: value})
