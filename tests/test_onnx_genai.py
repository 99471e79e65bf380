"""onnxruntime-genai runs an exported folder, with the tokens of plain onnxruntime."""

from pathlib import Path

import numpy as np
import pytest

from edge_moe.checkpoint import open_checkpoint
from edge_moe.onnx_folder import OnnxFolder, OnnxPass
from edge_moe.tokenizer import Tokenizer

pytest.importorskip("onnx", reason="the export needs onnx")
genai = pytest.importorskip("onnxruntime_genai", reason="no onnxruntime-genai here; pip install it beside onnxruntime")

from edge_moe_export.onnx import export_onnx  # noqa: E402

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "edge_moe" / "data" / "reference.gguf"
GOLDEN = ROOT / "tests" / "golden"
N_TOKENS = 64


def by_genai(folder, prompt):
    """Ids of the prompt and of N_TOKENS more."""
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + N_TOKENS, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    for _ in range(N_TOKENS):
        generator.generate_next_token()
    return [int(token_id) for token_id in generator.get_sequence(0)]


def by_onnxruntime(folder, prompt):
    model = OnnxPass(OnnxFolder(folder), threads=1)
    cache = model.new_cache(len(prompt) + N_TOKENS)
    ids, new = list(prompt), list(prompt)
    for _ in range(N_TOKENS):
        new = [int(model.forward(np.array(new, np.int64), cache)[-1].argmax())]
        ids += new
    return ids


@pytest.mark.parametrize("kv", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", ["reference", "v2_groups", "v3"])
def test_genai_gives_the_tokens_of_onnxruntime(name, kv, tmp_path):
    path = REFERENCE if name == "reference" else GOLDEN / f"{name}.gguf"
    checkpoint = open_checkpoint(path)
    export_onnx(checkpoint, tmp_path / "out", bits=8, block=32 if name == "reference" else 16, kv=kv)
    prompt = [3, 50, 20, 31, 70, 12, 8]
    if name == "reference":
        prompt = Tokenizer.from_metadata(checkpoint.metadata, path).encode("It is a truth universally acknowledged")
    expected = by_onnxruntime(tmp_path / "out", prompt)
    assert len(set(expected)) > 8  # it says more than one thing
    assert by_genai(tmp_path / "out", prompt) == expected
