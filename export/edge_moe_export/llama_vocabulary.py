"""The vocabulary of Llama's family as the `tokenizer.` keys of a GGUF file: SentencePiece, or byte-level BPE.

Source: LlamaModel.set_vocab of llama.cpp's converter, which says what is looked for first; the GGUF specification,
section "Tokenizer"; sentencepiece_model.proto of SentencePiece.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_moe.errors import FormatError
from edge_moe.safetensors import read_json
from edge_moe.vocabulary import TokenKind
from edge_moe_export.hyperparameters import HyperParameters
from edge_moe_export.vocabulary import (
    SpecialTokens,
    added_tokens,
    chat_templates,
    load_tokenizer,
    looks_special,
    text_of,
    vocabulary_metadata,
)

_CODE_LLAMA_SIZE, _CODE_LLAMA_END = 32016, 32010  # a vocabulary of this size has a token that ends what was filled in
_NO_BOS_SIZE = 49152  # of SmolLM and small Granite models, which never begin a text with a token
_SCORE_OF_ADDED, _SCORE_OF_UNUSED = -1000.0, -10000.0

_KINDS_OF_PIECES: dict[object, TokenKind] = {  # llama.cpp takes those that a user defined for ordinary ones
    1: TokenKind.NORMAL, 2: TokenKind.UNKNOWN, 3: TokenKind.CONTROL, 4: TokenKind.NORMAL, 5: TokenKind.UNUSED,
    6: TokenKind.BYTE,
}  # fmt: skip
Row = tuple[str, float, TokenKind]


def llama_vocabulary_metadata(folder: Path, params: HyperParameters) -> dict[str, Any]:
    """All `tokenizer.` keys. Raises FormatError (damaged) and UnsupportedError (another kind of tokenizer)."""
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    path = folder / "tokenizer.json"
    tokenizer = read_json(path) if path.is_file() else {}
    keys: dict[str, Any] = {}
    if isinstance(flag := config.get("add_prefix_space"), bool):
        keys["tokenizer.ggml.add_space_prefix"] = flag
    size = params.integer("vocab_size")
    if (folder / "tokenizer.model").is_file():
        rows = _rows_of_pieces(folder, config, size)
    elif _is_converted(tokenizer):
        rows = _rows_of_converted(path, config, size)
    else:
        rows = []
        keys |= vocabulary_metadata(folder, params)
    if rows:
        texts, scores, kinds = zip(*rows, strict=True)
        special = SpecialTokens(tokenizer, config, load_tokenizer(path) if tokenizer else None, path)
        special.take_ids(params)
        keys |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": list(texts),
            "tokenizer.ggml.scores": np.array(scores, np.float32),
            "tokenizer.ggml.token_type": np.array(kinds, np.int32),
            **special.metadata(),
            **chat_templates(folder, config),
        }
    if size == _CODE_LLAMA_SIZE:
        keys["tokenizer.ggml.eot_token_id"] = _CODE_LLAMA_END
    if size == _NO_BOS_SIZE:
        keys["tokenizer.ggml.add_bos_token"] = False
    return keys


# ---- tokenizer.model, as SentencePiece wrote it


def _rows_of_pieces(folder: Path, config: Mapping[str, Any], size: int) -> list[Row]:
    """Text, score and kind of each id: the pieces of tokenizer.model, then what the other files add or replace."""
    rows = [(f"[PAD{i}]", _SCORE_OF_UNUSED, TokenKind.UNUSED) for i in range(size)]
    pieces = read_pieces(folder / "tokenizer.model")[:size]
    rows[: len(pieces)] = pieces
    more = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    for text, token_id in more.items():
        if type(token_id) is not int or token_id < 0:
            raise FormatError(f"{folder / 'added_tokens.json'}: {text[:20]!r} has no id; download the file again")
        if token_id < size:
            rows[token_id] = text, _SCORE_OF_ADDED, TokenKind.USER_DEFINED
    for token_id, (text, is_special) in added_tokens(None, config, folder).items():
        if token_id < size:
            is_control = is_special or looks_special(text)
            kind = TokenKind.CONTROL if is_control else TokenKind.USER_DEFINED
            rows[token_id] = text if is_control else text.replace("▁", " "), _SCORE_OF_ADDED, kind
    return rows


def read_pieces(path: Path) -> list[Row]:
    """The pieces of a tokenizer.model, by id. Raises FormatError where the file is no such model.

    Of the message ModelProto only its field 1 is read, messages of the fields 1 (text), 2 (score) and 3 (kind).
    """
    rows: list[Row] = []
    for field, piece in _fields(path.read_bytes(), path):
        if field != 1 or not isinstance(piece, bytes):
            continue
        values = dict(_fields(piece, path))
        text, score, kind = values.get(1, b""), values.get(2, 0.0), values.get(3, 1)
        if not (isinstance(text, bytes) and isinstance(score, float) and kind in _KINDS_OF_PIECES):
            raise _damaged(path)
        try:
            rows.append((text.decode("utf-8"), score, _KINDS_OF_PIECES[kind]))
        except ValueError:
            raise _damaged(path) from None
    if not rows:
        raise _damaged(path)
    return rows


def _fields(data: bytes, path: Path) -> Iterator[tuple[int, int | float | bytes]]:
    """The fields of a protobuf message: number and value. Source: the encoding's specification, protobuf.dev."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(data) and shift < 64:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise _damaged(path)

    while at < len(data):
        field, wire = divmod(varint(), 8)
        if wire == 0:
            yield field, varint()
            continue
        n_bytes = {1: 8, 5: 4}.get(wire, 0) if wire != 2 else varint()
        if wire not in (1, 2, 5) or n_bytes > len(data) - at:
            raise _damaged(path)
        value = data[at : at + n_bytes]
        at += n_bytes
        yield field, struct.unpack("<f", value)[0] if wire == 5 else value


def _damaged(path: Path) -> FormatError:
    return FormatError(f"{path}: is no SentencePiece model; download the file again")


# ---- tokenizer.json, to which a SentencePiece model was converted


def _is_converted(tokenizer: Mapping[str, Any]) -> bool:
    model, decoder = tokenizer.get("model"), tokenizer.get("decoder")
    return (
        isinstance(model, dict)
        and model.get("type") == "BPE"
        and model.get("byte_fallback") is True
        and isinstance(decoder, dict)
        and decoder.get("type") == "Sequence"
    )


def _rows_of_converted(path: Path, config: Mapping[str, Any], size: int) -> list[Row]:
    """Text, score and kind of each id. The scores are lost: merging by them, all alike, is what llama.cpp does, too."""
    loaded = load_tokenizer(path)
    added = added_tokens(loaded, config, path.parent)
    texts = {token_id: text for text, token_id in loaded.get_vocab().items()} | {i: row[0] for i, row in added.items()}
    n_pieces = loaded.get_vocab_size(with_added_tokens=False)
    special = _special_texts(config, path.parent)
    rows: list[Row] = []
    for token_id in range(size):
        text = texts.get(token_id)
        if text is None:
            rows.append((f"[PAD{token_id}]", _SCORE_OF_ADDED, TokenKind.UNUSED))
            continue
        kind = TokenKind.NORMAL if token_id < n_pieces else TokenKind.USER_DEFINED
        if token_id < n_pieces and re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            kind = TokenKind.BYTE
        elif text in special:
            kind = TokenKind.CONTROL
        rows.append((text, _SCORE_OF_ADDED, kind))
    return rows


def _special_texts(config: Mapping[str, Any], folder: Path) -> set[str]:
    """Tokens that a role is named for."""
    path = folder / "special_tokens_map.json"
    named = {**(read_json(path) if path.is_file() else {}), **config}
    roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    texts = {text for role in roles if (text := text_of(named.get(f"{role}_token")))}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = named.get(key) or []
        texts |= {text for token in (more.values() if isinstance(more, dict) else more) if (text := text_of(token))}
    return texts
