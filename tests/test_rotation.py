"""Rotated latents: the matrix, answers that stay, channels that become alike, bad input."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from edge_moe_quant.quantize import calibration_key, quantize
from edge_moe_quant.rotation import KEY, rotate, rotated
from reference import ReferenceModel, read_gguf

import edge_moe
from edge_moe.cli import main
from edge_moe.errors import OptionError
from edge_moe.formats import F32, Q8_0
from edge_moe.gguf import open_gguf

GOLDEN = Path(__file__).parent / "golden"


def hadamard(n):
    return np.array([[(-1) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]) / math.sqrt(n)


@pytest.mark.parametrize(("n", "block"), [(1, 1), (2, 2), (64, 64), (96, 32), (7, 1)])
def test_the_matrix(n, block):
    x = np.random.default_rng(n).standard_normal((3, n))
    expected = np.concatenate([x[:, i : i + block] @ hadamard(block) for i in range(0, n, block)], axis=1)
    np.testing.assert_allclose(rotate(x), expected, atol=1e-12)
    np.testing.assert_allclose(rotate(rotate(x)), x, atol=1e-12)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.gguf")), ids=lambda path: path.stem)
def test_answers_stay(path, tmp_path):
    source = open_gguf(path)
    turned = rotated(source, tmp_path, allow_requantize=True)
    assert list(tmp_path.iterdir()) == []
    formats = {name: entry.format for name, entry in turned.tensors.items()}
    quantize(turned, tmp_path / "turned.gguf", formats, file_type=0)
    metadata, tensors = read_gguf(tmp_path / "turned.gguf")
    assert metadata[KEY] == "hadamard"
    norms = [np.asarray(values) for name, values in tensors.items() if "kv_a_norm" in name]
    assert norms
    assert all((norm == 1).all() for norm in norms)
    ids = np.random.default_rng(0).integers(0, 100, 24)
    before, after = (ReferenceModel.from_gguf(each).logits(ids) for each in (path, tmp_path / "turned.gguf"))
    np.testing.assert_allclose(after, before, atol=2e-5 * np.ptp(before))


def test_planted_outliers_are_spread(tmp_path):
    """With eight channels 30 times as large, the largest channel of the rotated latent is near the mean one."""
    source = open_gguf(GOLDEN / "v2_lite.gguf")
    gain = source.tensors["blk.0.attn_kv_a_norm.weight"]
    planted = gain.format.decode(gain.data).copy()
    planted[:8] *= 30
    latents = rotate(np.random.default_rng(0).standard_normal((1000, len(planted))) * planted)
    size = np.sqrt(np.square(latents).mean(axis=0))
    assert size.max() < 1.2 * size.mean()


def test_the_command(tmp_path, capsys):
    out = tmp_path / "out.gguf"
    words = ["quantize", str(GOLDEN / "v2_lite.gguf"), str(out), "--type", "Q8_0", "--rotate-latent"]
    assert main(words) == 0
    assert open_gguf(out).metadata[KEY] == "hadamard"
    ids = list(range(40))
    turned, plain = (edge_moe.load(path, kv="f32").logits(ids) for path in (out, GOLDEN / "v2_lite.gguf"))
    assert np.abs(turned - plain).max() < 0.05 * np.ptp(plain)
    capsys.readouterr()
    assert main(["quantize", str(out), str(tmp_path / "b.gguf"), "--type", "Q4_0", "--rotate-latent"]) == 2
    assert "rotated already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_quantized_sources_and_keys(tmp_path):
    source = open_gguf(GOLDEN / "v2_lite.gguf")
    formats = {
        name: Q8_0 if re.search(r"attn_v_b", name) and entry.shape[-1] % 32 == 0 else F32
        for name, entry in source.tensors.items()
    }
    assert Q8_0 in formats.values()
    quantize(source, tmp_path / "q8.gguf", formats, file_type=7)
    with pytest.raises(OptionError, match=r"attn_v_b\.weight is Q8_0 already"):
        rotated(open_gguf(tmp_path / "q8.gguf"), tmp_path)
    windows = np.zeros((1, 8), np.int64)
    turned = rotated(source, tmp_path)
    assert calibration_key(source, formats, windows) != calibration_key(turned, formats, windows)
