"""The tools that train the reference model: its training forward against transformers', a smoke run of all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "reference_model"

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 6,
}


@pytest.fixture
def tools(monkeypatch):
    """Import the scripts by their own names, for this test only."""
    monkeypatch.syspath_prepend(str(TOOLS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(TOOLS)):
            del sys.modules[name]


def test_training_forward_equals_transformers(tools):
    torch = pytest.importorskip("torch", reason="the reference model is trained with torch")
    transformers = pytest.importorskip("transformers", reason="transformers is the reference implementation")
    from model import CONFIG, DeepseekV2

    torch.manual_seed(0)
    config = CONFIG | SMALL
    ours = DeepseekV2(config)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.normal_(std=0.2) if weight.ndim > 1 else weight.uniform_(0.5, 1.5)
    theirs = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**config)).eval()
    theirs.load_state_dict(ours.state_dict())
    # No padding ids, as transformers gives those no gradient; more than one block of queries.
    ids = torch.randint(3, config["vocab_size"], (2, 150))

    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)

    loss, _, counts = ours.loss(ids[:, :-1], ids[:, 1:])
    expected = torch.nn.functional.cross_entropy(theirs(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert counts.sum(-1).tolist() == [2 * 149 * config["num_experts_per_tok"]] * 2
    loss.backward()
    expected.backward()
    expected_grad = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, expected_grad[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_orthogonalize_brings_singular_values_near_one(tools):
    torch = pytest.importorskip("torch", reason="the reference model is trained with torch")
    from muon import orthogonalize

    torch.manual_seed(0)
    for shape in ((3, 32, 32), (48, 16), (2, 2, 16, 48)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.3 and values.max() < 1.7


@pytest.mark.slow
def test_training_learns_resumes_decays_and_exports(tmp_path):
    for module in ("torch", "transformers", "gguf", "tokenizers"):
        pytest.importorskip(module, reason="the reference model is trained with torch, transformers, tokenizers, gguf")
    from edge_moe_export.convert import convert
    from gguf import GGUFReader

    def run(script: str, *options: object) -> None:
        command = [sys.executable, TOOLS / script, "--cache", tmp_path, *options]
        subprocess.run([str(part) for part in command], check=True, timeout=600)

    # The committed held-out text stands in for the training text, which takes a download.
    text = (TOOLS / "calibration.txt").read_bytes()
    ranges = json.loads((TOOLS / "calibration.json").read_text())["domains"]
    with (tmp_path / "train.jsonl").open("w") as out:
        for domain, (start, stop) in ranges.items():
            for part in range(start, stop, 5000):
                piece = text[part : min(part + 5000, stop)].decode(errors="ignore")
                out.write(json.dumps({"domain": domain, "text": piece}) + "\n")
    run("tokenizer.py")
    options = ("--batch", 8, "--micro", 4, "--seq", 64, "--warmup", 500)
    run("train.py", *options, "--until", 3_000)
    run("train.py", *options, "--until", 6_000)
    run("train.py", *options, "--decay", 2_000)

    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    tokens = [r["tokens"] for r in records]
    assert tokens == sorted(set(tokens)) and tokens[-1] >= 6_000, "training resumes where it stopped"
    assert records[-1]["loss"] < records[0]["loss"] - 1
    decayed = json.loads((tmp_path / "log_decay.jsonl").read_text().splitlines()[-1])
    assert decayed["loss"] < records[0]["loss"] - 1

    run("export.py", "--state", max((tmp_path / "decayed").glob("*.pt")))
    made = tmp_path / "made.gguf"
    convert(tmp_path / "checkpoint", made, "f32")
    reader = GGUFReader(made)
    shapes = {t.name: t.shape.tolist() for t in reader.tensors}
    assert shapes["blk.1.ffn_gate_exps.weight"] == [256, 256, 16]
    assert shapes["blk.0.attn_k_b.weight"] == [32, 256, 8]

    (tmp_path / "stable").rename(tmp_path / "lost")
    warm = ("--warm", made, "--warm-tokens", tokens[-1])
    run("train.py", *options, *warm, "--until", tokens[-1] + 512)
    warmed = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert warmed["tokens"] == tokens[-1] + 512
    assert warmed["loss"] < records[0]["loss"] - 1, "training goes on from a GGUF file"
