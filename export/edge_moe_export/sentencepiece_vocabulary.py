"""The tokenizer.model of SentencePiece as the `tokenizer.` keys of a GGUF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_moe.errors import FormatError
from edge_moe.safetensors import read_json
from edge_moe.vocabulary import TokenKind
from edge_moe_export.hyperparameters import HyperParameters
from edge_moe_export.vocabulary import SpecialTokens, chat_templates, looks_special, tokenizer_config

_SCORE_OF_UNUSED, _SCORE_OF_ADDED = -10000.0, -1000.0  # as llama.cpp's converter has them


def sentencepiece_metadata(folder: Path, params: HyperParameters) -> dict[str, Any]:
    """All `tokenizer.` keys: the pieces, and tokens that other files add to them. Raises FormatError (damaged)."""
    path, config = folder / "tokenizer.model", tokenizer_config(folder)
    vocab_size = params.integer("vocab_size")
    pieces = _read_pieces(path)[:vocab_size]
    pieces += [(f"[PAD{i}]", _SCORE_OF_UNUSED, TokenKind.UNUSED) for i in range(len(pieces), vocab_size)]
    for token_id, text, is_special in _added_tokens(folder, config):
        if token_id < vocab_size:
            kind = TokenKind.CONTROL if is_special else TokenKind.USER_DEFINED
            pieces[token_id] = (text, _SCORE_OF_ADDED, kind)
    json_path = folder / "tokenizer.json"
    tokenizer = read_json(json_path) if json_path.is_file() else {}
    special = SpecialTokens(tokenizer, config, _ids_by_text(tokenizer), path)
    special.take_ids(params)
    texts, scores, kinds = zip(*pieces, strict=True)
    prefix = config.get("add_prefix_space")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(texts),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        **({"tokenizer.ggml.add_space_prefix": prefix} if isinstance(prefix, bool) else {}),
        **{key: value for key, value in special.metadata().items() if isinstance(value, bool) or value < vocab_size},
        **chat_templates(folder, config),
    }


def _read_pieces(path: Path) -> list[tuple[str, float, TokenKind]]:
    """Text, score and kind of each piece."""
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor()
        model.LoadFromFile(str(path))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:80] if str(error) else "it does not load"
        raise FormatError(f"{path}: is no SentencePiece model ({reason}); download it again") from None
    kinds = (
        (model.IsUnknown, TokenKind.UNKNOWN),
        (model.IsControl, TokenKind.CONTROL),
        (model.IsUnused, TokenKind.UNUSED),
        (model.IsByte, TokenKind.BYTE),
    )
    return [
        (model.IdToPiece(i), model.GetScore(i), next((kind for has, kind in kinds if has(i)), TokenKind.NORMAL))
        for i in range(model.vocab_size())
    ]


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> list[tuple[int, str, bool]]:
    """Id, text and whether it is special of each token beside the pieces; what comes later counts."""
    found = []
    path = folder / "added_tokens.json"
    for text, token_id in (read_json(path) if path.is_file() else {}).items():
        if type(token_id) is not int or token_id < 0:
            raise FormatError(f"{path}: token {text[:20]!r} has id {str(token_id)[:20]!r}, expected a whole number")
        found.append((token_id, text, False))
    for id_text, row in (config.get("added_tokens_decoder") or {}).items():
        if not id_text.isdecimal() or not isinstance(row, dict) or not isinstance(row.get("content"), str):
            raise FormatError(f"{folder}: tokenizer_config.json has an added token {id_text[:20]!r} without a text")
        is_special = bool(row.get("special")) or looks_special(row["content"])
        found.append((int(id_text), row["content"] if is_special else row["content"].replace("▁", " "), is_special))
    return found


def _ids_by_text(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """The added tokens of a tokenizer.json; of equal texts the first counts."""
    ids: dict[str, int] = {}
    for row in tokenizer.get("added_tokens") or []:
        if isinstance(row, dict) and isinstance(row.get("content"), str) and type(row.get("id")) is int:
            ids.setdefault(row["content"], row["id"])
    return ids
