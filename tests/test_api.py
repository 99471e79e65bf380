"""The Python interface on a tiny random model."""

from pathlib import Path

import numba
import numpy as np
import pytest

import edge_moe
from edge_moe.api import _overlap, default_threads

GOLDEN = Path(__file__).parent / "golden" / "v3.gguf"
GREEDY = edge_moe.SamplingOptions(temperature=0)


@pytest.fixture(scope="module")
def model():
    return edge_moe.load(GOLDEN, threads=1)


def test_config(model):
    assert model.config.architecture == "deepseek2"
    assert model.config.vocab_size == model.tokenizer.vocab_size
    assert model.context_length == model.config.max_position_embeddings


def test_logits_do_not_depend_on_what_follows(model):
    ids = np.arange(5, 45).tolist()
    whole = model.logits(ids)
    assert whole.shape == (40, model.config.vocab_size)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(model.logits(ids[:17]), whole[:17], rtol=1e-4, atol=1e-4)


def test_forward_gives_the_last_logits(model):
    ids = np.arange(5, 25)
    cache = model.new_cache(64)
    model.forward(ids[:12], cache)
    last = model.forward(ids[12:], cache)
    assert cache.length == 20
    np.testing.assert_allclose(last[0], model.logits(ids.tolist())[-1], rtol=1e-4, atol=1e-4)


def test_same_seed_same_text_whatever_the_threads():
    texts = set()
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        loaded = edge_moe.load(GOLDEN, threads=threads)
        options = edge_moe.SamplingOptions(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=11)
        texts.add("".join(loaded.generate("abc", max_new_tokens=40, options=options, ignore_eos=True)))
    assert len(texts) == 1


def test_stop_string_ends_the_text_before_it(model):
    text = "".join(model.generate("abc", max_new_tokens=30, options=GREEDY, ignore_eos=True))
    assert len(text) >= 10
    stop = text[5:8]
    cut = "".join(model.generate("abc", max_new_tokens=30, options=GREEDY, ignore_eos=True, stop=["\0never", stop]))
    assert cut == text[: text.index(stop)]
    assert model.last_stats.stop_reason == "stop"


def test_a_stop_string_that_only_begins_is_given_out(model):
    text = "".join(model.generate("abc", max_new_tokens=12, options=GREEDY, ignore_eos=True))
    stop = text[-3:] + "and never this"
    assert "".join(model.generate("abc", max_new_tokens=12, options=GREEDY, ignore_eos=True, stop=[stop])) == text


@pytest.mark.parametrize(
    ("text", "stop", "length"), [("hello", "low", 2), ("abc", "xyz", 0), ("aaa", "aaab", 3), ("abc", "abc", 0)]
)
def test_overlap(text, stop, length):
    assert _overlap(text, stop) == length


def test_stats(model):
    list(model.generate([5, 6, 7], max_new_tokens=4, options=GREEDY, ignore_eos=True))
    stats = model.last_stats
    assert (stats.prompt_tokens, stats.completion_tokens, stats.stop_reason) == (3, 4, "length")
    assert stats.prefill_tok_per_s > 0
    assert stats.decode_tok_per_s > 0


def test_a_session_keeps_what_it_has_seen(model):
    session = model.new_session()
    list(model.generate([5, 6, 7, 8], max_new_tokens=2, options=GREEDY, ignore_eos=True, session=session))
    list(model.generate([5, 6, 7, 8, 9], max_new_tokens=2, options=GREEDY, ignore_eos=True, session=session))
    assert model.last_stats.reused_tokens == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "--threads 0"),
        ({"threads": 100_000}, "--threads 100000"),
        ({"context_length": 0}, "--ctx-size 0"),
        ({"context_length": 1 << 30}, "--ctx-size"),
    ],
)
def test_bad_options_of_load(arguments, message):
    with pytest.raises(edge_moe.OptionError, match=message):
        edge_moe.load(GOLDEN, **arguments)


def test_bad_prompts(model):
    with pytest.raises(edge_moe.OptionError, match="-n/--n-predict 0"):
        model.generate("a", max_new_tokens=0)
    with pytest.raises(edge_moe.OptionError, match="--stop"):
        model.generate("a", stop=[""])
    with pytest.raises(edge_moe.OptionError, match="no tokens"):
        list(model.generate([]))
    with pytest.raises(edge_moe.OptionError, match=r"\d+ tokens, the context takes \d+"):
        list(model.generate([5] * (model.context_length + 1)))
    with pytest.raises(edge_moe.ShapeError, match="outside the vocabulary"):
        model.logits([0, model.config.vocab_size])


def test_default_threads():
    assert 1 <= default_threads() <= numba.config.NUMBA_NUM_THREADS
