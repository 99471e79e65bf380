"""A GGUF file's vocabulary, checked: token texts, their kinds, the bytes they stand for, and the special ids."""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from os import PathLike
from typing import Any

from edge_moe.errors import FormatError

PREFIX = "tokenizer.ggml."


class TokenKind(IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Many files do not say which tokens end a text or a turn; like the reference implementation we go by these texts.
END_TEXTS = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    )
)
# Fill-in-the-middle tokens by role; those of the last three roles also end a text.
FIM_TEXTS = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
OLD_FIM_KEYS = {"fim_pre": "prefix_token_id", "fim_suf": "suffix_token_id", "fim_mid": "middle_token_id"}
FIM_END_ROLES = ("fim_pad", "fim_rep", "fim_sep")
# These steer the channels of one model family and have to stay visible in its output.
ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's reversible alphabet: a printable character for each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


def read_value(metadata: Mapping[str, Any], key: str, kind: type, default: Any, path: str | PathLike[str]) -> Any:
    """The value of one metadata key, or the default if it is missing; FormatError if it is of another type."""
    value = metadata.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(f"{path}: {key} is {str(value)[:40]!r}, expected {kind.__name__}; the file is damaged")
    return value


class Vocabulary:
    """Token texts, kinds and special ids of one file; raises FormatError where they contradict each other."""

    def __init__(self, metadata: Mapping[str, Any], path: str | PathLike[str]) -> None:
        self.path = path
        self._metadata = metadata
        self.is_sentencepiece = metadata.get(PREFIX + "model") == "llama"
        self.tokens = self._read_tokens()
        self.ids = dict(zip(self.tokens, range(len(self.tokens)), strict=True))  # of equal texts the last one counts
        self.kinds = self._read_numbers("token_type") or [int(TokenKind.NORMAL)] * len(self.tokens)
        self.scores = self._read_numbers("scores") or [0.0] * len(self.tokens)
        self.bos_id = self._read_id("bos_token_id", 1 if self.is_sentencepiece else None)
        self.eos_id = self._read_id("eos_token_id", 2 if self.is_sentencepiece else None)
        self.unknown_id = self._read_id("unknown_token_id", 0 if self.is_sentencepiece else None)
        self.end_ids = self._find_end_ids()
        self._bytes_by_id: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def is_hidden(self, token_id: int) -> bool:
        """Whether a token steers the model instead of standing for text."""
        return self.kinds[token_id] in (TokenKind.CONTROL, TokenKind.UNKNOWN)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; a special token stands for its own text."""
        found = self._bytes_by_id.get(token_id)
        if found is None:
            found = self._bytes_by_id[token_id] = self._decode_token(token_id)
        return found

    def special_ids(self) -> list[int]:
        """Ids that are cut out of a text before anything else, longest text first."""
        kinds = (TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.UNKNOWN)
        ids = [token_id for token_id, kind in enumerate(self.kinds) if kind in kinds]
        return sorted(ids, key=lambda token_id: -len(self.tokens[token_id].encode("utf-8", "replace")))

    def _decode_token(self, token_id: int) -> bytes:
        text, kind = self.tokens[token_id], self.kinds[token_id]
        if kind in (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED):
            return text.encode("utf-8", "replace")
        if kind == TokenKind.BYTE:
            try:
                return bytes([int(text[3:5], 16)])
            except ValueError:
                return b""
        if kind != TokenKind.NORMAL:
            return b""
        if self.is_sentencepiece:
            return text.replace("▁", " ").encode("utf-8", "replace")
        return b"".join(
            bytes([BYTE_OF_CHARACTER[c]]) if c in BYTE_OF_CHARACTER else c.encode("utf-8", "replace") for c in text
        )

    def _read_tokens(self) -> list[str]:
        tokens = self.read_texts("tokens")
        if not tokens:
            raise FormatError(f"{self.path}: {PREFIX}tokens is missing or empty, so the file has no vocabulary")
        if "" in tokens:
            tokens = [token or f"[EMPTY_{token_id}]" for token_id, token in enumerate(tokens)]
        return tokens

    def read_texts(self, name: str) -> list[str] | None:
        """A list of texts from the metadata, None if it is missing."""
        texts = self._read_array(name)
        if not set(map(type, texts or ())) <= {str}:
            raise FormatError(f"{self.path}: {PREFIX}{name} holds something else than texts; the file is damaged")
        return texts

    def _read_array(self, name: str) -> list[Any] | None:
        values = self._metadata.get(PREFIX + name)
        if values is None:
            return None
        if isinstance(values, str | bytes) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
            raise FormatError(f"{self.path}: {PREFIX}{name} is {str(values)[:40]!r}, expected a list")
        return values.tolist() if hasattr(values, "tolist") else list(values)

    def _read_numbers(self, name: str) -> list[Any]:
        values = self._read_array(name) or []
        if values and len(values) != len(self.tokens):
            raise FormatError(
                f"{self.path}: {PREFIX}{name} has {len(values)} entries, expected {len(self.tokens)}, one per token"
            )
        if not set(map(type, values)) <= {int, float}:
            raise FormatError(f"{self.path}: {PREFIX}{name} holds something else than numbers; the file is damaged")
        return values

    def _read_id(self, name: str, default: int | None = None) -> int | None:
        token_id = read_value(self._metadata, PREFIX + name, int, None, self.path)
        if token_id is None:
            return default if default is not None and default < len(self.tokens) else None
        if not 0 <= token_id < len(self.tokens):
            raise FormatError(
                f"{self.path}: {PREFIX}{name} is {token_id}, expected less than {len(self.tokens)}, the vocabulary size"
            )
        return token_id

    def _find(self, texts: Sequence[str] | frozenset[str]) -> set[int]:
        return {self.ids[text] for text in texts if text in self.ids}

    def _find_end_ids(self) -> frozenset[int]:
        """Every id that ends a text; tokens found by their text become control tokens, whatever the file says."""
        stated = {self._read_id(f"{name}_token_id") for name in ("eot", "eom")} | {self.eos_id}
        end_ids = self._find(END_TEXTS)
        control = set(end_ids)
        for role, texts in FIM_TEXTS.items():
            token_id = self._read_id(f"{role}_token_id")
            if token_id is None and role in OLD_FIM_KEYS:
                token_id = self._read_id(OLD_FIM_KEYS[role])
            found = self._find(texts.split()) if token_id is None else {token_id}
            if token_id is None:
                control |= found
            if role in FIM_END_ROLES:
                end_ids |= found
        for token_id in control:
            self.kinds[token_id] = TokenKind.CONTROL
        for token_id in self._find(ALWAYS_SHOWN):
            self.kinds[token_id] = TokenKind.USER_DEFINED
        end_ids |= {token_id for token_id in stated if token_id is not None}
        self._take_back(end_ids, "<|end|>", TokenKind.USER_DEFINED, ("<|return|>", "<|call|>"))
        self._take_back(end_ids, "<|end|>", TokenKind.USER_DEFINED, ("<|calls|>", "<|flush|>"))
        self._take_back(end_ids, "</s>", TokenKind.NORMAL, ("<|tool_response>",))
        return frozenset(end_ids)

    def _take_back(self, end_ids: set[int], text: str, kind: TokenKind, others: Sequence[str]) -> None:
        """In a vocabulary that has all of `others`, `text` does not end anything."""
        if text in self.ids and all(other in self.ids for other in others):
            end_ids.discard(self.ids[text])
            self.kinds[self.ids[text]] = kind
