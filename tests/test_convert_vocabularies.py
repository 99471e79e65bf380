"""Vocabularies beside tokenizer.json: tiktoken.model as Moonlight and Kimi-K2 have it, and SentencePiece models."""

import hashlib
import json
import math
import random
import re
from itertools import pairwise

import numpy as np
import pytest
from deepseek_checkpoints import N_RANKS, SENTENCEPIECE_MODEL, kimi_folder, sentencepiece_folder
from edge_moe_export.convert import convert
from edge_moe_export.hyperparameters import read_hyperparameters
from edge_moe_export.vocabularies import deepseek_vocabulary_metadata
from edge_moe_export.vocabulary import CHECK_TEXT
from hf_checkpoints import write_hf_checkpoint
from vocab_files import CHARACTER_OF_BYTE, TEXTS, llama_cpp_tokenizer, real_vocabulary, write_vocabulary

import edge_moe
from edge_moe.cli import main
from edge_moe.errors import FormatError, UnsupportedError
from edge_moe.gguf import open_gguf
from edge_moe.tokenizer import Tokenizer


def vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    return deepseek_vocabulary_metadata(folder, read_hyperparameters(config, folder / "config.json"))


def gguf_text(token, alphabet):
    return "".join(alphabet[byte] for byte in token)


def bytes_merged_by_rank(word, ranks):
    """tiktoken's own rule: the adjacent pair of lowest rank is merged first, until none is a token -> ids."""
    parts = [bytes([byte]) for byte in word]
    while True:
        joint = [ranks.get(a + b, math.inf) for a, b in pairwise(parts)]
        if not joint or min(joint) == math.inf:
            return [ranks[part] for part in parts]
        at = joint.index(min(joint))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


# ---- tiktoken.model -------------------------------------------------------------------------------------------------


def test_tiktoken_keys(tmp_path):
    ranks = kimi_folder(tmp_path / "hf")
    keys = {
        key.removeprefix("tokenizer.").removeprefix("ggml."): value
        for key, value in vocabulary(tmp_path / "hf").items()
    }
    assert (keys["model"], keys["pre"]) == ("gpt2", "kimi-k2")
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    assert keys["tokens"][:N_RANKS] == [gguf_text(token, alphabet) for token in ranks]
    reserved = [f"<|reserved_token_{N_RANKS + i}|>" for i in range(256)]
    for i, text in {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 9: "<think>"}.items():
        reserved[i] = text
    reserved[254:] = ["[UNK]", "[PAD]"]
    assert keys["tokens"][N_RANKS : N_RANKS + 256] == reserved
    assert keys["tokens"][N_RANKS + 256 :] == [f"[PAD{N_RANKS + 256 + i}]" for i in range(4)]
    assert keys["token_type"].tolist() == [1] * N_RANKS + [3] * 256 + [5] * 4
    assert (keys["bos_token_id"], keys["eos_token_id"]) == (N_RANKS, N_RANKS + 2)
    assert keys["chat_template"].startswith("{% for m")
    assert not keys.keys() & {"add_bos_token", "unknown_token_id"}  # nothing says so
    # Every merge makes a token of two others, in the order of ranks.
    ids = {text: token_id for token_id, text in enumerate(keys["tokens"])}
    made = [ids[merge.replace(" ", "")] for merge in keys["merges"]]
    assert made == sorted(made)
    assert len(made) > 100
    assert all(ids[part] < rank for merge, rank in zip(keys["merges"], made, strict=True) for part in merge.split(" "))


def test_tiktoken_words_become_the_tokens_of_the_ranks(tmp_path):
    """The merges give what merging by rank gives, but for tokens that no merges reach, which tiktoken takes whole."""
    ranks = kimi_folder(tmp_path / "hf")
    tokenizer = Tokenizer.from_metadata(vocabulary(tmp_path / "hf"), tmp_path)
    rng = random.Random(3)
    for _ in range(300):
        word = "".join(rng.choice("adehinorstw") for _ in range(rng.randint(1, 12)))
        assert tokenizer.encode(word, add_special=False) == bytes_merged_by_rank(word.encode(), ranks)


def test_merges_follow_from_ranks(tmp_path):
    """A real vocabulary's ids of tokens, taken for ranks, give back the merges that it was made with."""
    metadata = open_gguf(real_vocabulary("qwen2")).metadata
    rows = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    byte_of = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}
    ranks = {bytes(byte_of[c] for c in text): i for i, (text, kind) in enumerate(rows) if kind == 1}
    kimi_folder(tmp_path / "hf", ranks=ranks, vocab_size=len(ranks) + 256)
    assert vocabulary(tmp_path / "hf")["tokenizer.ggml.merges"] == list(metadata["tokenizer.ggml.merges"])


def test_tiktoken_tokens_are_those_of_llama_cpp(tmp_path):
    kimi_folder(tmp_path / "hf")
    keys = vocabulary(tmp_path / "hf")
    ours = Tokenizer.from_metadata(keys, tmp_path)
    path = write_vocabulary(tmp_path / "vocabulary.gguf", keys)
    with llama_cpp_tokenizer(path) as theirs:
        for text in (*TEXTS, "[BOS]the<|im_user|> 你好 wo<think>rd[EOS]<|reserved_token_430|>"):
            for parse_special in (False, True):
                ids = ours.encode(text, add_special=False, parse_special=parse_special)
                assert ids == theirs.encode(text, parse_special=parse_special), text
        assert ours.eos_ids == theirs.eos_ids
        assert (ours.add_bos, ours.add_eos) == theirs.adds


def test_a_known_vocabulary_needs_no_module(tmp_path, monkeypatch):
    """It is known by the hash of the tokens of one text, as llama.cpp's converter knows it."""
    kimi_folder(tmp_path / "hf")
    keys = vocabulary(tmp_path / "hf")
    with llama_cpp_tokenizer(write_vocabulary(tmp_path / "vocabulary.gguf", keys)) as theirs:
        ids = theirs.encode(CHECK_TEXT, parse_special=True)
    (tmp_path / "hf" / "tokenization_moonshot.py").unlink()
    with pytest.raises(UnsupportedError, match="says how text is split"):
        vocabulary(tmp_path / "hf")
    known = hashlib.sha256(str(ids).encode()).hexdigest()
    monkeypatch.setattr("edge_moe_export.tiktoken_vocabulary._KIMI_HASH", known)
    assert vocabulary(tmp_path / "hf")["tokenizer.ggml.pre"] == "kimi-k2"


def test_a_kimi_checkpoint_runs(tmp_path):
    folder = tmp_path / "hf"
    kimi_folder(folder, vocab_size=N_RANKS + 256)
    assert main(["convert", str(folder), str(tmp_path / "model.gguf")]) == 0
    model = edge_moe.load(tmp_path / "model.gguf")
    assert model.tokenizer.encode("<|im_user|>", parse_special=True) == [N_RANKS + 3]
    list(model.generate("and the", max_new_tokens=4, ignore_eos=True))  # its tokens need not be text
    assert (model.last_stats.completion_tokens, model.last_stats.stop_reason) == (4, "length")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("tiktoken.model", b"", FormatError, "has 0 tokens"),
        ("tiktoken.model", b"YQ== x\n", FormatError, "line 1 is"),
        ("tiktoken.model", b"YQ== 0\n\nYQ 1\n", FormatError, "line 3 is"),
        ("tiktoken.model", b"YQ== 0\nYQ== 1\n", FormatError, "line 2 has rank 1"),
        ("tiktoken.model", b"YQ== 0\nYg== 0\n", FormatError, "a rank for each"),
        ("tiktoken.model", b"YQ== 99999\n", FormatError, "rank 99999"),
        ("tiktoken.model", b"\xff\xfe\x00 0\n", FormatError, "line 1"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}', FormatError, "added token 'x'"),
        ("tokenization_moonshot.py", b"pat_str = r'\\w+'", UnsupportedError, r"splits text by"),
        ("tokenization_moonshot.py", b"pat_str = other", UnsupportedError, "says how text is split"),
        ("tokenization_moonshot.py", b"pat_str = '|'.join([x])", UnsupportedError, "says how text is split"),
        ("tokenization_moonshot.py", b"def (", UnsupportedError, "says how text is split"),
    ],
)
def test_bad_tiktoken_files(name, content, error, message, tmp_path):
    kimi_folder(tmp_path / "hf")
    (tmp_path / "hf" / name).write_bytes(content)
    with pytest.raises(error, match=message):
        convert(tmp_path / "hf", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# ---- tokenizer.model ------------------------------------------------------------------------------------------------


@pytest.fixture
def pieces():
    """The model itself."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="it is the oracle of its own files")
    return sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE_MODEL))


def test_sentencepiece_keys(pieces, tmp_path):
    sentencepiece_folder(tmp_path / "hf")
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in vocabulary(tmp_path / "hf").items()}
    assert (keys["model"], keys["pre"]) == ("llama", "default")
    n = pieces.vocab_size()
    assert n == 380
    tokens, kinds, scores = keys["tokens"], keys["token_type"].tolist(), keys["scores"]
    assert scores.dtype == np.float32
    assert tokens[:n] == [pieces.IdToPiece(i) for i in range(n)]
    assert tokens[n:] == [f"[PAD{i}]" for i in range(n, 391)] + ["<more>", "<|im|>", "  x", "<q>"] + [
        f"[PAD{i}]" for i in range(395, 402)
    ]
    assert kinds[:3] == [2, 3, 3]  # <unk>, <s>, </s>
    assert {tokens[i]: kinds[i] for i in range(3, 5)} == {"<ctl>": 3, "<sep>": 1}
    assert kinds[5 : 5 + 256] == [6] * 256
    assert set(kinds[261:n]) == {1}
    assert kinds[n:] == [5] * (391 - n) + [4, 3, 4, 3] + [5] * 7
    assert scores[2:n].tolist() == [pieces.GetScore(i) for i in range(2, n)]
    assert scores[n:].tolist() == [-10000] * (391 - n) + [-1000, -1000, -1000, -1000] + [-10000] * 7
    assert scores[1] == -1000  # stated by tokenizer_config.json, too
    special = {key: value for key, value in keys.items() if key.endswith("_id") or key.startswith("add_")}
    assert special == {
        "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 395, "add_bos_token": True, "add_eos_token": False
    }  # fmt: skip


def test_sentencepiece_tokens(pieces, tmp_path):
    """Ours are those of SentencePiece itself, and on hard texts those of llama.cpp."""
    sentencepiece_folder(tmp_path / "hf")
    keys = vocabulary(tmp_path / "hf")
    ours = Tokenizer.from_metadata(keys, tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.add_bos, ours.add_eos) == (1, 2, True, False)
    for text in ("the cat in the house", "hello there, thing 12345!", "漢字 unknown ünïcode", "a"):
        assert ours.encode(text, add_special=False) == pieces.encode(text)
        assert ours.decode(ours.encode(text)) == text
    with llama_cpp_tokenizer(write_vocabulary(tmp_path / "vocabulary.gguf", keys)) as theirs:
        for text in (*TEXTS, "<q>the<|im|>  x<more> cat"):
            for parse_special in (False, True):
                ids = ours.encode(text, add_special=False, parse_special=parse_special)
                assert ids == theirs.encode(text, parse_special=parse_special), text
        assert ours.eos_ids == theirs.eos_ids


def test_sentencepiece_without_a_space_before_the_text(tmp_path):
    sentencepiece_folder(tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_prefix_space": False}))
    assert vocabulary(tmp_path / "hf")["tokenizer.ggml.add_space_prefix"] is False


def test_a_tokenizer_json_that_restates_a_sentencepiece_model(pieces, tmp_path):
    """It gives way, but its added tokens and its template count; a byte-level one comes first."""
    write_hf_checkpoint(tmp_path / "bytes", "v2_lite")
    sentencepiece_folder(tmp_path / "hf")
    (tmp_path / "bytes" / "tokenizer.model").write_bytes((tmp_path / "hf" / "tokenizer.model").read_bytes())
    assert vocabulary(tmp_path / "bytes")["tokenizer.ggml.model"] == "gpt2"
    restated = json.loads((tmp_path / "bytes" / "tokenizer.json").read_text())
    restated["model"]["byte_fallback"] = True
    texts = [pieces.IdToPiece(i) for i in range(pieces.vocab_size())]
    texts += [f"[PAD{i}]" for i in range(len(texts), 394)] + ["<q>"]
    restated["model"] |= {"vocab": {text: i for i, text in enumerate(texts)}, "merges": []}
    row = restated["added_tokens"][0]
    restated["added_tokens"] = [row | {"id": i, "content": texts[i]} for i in (1, 2, 394)]
    del restated["post_processor"]
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(restated))
    path = tmp_path / "hf" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<q>"}))
    keys = vocabulary(tmp_path / "hf")
    assert keys["tokenizer.ggml.tokens"][300] == pieces.IdToPiece(300)
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 394)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"", "SentencePiece model"),
        ("tokenizer.model", b"\xff" * 200, "SentencePiece model"),
        ("tokenizer.model", b"YQ== 0\n", "SentencePiece model"),
        ("added_tokens.json", b'{"<x>": "3"}', "has no id"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"3": {"content": 5}}}', "added token '3'"),
    ],
)
def test_bad_sentencepiece_files(name, content, message, tmp_path, capfd):
    sentencepiece_folder(tmp_path / "hf")
    (tmp_path / "hf" / name).write_bytes(content)
    with pytest.raises(FormatError, match=re.escape(message)):
        vocabulary(tmp_path / "hf")
    capfd.readouterr()
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "model.gguf")]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
