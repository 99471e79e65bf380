"""The tiktoken.model of Moonlight and Kimi-K2 as the `tokenizer.` keys of a GGUF file.

The file holds tokens and their ranks; merges follow from the ranks. Names of special tokens are in
tokenizer_config.json, and how text is split is written in the Python module that comes with the model: it is read, but
never run.
"""

import ast
import base64
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_moe.errors import FormatError, UnsupportedError
from edge_moe.tokenizer import Tokenizer
from edge_moe.vocabulary import CHARACTER_OF_BYTE, TokenKind
from edge_moe_export.hyperparameters import HyperParameters
from edge_moe_export.vocabulary import CHECK_TEXT, SpecialTokens, added_tokens, chat_templates, tokenizer_config

N_RESERVED = 256  # ids behind the ranks that are special tokens, named or not
_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_NOT_HAN = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}" + _NOT_HAN, r"[\p{Ll}" + _NOT_HAN
_KIMI_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CASE}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CASE}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_KIMI = "kimi-k2"  # its name in GGUF files, and the hash by which llama.cpp knows it
_KIMI_HASH = "81212dc7cdb7e0c1074ca62c5aeab0d43c9f52b8a737be7b12a777c953027890"


def tiktoken_metadata(folder: Path, params: HyperParameters) -> dict[str, Any]:
    """All `tokenizer.` keys. Raises FormatError (damaged) and UnsupportedError (another way to split text)."""
    path, config = folder / "tiktoken.model", tokenizer_config(folder)
    vocab_size = params.integer("vocab_size")
    ranks = _read_ranks(path, vocab_size)
    texts = {rank: _text(token) for token, rank in ranks.items()}
    names = _special_texts(config, range(len(ranks), len(ranks) + N_RESERVED), folder)
    tokens, kinds = [], []
    for token_id in range(vocab_size):
        if token_id in names:
            tokens.append(names[token_id])
            kinds.append(int(TokenKind.CONTROL))
        elif token_id in texts:
            tokens.append(texts[token_id])
            kinds.append(int(TokenKind.NORMAL))
        else:
            tokens.append(f"[PAD{token_id}]")
            kinds.append(int(TokenKind.UNUSED))
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _KIMI,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": _merges(ranks),
    }
    _check_splitting(folder, metadata, path)
    special = SpecialTokens({}, config, None, path)
    special.take_ids(params)
    return metadata | special.metadata() | chat_templates(folder, config)


def _read_ranks(path: Path, vocab_size: int) -> dict[bytes, int]:
    """The tokens in ascending order of their ranks, which are their ids."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        token_text, _, rank_text = line.partition(b" ")
        if not line:
            continue
        try:
            token, rank = base64.b64decode(token_text, validate=True), int(rank_text)
        except ValueError:
            raise FormatError(
                f"{path}: line {number} is {line[:40]!r}, expected a token in base64 and its rank; download it again"
            ) from None
        if not token or token in ranks or not 0 <= rank < vocab_size:
            raise FormatError(
                f"{path}: line {number} has rank {rank}, expected each token once and ranks below the vocab_size "
                f"{vocab_size} of config.json; download it again"
            )
        ranks[token] = rank
    if not ranks or len(set(ranks.values())) < len(ranks):
        raise FormatError(f"{path}: has {len(ranks)} tokens, expected some, with a rank for each; download it again")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _text(token: bytes) -> str:
    """A token in the byte-level alphabet of GPT-2."""
    return "".join(CHARACTER_OF_BYTE[byte] for byte in token)


def _special_texts(config: Mapping[str, Any], ids: range, folder: Path) -> dict[int, str]:
    """The special tokens' texts by id, those without a name included."""
    named = added_tokens(None, config, folder)
    return {token_id: named[token_id][0] if token_id in named else f"<|reserved_token_{token_id}|>" for token_id in ids}


def _merges(ranks: Mapping[bytes, int]) -> list[str]:
    """For each token the two that it is made of when all merges of lower rank are done."""
    merges = []
    for token, rank in ranks.items():
        parts = _merged_below(token, rank, ranks)
        if len(parts) == 2:
            merges.append(f"{_text(parts[0])} {_text(parts[1])}")
    return merges


def _merged_below(token: bytes, limit: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """A token's bytes, adjacent parts merged, lowest rank first, as far as ranks are below the limit."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        joint_ranks = [ranks.get(parts[i] + parts[i + 1], math.inf) for i in range(len(parts) - 1)]
        lowest = min(joint_ranks)
        if lowest >= limit:
            break
        at = joint_ranks.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _check_splitting(folder: Path, metadata: Mapping[str, Any], path: Path) -> None:
    """Make sure that text is split as Kimi-K2 does it: by the model's own module, or since its vocabulary is known."""
    for module in sorted(folder.glob("tokenization*.py")):
        pattern = _pattern_of(module)
        if pattern == _KIMI_PATTERN:
            return
        if pattern is not None:
            raise UnsupportedError(f"{module}: splits text by {pattern[:120]!r}, which is not known here")
    ids = Tokenizer.from_metadata(metadata, path).encode(CHECK_TEXT, add_special=False, parse_special=True)
    if hashlib.sha256(str(ids).encode()).hexdigest() != _KIMI_HASH:
        raise UnsupportedError(
            f"{path}: is not the vocabulary of Kimi-K2 and Moonlight, and no tokenization_*.py beside it says how text "
            "is split; download the folder's Python files, too"
        )


def _pattern_of(module: Path) -> str | None:
    """What a module assigns to `pat_str`: a text, or texts joined by a text. None where it has no such thing."""
    try:
        tree = ast.parse(module.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pat_str" for t in node.targets):
            match node.value:
                case ast.Constant(value=str(text)):
                    return text
                case ast.Call(
                    func=ast.Attribute(value=ast.Constant(value=str(between)), attr="join"), args=[parts], keywords=[]
                ):
                    try:
                        texts = ast.literal_eval(parts)
                    except (ValueError, TypeError, RecursionError):
                        return None
                    return between.join(texts) if all(isinstance(text, str) for text in texts) else None
    return None
