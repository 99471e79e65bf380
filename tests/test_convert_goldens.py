"""Checkpoints of DeepSeek's kind become what llama.cpp's converter makes of them, key for key and tensor for tensor."""

import json

import numpy as np
import pytest
from deepseek_checkpoints import CHECKPOINTS, described
from edge_moe_export.convert import convert
from hf_checkpoints import GOLDEN
from llama_models import open_llama

import edge_moe

EXPECTED = json.loads((GOLDEN / "converted.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_as_llama_cpp_converts_it(name, kind, tmp_path):
    CHECKPOINTS[name](tmp_path / name)
    convert(tmp_path / name, tmp_path / "out.gguf", kind)
    keys, tensors = described(tmp_path / "out.gguf")
    expected_keys, expected_tensors = EXPECTED[f"{name} {kind}"]
    assert keys == expected_keys
    assert tensors == expected_tensors


@pytest.mark.parametrize("name", ["DeepSeek-V3-0324", "DeepSeek-R1-fp8", "GLM-4.7-Flash", "Moonlight-16B-A3B-Instruct"])
def test_llama_cpp_computes_the_same(name, tmp_path):
    """The converted file in F32: the same tokens of a text, and the same logits."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is the reference; install the test extra")
    CHECKPOINTS[name](tmp_path / name)
    convert(tmp_path / name, tmp_path / "out.gguf", "f32")
    ours = edge_moe.load(tmp_path / "out.gguf", kv="f32")
    ids = ours.tokenizer.encode("the inn and a then, in an hand of others")
    theirs = open_llama(tmp_path / "out.gguf", logits_all=True, n_ctx=64, type_k=0, type_v=0, flash_attn=False)
    try:
        assert theirs.tokenize(b"the inn and a then, in an hand of others") == ids
        theirs.eval(ids)
        expected = np.array(theirs.scores[: len(ids)])
    finally:
        theirs.close()
    assert np.abs(ours.logits(ids) - expected).max() < 1e-3 * np.ptp(expected)
