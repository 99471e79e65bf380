"""Vocabularies beside tokenizer.json: tiktoken.model as Moonlight and Kimi-K2 have it, and SentencePiece models."""

import base64
import io
import json
import math
import random
import re
from itertools import pairwise

import numpy as np
import pytest
from edge_moe_export.convert import convert
from edge_moe_export.hyperparameters import read_hyperparameters
from edge_moe_export.vocabularies import deepseek_vocabulary_metadata
from hf_checkpoints import GOLDEN, hf_tensors, stored, write_hf_checkpoint, write_safetensors
from reference import read_gguf
from vocab_files import CHARACTER_OF_BYTE, TEXTS, llama_cpp_tokenizer, real_vocabulary, write_vocabulary

import edge_moe
from edge_moe.cli import main
from edge_moe.errors import FormatError, UnsupportedError
from edge_moe.gguf import open_gguf
from edge_moe.tokenizer import Tokenizer

N_RANKS = 420
# As the module that comes with the models has it.
PYTHON_MODULE = r'''
raise SystemExit("this is read, never run")


class TikTokenTokenizer:
    num_reserved_special_tokens = 256
    pat_str = "|".join(
        [
            r"""[\p{Han}]+""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    )
'''


def made_up_ranks(seed=0):
    """All bytes in a mixed order, then tokens of two known ones each, as training makes them; some of them are not."""
    rng = random.Random(seed)
    single = [bytes([byte]) for byte in range(256)]
    rng.shuffle(single)
    ranks = {token: rank for rank, token in enumerate(single)}
    letters = [bytes([byte]) for byte in b"  \n.adehinorstw0123"] + [bytes([byte]) for byte in "你漢е".encode()]
    pool = list(letters)
    while len(ranks) < N_RANKS:
        token = rng.choice(pool) + rng.choice(pool)
        if len(ranks) % 40 == 0:
            token += rng.choice(letters) + rng.choice(letters)  # perhaps not to be reached by merges
        if len(token) < 9 and token not in ranks:
            ranks[token] = len(ranks)
            pool.append(token)
    return ranks


def edited_config(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def kimi_folder(folder, *, vocab_size=N_RANKS + 256 + 4, ranks=None):
    """A checkpoint without weights, with a tiktoken.model -> its ranks."""
    write_hf_checkpoint(folder, "v3")
    (folder / "tokenizer.json").unlink()
    ranks = ranks or made_up_ranks()
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    names = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 9: "<think>", 254: "[UNK]", 255: "[PAD]"}
    config = {
        "added_tokens_decoder": {
            str(N_RANKS + i): {"content": text, "special": text != "<think>"} for i, text in names.items()
        },
        "bos_token": "[BOS]",
        "eos_token": "<|im_end|>",
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_moonshot.py").write_text(PYTHON_MODULE)
    edited_config(folder, vocab_size=vocab_size, bos_token_id=N_RANKS, eos_token_id=N_RANKS + 2, model_type="kimi_k2")
    return ranks


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


def test_a_kimi_checkpoint_runs(tmp_path, capsys):
    folder = tmp_path / "hf"
    vocab_size = N_RANKS + 256
    kimi_folder(folder, vocab_size=vocab_size)
    _, tensors = read_gguf(GOLDEN / "v3.gguf")
    weights = hf_tensors(tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = np.resize(weights[name], (vocab_size, weights[name].shape[1]))
    write_safetensors(folder / "model.safetensors", {name: stored(value, "BF16") for name, value in weights.items()})
    assert main(["convert", str(folder), str(tmp_path / "model.gguf")]) == 0
    model = edge_moe.load(tmp_path / "model.gguf")
    assert model.tokenizer.encode("<|im_user|>", parse_special=True) == [N_RANKS + 3]
    assert len(list(model.generate("and the", max_new_tokens=4, ignore_eos=True))) > 0


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


def sentencepiece_folder(folder, *, vocab_size=372):
    """A checkpoint without weights, with a tokenizer.model -> the model itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    write_hf_checkpoint(folder, "v2_lite")
    (folder / "tokenizer.json").unlink()
    lines = ["the cat and the dog in the house", "hello world, hello again!", "an error in the thing", "12 345 6789"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([*lines, "多くの漢字 かな"] * 30), model_writer=model, vocab_size=350, model_type="bpe",
        byte_fallback=True, user_defined_symbols=["<sep>"], control_symbols=["<ctl>"], minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "added_tokens.json").write_text(json.dumps({"<more>": 361, "<late>": 5000}))
    added = {
        "1": {"content": "<s>", "special": True},
        "362": {"content": "<|im|>", "special": False},
        "363": {"content": "▁▁x", "special": False},
        "364": {"content": "<q>", "special": True},
        "9999": {"content": "<z>", "special": True},
    }
    config = {"add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    edited_config(folder, vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, pad_token_id=365, sep_token_id=5000)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_sentencepiece_keys(tmp_path):
    model = sentencepiece_folder(tmp_path / "hf")
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in vocabulary(tmp_path / "hf").items()}
    assert (keys["model"], keys["pre"]) == ("llama", "default")
    n = model.vocab_size()
    assert n < 361
    tokens, kinds, scores = keys["tokens"], keys["token_type"].tolist(), keys["scores"]
    assert scores.dtype == np.float32
    assert tokens[:n] == [model.IdToPiece(i) for i in range(n)]
    assert tokens[n:] == [f"[PAD{i}]" for i in range(n, 361)] + ["<more>", "<|im|>", "  x", "<q>"] + [
        f"[PAD{i}]" for i in range(365, 372)
    ]
    assert kinds[:3] == [2, 3, 3]  # <unk>, <s>, </s>
    assert {tokens[i]: kinds[i] for i in range(3, 5)} == {"<ctl>": 3, "<sep>": 1}
    assert kinds[5 : 5 + 256] == [6] * 256
    assert set(kinds[261:n]) == {1}
    assert kinds[n:] == [5] * (361 - n) + [4, 3, 4, 3] + [5] * 7
    assert scores[2:n].tolist() == [model.GetScore(i) for i in range(2, n)]
    assert scores[n:].tolist() == [-10000] * (361 - n) + [-1000, -1000, -1000, -1000] + [-10000] * 7
    assert scores[1] == -1000  # stated by tokenizer_config.json, too
    special = {key: value for key, value in keys.items() if key.endswith("_id") or key.startswith("add_")}
    assert special == {
        "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 365, "add_bos_token": True, "add_eos_token": False
    }  # fmt: skip


def test_sentencepiece_tokens(tmp_path):
    """Ours are those of SentencePiece itself, and on hard texts those of llama.cpp."""
    model = sentencepiece_folder(tmp_path / "hf")
    keys = vocabulary(tmp_path / "hf")
    ours = Tokenizer.from_metadata(keys, tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.add_bos, ours.add_eos) == (1, 2, True, False)
    for text in ("the cat in the house", "hello there, thing 12345!", "漢字 unknown ünïcode", "a"):
        assert ours.encode(text, add_special=False) == model.encode(text)
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


def test_a_tokenizer_json_that_restates_a_sentencepiece_model(tmp_path):
    """It gives way, but its added tokens and its template count; a byte-level one comes first."""
    write_hf_checkpoint(tmp_path / "bytes", "v2_lite")
    model = sentencepiece_folder(tmp_path / "hf")
    (tmp_path / "bytes" / "tokenizer.model").write_bytes((tmp_path / "hf" / "tokenizer.model").read_bytes())
    assert vocabulary(tmp_path / "bytes")["tokenizer.ggml.model"] == "gpt2"
    restated = json.loads((tmp_path / "bytes" / "tokenizer.json").read_text())
    restated["model"]["byte_fallback"] = True
    pieces = [model.IdToPiece(i) for i in range(model.vocab_size())]
    pieces += [f"[PAD{i}]" for i in range(len(pieces), 364)] + ["<q>"]
    restated["model"] |= {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []}
    row = restated["added_tokens"][0]
    restated["added_tokens"] = [row | {"id": i, "content": pieces[i]} for i in (1, 2, 364)]
    del restated["post_processor"]
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(restated))
    path = tmp_path / "hf" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<q>"}))
    keys = vocabulary(tmp_path / "hf")
    assert keys["tokenizer.ggml.tokens"][300] == model.IdToPiece(300)
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 364)


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
