"""Write a training state as a transformers checkpoint: bf16 safetensors, config.json and tokenizer files."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from data import CACHE
from tokenizer import BOS, EOS, PAD
from train import newest
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

CARD = """\
---
name: edge_moe reference
license: apache-2.0
language: en
---
The reference model of edge_moe: data, training, figures and limits are in tools/reference_model/MODEL_CARD.md there.
"""


def export(state_path: Path, tokenizer_path: Path, out: Path) -> None:
    """Replace the folder `out` by the checkpoint of one training state."""
    state = torch.load(state_path, weights_only=True)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**state["config"]))
    model.load_state_dict(state["model"])
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id
    )
    model.to(torch.bfloat16).save_pretrained(fresh)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_path), bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=2048
    ).save_pretrained(fresh)
    (fresh / "README.md").write_text(CARD, encoding="utf-8")
    (fresh / "model.safetensors").chmod(0o644)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--state", type=Path, help="default: the newest of the stable phase")
    parser.add_argument("--out", type=Path, help="default: CACHE/checkpoint")
    args = parser.parse_args()
    state = args.state or newest(args.cache / "stable")
    if state is None:
        parser.error(f"no training state in {args.cache / 'stable'}")
    export(state, args.cache / "tokenizer.json", args.out or args.cache / "checkpoint")


if __name__ == "__main__":
    main()
