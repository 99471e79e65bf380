"""Checkpoints of DeepSeek's kind become what llama.cpp's converter makes of them, key for key and tensor for tensor."""

import json

import pytest
from deepseek_checkpoints import CHECKPOINTS, described
from edge_moe_export.convert import convert
from hf_checkpoints import GOLDEN

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
