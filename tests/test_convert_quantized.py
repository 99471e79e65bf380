"""Conversion straight to quantized formats: the tensors that convert and then quantize give, in one pass."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from edge_moe_export.convert import convert
from edge_moe_quant.recipe import parse_rule
from edge_moe_quant.stream import encoding
from hf_checkpoints import write_hf_checkpoint

from edge_moe.cli import main
from edge_moe.gguf import open_gguf


def contents(path):
    file = open_gguf(path)
    tensors = {name: (entry.format.name, entry.shape, bytes(entry.data)) for name, entry in file.tensors.items()}
    return {key: str(value) for key, value in file.metadata.items()}, tensors


@pytest.mark.parametrize(("checkpoint", "kind"), [("v3_lite", "Q4_0"), ("v3", "Q4_K_M"), ("v2_lite", "Q8_0")])
def test_equal_to_both_steps(checkpoint, kind, tmp_path, capsys):
    write_hf_checkpoint(tmp_path / "hf", checkpoint)
    hf, plain, two, one, other = (str(tmp_path / name) for name in ("hf", "plain.gguf", "two.gguf", "a.gguf", "b.gguf"))
    assert main(["convert", hf, plain, "--type", "f32"]) == 0
    assert main(["quantize", plain, two, "--type", kind]) == 0
    if kind != "Q8_0":  # convert has a q8_0 of its own, as llama.cpp's converter writes it
        assert main(["convert", hf, one, "--type", kind.lower()]) == 0
        assert contents(one) == contents(two)
    capsys.readouterr()
    assert main(["quantize", hf, other, "--type", kind, "-t", "1", "--json"]) == 0
    assert contents(other) == contents(two)
    report = json.loads(capsys.readouterr().out)
    assert (report["path"], report["type"], report["tensors"]) == (other, kind, len(contents(two)[1]))


def test_rules_alone(tmp_path):
    write_hf_checkpoint(tmp_path / "hf", "v3_lite")
    rules = [parse_rule(".", "F32", "here"), parse_rule("ffn_.*_exps", "Q5_1", "here")]
    with ThreadPoolExecutor(2) as pool:
        convert(tmp_path / "hf", tmp_path / "m.gguf", encoding(None, rules, pool, 2))
    file = open_gguf(tmp_path / "m.gguf")
    kinds = {entry.format.name for name, entry in file.tensors.items() if "_exps" in name}
    assert kinds == {"Q5_1", "F16"}  # F16 where rows are no whole blocks
    assert file.metadata["general.file_type"] == 9


def test_parts_come_in_order():
    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(4) as pool:
        made = encoding("F32", [], pool, 4)
        parts = [rng.standard_normal((n, 8)).astype(np.float32) for n in (900, 1, 40, 2, 700, 3)]
        fmt = made.choose({"token_embd.weight": (1646, 8)}, {"general.architecture": "deepseek2"})["token_embd.weight"]
        out = np.concatenate(list(made.encode(iter(parts), fmt)))
    assert out.tobytes() == np.concatenate(parts).tobytes()


@pytest.mark.parametrize("option", [["--calibrate", "t.txt"], ["--imatrix", "i.gguf"], ["--rotate-latent"]])
def test_what_needs_a_gguf_file(option, tmp_path, capsys):
    write_hf_checkpoint(tmp_path / "hf", "v3")
    assert main(["quantize", str(tmp_path / "hf"), str(tmp_path / "o.gguf"), "--type", "Q4_0", *option]) == 2
    err = capsys.readouterr().err
    assert f"{option[0]}: needs a GGUF file" in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
