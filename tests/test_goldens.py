"""The engine computes what transformers computes: tiny random DeepSeek-V2/V3 models, see tools/make_goldens.py."""

from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import rewrite
from reference import ReferenceModel

import edge_moe

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.gguf"))
# As one prefill, in chunks, token by token, and as generation does it: a prompt, then one token at a time.
WAYS = {"prefill": [32], "chunks": [5, 1, 9, 2, 15], "one by one": [1] * 32, "generation": [20, *[1] * 12]}


def load_golden(name):
    """-> path of the model, ids i32[T], logits f32[T,vocab]."""
    with np.load(GOLDEN / f"{name}.npz") as saved:
        return GOLDEN / f"{name}.gguf", saved["ids"], saved["logits"]


def distance(a, b):
    """Largest difference of two sets of logits, as a part of their range."""
    return np.abs(a - b).max() / np.ptp(b)


def forward(model, ids, sizes):
    """The engine's logits when the tokens arrive in parts of the given sizes -> f32[T,vocab]."""
    cache = model.new_cache(len(ids))
    starts = np.cumsum([0, *sizes])
    assert starts[-1] == len(ids)
    ids = np.asarray(ids, np.int64)
    return np.concatenate([model.forward(ids[a:b], cache, all_logits=True) for a, b in pairwise(starts)])


def test_all_goldens_are_there():
    assert len(NAMES) == 9


@pytest.mark.parametrize("name", NAMES)
def test_reference_equals_transformers(name):
    path, ids, expected = load_golden(name)
    assert distance(ReferenceModel.from_gguf(path).logits(ids), expected) < 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_engine_equals_transformers(name, way):
    path, ids, expected = load_golden(name)
    logits = forward(edge_moe.load(path), ids, WAYS[way])
    assert logits.dtype == np.float32
    assert distance(logits, expected) < 1e-3
    # What remains is the cache: with latents rounded to bf16 the twin says the same. A value in the middle between two
    # bf16 numbers may be rounded either way, which the tolerance allows.
    assert distance(logits, ReferenceModel.from_gguf(path, bf16_latents=True).logits(ids)) < 2e-4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_engine_with_an_exact_cache_equals_transformers(name, way):
    path, ids, expected = load_golden(name)
    assert distance(forward(edge_moe.load(path, kv="f32"), ids, WAYS[way]), expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_engine_with_a_cache_of_8_bits(name):
    path, ids, expected = load_golden(name)
    for sizes in WAYS.values():
        logits = forward(edge_moe.load(path, kv="int8"), ids, sizes)
        assert np.sqrt(np.mean((logits - expected) ** 2)) / np.ptp(expected) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_last_logits_are_those_of_the_pass(name):
    path, ids, _ = load_golden(name)
    model = edge_moe.load(path)
    all_logits = forward(model, ids, [len(ids)])
    np.testing.assert_array_equal(model.logits(ids.tolist()), all_logits)
    last = model.forward(np.asarray(ids, np.int64), model.new_cache(len(ids)))
    assert last.shape == (1, all_logits.shape[1])
    assert distance(last, all_logits[-1:]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_thread_count_changes_nothing(name):
    path, ids, _ = load_golden(name)
    one, two = (forward(edge_moe.load(path, threads=threads), ids, WAYS["generation"]) for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", ["v2_lite", "v3", "v2_legacy_kv_b"])
def test_long_text(name, tmp_path):
    """Hundreds of tokens: several chunks of prefill, and decoding over several parts of the cache."""
    longer = {"deepseek2.context_length": (4096, gguf.GGUFValueType.UINT32)}
    path = rewrite(GOLDEN / f"{name}.gguf", tmp_path / "model.gguf", keys=longer)
    ids = np.random.default_rng(0).integers(3, 100, 700)
    expected = ReferenceModel.from_gguf(path, bf16_latents=True).logits(ids)
    model = edge_moe.load(path)
    for logits in (model.logits(ids.tolist()), forward(model, ids, [300, 395, 1, 1, 1, 1, 1])):
        assert np.sqrt(np.mean((logits - expected) ** 2)) < 1e-4 * np.ptp(expected)


# The engine multiplies by 8-bit activations where the weights are quantized: about 0.5 % of each product's size.
QUANTIZED = {"F16": 2e-4, "BF16": 2e-4, "Q8_0": 6e-3, "Q4_0": 6e-3, "Q4_1": 6e-3, "Q5_0": 6e-3, "Q5_1": 6e-3}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_engine_equals_twin_on_quantized_weights(kind, tmp_path):
    path, ids, _ = load_golden("v2_lite")
    path = rewrite(path, tmp_path / "model.gguf", matrices=gguf.GGMLQuantizationType[kind])
    expected = ReferenceModel.from_gguf(path, bf16_latents=True).logits(ids)
    for sizes in WAYS.values():
        logits = forward(edge_moe.load(path), ids, sizes)
        rms = np.sqrt(np.mean((logits - expected) ** 2)) / np.ptp(expected)
        assert rms < QUANTIZED[kind]


# A golden shows that a setting is right only if a wrong one shows in the logits.
WRONG_SETTINGS = [
    ("v2_lite", "rope.scaling.factor", 20.0),
    ("v2_lite", "rope.scaling.yarn_log_multiplier", 0.1),
    ("v2_lite", "rope.scaling.original_context_length", 1024),
    ("v2_lite", "rope.scaling.type", "none"),
    ("v2_legacy_kv_b", "rope.scaling.type", "linear"),
    ("v2_no_dense_layer", "expert_weights_scale", 1.0),
    ("v2_no_dense_layer", "expert_used_count", 3),
    ("v2_no_dense_layer", "expert_weights_norm", True),
    ("v2_no_dense_layer", "attention.layer_norm_rms_epsilon", 1e-2),
    ("v2_groups", "expert_group_count", 1),
    ("v2_groups", "expert_group_used_count", 3),
    ("v2_tied", "rope.freq_base", 50000.0),
    ("v3", "expert_weights_norm", False),
    ("v3", "expert_group_count", 1),
    ("v3_no_norm", "expert_weights_norm", True),
    ("v3_no_norm", "rope.scaling.type", "none"),
    ("v3_no_norm", "rope.scaling.yarn_log_multiplier", 0.0707),
    ("v3_lite", "expert_gating_func", 1),
    ("v3_lite", "expert_weights_scale", 2.0),
]


@pytest.mark.parametrize(("name", "key", "wrong"), WRONG_SETTINGS)
def test_a_wrong_setting_shows(name, key, wrong):
    path, ids, expected = load_golden(name)
    model = ReferenceModel.from_gguf(path)
    assert model.get(key) != wrong
    model.meta[f"deepseek2.{key}"] = wrong
    assert distance(model.logits(ids), expected) > 3e-3


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("v3")])
def test_a_missing_selection_bias_shows(name):
    path, ids, expected = load_golden(name)
    model = ReferenceModel.from_gguf(path)
    model.w = {key: value for key, value in model.w.items() if "exp_probs_b" not in key}
    assert distance(model.logits(ids), expected) > 3e-3


@pytest.mark.parametrize(("name", "n_best"), [("v2_groups", 2), ("v3", 1)])
def test_the_other_group_rule_shows(name, n_best, monkeypatch):
    """V2 scores a group by its best expert, V3 by its best two."""
    path, ids, expected = load_golden(name)
    model = ReferenceModel.from_gguf(path)
    monkeypatch.setattr(model, "n_best_of_group", lambda: n_best)
    assert distance(model.logits(ids), expected) > 3e-3
