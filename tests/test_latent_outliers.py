"""What the caches of few bits cost on a trained model, also with channels that stand out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from edge_moe_export.convert import convert

import edge_moe
from edge_moe.api import Model
from edge_moe.checkpoint import Checkpoint
from edge_moe.divergence import kl_divergences, live_log_probs, normalizers
from edge_moe.formats import F32
from edge_moe.gguf import GGUFFile, open_gguf
from edge_moe.latent_cache import LatentCache

REFERENCE = Path(__file__).parents[1] / "tools" / "reference_model"
CHANNELS = range(3, 256, 32)


def planted(source: GGUFFile, factor: float) -> GGUFFile:
    """The same model with eight channels of its latents `factor` times as large, and their weights as much smaller."""
    tensors = dict(source.tensors)
    for name, entry in source.tensors.items():
        kind = name.split(".")[2] if name.startswith("blk.") else ""
        if kind in ("attn_kv_a_norm", "attn_k_b", "attn_v_b"):
            values = entry.format.decode(entry.data).reshape(entry.shape).astype(np.float64)
            index = (slice(None), CHANNELS) if kind == "attn_k_b" else (..., CHANNELS)
            values[index] *= factor if kind == "attn_kv_a_norm" else 1 / factor
            data = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
            tensors[name] = replace(entry, format=F32, data=data)
    return replace(source, tensors=tensors)


@pytest.mark.slow
def test_divergence_by_kind_and_with_outliers(tmp_path):
    convert(REFERENCE / "checkpoint", tmp_path / "bf16.gguf")
    source = open_gguf(tmp_path / "bf16.gguf")
    own, outliers = (Model(Checkpoint(each), threads=2) for each in (source, planted(source, 30)))
    ids = np.array(own.tokenizer.encode((REFERENCE / "eval.txt").read_text(encoding="utf-8")[:6000]), np.int64)
    windows = ids[: len(ids) // 512 * 512].reshape(-1, 512)
    assert len(windows) >= 2

    def logits(model, new_cache):
        return [model.forward(window, new_cache(), all_logits=True) for window in windows]

    right = logits(own, lambda: LatentCache(own.config, 512, "f32"))

    def divergence(model, new_cache):
        means = [
            kl_divergences(live_log_probs(expected, normalizers(expected)), found, normalizers(found))[0].mean()
            for expected, found in zip(right, logits(model, new_cache), strict=True)
        ]
        return float(np.mean(means))

    def of_kind(model, kind):
        return lambda: edge_moe.load(model.checkpoint, kv=kind).new_cache(512)

    assert divergence(outliers, lambda: LatentCache(own.config, 512, "f32")) < 1e-6
    assert divergence(own, of_kind(own, "int8")) < 1e-4
    rotated = divergence(own, of_kind(own, "int4"))
    assert rotated < 2e-3
    assert divergence(outliers, of_kind(outliers, "int4")) == pytest.approx(rotated, rel=0.2)
    assert divergence(outliers, lambda: LatentCache(own.config, 512, "int4")) > 3 * rotated
