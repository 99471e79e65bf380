"""Train the byte-level BPE tokenizer and turn the training text into one stream of token ids.

The pre-tokenizer is GPT-2's, so that a GGUF file can name it (`tokenizer.ggml.pre = gpt-2`).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from data import CACHE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 8192
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, "<|user|>", "<|assistant|>"]  # the last two are for a later chat model

# How often a document of a domain occurs in one pass of the stream: without this, two manuals would drown the prose.
PASSES = {
    "novels": 2.0,
    "scripture": 1.25,
    "dictionary": 0.7,
    "python": 0.8,
    "database": 0.8,
    "fortunes": 1.5,
    "jargon": 1.5,
}


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (domain, text) of every training document."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            yield document["domain"], document["text"]


def train_tokenizer(texts: Iterator[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learn the merges; ids 0.. are the special tokens, then the 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def build_stream(documents: list[tuple[str, str]], tokenizer: Tokenizer, seed: int = 0) -> np.ndarray:
    """Lay out one weighted pass over the documents as token ids u16[T], each document between BOS and EOS.

    The copies of a repeated document are spread over the stream, so that they meet the model far apart.
    """
    rng = random.Random(seed)
    order = []
    for i, (domain, _) in enumerate(documents):
        passes = PASSES[domain]
        copies = int(passes) + (rng.random() < passes % 1)
        order += [((copy + rng.random()) / copies, i) for copy in range(copies)]
    encoded: dict[int, np.ndarray] = {}
    eos = tokenizer.token_to_id(EOS)
    used = sorted({i for _, i in order})
    for start in range(0, len(used), 512):
        batch = used[start : start + 512]
        for i, encoding in zip(batch, tokenizer.encode_batch([documents[i][1] for i in batch]), strict=True):
            encoded[i] = np.array([*encoding.ids, eos], dtype=np.uint16)
    return np.concatenate([encoded[i] for _, i in sorted(order)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    documents = list(read_documents(args.cache / "train.jsonl"))
    path = args.cache / "tokenizer.json"
    # Merges should serve the mixture the model sees, so the over-long domains are sampled here too.
    rng = random.Random(0)
    tokenizer = train_tokenizer(text for domain, text in documents if rng.random() < PASSES[domain])
    tokenizer.save(str(path))
    stream = build_stream(documents, tokenizer)
    np.save(args.cache / "train_tokens.npy", stream)
    sample = [text for _, text in documents[::50]]
    tokens = sum(len(e.ids) for e in tokenizer.encode_batch(sample))
    print(json.dumps({"vocab": tokenizer.get_vocab_size(), "stream_tokens": len(stream),
                      "bytes_per_token": sum(len(t.encode()) for t in sample) / tokens}))  # fmt: skip


if __name__ == "__main__":
    main()
