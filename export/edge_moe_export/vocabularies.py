"""Finds the vocabulary of a DeepSeek-like checkpoint, of whichever kind it is."""

from pathlib import Path
from typing import Any

from edge_moe.safetensors import read_json
from edge_moe_export.hyperparameters import HyperParameters
from edge_moe_export.llama_vocabulary import llama_vocabulary_metadata
from edge_moe_export.tiktoken_vocabulary import tiktoken_metadata
from edge_moe_export.vocabulary import vocabulary_metadata


def deepseek_vocabulary_metadata(folder: Path, params: HyperParameters) -> dict[str, Any]:
    """All `tokenizer.` keys, from tokenizer.json, tiktoken.model or tokenizer.model.

    A tokenizer.json that only restates a SentencePiece model gives way to that.
    Raises FormatError (damaged) and UnsupportedError (none of these, or of a kind that is not read).
    """
    has_json, has_tiktoken, has_sentencepiece = (
        (folder / name).is_file() for name in ("tokenizer.json", "tiktoken.model", "tokenizer.model")
    )
    if has_sentencepiece and not (has_json and _is_byte_level(folder / "tokenizer.json")):
        return llama_vocabulary_metadata(folder, params)
    if has_tiktoken and not has_json:
        return tiktoken_metadata(folder, params)
    return vocabulary_metadata(folder, params)


def _is_byte_level(path: Path) -> bool:
    model = read_json(path).get("model")
    return isinstance(model, dict) and model.get("type", "BPE") == "BPE" and not model.get("byte_fallback")
