"""Tokenization equals llama.cpp's for every splitting rule; decoding gives the text back; bad files are refused."""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vocab_files import (
    TEXTS,
    boundary_vocabulary,
    llama_cpp_tokenizer,
    real_vocabulary,
    sentencepiece_vocabulary,
    texts,
    with_extra_tokens,
    write_vocabulary,
)

from edge_moe.api import embedded_model_path
from edge_moe.encoders import _parts
from edge_moe.errors import FormatError, ShapeError, UnsupportedError
from edge_moe.gguf import open_gguf
from edge_moe.pretokenizers import PRE_TOKENIZERS
from edge_moe.tokenizer import Tokenizer

ONE_NAME = {rule: name for name, rule in PRE_TOKENIZERS.items()}  # of several with the same rule
# One name of each rule that a model of this architecture uses, and the rules that differ most from them.
FUZZED = ("default", "deepseek-coder", "deepseek-llm", "deepseek-v3", "glm4", "gpt-2", "gpt-4o", "kimi-k2", "qwen2")
REAL = (
    "aquila baichuan command-r deepseek-coder deepseek-llm falcon gpt-2 gpt-neox llama-bpe llama-spm mpt qwen2 refact"
)
COMMON = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def embedded():
    """The tokenizer's metadata in the embedded model."""
    metadata = open_gguf(embedded_model_path()).metadata
    return {key: value for key, value in metadata.items() if key.startswith("tokenizer.ggml.")}


@pytest.fixture(scope="module")
def embedded_tokenizer(embedded):
    return Tokenizer.from_metadata(embedded, "embedded")


def assert_equal(ours, theirs, text):
    for parse_special in (False, True):
        ids = ours.encode(text, add_special=False, parse_special=parse_special)
        assert ids == theirs.encode(text, parse_special=parse_special), text


# ---- equal to llama.cpp ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_splitting_rule_equals_llama_cpp(pre, embedded, tmp_path):
    vocabularies = [with_extra_tokens({**embedded, "tokenizer.ggml.pre": pre})]
    if ONE_NAME[PRE_TOKENIZERS[pre]] == pre:
        vocabularies.append(boundary_vocabulary(pre))
    for metadata in vocabularies:
        ours = Tokenizer.from_metadata(metadata, "test")
        with llama_cpp_tokenizer(write_vocabulary(tmp_path / "vocab.gguf", metadata)) as theirs:
            for text in TEXTS:
                assert_equal(ours, theirs, text)
            assert ours.eos_ids == theirs.eos_ids
            assert (ours.add_bos, ours.add_eos) == theirs.adds


@pytest.mark.parametrize("words", ["learned", "boundaries"])
@pytest.mark.parametrize("pre", FUZZED)
def test_generated_texts_equal_llama_cpp(pre, words, embedded, tmp_path):
    metadata = with_extra_tokens({**embedded, "tokenizer.ggml.pre": pre})
    if words == "boundaries":
        metadata = boundary_vocabulary(pre)
    ours = Tokenizer.from_metadata(metadata, "test")
    with llama_cpp_tokenizer(write_vocabulary(tmp_path / "vocab.gguf", metadata)) as theirs:

        @COMMON
        @given(texts())
        def check(text):
            assert_equal(ours, theirs, text)
            assert ours.decode(ours.encode(text)) == text

        check()


@pytest.mark.parametrize("pre", sorted(ONE_NAME.values()))
def test_long_texts_are_cut_where_it_makes_no_difference(pre, monkeypatch):
    ours = Tokenizer.from_metadata(boundary_vocabulary(pre), "test")
    text = "".join(
        f"{text}{end}\n{start}" for text in TEXTS for end in "xe!1 " for start in ("The ", "s", " a", "5", "\n")
    )
    whole = ours.encode(text)
    monkeypatch.setattr("edge_moe.encoders.PART_LENGTH", 1)
    assert ours.encode(text) == whole
    assert len(list(_parts(text))) > 30


@pytest.mark.parametrize("name", REAL.split())
def test_real_vocabularies_equal_llama_cpp(name):
    path = real_vocabulary(name)
    ours = Tokenizer.from_metadata(open_gguf(path).metadata, path)
    with llama_cpp_tokenizer(path) as theirs:
        for text in TEXTS:
            assert_equal(ours, theirs, text)
        assert ours.eos_ids == theirs.eos_ids
        assert (ours.add_bos, ours.add_eos) == theirs.adds

        @COMMON
        @given(texts())
        def check(text):
            assert_equal(ours, theirs, text)

        check()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"across_spaces": True},
        {"add_space_prefix": False},
        {"across_spaces": True, "add_space_prefix": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_sentencepiece_equals_llama_cpp(seed, options, tmp_path):
    metadata = sentencepiece_vocabulary(seed, **options)
    ours = Tokenizer.from_metadata(metadata, "test")
    rng = random.Random(seed)
    with llama_cpp_tokenizer(write_vocabulary(tmp_path / "vocab.gguf", metadata)) as theirs:
        for text in TEXTS:
            assert_equal(ours, theirs, text)
        for _ in range(300):
            parts = ("a", "b", "c", "d", " ", " ", "é", "漢", "x", "[TOOL]", "<s>", "</s>", "\n", "😀")
            assert_equal(ours, theirs, "".join(rng.choices(parts, k=rng.randint(1, 60))))
        assert ours.eos_ids == theirs.eos_ids
        assert (ours.add_bos, ours.add_eos) == theirs.adds == (True, False)
        assert ours.encode("ab", add_special=True) == theirs.encode("ab", parse_special=False, add_special=True)


def test_pieces_equal_llama_cpp(embedded, tmp_path):
    metadata = with_extra_tokens(embedded)
    ours = Tokenizer.from_metadata(metadata, "test")
    with llama_cpp_tokenizer(write_vocabulary(tmp_path / "vocab.gguf", metadata)) as theirs:
        for token_id in range(ours.vocab_size):
            assert ours.token_bytes(token_id) == theirs.piece(token_id)


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(text, embedded_tokenizer):
    assert embedded_tokenizer.decode(embedded_tokenizer.encode(text)) == text
    sentencepiece = Tokenizer.from_metadata(sentencepiece_vocabulary(0), "test")
    if "[TOOL]" not in text:  # encoding puts a space behind such a token, as llama.cpp's does
        assert sentencepiece.decode(sentencepiece.encode(text)) == text.replace("▁", " ")


@COMMON
@given(st.lists(st.integers(0, 8191), max_size=40))
def test_a_stream_gives_what_decoding_gives(embedded_tokenizer, ids):
    stream = embedded_tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join([*pieces, stream.flush()]) == embedded_tokenizer.decode(ids)
    data = b"".join(embedded_tokenizer.token_bytes(token_id, skip_special=True) for token_id in ids)
    assert embedded_tokenizer.decode(ids) == data.decode("utf-8", "replace")


def byte_tokens():
    """A tokenizer whose normal tokens are single bytes."""
    return Tokenizer.from_metadata(sentencepiece_vocabulary(0), "test")


def test_a_stream_never_splits_a_character():
    tokenizer = byte_tokens()
    first_byte = tokenizer.encode("\n", add_special=False)[-1] - ord("\n")
    stream = tokenizer.stream()
    pushed = [stream.push(first_byte + byte) for byte in "é漢😀".encode()]
    assert pushed == ["", "é", "", "", "漢", "", "", "", "😀"]
    assert stream.flush() == ""


def test_a_stream_replaces_bytes_that_cannot_be_completed():
    tokenizer = byte_tokens()
    first_byte = tokenizer.encode("\n", add_special=False)[-1] - ord("\n")
    stream = tokenizer.stream()
    assert [stream.push(first_byte + byte) for byte in b"\xff\xe6a\xf0\x9f"] == ["\ufffd", "", "\ufffda", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_the_first_space_belongs_to_the_start_of_a_text_only():
    tokenizer = Tokenizer.from_metadata(sentencepiece_vocabulary(0), "test")
    ids = tokenizer.encode(" ab cd")
    assert tokenizer.decode(ids) == " ab cd"
    stream = tokenizer.stream()  # what a model writes after a prompt keeps its space
    assert "".join(map(stream.push, ids)) == "  ab cd"
    stream = tokenizer.stream(at_start=True)
    assert "".join(map(stream.push, ids)) == " ab cd"


def test_special_tokens_are_left_out_or_spelled(embedded):
    tokenizer = Tokenizer.from_metadata(with_extra_tokens(embedded), "test")
    text = "<|im_start|>user\nhi[TOOL]<|im_end|>"
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    assert tokenizer.decode(ids) == "user\nhi[TOOL]"  # user-defined tokens are text
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.token_text(ids[0]) == "<|im_start|>"
    assert len(tokenizer.encode(text, add_special=False)) > len(ids)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_and_eos_are_added_as_the_file_says(embedded):
    for add_bos in (False, True):
        for add_eos in (False, True):
            metadata = {**embedded, "tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": add_eos}
            tokenizer = Tokenizer.from_metadata(metadata, "test")
            plain = tokenizer.encode("hello", add_special=False)
            expected = [tokenizer.bos_id] * add_bos + plain + [tokenizer.eos_id] * add_eos
            assert tokenizer.encode("hello") == expected
            assert tokenizer.bos_token == metadata["tokenizer.ggml.tokens"][tokenizer.bos_id]


def test_half_characters_are_replaced(embedded_tokenizer):
    assert embedded_tokenizer.decode(embedded_tokenizer.encode("a\udc80b")) == "a\ufffdb"


def test_ids_outside_the_vocabulary_are_refused(embedded_tokenizer):
    for token_id in (-1, embedded_tokenizer.vocab_size):
        with pytest.raises(ShapeError, match=str(token_id)):
            embedded_tokenizer.decode([token_id])


# ---- ends of a text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "ends"),
    [
        ({}, ["<eos>"]),
        ({"<|im_end|>": 1, "<|eot_id|>": 3}, ["<eos>", "<|im_end|>", "<|eot_id|>"]),
        ({"<｜end▁of▁sentence｜>": 3, "[EOT]": 3}, ["<eos>", "<｜end▁of▁sentence｜>", "[EOT]"]),
        ({"<|fim_pad|>": 4, "<|fim_prefix|>": 4, "<|file_sep|>": 3}, ["<eos>", "<|fim_pad|>", "<|file_sep|>"]),
        ({"<|end|>": 3, "<|return|>": 3, "<|call|>": 3}, ["<eos>", "<|return|>", "<|call|>"]),
        ({"</s>": 3, "<|tool_response>": 3}, ["<eos>", "<|tool_response>"]),
    ],
)
def test_end_tokens_are_found_as_llama_cpp_finds_them(extra, ends, tmp_path):
    tokens = [chr(c) for c in range(0x21, 0x7F)] + ["<eos>", *extra]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 94 + [3, *extra.values()],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 94,
        "tokenizer.ggml.eos_token_id": 94,
    }
    metadata["tokenizer.ggml.tokens"].append("ab")
    metadata["tokenizer.ggml.token_type"].append(1)
    ours = Tokenizer.from_metadata(metadata, "test")
    assert ours.eos_ids == {tokens.index(end) for end in ends}
    text = "ab" + "".join(extra) + "a b"
    with llama_cpp_tokenizer(write_vocabulary(tmp_path / "vocab.gguf", metadata)) as theirs:
        assert ours.eos_ids == theirs.eos_ids
        assert_equal(ours, theirs, text)  # a found token counts as a control token from then on


# ---- damaged and foreign files --------------------------------------------------------------------------------------


def test_missing_byte_tokens_and_duplicates_do_no_harm():
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "ab", "", "a"],
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b", "a b"],
    }
    tokenizer = Tokenizer.from_metadata(metadata, "test")
    assert tokenizer.encode("ab") == [3]  # of equal tokens the last one
    assert tokenizer.encode("axb") == [5, 1]  # the bytes between them have no token, but they are not adjacent
    assert tokenizer.decode([0, 1, 2, 3]) == "abab" + "ab"
    assert tokenizer.bos_id is None
    assert tokenizer.eos_ids == frozenset()


def test_a_missing_pre_tokenizer_means_default(embedded):
    metadata = {key: value for key, value in embedded.items() if key != "tokenizer.ggml.pre"}
    assert Tokenizer.from_metadata(metadata, "test").pre_tokenizer == "default"


def test_unknown_kinds_are_named_together_with_what_there_is(embedded):
    with pytest.raises(
        UnsupportedError, match=r"model\.gguf: tokenizer\.ggml\.pre is 'klingon', .*deepseek-llm.*qwen2"
    ):
        Tokenizer.from_metadata({**embedded, "tokenizer.ggml.pre": "klingon"}, "model.gguf")
    with pytest.raises(UnsupportedError, match="'bert', supported are gpt2 and llama"):
        Tokenizer.from_metadata({**embedded, "tokenizer.ggml.model": "bert"}, "model.gguf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", None, "model is missing"),
        ("model", 7, "model is '7'"),
        ("tokens", None, "tokens is missing"),
        ("tokens", [], "tokens is missing or empty"),
        ("tokens", "abc", "tokens is 'abc', expected a list"),
        ("tokens", [1, 2], "tokens holds something else than texts"),
        ("tokens", ["a", "b"], "token_type has 8192 entries, expected 2"),
        ("token_type", np.ones(3, np.int32), "token_type has 3 entries, expected 8192"),
        ("token_type", ["x"] * 8192, "token_type holds something else than numbers"),
        ("scores", np.zeros(8193, np.float32), "scores has 8193 entries, expected 8192"),
        ("merges", None, "merges is missing"),
        ("merges", ["a"], r"merges\[0\] is 'a', expected two tokens"),
        ("merges", ["a n", "qqq z"], r"merges\[1\] needs token 'qqq'"),
        ("merges", [3], "merges holds something else than texts"),
        ("bos_token_id", 8192, "bos_token_id is 8192, expected less than 8192"),
        ("eos_token_id", -1, "eos_token_id is -1"),
        ("eot_token_id", 99999, "eot_token_id is 99999"),
        ("fim_pad_token_id", 99999, "fim_pad_token_id is 99999"),
        ("bos_token_id", "1", "bos_token_id is '1', expected int"),
        ("add_bos_token", 3, "add_bos_token is '3', expected bool"),
        ("pre", 3, "pre is '3', expected str"),
    ],
)
def test_contradictions_are_refused_in_one_line(key, value, message, embedded):
    metadata = {**embedded, f"tokenizer.ggml.{key}": value}
    with pytest.raises(FormatError, match=message) as caught:
        Tokenizer.from_metadata(metadata, "model.gguf")
    assert str(caught.value).startswith("model.gguf: ")
    assert "\n" not in str(caught.value)
