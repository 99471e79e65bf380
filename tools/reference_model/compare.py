"""Bits per byte of eval.txt by transformers, by llama.cpp and by edge_moe, all by llama-perplexity's method.

The text is cut into chunks of 512 tokens; the first token of each is replaced by BOS, the second half is scored.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from data import CACHE, HERE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

LENGTH = 512


@torch.no_grad()
def by_transformers(checkpoint: Path, text: str) -> tuple[float, int, int]:
    """-> mean nats of a scored token, scored tokens, their bytes."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    bos = tokenizer.bos_token_id
    ids = [bos, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats, tokens, text_bytes = 0.0, 0, 0
    for start in range(0, len(ids) - LENGTH + 1, LENGTH):
        chunk = torch.tensor([[bos, *ids[start + 1 : start + LENGTH]]])
        scored = chunk[0, LENGTH // 2 + 1 :]
        logits = model(chunk).logits[0, LENGTH // 2 : -1]
        nats += F.cross_entropy(logits, scored, reduction="sum").item()
        tokens += len(scored)
        text_bytes += len(tokenizer.decode(scored).encode())
    return nats / tokens, tokens, text_bytes


def by_llama(program: str, gguf: Path, text: Path) -> float:
    """Mean nats of a scored token by llama-perplexity."""
    command = [program, "-m", gguf, "-f", text, "-c", LENGTH, "-t", "2"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    if found is None:
        raise SystemExit(f"{program}: no perplexity in its output\n{done.stderr[-500:]}")
    return math.log(float(found[1]))


def by_edge_moe(program: str, gguf: Path, text: Path) -> float:
    """Mean nats of a scored token by `edge-moe eval`."""
    command = [program, "eval", gguf, "--text", text, "-c", LENGTH, "--json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return math.log(json.loads(done.stdout)["ppl"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CACHE / "checkpoint")
    parser.add_argument("--gguf", type=Path, default=CACHE / "gguf" / "reference-bf16.gguf", help="the same in GGUF")
    parser.add_argument("--text", type=Path, default=HERE / "eval.txt")
    parser.add_argument("--llama-perplexity", default="llama-perplexity", help="the program")
    parser.add_argument("--edge-moe", default="edge-moe", help="the program")
    args = parser.parse_args()
    nats, tokens, text_bytes = by_transformers(args.checkpoint, args.text.read_text(encoding="utf-8"))
    figures = {
        "transformers": nats,
        "llama.cpp": by_llama(args.llama_perplexity, args.gguf, args.text),
        "edge_moe": by_edge_moe(args.edge_moe, args.gguf, args.text),
    }
    print(f"{tokens} tokens of {text_bytes} bytes scored")
    for name, value in figures.items():
        bits = value / math.log(2) * tokens / text_bytes
        print(f"{name:14}{bits:.4f} bits per byte  {value / nats - 1:+.3%} of transformers'")


if __name__ == "__main__":
    main()
