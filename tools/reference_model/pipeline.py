"""Make the reference model, continuing from whatever state exists: data, tokenizer, training, decay, export, card.

Stop it at any time and run it again. It runs each step with its own virtual environment, or with --python.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edge-moe-reference"


def make_environment(folder: Path) -> Path:
    """Create a virtual environment with the requirements, once -> its interpreter."""
    python = folder / "bin" / "python"
    done = folder / "complete"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "-r", HERE / "requirements.txt", HERE.parent.parent], check=True
        )
        done.touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--python", type=Path, help="an interpreter that has the requirements and edge_moe")
    parser.add_argument("--stable", type=int, default=11_000_000, help="tokens of the stable phase")
    parser.add_argument("--decay", type=int, default=1_000_000, help="tokens of the decay after it")
    args = parser.parse_args()
    python = args.python or make_environment(args.cache / "venv")

    def run(*command: object) -> None:
        done = subprocess.run([str(part) for part in (python, *command)], check=False)
        if done.returncode:
            sys.exit(done.returncode)

    def step(script: str, *options: object) -> None:
        run(HERE / script, "--cache", args.cache, *options)

    if not (args.cache / "train.jsonl").exists() or not (HERE / "eval.txt").exists():
        step("data.py")
    if not (args.cache / "train_tokens.npy").exists():
        step("tokenizer.py")
    step("train.py", "--until", args.stable)
    states = sorted((args.cache / "stable").glob("*.pt"))
    if not states or int(states[-1].stem) < args.stable:
        sys.exit(f"training was stopped at {states[-1].stem if states else 0} tokens; run this again to go on")
    step("train.py", "--decay", args.decay)
    decayed = sorted((args.cache / "decayed").glob("*.pt"))
    if not decayed or int(decayed[-1].stem) < int(states[-1].stem) + args.decay:
        sys.exit("the decay was stopped; run this again to repeat it")
    step("export.py", "--state", decayed[-1])
    gguf = args.cache / "gguf"
    gguf.mkdir(exist_ok=True)
    run("-m", "edge_moe", "convert", args.cache / "checkpoint", gguf / "reference-bf16.gguf")
    for kind in ("Q8_0", "Q4_K_M"):
        out = gguf / f"reference-{kind.lower()}.gguf"
        run("-m", "edge_moe", "quantize", gguf / "reference-bf16.gguf", out, "--type", kind)
    step("card.py", "--state", decayed[-1])


if __name__ == "__main__":
    main()
