"""The evaluation against a plain rewriting of it, on models whose distributions are simple functions of the tokens."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from edge_moe import evaluate as ev
from edge_moe.errors import FormatError, OptionError

VOCAB = 300
BOS = 256


class ByteTokenizer:
    """A token is a byte; the shift makes another tokenizer of the same vocabulary."""

    def __init__(self, bos_id=BOS, shift=0):
        self.bos_id, self.shift = bos_id, shift

    def encode(self, text):
        ids = [(byte + self.shift) % 256 for byte in text.encode()]
        return ids if self.bos_id is None else [self.bos_id, *ids]

    def token_bytes(self, token_id, *, skip_special):
        return b"" if skip_special and token_id >= 256 else bytes([token_id])


class TableModel:
    """Logits from a table, chosen by the last token and the sum of all tokens in the cache."""

    runs_tokens_singly = False

    def __init__(self, seed=0, noise=0.0, vocab=VOCAB, tokenizer=None):
        table = np.random.default_rng(seed).normal(0, 2, (vocab, vocab))
        self.table = (table + noise * np.random.default_rng(seed + 1).normal(0, 1, table.shape)).astype(np.float32)
        self.config = SimpleNamespace(vocab_size=vocab, max_position_embeddings=4096)
        self.tokenizer = tokenizer or ByteTokenizer()
        self.checkpoint = SimpleNamespace(path="table.gguf")
        self.most_logits = 0

    def new_cache(self, context_length):
        return SimpleNamespace(ids=[], context_length=context_length)

    def logits_after(self, ids):
        return np.roll(self.table[ids[-1]], sum(ids) % 11)

    def forward(self, token_ids, cache, all_logits=False):
        assert token_ids.dtype == np.int64
        assert len(token_ids) <= ev.PREFILL_CHUNK
        assert len(cache.ids) + len(token_ids) <= cache.context_length
        rows = []
        for token_id in token_ids:
            cache.ids.append(int(token_id))
            rows.append(self.logits_after(cache.ids))
        out = np.stack(rows if all_logits else rows[-1:])
        self.most_logits = max(self.most_logits, out.size)
        return out


def plain_scores(model, ids, context_length, starts, first_scored, bos):
    """(probabilities, next id) of every scored position, one token at a time, from the definition."""
    scores = []
    for start in starts:
        window = list(ids[start : start + context_length])
        if bos is not None:
            window[0] = bos
        for position in range(first_scored, context_length - 1):
            logits = model.logits_after(window[: position + 1]).astype(np.float64)
            weights = np.array([math.exp(value) for value in logits - logits.max()])
            scores.append((weights / weights.sum(), window[position + 1]))
    return scores


TEXT = "Größere Wörter — 日本語 and ascii, " * 12


def test_perplexity_is_that_of_llama_perplexity():
    model = TableModel()
    ids = model.tokenizer.encode(TEXT)
    context_length = 32
    starts = [i * context_length for i in range(len(ids) // context_length)]
    scores = plain_scores(model, ids, context_length, starts, context_length // 2, BOS)
    surprises = [-math.log(probs[next_id]) for probs, next_id in scores]

    result = ev.evaluate(model, TEXT, context_length=context_length)

    assert result.windows == len(starts)
    assert result.nats == pytest.approx(sum(surprises), rel=1e-6)
    # chunks * (context - 1 - context / 2), as llama-perplexity counts
    assert result.tokens == len(scores) == len(starts) * 15
    assert result.ppl == pytest.approx(math.exp(sum(surprises) / len(surprises)), rel=1e-6)
    spread = math.sqrt(np.var(surprises) / (len(surprises) - 1))
    assert result.ppl_stderr == pytest.approx(result.ppl * spread, rel=1e-6)
    assert result.kld_mean is None
    assert result.top1_agreement is None


def test_strided_windows_score_their_last_tokens():
    model = TableModel(tokenizer=ByteTokenizer(bos_id=None))
    ids = model.tokenizer.encode(TEXT)
    context_length, stride = 20, 6
    starts = list(range(0, len(ids) - context_length + 1, stride))
    scores = plain_scores(model, ids, context_length, starts, context_length - stride - 1, None)
    surprises = [-math.log(probs[next_id]) for probs, next_id in scores]

    result = ev.evaluate(model, TEXT, context_length=context_length, stride=stride)

    assert result.tokens == len(starts) * stride
    assert result.ppl == pytest.approx(math.exp(sum(surprises) / len(surprises)), rel=1e-6)


def test_bits_per_byte_counts_the_bytes_of_the_scored_tokens():
    text = "0123456789abcdef" * 8
    model = TableModel(tokenizer=ByteTokenizer(bos_id=None))  # a token is a byte: bits per byte are bits per token
    result = ev.evaluate(model, text, context_length=16)
    assert result.bits_per_byte == pytest.approx(math.log2(result.ppl), rel=1e-9)
    assert result.scored_bytes == result.tokens == 8 * 7
    assert result.nats / math.log(2) / result.scored_bytes == pytest.approx(result.bits_per_byte, rel=1e-12)


@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_divergence_from_a_reference(noise):
    reference, model = TableModel(), TableModel(noise=noise)
    context_length = 40
    ids = model.tokenizer.encode(TEXT)
    starts = [i * context_length for i in range(len(ids) // context_length)]
    expected = plain_scores(reference, ids, context_length, starts, context_length // 2, BOS)
    actual = plain_scores(model, ids, context_length, starts, context_length // 2, BOS)
    divergences = sorted(
        sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        for (p, _), (q, _) in zip(expected, actual, strict=True)
    )
    changes = [q[token] - p[token] for (p, token), (q, _) in zip(expected, actual, strict=True)]
    log_ratio = sum(math.log(p[token] / q[token]) for (p, token), (q, _) in zip(expected, actual, strict=True))
    agreed = sum(p.argmax() == q.argmax() for (p, _), (q, _) in zip(expected, actual, strict=True))

    def quantile(fraction):  # llama-perplexity's: linear between the neighbours
        place = fraction * (len(divergences) - 1)
        low, part = int(place), place - int(place)
        return (1 - part) * divergences[low] + part * divergences[min(low + 1, len(divergences) - 1)]

    result = ev.evaluate(model, TEXT, reference=reference, context_length=context_length)

    assert result.kld_mean == pytest.approx(sum(divergences) / len(divergences), rel=1e-5)
    assert result.kld_median == pytest.approx(quantile(0.5), rel=1e-4)
    assert result.kld_p99 == pytest.approx(quantile(0.99), rel=1e-5)
    assert result.kld_p999 == pytest.approx(quantile(0.999), rel=1e-5)
    assert result.kld_max == pytest.approx(divergences[-1], rel=1e-5)
    assert result.top1_agreement == pytest.approx(agreed / len(divergences))
    assert result.delta_p_rms == pytest.approx(math.sqrt(np.mean(np.square(changes))), rel=1e-5)
    assert result.delta_p_mean == pytest.approx(np.mean(changes), rel=1e-4)
    assert result.ppl_ratio == pytest.approx(math.exp(log_ratio / len(changes)), rel=1e-5)
    assert result.ppl_ratio == pytest.approx(result.ppl / result.reference_ppl, rel=1e-9)


def test_a_model_does_not_differ_from_itself():
    result = ev.evaluate(TableModel(), TEXT, reference=TableModel(), context_length=16)
    assert result.kld_mean == result.kld_p999 == 0
    assert result.top1_agreement == 1


def test_long_windows_are_fed_in_chunks(monkeypatch):
    whole = ev.evaluate(TableModel(noise=0.3), TEXT, reference=TableModel(), context_length=128)
    monkeypatch.setattr(ev, "PREFILL_CHUNK", 7)
    assert ev.evaluate(TableModel(noise=0.3), TEXT, reference=TableModel(), context_length=128) == whole


def test_blocks_of_logits_are_bounded(monkeypatch):
    monkeypatch.setattr(ev, "LOGITS_BYTES", 20 * 4 * VOCAB)
    model = TableModel()
    bounded = ev.evaluate(model, TEXT, context_length=128)
    assert model.most_logits == 20 * VOCAB
    monkeypatch.undo()
    assert ev.evaluate(TableModel(), TEXT, context_length=128) == bounded


def test_progress_is_told():
    seen = []
    result = ev.evaluate(TableModel(), TEXT, context_length=64, on_window=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(i + 1, len(seen)) for i in range(len(seen))]
    assert seen[-1][2] == pytest.approx(result.ppl)


@pytest.mark.parametrize(
    ("n_tokens", "context_length", "stride", "words"),
    [
        (31, 32, None, "31 tokens, fewer than one context of 32"),
        (100, 3, None, "at least 4"),
        (100, 32, 32, "from 1 to 31"),
        (100, 32, 0, "from 1 to 31"),
    ],
)
def test_windows_that_cannot_be(n_tokens, context_length, stride, words):
    with pytest.raises(OptionError, match=words):
        ev.windows(n_tokens, context_length, stride)


def test_windows_leave_out_the_rest():
    assert [window.start for window in ev.windows(100, 32, limit=2)] == [0, 32]
    assert [window.start for window in ev.windows(100, 32)] == [0, 32, 64]
    assert ev.windows(32, 32)[0].scored == slice(17, 32)


def test_vocabularies_must_match():
    with pytest.raises(OptionError, match="300 tokens and the reference 301"):
        ev.evaluate(TableModel(), TEXT, reference=TableModel(vocab=301), context_length=16)
    other = TableModel(tokenizer=ByteTokenizer(shift=1))
    with pytest.raises(OptionError, match="different tokens"):
        ev.evaluate(TableModel(), TEXT, reference=other, context_length=16)


def test_logits_that_are_no_numbers_are_an_error():
    model = TableModel()
    model.table[ord("a")] = np.nan
    with pytest.raises(FormatError, match=r"table\.gguf: .* not finite"):
        ev.evaluate(model, "a" * 100, context_length=16)
