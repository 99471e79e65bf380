"""Converting Hugging Face checkpoints: the golden models come out as they were, FP8 is decoded, bad input is named."""

import json

import gguf
import numpy as np
import pytest
from deepseek_checkpoints import CARD, SAMPLING, fp8_checkpoint
from edge_moe_export.convert import convert
from edge_moe_export.hyperparameters import read_hyperparameters
from edge_moe_export.naming import parts_of_name
from edge_moe_export.vocabulary import vocabulary_metadata
from hf_checkpoints import GOLDEN, e4m3, hf_tensors, stored, write_hf_checkpoint, write_safetensors
from reference import ReferenceModel, read_gguf

import edge_moe
from edge_moe.cli import main
from edge_moe.errors import EdgeMoeError, FormatError, OptionError, UnsupportedError
from edge_moe.gguf import open_gguf
from edge_moe.safetensors import open_safetensors

# Their files hold split kv_b and stacked experts, as the converter writes them.
GOLDENS = ["v2_lite", "v2_no_dense_layer", "v2_groups", "v2_tied", "v3", "v3_no_norm", "v3_lite"]


def distance(a, b):
    return np.abs(a - b).max() / np.ptp(b)


@pytest.mark.parametrize("golden", GOLDENS)
def test_a_golden_model_comes_out_as_it_was(golden, tmp_path):
    """Tensors bit for bit, keys by value, and through the engine the logits of transformers."""
    write_hf_checkpoint(tmp_path / "hf", golden, n_files=1 + len(golden) % 3)
    out = tmp_path / "model.gguf"
    conversion = convert(tmp_path / "hf", out, "f32")
    expected_keys, expected = read_gguf(GOLDEN / f"{golden}.gguf")
    keys, tensors = read_gguf(out)
    n_layers = keys["deepseek2.block_count"]
    if golden == "v3_lite":  # ends in a block for speculation
        assert expected_keys["deepseek2.block_count"] == n_layers + 1
        assert conversion.notes == (
            f"left out layer {n_layers}: it predicts further tokens for speculation and has no part in plain decoding",
        )
        expected = {name: value for name, value in expected.items() if f"blk.{n_layers}." not in name}
    else:
        assert conversion.notes == ()
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    ignored = {"general.name", "deepseek2.nextn_predict_layers", "deepseek2.block_count"}
    for key, value in expected_keys.items():
        if key not in ignored and not key.startswith("GGUF."):
            assert keys.get(key, False) == value, key  # a flag that is off is left out

    with np.load(GOLDEN / f"{golden}.npz") as saved:
        ids, logits = saved["ids"], saved["logits"]
    assert distance(ReferenceModel.from_gguf(out).logits(ids), logits) < 1e-5
    assert distance(edge_moe.load(out).logits(ids.tolist()), logits) < 1e-3


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("target", ["f32", "f16", "bf16", "q8_0"])
def test_types(source, target, tmp_path):
    """Every matrix is what the gguf package makes of it; norms, bias and router stay F32."""
    write_hf_checkpoint(tmp_path / "hf", "v3", dtype=source)
    convert(tmp_path / "hf", tmp_path / "model.gguf", target)
    _, plain = read_gguf(GOLDEN / "v3.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        kind = gguf.GGMLQuantizationType[target.upper()]
        if len(shape) == 1 or "ffn_gate_inp" in tensor.name:
            kind = gguf.GGMLQuantizationType.F32
        elif target == "q8_0" and shape[-1] % 32:
            kind = gguf.GGMLQuantizationType.F16
        assert tensor.tensor_type == kind, tensor.name
        dtype, raw = stored(plain[tensor.name], source)
        values = (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw.astype(np.float32)
        expected = gguf.quantize(values, kind).view(np.uint8).reshape(-1)
        np.testing.assert_array_equal(tensor.data.view(np.uint8).reshape(-1), expected, err_msg=tensor.name)
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    file_type = open_gguf(tmp_path / "model.gguf").metadata["general.file_type"]
    assert file_type == gguf.LlamaFileType[file_types[target]]


def test_the_tokenizer_comes_along(tmp_path):
    write_hf_checkpoint(tmp_path / "hf", "v3")
    convert(tmp_path / "hf", tmp_path / "model.gguf", "bf16")
    ours, golden = (edge_moe.load(path).tokenizer for path in (tmp_path / "model.gguf", GOLDEN / "v3.gguf"))
    text = "the and\n  of a then"
    assert ours.encode(text) == golden.encode(text)
    assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (golden.bos_id, golden.eos_ids, golden.vocab_size)
    assert ours.chat_template.startswith("{{ bos_token }}")


def test_a_v3_config_that_leaves_out_the_routing_means_sigmoid(tmp_path):
    """As transformers saves it: the scoring function is not written, since V3 has but one."""
    write_hf_checkpoint(tmp_path / "hf", "v3")
    edited(tmp_path / "hf", "config.json", lambda c: [c.pop(key) for key in ("scoring_func", "norm_topk_prob")])
    convert(tmp_path / "hf", tmp_path / "model.gguf", "f32")
    keys = open_gguf(tmp_path / "model.gguf").metadata
    assert (keys["deepseek2.expert_gating_func"], keys["deepseek2.expert_weights_norm"]) == (2, True)


def test_chat_templates(tmp_path):
    write_hf_checkpoint(tmp_path / "hf", "v3")
    several = [{"name": "default", "template": "d"}, {"name": "tool use", "template": "t"}]
    edited(tmp_path / "hf", "tokenizer_config.json", lambda c: c.update(chat_template=several))
    templates = {key: value for key, value in vocabulary(tmp_path / "hf").items() if "chat" in key}
    assert templates == {
        "tokenizer.chat_template": "d",
        "tokenizer.chat_template.tool_use": "t",
        "tokenizer.chat_templates": ["tool_use"],
    }
    edited(tmp_path / "hf", "tokenizer_config.json", lambda c: c.pop("chat_template"))
    (tmp_path / "hf" / "chat_template.jinja").write_text("beside", encoding="utf-8")
    assert vocabulary(tmp_path / "hf")["tokenizer.chat_template"] == "beside"


def test_end_of_turn_and_separators(tmp_path):
    """A post-processor that ends a text with another token than tokenizer_config.json names."""
    write_hf_checkpoint(tmp_path / "hf", "v3")

    def edit(tokenizer):
        s, e = ({"SpecialToken": {"id": text, "type_id": 0}} for text in ("<s>", "<pad>"))
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        post = tokenizer["post_processor"]
        post["single"], post["pair"] = [s, a, e], [s, a, e, b, e]
        post["special_tokens"]["<pad>"] = {"id": "<pad>", "ids": [2], "tokens": ["<pad>"]}

    edited(tmp_path / "hf", "tokenizer.json", edit)
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in vocabulary(tmp_path / "hf").items()}
    assert (keys["eos_token_id"], keys["eot_token_id"], keys["add_eos_token"]) == (2, 1, True)


# ---- FP8 ------------------------------------------------------------------------------------------------------------


def test_fp8_with_block_scales(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (300, 200), dtype=np.uint8)
    scales = rng.uniform(1e-4, 1e-2, (3, 2)).astype(np.float32)
    write_safetensors(tmp_path / "model.safetensors", {"w": ("F8_E4M3", codes), "w_scale_inv": ("F32", scales)})
    values = np.array([e4m3(code) for code in range(256)], np.float32)
    expected = values[codes]
    for i in range(300):
        for j in range(200):
            expected[i, j] *= scales[i // 128, j // 128]
    model = open_safetensors(tmp_path)
    assert list(model.entries) == ["w"]
    np.testing.assert_array_equal(model.decode("w"), expected)
    for start, stop in ((0, 1), (127, 129), (100, 300), (256, 300)):
        np.testing.assert_array_equal(model.decode("w", start, stop), expected[start:stop])


def test_an_fp8_checkpoint(tmp_path):
    decoded = fp8_checkpoint(tmp_path / "hf", "v3_lite", 16)
    convert(tmp_path / "hf", tmp_path / "model.gguf", "f32")
    _, tensors = read_gguf(tmp_path / "model.gguf")
    back = hf_tensors(tensors)
    assert back.keys() == {name for name in decoded if "layers.2." not in name}
    for name, value in back.items():
        np.testing.assert_array_equal(value, decoded[name], err_msg=name)


# ---- names and vocabularies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "deepseek-ai/DeepSeek-V2-Lite-Chat", "DeepSeek-V3", "DeepSeek-V3-0324", "deepseek-coder-v2-lite-instruct",
        "Moonlight-16B-A3B-Instruct", "GLM-4.7-Flash", "DeepSeek-R1", "v3lite", "DeepSeek-V2.5-1210", "x-7b1-medium",
        "Kimi-K2-Instruct-0905", "gigachat3-10b-a1.8b", "a-4k-b", "f16-7B", "tiny-8x7B-q4_0", "-a-",
        "kanana-2-30b-a3b-thinking-2601",
    ],
)  # fmt: skip
@pytest.mark.parametrize("n_weights", [15_700_000_000, 100_000])
def test_names_are_taken_apart_as_the_gguf_package_does(name, n_weights):
    full, organization, *rest = gguf.Metadata.get_model_id_components(name, n_weights)
    title = gguf.Metadata.id_to_title
    found = (full and title(full), organization and title(organization), *rest)
    keys = ("name", "organization", "basename", "finetune", "version", "size_label")
    expected = {key: value for key, value in zip(keys, found, strict=True) if value is not None}
    assert parts_of_name(name, n_weights) == expected


def test_general_keys(tmp_path):
    folder = tmp_path / "DeepSeek-v2-tiny-Chat"
    write_hf_checkpoint(folder, "v2_lite")
    card = "---\nlicense: other\nlicense_name: deepseek\nlicense_link: https://example.org/L\nlanguage:\n- en\n- zh\n"
    (folder / "README.md").write_text(card + "pipeline_tag: text-generation\nwidget:\n  - a: {b: c}\n---\n# Title\n")
    (folder / "generation_config.json").write_text('{"top_p": 0.95, "temperature": 0.3, "top_k": 20}')
    convert(folder, tmp_path / "model.gguf", "q8_0")
    keys = {key: value for key, value in read_gguf(tmp_path / "model.gguf")[0].items() if key.startswith("general.")}
    assert keys == {
        "general.architecture": "deepseek2",
        "general.type": "model",
        "general.sampling.top_k": 20,
        "general.sampling.top_p": np.float32(0.95),
        "general.sampling.temp": np.float32(0.3),
        "general.name": "DeepSeek v2 Tiny Chat",
        "general.finetune": "Chat",
        "general.basename": "DeepSeek-v2-tiny",
        "general.size_label": "8x39K",
        "general.license": "other",
        "general.license.name": "deepseek",
        "general.license.link": "https://example.org/L",
        "general.tags": ["text-generation"],
        "general.languages": ["en", "zh"],
        "general.file_type": 7,
        "general.quantization_version": 2,
    }


def test_the_card_names_the_model_before_the_folder_does(tmp_path):
    folder = tmp_path / "DeepSeek-v2-tiny-Chat"
    write_hf_checkpoint(folder, "v2_lite")
    (folder / "README.md").write_text("---\nname: My Model\nmodel_author: Someone\n---\n", encoding="utf-8")
    convert(folder, tmp_path / "model.gguf", "q8_0")
    keys = read_gguf(tmp_path / "model.gguf")[0]
    assert keys["general.name"] == "My Model"
    assert keys["general.author"] == "Someone"


def test_a_card_with_origins(tmp_path):
    folder = tmp_path / "tiny"
    write_hf_checkpoint(folder, "v2_lite")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING), encoding="utf-8")
    convert(folder, tmp_path / "model.gguf", "q8_0")
    keys = {key: value for key, value in read_gguf(tmp_path / "model.gguf")[0].items() if key.startswith("general.")}
    for key in ("architecture", "type", "file_type", "quantization_version"):
        del keys[f"general.{key}"]
    assert keys == {
        "general.sampling.top_k": 20,
        "general.sampling.top_p": np.float32(0.95),
        "general.sampling.temp": np.float32(0.3),
        "general.sampling.penalty_repeat": np.float32(1.1),
        "general.sampling.mirostat": 2,
        "general.sampling.min_p": np.float32(0.1),
        "general.sampling.sequence": "k;p",
        "general.sampling.penalty_last_n": 64,
        "general.name": "Tiny",
        "general.author": "Some Org",
        "general.basename": "Tiny",
        "general.description": "two lines",
        "general.size_label": "8x39K",
        "general.license": "mit,other",
        "general.license.name": "modified",
        "general.license.link": "https://example.org/L",
        "general.source.url": "https://example.org/model",
        "general.source.doi": "10.1/2",
        "general.base_model.count": 5,
        "general.base_model.0.name": "Some Model v2 Chat",
        "general.base_model.0.organization": "Some Org",
        "general.base_model.0.repo_url": "https://huggingface.co/some-org/Some-Model-v2-Chat",
        "general.base_model.1.name": "Base 7B v1.5",
        "general.base_model.1.organization": "Another",
        "general.base_model.1.version": "v1.5",
        "general.base_model.1.repo_url": "https://huggingface.co/another/Base-7B-v1.5",
        "general.base_model.2.repo_url": "https://example.org/else",
        "general.base_model.3.name": "Plain Name",
        "general.base_model.4.name": "Own",
        "general.base_model.4.author": "Me",
        "general.base_model.4.repo_url": "https://example.org/own",
        "general.dataset.count": 1,
        "general.dataset.0.name": "Text",
        "general.dataset.0.organization": "Org",
        "general.dataset.0.repo_url": "https://huggingface.co/org/Text",
        "general.tags": ["moe", "1", "text-generation"],
        "general.languages": ["en", "no"],
    }


@pytest.mark.parametrize("card", ["---\na: [\n---\n", "---\n- list\n---\n", "# none", "", "---\n\x01\n---\n"])
def test_a_card_that_says_nothing(card, tmp_path):
    folder = tmp_path / "tiny"
    write_hf_checkpoint(folder, "v2_lite")
    (folder / "README.md").write_text(card, encoding="utf-8")
    convert(folder, tmp_path / "model.gguf", "q8_0")
    assert read_gguf(tmp_path / "model.gguf")[0]["general.name"] == "Tiny"


def edited(folder, name, edit):
    """Change one JSON file of a checkpoint."""
    document = json.loads((folder / name).read_text(encoding="utf-8"))
    edit(document)
    (folder / name).write_text(json.dumps(document), encoding="utf-8")


def vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    return vocabulary_metadata(folder, read_hyperparameters(config, folder / "config.json"))


def test_token_kinds_and_padding(tmp_path):
    write_hf_checkpoint(tmp_path / "hf", "v3")
    n = len(vocabulary(tmp_path / "hf")["tokenizer.ggml.tokens"])
    edited(tmp_path / "hf", "config.json", lambda c: c.update(vocab_size=n + 6))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    more = [{"id": n, "content": "▁▁", **plain}, {"id": n + 1, "content": "<｜User｜>", **plain}]
    edited(tmp_path / "hf", "tokenizer.json", lambda t: t["added_tokens"].extend(more))
    later = {str(n + 3): {"content": "<late>", "special": True}}
    edited(tmp_path / "hf", "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=later))
    keys = vocabulary(tmp_path / "hf")
    unused = [f"[PAD{n + i}]" for i in range(6)]
    assert keys["tokenizer.ggml.tokens"][n:] == ["  ", "<｜User｜>", unused[2], "<late>", unused[4], unused[5]]
    assert keys["tokenizer.ggml.token_type"][n:].tolist() == [4, 3, 5, 3, 5, 5]
    assert keys["tokenizer.ggml.bos_token_id"] == 0
    assert keys["tokenizer.ggml.add_bos_token"] is True


def test_pre_tokenizers_are_known_by_their_patterns(tmp_path):
    write_hf_checkpoint(tmp_path / "hf", "v3")
    space = r"\s*[\r\n]+|\s+(?!\S)|\s+"
    word = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    known = {
        "deepseek-v3": [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", word + r"| ?[\p{P}\p{S}]+[\r\n]*|" + space],
        "qwen2": [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + space],
    }
    for name, patterns in [*known.items(), (None, ["[a-z]+"])]:
        parts = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
        parts.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False})
        split = {"type": "Sequence", "pretokenizers": parts}
        edited(tmp_path / "hf", "tokenizer.json", lambda t, split=split: t.update(pre_tokenizer=split))
        if name:
            assert vocabulary(tmp_path / "hf")["tokenizer.ggml.pre"] == name
        else:
            with pytest.raises(UnsupportedError, match=r"pre-tokenizer.*\[a-z\]\+"):
                vocabulary(tmp_path / "hf")


# ---- bad input ------------------------------------------------------------------------------------------------------


def remove(folder, name):
    (folder / name).unlink()


def cut(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])


def retype(tensor):
    """Overwrite a dtype of the same size."""

    def edit(folder, name):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data.replace(b'"dtype": "F32"', b'"dtype": "I32"'))

    return edit


PART = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
BAD_INPUT = [
    (PART, remove, FormatError, "no such file"),
    (PART, cut, FormatError, "bytes"),
    (PART, retype, UnsupportedError, "is I32"),
    (PART, lambda f, n: (f / n).write_bytes(b"\xff" * 20), FormatError, "header"),
    (PART, lambda f, n: (f / n).write_bytes(b""), FormatError, "0 bytes"),
    (INDEX, remove, OptionError, "neither"),
    (INDEX, lambda f, n: edited(f, n, lambda d: d["weight_map"].update(more=PART)), FormatError, "more is missing"),
    (INDEX, lambda f, n: edited(f, n, lambda d: d.pop("weight_map")), FormatError, "weight_map"),
    (INDEX, lambda f, n: edited(f, n, lambda d: d["weight_map"].update(x="../x")), FormatError, "no such file"),
    ("config.json", remove, OptionError, "No such file"),
    ("config.json", lambda f, n: (f / n).write_text("{"), FormatError, "no JSON"),
    ("config.json", lambda f, n: (f / n).write_text("[]"), FormatError, "object"),
    ("config.json", lambda f, n: edited(f, n, lambda c: c.pop("hidden_size")), FormatError, "hidden_size"),
    ("config.json", lambda f, n: edited(f, n, lambda c: c.update(kv_lora_rank="8")), FormatError, "kv_lora_rank"),
    ("config.json", lambda f, n: edited(f, n, lambda c: c.update(n_shared_experts="1")), FormatError, "n_shared"),
    (
        "config.json",
        lambda f, n: edited(f, n, lambda c: c.update(quantization_config="x")),
        FormatError,
        "quantization",
    ),
    ("config.json", lambda f, n: edited(f, n, lambda c: c.update(rope_scaling=[1])), FormatError, "rope_scaling"),
    ("config.json", lambda f, n: edited(f, n, lambda c: c.update(kv_lora_rank=31)), FormatError, "kv_b_proj"),
    ("config.json", lambda f, n: edited(f, n, lambda c: c.update(num_hidden_layers=4)), FormatError, "missing"),
    ("config.json", lambda f, n: edited(f, n, lambda c: c.update(n_shared_experts=0)), UnsupportedError, "no place"),
    (
        "config.json",
        lambda f, n: edited(f, n, lambda c: c.update(architectures=["GemmaForCausalLM"])),
        UnsupportedError,
        "GemmaForCausalLM",
    ),
    (
        "config.json",
        lambda f, n: edited(f, n, lambda c: c.update(quantization_config={"quant_method": "gptq"})),
        UnsupportedError,
        "gptq",
    ),
    (
        "config.json",
        lambda f, n: edited(f, n, lambda c: c.update(rope_scaling={"type": "dynamic"})),
        UnsupportedError,
        "dynamic",
    ),
    ("tokenizer.json", remove, UnsupportedError, "tokenizer.json: no such file"),
    (
        "tokenizer.json",
        lambda f, n: edited(f, n, lambda t: t["model"].update(type="Unigram")),
        UnsupportedError,
        "Unigram",
    ),
    ("tokenizer.json", lambda f, n: edited(f, n, lambda t: t["model"].update(merges=[])), FormatError, "merges"),
    ("tokenizer.json", lambda f, n: edited(f, n, lambda t: t.update(added_tokens=[3])), FormatError, "no tokenizer"),
    (
        "tokenizer_config.json",
        lambda f, n: edited(f, n, lambda c: c.update(added_tokens_decoder={"x": 1})),
        FormatError,
        "added token 'x'",
    ),
    ("config.json", lambda f, n: edited(f, n, lambda c: c.update(vocab_size=20)), FormatError, "vocab_size"),
]


@pytest.mark.parametrize(("name", "spoil", "error", "message"), BAD_INPUT)
def test_bad_input_gives_one_line_and_no_file(name, spoil, error, message, tmp_path, capsys):
    folder, out = tmp_path / "hf", tmp_path / "out"
    write_hf_checkpoint(folder, "v3", n_files=3)
    out.mkdir()
    (retype(name) if spoil is retype else spoil)(folder, name)
    with pytest.raises(EdgeMoeError, match=message) as caught:
        convert(folder, out / "model.gguf")
    assert type(caught.value) is error
    assert str(folder) in str(caught.value)
    assert main(["convert", str(folder), str(out / "model.gguf")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("edge-moe: error: ")
    assert not list(out.iterdir())


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    write_hf_checkpoint(tmp_path / "hf", "v3_lite")
    out = tmp_path / "model.gguf"
    assert main(["convert", str(tmp_path / "hf"), str(out), "--type", "q8_0"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "left out layer 2" in printed.err
    assert f"wrote {out}: 30 tensors" in printed.err
    assert main(["convert", str(tmp_path / "hf"), str(out), "--type", "f32", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"] == out.stat().st_size
    assert (document["type"], document["tensors"], len(document["notes"])) == ("f32", 30, 1)


@pytest.mark.parametrize(
    "words", [["{hf}"], ["{hf}", "{out}", "--type", "q4_k"], ["{hf}/none", "{out}"], ["{hf}", "{hf}"]]
)
def test_wrong_words(words, tmp_path, capsys):
    write_hf_checkpoint(tmp_path / "hf", "v3")
    words = [word.format(hf=tmp_path / "hf", out=tmp_path / "model.gguf") for word in words]
    assert main(["convert", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
