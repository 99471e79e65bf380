"""Plain text to token ids: byte-level BPE through the `tokenizers` library, and SentencePiece's merging by score."""

import heapq
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from typing import Any

from edge_moe.errors import FormatError
from edge_moe.pretokenizers import PreTokenizer
from edge_moe.vocabulary import CHARACTER_OF_BYTE, PREFIX, Vocabulary

PART_LENGTH = 50_000
SAFE_CUT = re.compile(r"[A-Za-z]\n(?=[A-Za-z])")  # a line break between two letters is a word of its own
SPACE = "▁"  # U+2581 stands for a space in SentencePiece vocabularies


class ByteLevelEncoder:
    """Byte-level BPE: words cut by the pre-tokenizer's patterns, then merged by rank."""

    def __init__(self, vocabulary: Vocabulary, merges: list[str], pre_tokenizer: PreTokenizer) -> None:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        ids = dict(vocabulary.ids)
        # A byte without a token of its own gets an id past the end, so that its neighbours are not taken for adjacent.
        for byte, character in CHARACTER_OF_BYTE.items():
            ids.setdefault(character, len(vocabulary) + byte)
        self._has_stand_ins = len(ids) > len(vocabulary.ids)
        self._first_stand_in = len(vocabulary)
        try:
            model = models.BPE(ids, _pairs(merges), ignore_merges=pre_tokenizer.ignore_merges)
        except Exception as error:  # the library raises plain exceptions
            raise _explain_merges(vocabulary, merges) from error
        self._tokenizer = Tokenizer(model)
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre_tokenizer.patterns]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])

    @property
    def library_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` that does the work; it knows no special tokens."""
        return self._tokenizer

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Token ids of a text without special tokens."""
        ids: list[int] = []
        for part in _parts(text):
            ids += self._tokenizer.encode(part, add_special_tokens=False).ids
        if self._has_stand_ins:
            ids = [token_id for token_id in ids if token_id < self._first_stand_in]
        return ids


def _parts(text: str) -> Iterator[str]:
    """Cut a long text where every splitting rule cuts it too, since the library needs 170 bytes for each character."""
    start = 0
    while cut := SAFE_CUT.search(text, start + PART_LENGTH):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _pairs(merges: list[str]) -> list[Any]:
    """The two tokens of each merge; of equal merges the first counts."""
    merges = list(dict.fromkeys(merges))
    if set(map(str.count, merges, repeat(" "))) == {1}:  # as in every vocabulary seen so far, and many times faster
        parts = " ".join(merges).split(" ")
        return list(zip(parts[::2], parts[1::2], strict=True))
    return [tuple(merge.split(" ", 1)) for merge in merges]


def _explain_merges(vocabulary: Vocabulary, merges: list[str]) -> FormatError:
    for rank, merge in enumerate(merges):
        parts = merge.split(" ", 1)
        if len(parts) < 2:
            return FormatError(
                f"{vocabulary.path}: {PREFIX}merges[{rank}] is {merge[:40]!r}, expected two tokens with a space between"
            )
        for token in (*parts, "".join(parts)):
            if token not in vocabulary.ids:
                return FormatError(
                    f"{vocabulary.path}: {PREFIX}merges[{rank}] needs token {token[:40]!r}, not found in {PREFIX}tokens"
                )
    return FormatError(f"{vocabulary.path}: {PREFIX}merges cannot be used; the file is damaged")


class SentencePieceEncoder:
    """SentencePiece BPE: the adjacent pair whose joint token scores highest is merged first, the leftmost among equals.

    What ends up as no token is spelled in byte tokens. Source: Kudo, Richardson, arXiv 1808.06226, section 3.1.
    """

    def __init__(self, vocabulary: Vocabulary, add_space_prefix: bool) -> None:
        self._vocabulary = vocabulary
        self._add_space_prefix = add_space_prefix
        self._merge_cached = lru_cache(maxsize=1 << 15)(self._merge)
        # Where no merge can join a letter and the space after it, words are independent, and repeated ones are free.
        self._words = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+") if not self._joins_across_spaces() else None

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Token ids of a text without special tokens; `at_start`: it opens the text or follows a special token."""
        if at_start and self._add_space_prefix:
            text = " " + text
        text = text.replace(" ", SPACE)
        if self._words is None:
            return list(self._merge(text))
        ids: list[int] = []
        for word in self._words.findall(text):
            ids += self._merge_cached(word) if len(word) <= 64 else self._merge(word)
        return ids

    def _joins_across_spaces(self) -> bool:
        ids = self._vocabulary.ids
        for token in ids:
            if SPACE in token.lstrip(SPACE):
                for cut in range(1, len(token)):
                    left, right = token[:cut], token[cut:]
                    if (
                        left[-1] != SPACE
                        and right[0] == SPACE
                        and (len(left) == 1 or left in ids)
                        and (len(right) == 1 or right in ids)
                    ):
                        return True
        return False

    def _merge(self, text: str) -> tuple[int, ...]:
        ids, scores = self._vocabulary.ids, self._vocabulary.scores
        symbols = list(text)  # a merged symbol keeps its left place and leaves "" on the right one
        previous = list(range(-1, len(symbols) - 1))
        following = [*range(1, len(symbols)), -1]
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            joint = symbols[left] + symbols[right]
            token_id = ids.get(joint)
            if token_id is not None:
                heapq.heappush(queue, (-scores[token_id], left, right, joint))

        for left in range(len(symbols) - 1):
            offer(left, left + 1)
        while queue:
            _, left, right, joint = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != len(joint):
                continue  # one of the two has been merged meanwhile
            symbols[left], symbols[right] = joint, ""
            following[left] = following[right]
            if following[right] >= 0:
                previous[following[right]] = left
            if previous[left] >= 0:
                offer(previous[left], left)
            if following[left] >= 0:
                offer(left, following[left])
        merged: list[int] = []
        for symbol in filter(None, symbols):
            token_id = ids.get(symbol)
            if token_id is not None:
                merged.append(token_id)
            else:
                merged += self._spell(symbol)
        return tuple(merged)

    def _spell(self, symbol: str) -> list[int]:
        ids, spelled = self._vocabulary.ids, []
        for byte in symbol.encode("utf-8"):
            token_id = ids.get(f"<0x{byte:02X}>", self._vocabulary.unknown_id)
            if token_id is not None:
                spelled.append(token_id)
        return spelled
