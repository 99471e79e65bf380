"""Text to token ids and back, with the vocabulary and the rules that a GGUF file carries."""

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any

from edge_moe.encoders import ByteLevelEncoder, SentencePieceEncoder
from edge_moe.errors import FormatError, ShapeError, UnsupportedError
from edge_moe.pretokenizers import PRE_TOKENIZERS
from edge_moe.vocabulary import PREFIX, TokenKind, Vocabulary, read_value

_SURROGATES = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """The tokenizer of one model file.

    `bos_id`, `eos_id`: None if the file has none; `bos_token`, `eos_token`: their texts or ""; `eos_ids`: all ids that
    end a text or a turn; `add_bos`, `add_eos`: what `encode` adds by itself; `kind`: "gpt2" or "llama".
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: ByteLevelEncoder | SentencePieceEncoder,
        *,
        kind: str,
        pre_tokenizer: str,
        add_bos: bool,
        add_eos: bool,
        strips_first_space: bool,
        chat_template: str | None,
    ) -> None:
        self.kind = kind
        self.pre_tokenizer = pre_tokenizer
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.chat_template = chat_template
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.eos_ids = vocabulary.end_ids
        self.bos_token = "" if self.bos_id is None else vocabulary.tokens[self.bos_id]
        self.eos_token = "" if self.eos_id is None else vocabulary.tokens[self.eos_id]
        self._vocabulary = vocabulary
        self._encoder = encoder
        self._strips_first_space = strips_first_space
        self._specials = [(vocabulary.tokens[token_id], token_id) for token_id in vocabulary.special_ids()]
        self._special_starts = {text[:2] for text, _ in self._specials}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str | PathLike[str]) -> "Tokenizer":
        """Build the tokenizer that a GGUF file's metadata describe; `path` names the file in messages.

        Raises FormatError for contradictory metadata, UnsupportedError for a kind of tokenizer that is not here.
        Source: the GGUF specification, section "Tokenizer".
        """
        kind = read_value(metadata, PREFIX + "model", str, None, path)
        if kind is None:
            raise FormatError(f"{path}: {PREFIX}model is missing, so the file has no tokenizer")
        add_bos, add_space_prefix, pre_name = True, True, ""
        if kind == "gpt2":
            pre_name = read_value(metadata, PREFIX + "pre", str, "", path) or "default"
            if pre_name not in PRE_TOKENIZERS:
                known = ", ".join(sorted(PRE_TOKENIZERS))
                raise UnsupportedError(f"{path}: {PREFIX}pre is {pre_name[:40]!r}, supported are {known}")
            add_bos, add_space_prefix = PRE_TOKENIZERS[pre_name].add_bos, False
        elif kind == "llama":
            add_space_prefix = read_value(metadata, PREFIX + "add_space_prefix", bool, True, path)
        else:
            raise UnsupportedError(f"{path}: {PREFIX}model is {kind[:40]!r}, supported are gpt2 and llama")
        vocabulary = Vocabulary(metadata, path)
        encoder: ByteLevelEncoder | SentencePieceEncoder
        if kind == "gpt2":
            merges = vocabulary.read_texts("merges")
            if merges is None:
                raise FormatError(
                    f"{path}: {PREFIX}merges is missing, expected a list of texts; convert the model again"
                )
            encoder = ByteLevelEncoder(vocabulary, merges, PRE_TOKENIZERS[pre_name])
        else:
            encoder = SentencePieceEncoder(vocabulary, add_space_prefix)
        return cls(
            vocabulary,
            encoder,
            kind=kind,
            pre_tokenizer=pre_name,
            add_bos=read_value(metadata, PREFIX + "add_bos_token", bool, add_bos, path),
            add_eos=read_value(metadata, PREFIX + "add_eos_token", bool, False, path),
            strips_first_space=add_space_prefix,
            chat_template=read_value(metadata, "tokenizer.chat_template", str, None, path),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self._vocabulary)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text; `add_special`: with the BOS and EOS the model expects; `parse_special`: the texts of
        control tokens become those tokens (for rendered chat templates; never for text from outside)."""
        if _SURROGATES.search(text):  # half characters, such as Python makes of undecodable arguments
            text = _SURROGATES.sub("\ufffd", text)
        ids: list[int] = []
        if add_special and self.add_bos and self.bos_id is not None:
            ids.append(self.bos_id)
        at_start = True
        for piece in self._cut_specials(text, parse_special):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._encoder.encode(piece, at_start)
            at_start = isinstance(piece, int)
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids from its start on; `skip_special`: control tokens are left out."""
        stream = TokenStream(self, skip_special=skip_special, at_start=True)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self, *, skip_special: bool = True, at_start: bool = False) -> "TokenStream":
        """A decoder for ids that come one by one; `at_start`: they open a text instead of continuing one."""
        return TokenStream(self, skip_special=skip_special, at_start=at_start)

    def token_bytes(self, token_id: int, *, skip_special: bool = False) -> bytes:
        """The bytes that one token adds to a text. Raises ShapeError for an id that the vocabulary does not have."""
        if not 0 <= token_id < len(self._vocabulary):
            raise ShapeError(f"token id {token_id} is not in the vocabulary, expected 0 to {self.vocab_size - 1}")
        if skip_special and self._vocabulary.is_hidden(token_id):
            return b""
        return self._vocabulary.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """The text of one token, special or not; bytes of an incomplete character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def strips_space_of(self, token_id: int) -> bool:
        """Whether this token, as the first of a text, carries the space that encoding put before the text."""
        return self._strips_first_space and self._vocabulary.kinds[token_id] == TokenKind.NORMAL

    def _cut_specials(self, text: str, parse_special: bool) -> Iterator[int | str]:
        """Cut special tokens out of a text, the longest token first wherever it stands."""
        pieces: list[int | str] = [text] if text else []
        starts = {start for start in self._special_starts if start in text}
        for special, token_id in self._specials:
            if special[:2] not in starts or (not parse_special and self._vocabulary.is_hidden(token_id)):
                continue
            if not any(isinstance(piece, str) and special in piece for piece in pieces):
                continue
            cut: list[int | str] = []
            for piece in pieces:
                if isinstance(piece, int):
                    cut.append(piece)
                    continue
                for number, part in enumerate(piece.split(special)):
                    if number:
                        cut.append(token_id)
                    if part:
                        cut.append(part)
            pieces = cut
        return iter(pieces)


class TokenStream:
    """Text of ids that come one by one; a character split over tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, at_start: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._at_start = at_start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is complete with this token; invalid bytes become U+FFFD."""
        data = self._tokenizer.token_bytes(token_id, skip_special=self._skip_special)
        if self._at_start and data:
            if data.startswith(b" ") and self._tokenizer.strips_space_of(token_id):
                data = data[1:]
            self._at_start = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._decoder.decode(b"", True)
