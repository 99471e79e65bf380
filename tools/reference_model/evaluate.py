"""Measure the reference model on held-out text: bits per byte and the use of experts, by domain."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from data import HERE
from model import DeepseekV2
from tokenizers import Tokenizer


@dataclass
class Measurement:
    """One domain's result; expert_counts i64[L,E] over its MoE layers."""

    text_bytes: int
    tokens: int
    nats: float
    expert_counts: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes


@torch.no_grad()
def held_out(
    model: DeepseekV2, tokenizer: Tokenizer, seq: int = 512, limit: int | None = None
) -> dict[str, Measurement]:
    """Measure eval.txt by domain: windows of `seq` tokens that begin with BOS, every other token scored once.

    With `limit`, only the first so many tokens of each domain count, and the bytes they stand for.
    """
    text = (HERE / "eval.txt").read_bytes()
    bos, report = model.config["bos_token_id"], {}
    for domain, (start, stop) in json.loads((HERE / "eval.json").read_text())["domains"].items():
        ids = tokenizer.encode(text[start:stop].decode(), add_special_tokens=False).ids[:limit]
        text_bytes = len(tokenizer.decode(ids, skip_special_tokens=False).encode()) if limit else stop - start
        nats, counts = 0.0, 0
        for at in range(0, len(ids), seq - 1):
            window = torch.tensor([[bos, *ids[at : at + seq - 1]]])
            routing: list = []
            logits = model(window[:, :-1], routing)[0]
            nats += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
            counts = counts + torch.stack([layer["counts"] for layer in routing])
        report[domain] = Measurement(text_bytes, len(ids), nats, counts.numpy())
    return report


def overall(report: dict[str, Measurement]) -> Measurement:
    """The domains taken together."""
    parts = list(report.values())
    return Measurement(
        sum(p.text_bytes for p in parts),
        sum(p.tokens for p in parts),
        sum(p.nats for p in parts),
        sum(p.expert_counts for p in parts),
    )
