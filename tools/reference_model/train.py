"""Train the reference model, from any state to the next one.

The schedule is warmup-stable-decay. `train.py` continues the stable phase from its newest checkpoint until it is
stopped (or --until tokens); `train.py --decay TOKENS` takes the newest stable checkpoint, lets the learning rate fall
to zero over TOKENS and writes the result beside it, without touching the stable run. A checkpoint is written every few
minutes and at SIGTERM, under another name first, and two are kept, so a machine may vanish at any time.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from data import CACHE
from evaluate import held_out, overall
from model import CONFIG, DeepseekV2
from muon import Muon
from tokenizers import Tokenizer
from torch import Tensor
from warm import state_from_gguf

SHUFFLE_TOKENS = 1 << 19  # windows are shuffled inside blocks of this many tokens


def batch_at(tokens: np.ndarray, position: int, batch: int, seq: int) -> tuple[Tensor, Tensor]:
    """Windows of the shuffled stream from token `position` on -> token_ids, target i64[batch,seq]."""
    block_tokens = min(SHUFFLE_TOKENS, len(tokens) - 1)
    per_block, blocks = block_tokens // seq, (len(tokens) - 1) // block_tokens
    rows = []
    for window in range(position // seq, position // seq + batch):
        turn, place = divmod(window, blocks * per_block)
        block, index = divmod(place, per_block)
        order = np.random.default_rng((turn, block)).permutation(per_block)
        # A later turn cuts the stream elsewhere, so that the windows differ.
        start = block * block_tokens + int(order[index]) * seq + (turn * 211) % seq
        start = min(start, len(tokens) - seq - 1)
        rows.append(tokens[start : start + seq + 1].astype(np.int64))
    both = torch.from_numpy(np.stack(rows))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def make_optimizers(model: DeepseekV2) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices of the layers; AdamW for embedding, head, router and norms."""
    plain, fused, embed, head, small = [], [], [], [], []
    for name, param in model.named_parameters():
        if "embed_tokens" in name:
            embed.append(param)
        elif "lm_head" in name:
            head.append(param)
        elif param.ndim == 1 or "mlp.gate.weight" in name:
            small.append(param)
        else:
            (fused if "gate_up_proj" in name else plain).append(param)
    groups = [{"params": plain}, {"params": fused, "split": 2}]
    adam = [
        {"params": embed, "lr": 1e-2, "weight_decay": 0.0},
        {"params": head, "lr": 3e-3, "weight_decay": 0.01},
        {"params": small, "lr": 2e-3, "weight_decay": 0.0},
    ]
    optimizers = Muon(groups, lr=0.02, weight_decay=0.05), torch.optim.AdamW(adam, betas=(0.9, 0.95), eps=1e-10)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def gradient(model: DeepseekV2, params: list[Tensor], token_ids: Tensor, target: Tensor) -> tuple:
    """One part of a batch -> (loss, balance loss, expert counts, gradients)."""
    loss, balance, counts = model.loss(token_ids, target)
    return loss.item(), balance.item(), counts, torch.autograd.grad(loss + 0.01 * balance, params)


def save(folder: Path, state: dict, keep: int = 2) -> Path:
    """Write a checkpoint so that a crash leaves either the old or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{state['tokens']:012d}.pt"
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    for old in sorted(folder.glob("*.pt"))[:-keep]:
        old.unlink()
    return path


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most tokens."""
    return max(folder.glob("*.pt"), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--until", type=int, default=1 << 62, help="stop the stable phase at this many tokens")
    parser.add_argument("--decay", type=int, default=0, help="branch off: decay to zero over this many tokens")
    parser.add_argument("--warm", type=Path, help="begin from the weights of a GGUF file when there is no checkpoint")
    parser.add_argument("--warm-tokens", type=int, default=0, help="tokens those weights have seen")
    parser.add_argument("--batch", type=int, default=24, help="sequences in a step")
    parser.add_argument("--micro", type=int, default=4, help="sequences at a time")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--warmup", type=int, default=80_000, help="tokens until the full learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=300, help="seconds between checkpoints")
    parser.add_argument("--eval-every", type=int, default=1 << 18, help="tokens between held-out measurements")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokens = np.load(args.cache / "train_tokens.npy", mmap_mode="r")
    tokenizer = Tokenizer.from_file(str(args.cache / "tokenizer.json"))
    model = DeepseekV2(CONFIG)
    params = list(model.parameters())
    optimizers = muon, adam = make_optimizers(model)
    # A thread for each part of the batch wastes less on a busy machine than many threads inside each product.
    pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))
    stable, target = args.cache / "stable", args.cache / ("decayed" if args.decay else "stable")
    position, start = 0, newest(stable)
    fresh = 0  # the position at which the optimizers began without momentum
    if start is not None:
        state = torch.load(start, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        position, fresh = state["tokens"], state.get("fresh", 0)
    elif args.warm:
        model.load_state_dict(state_from_gguf(args.warm, CONFIG))
        position = fresh = args.warm_tokens
    branch = position
    end = position + args.decay if args.decay else args.until
    log = (args.cache / ("log_decay.jsonl" if args.decay else "log.jsonl")).open("a", buffering=1)

    def checkpoint() -> None:
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        rest = {"rng": torch.get_rng_state(), "tokens": position, "fresh": fresh, "config": CONFIG}
        path = save(target, state | rest)
        print(f"saved {path}", flush=True)

    stopping = []
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: stopping.append(True))
    saved_at = time.monotonic()
    while position < end and not stopping:
        began = time.monotonic()
        factor = min(1.0, (position - fresh + args.batch * args.seq) / args.warmup)
        if args.decay:
            factor *= (end - position) / args.decay
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        token_ids, target_ids = batch_at(tokens, position, args.batch, args.seq)
        micro = list(zip(token_ids.split(args.micro), target_ids.split(args.micro), strict=True))
        results = pool.map(lambda part: gradient(model, params, *part), micro)
        losses, balances, counts, gradients = zip(*results, strict=True)
        for param, *grads in zip(params, *gradients, strict=True):
            param.grad = torch.stack(grads).mean(0)
        counts = sum(counts)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        muon.step(pool.map)
        adam.step()
        model.zero_grad(set_to_none=True)
        position += args.batch * args.seq
        share = counts / counts.sum(-1, keepdim=True)
        record = {
            "tokens": position,
            "loss": sum(losses) / len(micro),
            "balance": sum(balances) / len(micro),
            "lr": factor,
            "grad_norm": norm,
            "expert_share_min": share.min().item(),
            "expert_share_max": share.max().item(),
            "tok_per_s": args.batch * args.seq / (time.monotonic() - began),
            "unix_time": int(time.time()),
        }
        if position % args.eval_every < args.batch * args.seq:
            report = held_out(model, tokenizer, args.seq, limit=3000)
            report["overall"] = overall(report)
            record["bits_per_byte"] = {domain: part.bits_per_byte for domain, part in report.items()}
        log.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
        if time.monotonic() - saved_at > args.save_every:
            checkpoint()
            saved_at = time.monotonic()
    if position > branch:
        checkpoint()


if __name__ == "__main__":
    main()
