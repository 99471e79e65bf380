"""Converting checkpoints of Llama's family: key for key and tensor for tensor what llama.cpp's converter writes."""

import hashlib
import json
from contextlib import suppress

import gguf
import numpy as np
import pytest
from edge_moe_export.convert import convert
from edge_moe_export.hyperparameters import read_hyperparameters
from edge_moe_export.llama_vocabulary import llama_vocabulary_metadata, read_pieces
from hf_checkpoints import hf_tokenizer
from llama_checkpoints import CHECKPOINTS, GOLDEN, PIECES, write_llama_checkpoint
from reference import read_gguf

import edge_moe
from edge_moe.cli import main
from edge_moe.errors import EdgeMoeError, FormatError, UnsupportedError
from edge_moe.gguf import open_gguf

EXPECTED = json.loads((GOLDEN / "converted.json").read_text(encoding="utf-8"))
every_checkpoint = pytest.mark.parametrize("name", CHECKPOINTS)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@every_checkpoint
def test_as_llama_cpp_converts_it(name, kind, tmp_path):
    write_llama_checkpoint(tmp_path / name, name)
    convert(tmp_path / name, tmp_path / "out.gguf", kind)
    expected = EXPECTED[name]["keys"] | {"general.file_type": EXPECTED[name][kind]["file_type"]}
    if name == "Mistral-7B-v0.1":
        expected["llama.attention.sliding_window"] = 7  # which llama.cpp leaves out
    if name == "Llama-3-8B-Instruct":
        expected["tokenizer.ggml.pre"] = "llama-bpe"  # told by its pattern; converted.json always has gpt-2
    keys, _ = read_gguf(tmp_path / "out.gguf")
    keys = {key: value for key, value in keys.items() if not key.startswith("GGUF.")}
    assert keys.keys() == expected.keys()
    for key, value in expected.items():
        found = keys[key].tolist() if isinstance(keys[key], np.ndarray) else keys[key]
        assert found == value, key
    tensors = {
        tensor.name: [
            tensor.tensor_type.name,
            [int(n) for n in reversed(tensor.shape)],
            hashlib.sha256(tensor.data.tobytes()).hexdigest(),
        ]
        for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors
    }
    assert tensors == EXPECTED[name][kind]["tensors"]


@every_checkpoint
def test_the_logits_of_transformers(name, tmp_path):
    """The converted model gives the golden's logits where its vocabulary was not made larger."""
    write_llama_checkpoint(tmp_path / name, name)
    convert(tmp_path / name, tmp_path / "out.gguf", "f32")
    with np.load(GOLDEN / f"{CHECKPOINTS[name][0]}.npz") as saved:
        ids, expected = saved["ids"], saved["logits"]
    logits = edge_moe.load(tmp_path / "out.gguf", kv="f32").logits(ids.tolist())[:, : expected.shape[1]]
    assert np.abs(logits - expected).max() < 1e-5 * np.ptp(expected)


@pytest.mark.parametrize("name", ["linear", "Mistral-7B-v0.1", "Mixtral-8x7B-Instruct-v0.1"])
def test_a_sentencepiece_vocabulary_encodes(name, tmp_path):
    write_llama_checkpoint(tmp_path / name, name)
    convert(tmp_path / name, tmp_path / "out.gguf", "f32")
    tokenizer = edge_moe.load(tmp_path / "out.gguf").tokenizer
    text = "The weights stay in the file — 東京"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id == 1
    assert len(ids) < len(text.encode())
    assert tokenizer.decode(ids).lstrip(" ") == text


@pytest.mark.parametrize(("name", "kind"), [("linear", "Q4_K_M"), ("Mixtral-8x7B-Instruct-v0.1", "Q4_0")])
def test_straight_to_quantized(name, kind, tmp_path, capsys):
    """convert and then quantize give what either of them makes of the folder in one pass."""
    write_llama_checkpoint(tmp_path / name, name)
    folder, plain, two, one, other = (str(tmp_path / file) for file in (name, "p.gguf", "2.gguf", "a.gguf", "b.gguf"))
    assert main(["convert", folder, plain, "--type", "f32"]) == 0
    assert main(["quantize", plain, two, "--type", kind]) == 0
    assert main(["convert", folder, one, "--type", kind.lower()]) == 0
    assert main(["quantize", folder, other, "--type", kind]) == 0
    expected = contents(two)
    assert contents(one) == expected
    assert contents(other) == expected
    assert {fmt for fmt, _, _ in expected[1].values()} >= {"F32", "Q4_0" if kind == "Q4_0" else "Q5_0"}
    assert main(["run", one, "the", "-n", "4", "--temp", "0"]) == 0
    assert "4 tokens" in capsys.readouterr().err


def contents(path):
    file = open_gguf(path)
    tensors = {name: (entry.format.name, entry.shape, bytes(entry.data)) for name, entry in file.tensors.items()}
    return {key: str(value) for key, value in file.metadata.items()}, tensors


# ---- config.json


def parameters(**changes):
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    config.pop("rope_parameters")
    return read_hyperparameters({key: value for key, value in (config | changes).items() if value != "-"}, GOLDEN)


def test_old_files_say_less():
    """Llama 2 has no rope_theta, the first Llama as many heads of keys as of queries; RoPE's kind was called type."""
    keys = parameters(num_key_value_heads="-", head_dim="-", rope_scaling={"type": "linear", "factor": 2}).metadata()
    assert keys["llama.attention.head_count_kv"] == 4
    assert keys["llama.rope.freq_base"] == 10000.0
    assert (keys["llama.rope.scaling.type"], keys["llama.rope.scaling.factor"]) == ("linear", 2)
    assert keys["llama.rope.dimension_count"] == 8


def test_yarn():
    yarn = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16, "attn_factor": 0.5, "beta_fast": 30}
    keys = parameters(rope_scaling=yarn, rope_theta=5e5).metadata()
    rope = {key.removeprefix("llama.rope."): value for key, value in keys.items() if ".rope." in key}
    assert rope == {
        "freq_base": 5e5, "scaling.type": "yarn", "scaling.factor": 16.0, "scaling.original_context_length": 16,
        "scaling.yarn_attn_factor": 0.5, "scaling.yarn_beta_fast": 30.0, "dimension_count": 8,
    }  # fmt: skip


def test_the_window_is_of_models_that_have_one():
    assert "llama.attention.sliding_window" not in parameters(sliding_window=7).metadata()
    mistral = parameters(sliding_window=7, architectures=["MistralForCausalLM"])
    assert mistral.metadata()["llama.attention.sliding_window"] == 7
    without = parameters(sliding_window=None, architectures=["MistralForCausalLM"])
    assert "llama.attention.sliding_window" not in without.metadata()
    unsaid = parameters(architectures=["MistralForCausalLM"])
    assert unsaid.metadata()["llama.attention.sliding_window"] == 4096  # as transformers takes it


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act is 'gelu', only silu"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor is '0.5', only 1.0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, UnsupportedError, "rope type 'dynamic'"),
        ({"rope_scaling": [2.0]}, FormatError, "rope_scaling"),
        ({"num_key_value_heads": "2"}, FormatError, "num_key_value_heads is '2'"),
        ({"intermediate_size": "-"}, FormatError, "intermediate_size is 'None'"),
    ],
)
def test_config_that_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        parameters(**change).metadata()


@pytest.mark.parametrize(
    "wrong", [{"low_freq_factor": 4.0}, {"factor": 0}, {"original_max_position_embeddings": 1.5}, {"rope_theta": -1}]
)
def test_llama3_factors_that_are_wrong(wrong):
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64} | wrong
    with pytest.raises(FormatError, match="rope_scaling is"):
        parameters(rope_parameters=rope).rope_divisors()


# ---- tokenizers


def vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    return llama_vocabulary_metadata(folder, read_hyperparameters(config, folder / "config.json"))


def edited(folder, name, edit):
    document = json.loads((folder / name).read_text(encoding="utf-8"))
    edit(document)
    (folder / name).write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize(("size", "key", "value"), [(32016, "eot_token_id", 32010), (49152, "add_bos_token", False)])
def test_sizes_that_llama_cpp_knows_models_by(size, key, value, tmp_path):
    """CodeLlama's, and that of SmolLM, which adds no BOS token whatever the files say."""
    write_llama_checkpoint(tmp_path / "hf", "linear")
    assert vocabulary(tmp_path / "hf").get(f"tokenizer.ggml.{key}") != value
    edited(tmp_path / "hf", "config.json", lambda c: c.update(vocab_size=size))
    keys = vocabulary(tmp_path / "hf")
    assert keys[f"tokenizer.ggml.{key}"] == value
    assert len(keys["tokenizer.ggml.tokens"]) == size


def test_pre_tokenizer_of_smollm(tmp_path):
    write_llama_checkpoint(tmp_path / "hf", "llama-tiny-chat")
    tokenizer, _ = hf_tokenizer(read_gguf(GOLDEN / "llama.gguf")[0])
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]}
    digits["pretokenizers"].append(tokenizer["pre_tokenizer"])
    assert vocabulary(tmp_path / "hf")["tokenizer.ggml.pre"] == "gpt-2"
    edited(tmp_path / "hf", "tokenizer.json", lambda t: t.update(pre_tokenizer=digits))
    assert vocabulary(tmp_path / "hf")["tokenizer.ggml.pre"] == "smollm"


@pytest.mark.parametrize("change", ["empty", "cut", "noise", "no kind", "no text", "field 3"])
def test_a_damaged_sentencepiece_model(change, tmp_path):
    data = PIECES.read_bytes()
    piece = b"\x0a\x01a\x15\x00\x00\x00\x00\x18"
    spoiled = {
        "empty": b"",
        "cut": data[:1000],
        "noise": np.random.default_rng(0).bytes(500),
        "no kind": b"\x0a" + bytes([len(piece) + 1]) + piece + b"\x09",
        "no text": b"\x0a\x03\x0a\x01\xff",
        "field 3": b"\x0b",
    }
    (tmp_path / "tokenizer.model").write_bytes(spoiled[change])
    with pytest.raises(FormatError, match="is no SentencePiece model; download the file again"):
        read_pieces(tmp_path / "tokenizer.model")


def test_no_cut_of_a_sentencepiece_model_does_more_than_raise(tmp_path):
    data, path = PIECES.read_bytes(), tmp_path / "tokenizer.model"
    for n in range(0, len(data), 7):
        path.write_bytes(data[:n])
        with suppress(FormatError):
            assert read_pieces(path)


# ---- bad input

BAD_INPUT = [
    ("config.json", lambda f: edited(f, "config.json", lambda c: c.update(num_key_value_heads=4)), "k_proj"),
    ("config.json", lambda f: edited(f, "config.json", lambda c: c.update(num_hidden_layers=3)), "missing"),
    ("config.json", lambda f: edited(f, "config.json", lambda c: c.update(num_hidden_layers=1)), "no place"),
    ("config.json", lambda f: edited(f, "config.json", lambda c: c.update(num_local_experts=5)), "gate"),
    ("tokenizer.json", lambda f: (f / "tokenizer.json").unlink(), "no such file"),
    ("tokenizer.json", lambda f: edited(f, "tokenizer.json", lambda t: t.update(decoder=None)), "'BPE'"),
    ("tokenizer.json", lambda f: edited(f, "tokenizer.json", lambda t: t.update(added_tokens=[3])), "no tokenizer"),
    ("tokenizer.model", lambda f: (f / "tokenizer.model").write_bytes(b"x"), "no SentencePiece"),
    ("added_tokens.json", lambda f: (f / "added_tokens.json").write_text('{"a": "b"}'), "has no id"),
]


@pytest.mark.parametrize(("file", "spoil", "message"), BAD_INPUT)
def test_bad_input_gives_one_line_and_no_file(file, spoil, message, tmp_path, capsys):
    folder, out = tmp_path / "hf", tmp_path / "out"
    write_llama_checkpoint(folder, "Mixtral-8x7B-Instruct-v0.1")
    if file == "added_tokens.json":
        (folder / "tokenizer.model").write_bytes(PIECES.read_bytes())
    out.mkdir()
    spoil(folder)
    with pytest.raises(EdgeMoeError, match=message):
        convert(folder, out / "model.gguf")
    assert main(["convert", str(folder), str(out / "model.gguf")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(out.iterdir())
