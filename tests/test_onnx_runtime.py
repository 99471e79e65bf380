"""Exported graphs against our own runtime on the same weights, and batches as other programs make them."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import rewrite, write_tiny_deepseek2
from reference import ReferenceModel

import edge_moe
from edge_moe.checkpoint import open_checkpoint
from edge_moe.weights import Weight

pytest.importorskip("onnx", reason="the export needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="what it writes is run by onnxruntime")

from edge_moe_export.onnx import export_onnx  # noqa: E402

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "edge_moe" / "data" / "reference.gguf"
# Sigmoid with a bias for choosing, groups, low-rank queries, and each of them with and without the others.
V3_STYLE = {
    "v3": {
        "scoring_func": "sigmoid", "selection_bias": True, "norm_topk_prob": True, "n_routed_experts": 16, "n_group": 4,
        "topk_group": 2, "num_experts_per_tok": 4, "q_lora_rank": 32, "routed_scaling_factor": 2.5,
        "rope_scaling": {"factor": 40.0, "original_max_position_embeddings": 64, "mscale_all_dim": 1.0},
    },
    "moonlight": {
        "scoring_func": "sigmoid", "selection_bias": True, "norm_topk_prob": True, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "routed_scaling_factor": 2.446, "rope_theta": 50000.0,
    },
    "v2": {
        "n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "q_lora_rank": 64,
        "routed_scaling_factor": 16.0,
    },
}  # fmt: skip
NAMES = ["reference", *V3_STYLE]
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want"


def write_model(name, path, kind):
    """A model all of whose matrices are of one kind."""
    if name == "reference":
        return rewrite(REFERENCE, path, matrices=gguf.GGMLQuantizationType[kind])
    write_tiny_deepseek2(path, weight_type=kind, num_hidden_layers=2, seed=5, **V3_STYLE[name])
    return path


def tokens(name, model, n_tokens=24):
    if name == "reference":
        return model.tokenizer.encode(TEXT)[:n_tokens]
    return np.random.default_rng(1).integers(3, model.config.vocab_size, n_tokens).tolist()


def steady_tokens(name, path, model, n_tokens=10):
    """Tokens at which no router is near a tie, one after the other, so that rounding chooses no other experts."""
    if name == "reference":
        return tokens(name, model)
    reference, ids = ReferenceModel.from_gguf(path), []
    for candidate in np.random.default_rng(2).integers(3, model.config.vocab_size, 2000):
        reference.min_router_margin = np.inf
        reference.logits([*ids, int(candidate)])
        if reference.min_router_margin > 0.02:
            ids.append(int(candidate))
            if len(ids) == n_tokens:
                return ids
    raise AssertionError(f"found {len(ids)} such tokens only")


def distance(a, b):
    """Largest difference of two sets of logits, as a part of their range."""
    return np.abs(a - b).max() / np.ptp(b)


@pytest.mark.parametrize(("bits", "kind", "allowed"), [(32, "F32", 1e-4), (8, "Q8_0", 2e-2)])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_our_runtime(name, bits, kind, allowed, tmp_path, monkeypatch):
    """In 8 bits without our fine products: ONNX Runtime rounds each input once."""
    monkeypatch.setattr(Weight, "has_8_bits", False)
    path = write_model(name, tmp_path / "model.gguf", kind)
    result = export_onnx(open_checkpoint(path), tmp_path / "out", bits=bits)
    assert not result.requantized  # the same weights
    ours, theirs = edge_moe.load(path, kv="f32"), edge_moe.load(tmp_path / "out", threads=1)
    ids = steady_tokens(name, path, ours)
    assert distance(theirs.logits(ids), ours.logits(ids)) < allowed


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_that_of_our_runtime(name, tmp_path):
    """128 tokens in f32, one after the other."""
    path = write_model(name, tmp_path / "model.gguf", "F32")
    export_onnx(open_checkpoint(path), tmp_path / "out", bits=32)
    texts = []
    for model in (edge_moe.load(path, kv="f32"), edge_moe.load(tmp_path / "out", threads=1)):
        greedy = edge_moe.SamplingOptions(temperature=0)
        pieces = model.generate(tokens(name, model, 9), max_new_tokens=128, options=greedy, ignore_eos=True)
        texts.append("".join(pieces))
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 4


@pytest.mark.parametrize(("bits", "kind", "allowed"), [(32, "F32", 1e-5), (8, "Q8_0", 1e-2)])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_four_equals_each_alone(name, bits, kind, allowed, tmp_path):
    """Texts of four lengths, padded on the left; then one more token for each, behind the cache of all.

    In 8 bits a sum that differs in its last digit may round an activation to the code beside.
    """
    path = write_model(name, tmp_path / "model.gguf", kind)
    export_onnx(open_checkpoint(path), tmp_path / "out", bits=bits)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), options)
    cache_names = [each.name for each in session.get_inputs() if each.name.startswith("past")]
    outputs = ["logits", *(each.replace("past_key_values", "present") for each in cache_names)]
    width = session.get_inputs()[-1].shape[-1]

    def run(ids, mask, positions, cache):
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits, *cache = session.run(outputs, feeds | dict(zip(cache_names, cache, strict=True)))
        return logits, cache

    def empty(n):
        return [np.zeros((n, 1, 0, width), np.float32) for _ in cache_names]

    texts = [tokens(name, edge_moe.load(path), n) for n in (20, 13, 7, 1)]
    alone = []
    for text in texts:
        ids = np.array([text])
        logits, cache = run(ids, np.ones_like(ids), np.arange(len(text))[None], empty(1))
        more, _ = run(np.array([[9]]), np.ones((1, len(text) + 1), np.int64), np.array([[len(text)]]), cache)
        alone.append((logits[0], more[0]))

    longest = len(texts[0])
    ids = np.array([[0] * (longest - len(text)) + text for text in texts])
    mask = np.array([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    logits, cache = run(ids, mask, np.maximum(mask.cumsum(axis=1) - 1, 0), empty(4))
    mask = np.concatenate([mask, np.ones((4, 1), np.int64)], axis=1)
    more, _ = run(np.full((4, 1), 9), mask, mask.sum(axis=1, keepdims=True) - 1, cache)
    for i, text in enumerate(texts):
        assert distance(logits[i, longest - len(text) :], alone[i][0]) < allowed
        assert distance(more[i], alone[i][1]) < allowed
