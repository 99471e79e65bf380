"""Importance matrices that we write: against a plain count over the twin's own activations, as llama.cpp reads them."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from edge_moe_quant.imatrix import SquareSums, collect
from edge_moe_quant.importance import read_importance
from reference import read_gguf

from edge_moe.api import embedded_model_path
from edge_moe.checkpoint import Checkpoint, open_checkpoint
from edge_moe.cli import main
from edge_moe.gguf import open_gguf
from edge_moe.models.deepseek2 import MLP, load_weights

GOLDEN = Path(__file__).parent / "golden" / "v2_lite.gguf"
LLAMAS = Path(__file__).parent / "golden_llama"


def test_sums_of_experts():
    rng = np.random.default_rng(0)
    tensors = read_gguf(GOLDEN)[1]
    layers = load_weights(Checkpoint(open_gguf(GOLDEN))).layers
    w = next(each.mlp.experts for each in layers if not isinstance(each.mlp, MLP))
    layer, n_experts = w.down_proj.name.split(".")[1], w.down_proj.shape[0]
    gate, up = (np.asarray(tensors[f"blk.{layer}.ffn_{n}_exps.weight"], np.float64) for n in ("gate", "up"))
    x = rng.standard_normal((30, w.gate_proj.shape[-1])).astype(np.float32)
    ids = np.array([rng.choice(n_experts - 1, 2, replace=False) for _ in range(30)])
    ops = SquareSums(2)
    gates = rng.random((30, 2)).astype(np.float32)
    for part in (slice(17), slice(17, None)):
        ops.experts(x[part], ids[part], gates[part], w.gate_proj, w.up_proj, w.down_proj)
    for e in range(n_experts):
        tokens = x[(ids == e).any(axis=1)].astype(np.float64)
        assert ops.counts[w.down_proj.name][e] == len(tokens)
        np.testing.assert_allclose(ops.sums[w.up_proj.name][e], np.square(tokens).sum(axis=0), rtol=1e-6)
        before = tokens @ gate[e].T
        gated = before / (1 + np.exp(-before)) * (tokens @ up[e].T)
        np.testing.assert_allclose(ops.sums[w.down_proj.name][e], np.square(gated).sum(axis=0), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("path", [GOLDEN, LLAMAS / "mixtral.gguf", LLAMAS / "llama.gguf"], ids=lambda path: path.stem)
def test_every_matrix_but_the_head(path):
    checkpoint = open_checkpoint(path)
    windows = np.random.default_rng(1).integers(0, 100, (3, 40))
    sums = collect(checkpoint, windows, n_threads=2)
    names = {checkpoint.tensor_name(name) for name in sums.sums}
    unseen = ("token_embd.weight", "output.weight")
    matrices = {n for n, entry in checkpoint.tensors.items() if len(entry.shape) > 1 and n not in unseen}
    assert names == matrices
    for name, counts in sums.counts.items():
        n_used = checkpoint.config.num_experts_per_tok if "experts" in name.split(".") else 1
        assert counts.sum() == 3 * 40 * n_used
        assert sums.sums[name].size * 4 % checkpoint.tensors[checkpoint.tensor_name(name)].shape[-1] == 0


def test_the_command_and_its_file(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out.gguf"
    text.write_text("It is a truth universally acknowledged, that a single man must be in want of a wife. " * 20)
    words = ["imatrix", str(embedded_model_path()), "-f", str(text), "-o", str(out), "-c", "64"]
    assert main([*words, "--chunks", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["chunks"], report["tokens"]) == (2, 128)
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["text.txt"]
    assert reader.fields["imatrix.chunk_size"].contents() == 64
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down_exps.weight.in_sum2"] == [256, 16]
    assert shapes["blk.1.ffn_down_exps.weight.counts"] == [1, 16]
    assert shapes["blk.1.attn_v_b.weight.counts"][-1] == 1
    assert len(shapes) == 2 * report["tensors"]
    importance = read_importance(out)
    entry = open_gguf(embedded_model_path()).tensors["blk.1.ffn_up_exps.weight"]
    assert importance.of("blk.1.ffn_up_exps.weight", entry.shape).shape == (16, 256)
    assert main(words) == 0
    assert "least used expert" in capsys.readouterr().err
    assert main([*words, "-c", "2000"]) == 2
    assert "longer text" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["imatrix"], ["imatrix", "missing.gguf", "-f", "a", "-o", "b"]])
def test_bad_commands(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
