"""The engine computes what transformers computes: tiny random Llama, Mistral and Mixtral models."""

import json
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import rewrite
from llama_models import open_llama
from reference_llama import ReferenceLlama

import edge_moe
from edge_moe.backends.cpu import CpuBackend
from edge_moe.cli import main
from edge_moe.cli.info import describe
from edge_moe.errors import FormatError, UnsupportedError
from edge_moe.models.architectures import load_pass
from edge_moe.models.deepseek2 import load_weights as load_deepseek

GOLDEN = Path(__file__).parent / "golden_llama"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.gguf"))
WAYS = {"prefill": [32], "chunks": [5, 1, 9, 2, 15], "one by one": [1] * 32, "generation": [20, *[1] * 12]}
U32 = gguf.GGUFValueType.UINT32
every_golden = pytest.mark.parametrize("name", NAMES)


def load_golden(name):
    """-> path of the model, ids i32[T], logits f32[T,vocab]."""
    with np.load(GOLDEN / f"{name}.npz") as saved:
        return GOLDEN / f"{name}.gguf", saved["ids"], saved["logits"]


def distance(a, b):
    """Largest difference of two sets of logits, as a part of their range."""
    return np.abs(a - b).max() / np.ptp(b)


def forward(model, ids, sizes):
    """The engine's logits when the tokens arrive in parts of the given sizes -> f32[T,vocab]."""
    cache, starts = model.new_cache(len(ids)), np.cumsum([0, *sizes])
    ids = np.asarray(ids, np.int64)
    return np.concatenate([model.forward(ids[a:b], cache, all_logits=True) for a, b in pairwise(starts)])


def test_all_goldens_are_there():
    assert NAMES == ["llama", "llama3", "llama_linear", "mistral", "mixtral"]


@every_golden
def test_reference_equals_transformers(name):
    path, ids, expected = load_golden(name)
    assert distance(ReferenceLlama.from_gguf(path).logits(ids), expected) < 1e-5


@pytest.mark.parametrize("way", WAYS)
@every_golden
def test_engine_equals_transformers(name, way):
    path, ids, expected = load_golden(name)
    logits = forward(edge_moe.load(path), ids, WAYS[way])
    assert distance(logits, expected) < 1e-3
    # What remains is the cache. A number in the middle between two of bf16 may be rounded either way.
    assert distance(logits, ReferenceLlama.from_gguf(path, bf16_cache=True).logits(ids)) < 2e-4
    assert distance(forward(edge_moe.load(path, kv="f32"), ids, WAYS[way]), expected) < 1e-5
    rounded = forward(edge_moe.load(path, kv="int8"), ids, WAYS[way])
    assert np.sqrt(np.mean((rounded - expected) ** 2)) / np.ptp(expected) < 2e-3


@pytest.mark.parametrize("threads", [1, 2])
@every_golden
def test_a_recorded_token_equals_the_operations(name, threads, monkeypatch):
    path, ids, _ = load_golden(name)
    recorded = forward(edge_moe.load(path, threads=threads), ids, [1] * 32)
    monkeypatch.setattr(
        CpuBackend, "run", lambda self, compute, ids, cache, all_logits: compute(self, ids, cache, all_logits)
    )
    np.testing.assert_array_equal(recorded, forward(edge_moe.load(path, threads=1), ids, [1] * 32))


@pytest.mark.parametrize("name", ["llama3", "mistral", "mixtral"])
def test_long_text(name, tmp_path):
    """Hundreds of tokens: several parts of the cache, most of it behind the window of `mistral`."""
    longer = {"llama.context_length": (4096, gguf.GGUFValueType.UINT32)}
    path = rewrite(GOLDEN / f"{name}.gguf", tmp_path / "model.gguf", keys=longer)
    ids = np.random.default_rng(0).integers(3, 100, 700)
    expected = ReferenceLlama.from_gguf(path, bf16_cache=True).logits(ids)
    model = edge_moe.load(path)
    for logits in (model.logits(ids.tolist()), forward(model, ids, [300, 395, 1, 1, 1, 1, 1])):
        assert np.sqrt(np.mean((logits - expected) ** 2)) < 1e-4 * np.ptp(expected)


# A golden shows that a setting is right only if a wrong one shows in the logits.
WRONG_SETTINGS = [
    ("llama", "rope.freq_base", 50000.0),
    ("llama", "attention.head_count_kv", 1),
    ("llama", "attention.layer_norm_rms_epsilon", 1e-2),
    ("llama_linear", "rope.scaling.factor", 2.0),
    ("mistral", "attention.sliding_window", 8),
    ("mixtral", "expert_used_count", 3),
]


@pytest.mark.parametrize(("name", "key", "wrong"), WRONG_SETTINGS)
def test_a_wrong_setting_shows(name, key, wrong):
    path, ids, expected = load_golden(name)
    model = ReferenceLlama.from_gguf(path)
    assert model.get(key) != wrong
    model.meta[f"llama.{key}"] = wrong
    if key == "attention.head_count_kv":
        model.w = {n: w[: len(w) // 2] if "attn_k." in n or "attn_v." in n else w for n, w in model.w.items()}
    assert distance(model.logits(ids), expected) > 3e-3


@pytest.mark.parametrize(("fast", "slow"), [(32.0, 1.0), (0.6, 0.1)])
def test_yarn_as_llama_cpp_stretches_it(fast, slow, tmp_path):
    """Also with bounds of the file's own, which llama.cpp has to be told."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is the reference; install the test extra")
    f32, text = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING
    keys = {
        "rope.scaling.type": ("yarn", text), "rope.scaling.factor": (4.0, f32), "rope.freq_base": (500.0, f32),
        "rope.scaling.original_context_length": (64, U32),
        "rope.scaling.yarn_beta_fast": (fast, f32), "rope.scaling.yarn_beta_slow": (slow, f32),
    }  # fmt: skip
    keys = {f"llama.{key}": value for key, value in keys.items()}
    path = rewrite(GOLDEN / "llama_linear.gguf", tmp_path / "yarn.gguf", keys=keys)
    ids = load_golden("llama_linear")[1].tolist()
    theirs = open_llama(
        path, n_ctx=64, n_threads=1, logits_all=True, type_k=0, type_v=0,
        yarn_beta_fast=fast, yarn_beta_slow=slow,
    )  # fmt: skip
    theirs.eval(ids)
    expected = np.array(theirs.scores[: len(ids)])
    theirs.close()
    assert distance(edge_moe.load(path, kv="f32").logits(ids), expected) < 1e-5


def test_without_rope_factors_the_logits_differ():
    path, ids, expected = load_golden("llama3")
    model = ReferenceLlama.from_gguf(path)
    del model.w["rope_freqs.weight"]
    assert distance(model.logits(ids), expected) > 3e-3


# ---- what the file declares


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("attention.head_count_kv", 3, FormatError, "head_count_kv is 3, expected a divisor"),
        ("attention.key_length", 7, FormatError, "key_length is 7, expected an even"),
        ("attention.value_length", 4, FormatError, "value_length is 4, expected the size of a head, 8"),
        ("rope.dimension_count", 4, FormatError, "dimension_count is 4, expected the size of a head, 8"),
        ("feed_forward_length", 0, FormatError, "feed_forward_length is 0, expected at least 1"),
        ("feed_forward_length", 96, FormatError, "ffn_gate.weight has shape"),
        ("expert_count", 4, FormatError, "expert_used_count is missing"),
    ],
)
def test_wrong_metadata(tmp_path, key, value, error, message):
    path = rewrite(GOLDEN / "llama.gguf", tmp_path / "model.gguf", keys={f"llama.{key}": (value, U32)})
    with pytest.raises(error, match=message):
        edge_moe.load(path)


def test_an_architecture_that_there_is_not(tmp_path, capsys):
    path = rewrite(GOLDEN / "llama.gguf", tmp_path / "model.gguf", architecture="gemma3")
    with pytest.raises(UnsupportedError, match=r"'gemma3' is not one that edge_moe runs \(deepseek2, llama\)"):
        edge_moe.load(path)
    assert main(["run", str(path), "hi"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_bias_is_refused(tmp_path):
    bias = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    path = rewrite(GOLDEN / "llama.gguf", tmp_path / "model.gguf", tensors=bias)
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_q\.bias is a bias"):
        edge_moe.load(path)


def test_what_is_for_deepseek_only_says_so(tmp_path, capsys):
    path = str(GOLDEN / "llama.gguf")
    model = edge_moe.load(path)
    with pytest.raises(UnsupportedError, match="architecture llama, expected deepseek2"):
        load_deepseek(model.checkpoint)
    for command, message in (
        (["export", "onnx", path, str(tmp_path / "onnx")], "architecture llama, expected deepseek2"),
        (["quantize", path, str(tmp_path / "o.gguf"), "--type", "Q8_0", "--rotate-latent"], "no latent"),
        (["run", path, "hi", "--kv", "int4"], "--kv int4: a model of grouped-query attention takes one of bf16, int8"),
        (["bench", path, "-p", "4", "--kv", "int4"], "--kv int4: a model of grouped-query attention takes one of"),
        (["experts", path, "--text", __file__], "has no experts"),
    ):
        assert main(command) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_routes_of_a_text_longer_than_the_context(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the and of a then " * 100)
    assert main(["experts", str(GOLDEN / "mixtral.gguf"), "--text", str(text), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tokens"] > 256
    assert np.shape(document["use_per_token"]) == (2, 6)


@every_golden
def test_info(name, capsys):
    path = GOLDEN / f"{name}.gguf"
    document = describe(edge_moe.load(path).checkpoint)
    assert document["unused_weights"] == 0
    parts = {part["part"]: part["weights"] for part in document["parts"]}
    assert ("routed experts" in parts) == (name == "mixtral")
    assert ("output head" in parts) == (name != "llama")
    assert sum(parts.values()) == document["weights"]
    assert list(document["memory"][0]["cache_bytes_by_kind"]) == ["bf16", "int8", "f32"]
    assert main(["info", str(path)]) == 0
    assert "of keys and values" in capsys.readouterr().out


def test_the_pass_fits_the_config():
    checkpoint = edge_moe.load(GOLDEN / "mixtral.gguf").checkpoint
    assert type(load_pass(checkpoint, CpuBackend(1))).__name__ == "Llama"
