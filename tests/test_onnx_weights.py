"""What the ONNX export writes beside the graph: blocks of codes and scales, the tokenizer, all through the command."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import rewrite
from reference import read_gguf
from tokenizers import Tokenizer as LibraryTokenizer

import edge_moe
from edge_moe.api import embedded_model_path
from edge_moe.cli import main

onnx = pytest.importorskip("onnx", reason="the export needs onnx")
pytest.importorskip("onnxruntime", reason="what it writes is run by onnxruntime")

from edge_moe_export.onnx import export_onnx  # noqa: E402
from edge_moe_export.onnx_weights import pack, quantize  # noqa: E402
from onnx import numpy_helper  # noqa: E402

from edge_moe.checkpoint import open_checkpoint  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
TEXTS = [
    "It is a truth universally acknowledged",
    "  two spaces,\n\nlines; 12345 naïve 日本語 🚀",
    "",
    "a<|end_of_text|> b",
]


def restore(codes, scales, bits):
    """Values of codes u8[..., bytes] and scales f32[..., blocks], element by element."""
    n_rows, n_blocks = int(np.prod(scales.shape[:-1])), scales.shape[-1]
    codes, scales = codes.reshape(n_rows, -1), scales.reshape(n_rows, n_blocks)
    n_cols = codes.shape[1] * 8 // bits
    out = np.empty((n_rows, n_cols))
    for row in range(n_rows):
        for col in range(n_cols):
            code = int(codes[row, col * bits // 8])
            if bits == 4:
                code = code >> 4 if col % 2 else code & 15
            out[row, col] = scales[row, col * n_blocks // n_cols] * (code - (1 << bits - 1))
    return out


@pytest.mark.parametrize(("kind", "bits", "block"), [("Q4_0", 4, 32), ("Q4_0", 8, 16), ("Q8_0", 8, 32)])
def test_blocks_are_repacked_exactly(kind, bits, block, tmp_path):
    """The graph's constants are the values that the gguf package decodes."""
    path = rewrite(GOLDEN / "v2_lite.gguf", tmp_path / "m.gguf", matrices=gguf.GGMLQuantizationType[kind])
    export_onnx(open_checkpoint(path), tmp_path / "out", bits=bits, block=block)
    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    found = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    _, expected = read_gguf(path)
    own_bits = 4 if kind == "Q4_0" else 8  # of all but the experts
    for name, gguf_name in (
        ("layers.0.self_attn.q_proj", "blk.0.attn_q.weight"),
        ("layers.0.mlp.down_proj", "blk.0.ffn_down.weight"),
        ("lm_head", "output.weight"),
    ):
        values = restore(found[f"{name}.codes"], found[f"{name}.scales"], own_bits)
        assert np.array_equal(values, expected[gguf_name])
    rows = restore(found["embed_tokens.rows"], found["embed_tokens.scales"], own_bits)
    assert np.array_equal(rows, expected["token_embd.weight"])
    name = "layers.1.mlp.experts"
    expert_bits = 4 if kind == "Q4_0" else bits
    down = restore(found[f"{name}.down_proj.codes"], found[f"{name}.down_proj.scales"], expert_bits)
    assert np.array_equal(down, expected["blk.1.ffn_down_exps.weight"].reshape(down.shape))
    both = [found[f"{name}.gate_proj.and_up.{part}"] for part in ("codes", "scales")]
    for start, part in ((0, "gate"), (1, "up")):
        values = restore(both[0][:, start::2], both[1][:, start::2], expert_bits)
        assert np.array_equal(values, expected[f"blk.1.ffn_{part}_exps.weight"].reshape(values.shape))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_by_importance(bits):
    """Errors in columns that count more become less, by the sum that is weighted; the same for all leaves all as is."""
    rng = np.random.default_rng(7)
    values = rng.standard_normal((50, 128), np.float32)
    importance = rng.uniform(0.01, 1.0, 128).astype(np.float32) ** 4 + np.float32(1e-4)
    errors = []
    for weights in (None, importance):
        codes, scales = quantize(values, bits, 32, weights)
        restored = np.repeat(scales, 32, axis=1) * codes
        errors.append((importance * (values - restored) ** 2).sum())
    assert errors[1] < 0.97 * errors[0]
    plain, even = quantize(values, bits, 32), quantize(values, bits, 32, np.full(128, 0.5, np.float32))
    assert np.array_equal(plain[0], even[0])
    np.testing.assert_allclose(plain[1], even[1], rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize(bits):
    """Better than rounding to the largest value of each block, and right for blocks of zeros and of codes."""
    values = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32)
    values[3] = 0
    values[5, :32] = np.arange(32) % 15 - 7  # codes with scale 1
    values[6, 7] = 1e-42  # a block whose inverse overflows
    values[6, 0:7] = values[6, 8:32] = 0
    codes, scales = quantize(values, bits, 32)
    restored = restore(pack(codes, bits), scales, bits)
    assert np.isfinite(scales).all()
    assert np.array_equal(restored[3], values[3])
    assert np.abs(restored[5, :32] - values[5, :32]).max() < (1e-6 if bits == 4 else 0.03)
    blocks = values.astype(np.float64).reshape(-1, 32)
    steps = (1 << bits - 1) - 1
    scale = np.abs(blocks).max(axis=1, keepdims=True) / steps
    plain = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 1e-30)) * scale
    errors, plain_errors = (np.square(each.reshape(-1, 32) - blocks).sum(axis=1) for each in (restored, plain))
    assert (errors <= plain_errors * (1 + 1e-4) + 1e-12).all()
    if bits == 4:
        assert errors.sum() < 0.85 * plain_errors.sum()


def test_tokenizer_json_is_ours(tmp_path):
    """The library's tokenizer made of the file gives the ids and the text that ours gives."""
    path = embedded_model_path()
    export_onnx(open_checkpoint(path), tmp_path / "out", bits=8)
    ours, theirs = edge_moe.load(path).tokenizer, LibraryTokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in TEXTS:
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text, parse_special=True)
        assert theirs.decode(ids) == ours.decode(ids)
    assert edge_moe.load(tmp_path / "out").tokenizer.encode(TEXTS[1]) == ours.encode(TEXTS[1])
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["add_bos_token"]) == (ours.eos_token, ours.add_bos)


@pytest.mark.slow
def test_embedded_model_through_the_command(tmp_path, capsys):
    """Exported in 8 bits it chooses the engine's tokens but for near ties, and is as good in perplexity."""
    out = tmp_path / "out"
    assert main(["export", "onnx", str(embedded_model_path()), str(out), "--bits", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["relative_error"] == {} and report["bytes"] == sum(each.stat().st_size for each in out.iterdir())
    assert main(["run", str(out), TEXTS[0], "-n", "24", "--temp", "0", "--no-stats"]) == 0
    engine = edge_moe.load(embedded_model_path())
    ids = engine.tokenizer.encode(TEXTS[0] + capsys.readouterr().out.rstrip("\n"))
    n_prompt = len(engine.tokenizer.encode(TEXTS[0]))
    logits = engine.logits(ids)[n_prompt - 1 : -1]
    chosen = logits[np.arange(len(logits)), ids[n_prompt:]]
    assert len(chosen) > 8
    assert (logits.max(axis=1) - chosen < 0.1).all()
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 12)
    words = ["--text", str(text), "-c", "64", "--reference", str(embedded_model_path()), "--json"]
    assert main(["eval", str(out), *words]) == 0
    assert json.loads(capsys.readouterr().out)["kld_mean"] < 2e-3
    assert main(["bench", str(out), "-p", "16", "-n", "4", "-r", "1", "--json"]) == 0
    assert [test["test"] for test in json.loads(capsys.readouterr().out)] == ["pp16", "tg4"]


def test_what_the_answers_lose_is_reported(tmp_path, capsys):
    """As `eval` finds it; and with an importance matrix from the text less is lost on that text."""
    model, text = str(embedded_model_path()), tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 30)
    assert main(["imatrix", model, "-f", str(text), "-o", str(tmp_path / "imatrix.gguf")]) == 0
    lost = []
    for name, more in (("plain", []), ("weighted", ["--imatrix", str(tmp_path / "imatrix.gguf")])):
        capsys.readouterr()
        words = ["--bits", "4", "--text", str(text), "--chunks", "1", *more]
        assert main(["export", "onnx", model, str(tmp_path / name), *words, "--json"]) == 0
        lost.append(json.loads(capsys.readouterr().out)["divergence"])
        words = ["--text", str(text), "--chunks", "1", "-c", "512", "--reference", model, "--json"]
        assert main(["eval", str(tmp_path / name), *words]) == 0
        assert json.loads(capsys.readouterr().out)["kld_mean"] == pytest.approx(lost[-1]["kld_mean"], rel=1e-6)
    assert 0 < lost[1]["kld_mean"] < lost[0]["kld_mean"] < 0.5
    assert main(["export", "onnx", model, str(tmp_path / "told"), "--text", str(text), "--chunks", "1"]) == 0
    assert f"KL divergence from {model}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kv", "head_size", "number"), [("fp32", 20, "float"), ("fp16", 20, "float16"), ("int8", 25, "int8")]
)
def test_the_kind_of_cache_is_an_option(kv, head_size, number, tmp_path, capsys):
    model, out = str(GOLDEN / "v3.gguf"), tmp_path / "out"
    assert main(["export", "onnx", model, str(out), "--block", "16", "--kv", kv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv"] == kv
    assert json.loads((out / "genai_config.json").read_text())["model"]["decoder"]["head_size"] == head_size
    graph = onnx.load(str(out / "model.onnx"), load_external_data=False).graph
    past = next(each for each in graph.input if each.name == "past_key_values.2.value").type.tensor_type
    assert onnx.helper.tensor_dtype_to_string(past.elem_type) == f"TensorProto.{number.upper()}"
    assert main(["run", str(out), "the", "-n", "4", "--temp", "0"]) == 0


def test_packed_graph_says_what_it_saves(tmp_path, capsys):
    model = str(embedded_model_path())
    assert main(["export", "onnx", model, str(tmp_path / "out"), "--bits", "8", "--optimized"]) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if "packed weights" in line)
    assert 20 < float(line.split(" MB")[0]) < 80


def test_command_says_what_is_wrong(tmp_path, capsys):
    model = str(GOLDEN / "v3.gguf")
    for words, message in (
        (["onnx", model, str(tmp_path / "out")], "try --block 16"),
        (["onnx", model, str(tmp_path / "out"), "--bits", "6"], "--bits"),
        (["tflite", model, str(tmp_path / "out")], "onnx"),
        (["onnx", str(tmp_path), str(tmp_path / "out")], "is not a file"),
        (["onnx", model], "OUT_DIR"),
    ):
        assert main(["export", *words]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert main(["export", "onnx", model, str(tmp_path / "out"), "--block", "16"]) == 0
    assert "relative error" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "out")]) == 2
    assert "is not a file" in capsys.readouterr().err
