"""Saved distributions: what is read is what was written, to half a code; damaged and foreign files are refused."""

import math
import struct

import numpy as np
import pytest
from test_evaluate import TEXT, VOCAB, ByteTokenizer, TableModel

from edge_moe import divergence as dv
from edge_moe import evaluate as ev
from edge_moe.errors import FormatError, OptionError
from edge_moe.saved_logits import open_saved_logits, saving_logits, scored_rows

CONTEXT = 32


def decoded(saved, chunk):
    """(known, log probabilities) of a chunk, from the format's definition in perplexity.cpp, byte by byte."""
    data = saved.path.read_bytes()
    n_chunks, context_length = saved.token_ids.shape
    padded = 2 * ((saved.vocab_size + 1) // 2)
    rows = scored_rows(context_length)
    start = 20 + 4 * n_chunks * context_length + chunk * rows * (8 + 2 * padded)
    known, log_probs = [], []
    for row in range(rows):
        at = start + row * (8 + 2 * padded)
        scale, least = struct.unpack_from("<ff", data, at)
        codes = np.array(struct.unpack_from(f"<{saved.vocab_size}H", data, at + 8))
        known.append(codes > 0 if scale * 65535 > 15.99 else np.ones(len(codes), bool))
        log_probs.append(codes * scale + least)
    return np.array(known), np.array(log_probs)


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.astype(np.float64).max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.fixture
def write(tmp_path):
    def write(logits, name="x.kld", context_length=8):
        """A file of one chunk with these rows."""
        ids = [list(range(context_length))]
        with saving_logits(tmp_path / name, context_length, logits.shape[1], ids) as writer:
            writer.write(logits, dv.normalizers(logits))
        return open_saved_logits(tmp_path / name)

    return write


@pytest.mark.parametrize("vocab", [10, 301])
@pytest.mark.parametrize("spread", [0.5, 30.0])
def test_rows_hold_log_probabilities(write, vocab, spread):
    logits = np.random.default_rng(0).uniform(-spread, spread, (3, vocab)).astype(np.float32)
    saved = write(logits)
    known, log_probs = decoded(saved, 0)
    expected = log_softmax(logits)
    step = min(16, 2 * spread) / 65535
    np.testing.assert_allclose(log_probs[known], expected[known], rtol=0, atol=0.51 * step + 2e-6)
    below = expected < expected.max(axis=1, keepdims=True) - 16
    assert below.any() == (spread == 30)
    assert not known[below].any()
    np.testing.assert_array_equal(saved.rows(0, 0, 3).likeliest(), logits.argmax(axis=1))
    np.testing.assert_array_equal(saved.rows(0, 1, 2).values, saved.rows(0, 0, 3).values[1:])


def test_rows_of_equal_or_ruled_out_logits(write):
    logits = np.array([[1.0, 1, 1, 1], [0, -np.inf, -5, -np.inf], [0, 0, 0, -1000]], np.float32)
    saved = write(logits)
    _, log_probs = decoded(saved, 0)
    np.testing.assert_allclose(log_probs[0], -math.log(4), rtol=1e-6)
    rows = saved.rows(0, 0, 3)
    kld, mass = dv.kl_divergences(rows, logits, dv.normalizers(logits))
    np.testing.assert_allclose(mass, 1, atol=2e-4)
    np.testing.assert_allclose(kld, 0, atol=2e-8)


def test_a_divergence_of_1e_6_survives_16_bits(write):
    """The rounding of a code is 1e-4 nats; as the terms are of second order, it costs 3e-9 and not 1e-4."""
    rng = np.random.default_rng(7)
    reference = rng.normal(0, 4, (15, 8192)).astype(np.float32)
    logits = (reference + rng.normal(0, 1.4e-3, reference.shape)).astype(np.float32)
    p, q = log_softmax(reference), log_softmax(logits)
    expected = (np.exp(p) * (p - q)).sum(axis=-1)
    found, _ = dv.kl_divergences(write(reference, context_length=32).rows(0, 0, 15), logits, dv.normalizers(logits))
    assert expected.mean() == pytest.approx(1e-6, rel=0.3)
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=1e-8)
    assert found.mean() == pytest.approx(expected.mean(), rel=0.01)


# ---- through the evaluation


@pytest.fixture
def saved(tmp_path):
    ev.evaluate(TableModel(), TEXT, context_length=CONTEXT, save_logits=tmp_path / "base.kld")
    assert [path.name for path in tmp_path.iterdir()] == ["base.kld"]
    return open_saved_logits(tmp_path / "base.kld")


def test_a_saved_reference_is_as_good_as_the_model(saved):
    live = ev.evaluate(TableModel(noise=0.05), TEXT, reference=TableModel(), context_length=CONTEXT)
    from_file = ev.evaluate(TableModel(noise=0.05), TEXT, reference=saved, context_length=CONTEXT)
    assert (from_file.ppl, from_file.tokens, from_file.nats) == (live.ppl, live.tokens, live.nats)
    assert from_file.top1_agreement == live.top1_agreement
    for name in ("kld_mean", "kld_p99", "kld_max", "delta_p_rms", "ppl_ratio", "reference_ppl"):
        assert getattr(from_file, name) == pytest.approx(getattr(live, name), rel=1e-3), name
    itself = ev.evaluate(TableModel(), TEXT, reference=saved, context_length=CONTEXT)
    assert itself.kld_max < 1e-8
    assert itself.top1_agreement == 1


def test_tokens_too_unlikely_to_be_known_do_not_bend_the_ratio(tmp_path):
    """A quarter of the tokens that come is 20 nats below the likeliest: with the 16 that codes reach, the ratio of the
    perplexities would be off by some nats at each."""
    likely, unlikely = TableModel(), TableModel(noise=0.05)
    for model in (likely, unlikely):
        model.logits_after = lambda ids, table=model.table: table[ids[-1]]
        model.table[:, ord("z")] = model.table.max(axis=1) - 20
    text = "abcz" * 40
    ev.evaluate(likely, text, context_length=CONTEXT, save_logits=tmp_path / "base.kld")
    live = ev.evaluate(unlikely, text, reference=likely, context_length=CONTEXT)
    saved = open_saved_logits(tmp_path / "base.kld")
    from_file = ev.evaluate(unlikely, text, reference=saved, context_length=CONTEXT)
    assert live.nats / live.tokens > 5
    assert from_file.ppl_ratio == pytest.approx(live.ppl_ratio, rel=0.05)
    assert from_file.reference_ppl == pytest.approx(from_file.ppl / from_file.ppl_ratio)
    assert from_file.delta_p_rms == pytest.approx(live.delta_p_rms, rel=1e-3)


def test_small_blocks_and_few_chunks(saved, monkeypatch):
    whole = ev.evaluate(TableModel(noise=0.3), TEXT, reference=saved, context_length=CONTEXT, max_windows=3)
    assert (whole.windows, whole.tokens) == (3, 3 * 15)
    monkeypatch.setattr(ev, "PREFILL_CHUNK", 4)
    again = ev.evaluate(TableModel(noise=0.3), TEXT, reference=saved, context_length=CONTEXT, max_windows=3)
    assert again == whole


def test_header_and_tokens_are_those_of_the_text(saved):
    ids = TableModel().tokenizer.encode(TEXT)
    n = len(ids) // CONTEXT
    data = saved.path.read_bytes()
    assert data[:20] == struct.pack("<8sIii", b"_logits_", CONTEXT, VOCAB, n)
    np.testing.assert_array_equal(saved.token_ids.ravel(), ids[: n * CONTEXT])


def test_foreign_references_are_refused(saved):
    def evaluate(text=TEXT, model=None, context_length=CONTEXT, **options):
        model = model or TableModel(noise=0.1)
        return ev.evaluate(model, text, reference=saved, context_length=context_length, **options)

    with pytest.raises(
        OptionError, match=r"base\.kld: is of another text .*: token 1 of its text is 71, of this one 35"
    ):
        evaluate(text="#" + TEXT[1:])
    with pytest.raises(OptionError, match=r"base\.kld: is of a vocabulary of 300 tokens, the model has 302"):
        evaluate(model=TableModel(vocab=302))
    with pytest.raises(OptionError, match=r"base\.kld: is of chunks of 32 tokens, not 16; give -c 32"):
        evaluate(context_length=16)
    with pytest.raises(OptionError, match=r"base\.kld: holds \d+ chunks, the text has \d+; .*--chunks"):
        evaluate(text=TEXT + "x" * CONTEXT)
    with pytest.raises(OptionError, match="leave out --stride"):
        evaluate(stride=3)
    with pytest.raises(OptionError, match="another text or tokenizer"):
        evaluate(model=TableModel(tokenizer=ByteTokenizer(shift=1)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "cut off"),
        (lambda data: data + b"\0", "cut off or damaged"),
        (lambda data: data[:300], "cut off"),
        (lambda data: data[:15], "ends within its header"),
        (lambda data: b"", "begins with b''"),
        (lambda data: b"GGUF" + data[4:], "begins with b'GGUFits_'"),
        (lambda data: data[:8] + struct.pack("<I", 2**32 - 1) + data[12:], "cut off"),
        (lambda data: data[:12] + struct.pack("<i", -1) + data[16:], "expected at least 1 chunk"),
        (lambda data: data[:16] + struct.pack("<i", 2**31 - 1) + data[20:], "cut off"),
    ],
)
def test_damaged_headers(saved, damage, words):
    saved.path.write_bytes(damage(saved.path.read_bytes()))
    with pytest.raises(FormatError, match=words) as caught:
        open_saved_logits(saved.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bytes_of_row", [struct.pack("<f", np.nan), struct.pack("<ff", 1e30, 0), struct.pack("<f", 0)])
def test_damaged_rows(saved, bytes_of_row):
    data = bytearray(saved.path.read_bytes())
    rows_at = 20 + saved.token_ids.nbytes
    row_bytes = (len(data) - rows_at) // (len(saved.token_ids) * 15)
    at = rows_at + 17 * row_bytes  # the third row of the second chunk
    data[at : at + len(bytes_of_row)] = bytes_of_row
    saved.path.write_bytes(data)
    with pytest.raises(FormatError, match=r"base\.kld: chunk 2 of \d+ does not hold probabilities"):
        ev.evaluate(TableModel(), TEXT, reference=open_saved_logits(saved.path), context_length=CONTEXT)


def test_a_file_that_shrinks_while_it_is_read(saved):
    saved.path.write_bytes(saved.path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="became shorter"):
        saved.rows(len(saved.token_ids) - 1, 0, 15)


def test_nothing_stays_of_a_file_that_was_not_finished(tmp_path):
    model = TableModel()
    model.table[ord("R")] = np.nan
    (tmp_path / "old.kld").write_bytes(b"old")
    with pytest.raises(FormatError, match="not finite"):
        ev.evaluate(model, "a" * 60 + "R" * 60, context_length=16, save_logits=tmp_path / "old.kld")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old.kld", b"old")]


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(OptionError, match="is a folder"):
        ev.evaluate(TableModel(), TEXT, context_length=16, save_logits=tmp_path)
    with pytest.raises(OptionError, match=r"x\.kld: cannot be written: No such file"):
        ev.evaluate(TableModel(), TEXT, context_length=16, save_logits=tmp_path / "missing" / "x.kld")
    with pytest.raises(OptionError, match="leave out --stride"):
        ev.evaluate(TableModel(), TEXT, context_length=16, stride=4, save_logits=tmp_path / "x.kld")
    with pytest.raises(OptionError, match=r"x\.kld: cannot read the saved logits: No such file"):
        open_saved_logits(tmp_path / "x.kld")
