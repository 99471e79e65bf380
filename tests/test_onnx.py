"""Exported ONNX graphs compute what transformers computes, and keep what the file's blocks hold."""

import json
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import rewrite
from reference import ReferenceModel

import edge_moe
from edge_moe.checkpoint import open_checkpoint
from edge_moe.errors import FormatError, OptionError
from edge_moe.onnx_folder import OnnxFolder, OnnxPass

onnx = pytest.importorskip("onnx", reason="the export needs onnx")
pytest.importorskip("onnxruntime", reason="what it writes is run by onnxruntime")

from edge_moe_export.onnx import export_onnx  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.gguf"))
WAYS = {"prefill": [32], "chunks": [5, 1, 9, 2, 15], "one by one": [1] * 32}
QUANT = gguf.GGMLQuantizationType


def load_golden(name):
    """-> path of the model, ids i64[T], logits f32[T,vocab]."""
    with np.load(GOLDEN / f"{name}.npz") as saved:
        return GOLDEN / f"{name}.gguf", saved["ids"].astype(np.int64), saved["logits"]


def distance(a, b):
    """Largest difference of two sets of logits, as a part of their range."""
    return np.abs(a - b).max() / np.ptp(b)


def rms(a, b):
    """Root of the mean squared difference, as a part of the range."""
    return np.sqrt(np.mean((a - b) ** 2)) / np.ptp(b)


def export(path, out, **options):
    return export_onnx(open_checkpoint(path), out, **options)


def forward(model, ids, sizes):
    cache = model.new_cache(len(ids))
    starts = np.cumsum([0, *sizes])
    assert starts[-1] == len(ids)
    return np.concatenate([model.forward(ids[a:b], cache, all_logits=True) for a, b in pairwise(starts)])


@pytest.mark.parametrize("name", NAMES)
def test_f32_graph_equals_transformers(name, tmp_path):
    path, ids, expected = load_golden(name)
    export(path, tmp_path / "out", bits=32)
    model = OnnxPass(OnnxFolder(tmp_path / "out"), threads=1)
    for sizes in WAYS.values():
        assert distance(forward(model, ids, sizes), expected) < 1e-5


@pytest.mark.parametrize("name", ["v2_groups", "v2_tied", "v3"])
def test_graph_is_sound(name, tmp_path):
    """onnx's checker accepts it, and shape inference finds every result's type and number of axes."""
    for bits in (32, 8):
        out = tmp_path / str(bits)
        export(GOLDEN / f"{name}.gguf", out, bits=bits, block=16)
        onnx.checker.check_model(str(out / "model.onnx"), full_check=bits == 32)
        graph = onnx.load(str(out / "model.onnx"), load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True).graph
        known = {each.name for each in [*inferred.value_info, *inferred.output] if each.type.tensor_type.elem_type}
        assert {result for node in inferred.node for result in node.output} == known
        domains = {node.domain for node in inferred.node}
        assert domains == ({""} if bits == 32 else {"", "com.microsoft"})


@pytest.mark.parametrize(
    ("kv", "row_bytes", "allowed"), [("fp32", 40 * 4, 1e-5), ("fp16", 40 * 2, 1e-3), ("int8", 40 + 40 // 4, 1e-2)]
)
def test_cache_is_the_latent(kv, row_bytes, allowed, tmp_path):
    """Per token and layer it holds kv_lora_rank + qk_rope_head_dim numbers, and in int8 a scale for each 4 of them.

    (The largest block that fits both halves of these 32 + 8 is 4; for DeepSeek-V2's 512 + 64 it is 32.)
    """
    path, ids, expected = load_golden("v3")
    export(path, tmp_path / "out", bits=32, kv=kv)
    model = OnnxPass(OnnxFolder(tmp_path / "out"), threads=1)
    cache = model.new_cache(64)
    model.forward(ids, cache)
    assert (cache.length, cache.free) == (32, 32)
    assert cache.n_bytes == 32 * 3 * row_bytes
    for sizes in WAYS.values():
        assert distance(forward(model, ids, sizes), expected) < allowed
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)


def test_int8_cache_holds_rows_of_all_sizes(tmp_path):
    """What is kept of a token is within half a step of it: a step is at most 2^(1/8) / 127 of its block's peak."""
    path, ids, _ = load_golden("v2_lite")
    halves = {}
    for kv in ("fp32", "int8"):
        export(path, tmp_path / kv, bits=32, kv=kv)
        model = OnnxPass(OnnxFolder(tmp_path / kv), threads=1)
        cache = model.new_cache(32)
        model.forward(ids, cache)
        halves[kv] = [half.numpy()[0, 0] for half in cache.halves[:2]]  # the first layer's, which no rounding has met
    for exact, kept in zip(halves["fp32"], halves["int8"], strict=True):
        codes, steps = np.split(kept.astype(np.float64), [20], axis=1)
        restored = codes.reshape(32, 5, 4) * 2.0 ** (steps[..., None] / 8)
        peaks = np.abs(exact.reshape(32, 5, 4)).max(axis=2, keepdims=True)
        assert (np.abs(restored - exact.reshape(32, 5, 4)) <= 0.5001 * 2 ** (1 / 8) / 127 * peaks).all()


def test_cache_is_cut_and_bounded(tmp_path):
    path, ids, expected = load_golden("v2_lite")
    export(path, tmp_path / "out", bits=32)
    model = OnnxPass(OnnxFolder(tmp_path / "out"), threads=1)
    cache = model.new_cache(32)
    model.forward(ids[:20][::-1].copy(), cache)
    cache.truncate(0)
    model.forward(ids[:20], cache)
    cache.truncate(12)
    logits = model.forward(ids[12:], cache, all_logits=True)
    assert distance(logits, expected[12:]) < 1e-5
    with pytest.raises(OptionError, match="room for 0"):
        model.forward(ids[:1], cache)
    with pytest.raises(OptionError, match="holds 32"):
        cache.truncate(33)
    with pytest.raises(OptionError, match="1 to 256"):
        model.new_cache(257)


# Against the same weights in f32: what remains is the rounding of activations to 8 bits, and of weights that were F32.
@pytest.mark.parametrize(
    ("name", "kind", "bits", "block"),
    [
        ("v2_lite", "Q8_0", 8, 32),
        ("v2_lite", "Q4_0", 4, 32),
        ("v2_lite", "Q4_0", 8, 16),
        ("v2_groups", "F32", 8, 16),
        ("v2_tied", "F32", 8, 16),
        ("v3", "F32", 8, 16),
        ("v3_fused_gate_up", "F32", 8, 16),
        ("v3_no_norm", "F32", 8, 16),
    ],
)
def test_quantized_graph(name, kind, bits, block, tmp_path):
    path, ids, expected = load_golden(name)
    if kind != "F32":
        path = rewrite(path, tmp_path / "model.gguf", matrices=QUANT[kind])
        export(path, tmp_path / "f32", bits=32)
        expected = forward(OnnxPass(OnnxFolder(tmp_path / "f32"), threads=1), ids, [32])
    result = export(path, tmp_path / "out", bits=bits, block=block)
    model = OnnxPass(OnnxFolder(tmp_path / "out"), threads=1)
    for sizes in WAYS.values():
        assert rms(forward(model, ids, sizes), expected) < 6e-3
    if name == "v2_lite":  # its rows are whole blocks of 32
        assert not result.requantized and "repacked without loss" in result.notes[0]


def test_optimized_graph_is_the_same(tmp_path):
    """Packed for this CPU it gives the same logits; the packed tensors are in its file."""
    path, ids, _ = load_golden("v2_lite")
    path = rewrite(path, tmp_path / "model.gguf", matrices=QUANT.Q8_0)
    logits, sizes = [], []
    for optimized in (False, True):
        out = tmp_path / str(optimized)
        sizes.append(export(path, out, bits=8, optimized=optimized).file_bytes)
        logits.append(forward(OnnxPass(OnnxFolder(out), threads=1), ids, WAYS["chunks"]))
    assert np.array_equal(*logits)
    assert sizes[0].keys() == sizes[1].keys() == {each.name for each in (tmp_path / "True").iterdir()}
    assert sizes[1]["model.onnx.data"] > 1.3 * sizes[0]["model.onnx.data"]


def test_f32_of_blocks_is_exact(tmp_path):
    """What is compared with above is right itself."""
    path, ids, _ = load_golden("v2_lite")
    path = rewrite(path, tmp_path / "model.gguf", matrices=QUANT.Q4_0)
    export(path, tmp_path / "f32", bits=32)
    logits = forward(OnnxPass(OnnxFolder(tmp_path / "f32"), threads=1), ids, [32])
    assert distance(logits, ReferenceModel.from_gguf(path).logits(ids)) < 1e-5


def test_report_says_what_is_lost(tmp_path):
    path, ids, expected = load_golden("v3")
    result = export(path, tmp_path / "out", bits=4, block=16)
    assert 0.05 < result.requantized["F32 to 4 bits"] < 0.09
    assert 0.003 < result.requantized["F32 to 8 bits"] < 0.006
    assert any("rows that are no whole blocks" in note for note in result.notes)  # q_lora_rank is 24
    assert rms(forward(OnnxPass(OnnxFolder(tmp_path / "out"), threads=1), ids, [32]), expected) < 3e-2


def test_batches_and_masks(tmp_path):
    """Two texts of different lengths in one batch, the shorter one padded on the left, as other programs do it."""
    import onnxruntime

    path, ids, expected = load_golden("v2_lite")
    export(path, tmp_path / "out", bits=32)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    mask = np.ones((2, 32), np.int64)
    mask[1, :10] = 0
    feeds = {
        "input_ids": np.stack([ids, np.concatenate([np.zeros(10, np.int64), ids[:22]])]),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
    }
    for each in session.get_inputs():
        if each.name.startswith("past"):
            feeds[each.name] = np.zeros((2, 1, 0, each.shape[-1]), np.float32)
    logits = session.run(["logits"], feeds)[0]
    assert distance(logits[0], expected) < 1e-5
    assert distance(logits[1, 10:], expected[:22]) < 1e-5
    feeds["num_logits_to_keep"] = np.array([3], np.int64)
    assert np.array_equal(session.run(["logits"], feeds)[0], logits[:, -3:])


def test_model_from_a_folder(tmp_path):
    """edge_moe.load gives a model that generates the same text as from the file."""
    path, ids, expected = load_golden("v3_lite")
    export(path, tmp_path / "out", bits=32)
    model = edge_moe.load(tmp_path / "out", threads=1)
    assert distance(model.logits(ids.tolist()), expected) < 1e-5
    assert model.config == edge_moe.load(path).config
    greedy = edge_moe.SamplingOptions(temperature=0)
    texts = [
        list(each.generate(ids[:9].tolist(), max_new_tokens=8, options=greedy, ignore_eos=True))
        for each in (model, edge_moe.load(path))
    ]
    assert texts[0] == texts[1]


def test_files_for_other_programs(tmp_path):
    path, _, _ = load_golden("v3")
    export(path, tmp_path / "out", block=16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["kv_lora_rank"], config["topk_method"]) == ("deepseek_v3", 32, "noaux_tc")
    genai = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    graph = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph
    names = {each.name for each in graph.input}
    decoder = genai["decoder"]
    assert {decoder["inputs"]["past_key_names"] % layer for layer in range(3)} <= names
    assert decoder["head_size"] * 2 == config["kv_lora_rank"] + config["qk_rope_head_dim"]


def test_refusals(tmp_path):
    path, _, _ = load_golden("v3")
    with pytest.raises(OptionError, match="--bits 5: expected one of 4, 8, 32"):
        export(path, tmp_path / "out", bits=5)
    with pytest.raises(OptionError, match="--block 24"):
        export(path, tmp_path / "out", block=24)
    with pytest.raises(OptionError, match="rows of 16, which are no whole blocks; try --block 16"):
        export(path, tmp_path / "out", block=32)
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OptionError, match="exists already"):
        export(path, tmp_path / "full", block=16)
    with pytest.raises(OptionError, match="cannot be written"):
        export(path, tmp_path / "none" / "out", block=16)


def test_damaged_folders(tmp_path):
    path, _, _ = load_golden("v2_tied")
    out = tmp_path / "out"
    export(path, out, bits=32)
    data = (out / "model.onnx.data").read_bytes()
    (out / "model.onnx.data").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match=r"onnxruntime cannot load it"):
        edge_moe.load(out)
    (out / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"onnxruntime cannot load it"):
        edge_moe.load(out)
    (out / "settings.gguf").unlink()
    with pytest.raises(OptionError, match=r"has no settings\.gguf"):
        edge_moe.load(out)
    (out / "model.onnx").unlink()
    with pytest.raises(OptionError, match=r"has no model\.onnx"):
        edge_moe.load(out)


def test_another_models_graph_is_refused(tmp_path):
    for name, out in (("v3", tmp_path / "a"), ("v2_lite", tmp_path / "b")):
        export(GOLDEN / f"{name}.gguf", out, bits=32)
    (tmp_path / "a" / "settings.gguf").replace(tmp_path / "b" / "settings.gguf")
    with pytest.raises(FormatError, match="not those of an edge-moe export"):
        edge_moe.load(tmp_path / "b")
