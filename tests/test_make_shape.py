"""Random models of a given shape: sizes by the recipe, and the engine against the twin on K-quants and fallbacks."""

import importlib.util
import sys
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
from reference import ReferenceModel

import edge_moe

TOOL = Path(__file__).parent.parent / "tools" / "make_shape.py"


@pytest.fixture(scope="module")
def make_shape():
    spec = importlib.util.spec_from_file_location("make_shape", TOOL)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "make_shape", module)
        spec.loader.exec_module(module)
        yield module


def test_v2_lite_takes_the_bytes_of_the_real_file(make_shape):
    shape = make_shape.SHAPES["v2-lite"]
    n_bytes, kinds = 0, {}
    for name, dims in make_shape.tensor_shapes(shape).items():
        kind = make_shape.tensor_type(name, dims, "Q4_K_M", shape.num_hidden_layers)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        assert dims[-1] % block_size == 0
        n_bytes += prod(dims) // block_size * block_bytes
        kinds[name] = kind.name
    assert n_bytes / 1e9 == pytest.approx(10.36, abs=0.005)
    assert sum(map(prod, make_shape.tensor_shapes(shape).values())) / 1e9 == pytest.approx(15.7, abs=0.05)
    assert set(kinds.values()) == {"F32", "Q4_K", "Q6_K", "Q5_0", "Q8_0"}
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.26.ffn_down_exps.weight"] == "Q8_0"
    assert kinds["blk.3.ffn_down_exps.weight"] == kinds["blk.3.attn_k_b.weight"] == "Q5_0"
    assert kinds["blk.3.ffn_down_shexp.weight"] == "Q4_K" and kinds["blk.5.ffn_down_shexp.weight"] == "Q6_K"
    assert kinds["output.weight"] == "Q6_K" and kinds["token_embd.weight"] == "Q4_K"


# Eight-bit activations cost 0.4 % of the logits' range here, in llama.cpp as well; BF16 weights take them as they are.
@pytest.mark.parametrize(("recipe", "tolerance"), [("Q4_K_M", 6e-3), ("Q4_0", 6e-3), ("Q8_0", 6e-3), ("BF16", 2e-4)])
def test_engine_equals_twin(make_shape, recipe, tolerance, tmp_path):
    path = tmp_path / "model.gguf"
    make_shape.write_model(path, make_shape.SHAPES["tiny"], recipe, seed=1)
    assert list(tmp_path.iterdir()) == [path]  # the partial file became this one
    ids = np.random.default_rng(1).integers(3, 256, 24)
    expected = ReferenceModel.from_gguf(path, bf16_latents=True).logits(ids)
    assert 1 < expected.std() < 4
    model = edge_moe.load(path)
    cache = model.new_cache(len(ids))
    parts = [model.forward(part, cache, all_logits=True) for part in (ids[:15], *ids[15:, None])]
    for logits in (model.logits(ids.tolist()), np.concatenate(parts)):
        assert np.sqrt(np.mean((logits - expected) ** 2)) < tolerance * np.ptp(expected)


def test_an_interrupted_write_leaves_nothing(make_shape, tmp_path):
    def interrupt(done_bytes, all_bytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shape.write_model(tmp_path / "model.gguf", make_shape.SHAPES["tiny"], "Q4_0", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_is_copied_and_padded(make_shape, tmp_path):
    vocab_path = Path(__file__).parent / "golden" / "v2_lite.gguf"
    make_shape.write_model(tmp_path / "model.gguf", make_shape.SHAPES["tiny"], "Q4_0", vocab_path=vocab_path)
    made, original = (edge_moe.load(path) for path in (tmp_path / "model.gguf", vocab_path))
    assert made.tokenizer.encode("and the other") == original.tokenizer.encode("and the other")
    tokens, padded = (list(model.checkpoint.metadata["tokenizer.ggml.tokens"]) for model in (original, made))
    assert padded == [*tokens, *(f"[PAD{i}]" for i in range(len(tokens), 320))]
