"""A model's distributions over a text in a file, in the format of llama-perplexity's `--save-all-logits`.

After the magic `_logits_` come three 32-bit integers (tokens of a chunk, vocabulary, number of chunks) and the token
ids of all chunks, i32. Then, chunk by chunk, one row for each scored position: f32 scale, f32 offset, and a u16 code
for every token (padded to an even number); code * scale + offset is the log probability. The codes span at most 16 nats
below the likeliest token, so that code 0 of a row that spans all 16 says only that a token is less likely than that.

Source: llama.cpp tools/perplexity/perplexity.cpp, log_softmax() and kl_divergence(), which write and read the format.
"""

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edge_moe.errors import FormatError, OptionError
from edge_moe.files import replacing

_MAGIC = b"_logits_"
_HEADER = struct.Struct("<8sIii")
_SCALES = 4  # u16s that scale and offset take at the start of a row
_SPAN = 16.0  # nats below the likeliest token that codes reach
_LARGEST_CODE = 65535


@dataclass(frozen=True)
class LogProbs:
    """Log probabilities of T positions: values[:, first + token] * scale + offset, unknown where the value <= floor."""

    values: np.ndarray  # f32 or u16[T, first + V or more]
    first: int
    vocab_size: int
    scale: np.ndarray  # f32[T]
    offset: np.ndarray  # f32[T]
    floor: np.ndarray  # f32[T], NaN: every value is known

    def of(self, token_ids: np.ndarray) -> np.ndarray:
        """Log probability of one token at each position, -inf of an unknown one. token_ids i64[T] -> f64[T]."""
        values = self.values[np.arange(len(token_ids)), self.first + token_ids].astype(np.float64)
        return np.where(values <= self.floor, -np.inf, values * self.scale + self.offset)

    def likeliest(self) -> np.ndarray:
        """The likeliest token at each position, the first of equals, i64[T]."""
        return self.values[:, self.first : self.first + self.vocab_size].argmax(axis=1)


def _row_codes(vocab_size: int) -> int:
    """u16s of a row."""
    return _SCALES + 2 * ((vocab_size + 1) // 2)


def scored_rows(context_length: int) -> int:
    """Positions of a chunk that are scored: those of its second half that have a next token."""
    return context_length - 1 - context_length // 2


@dataclass(frozen=True)
class SavedLogits:
    """The header of a file of distributions; its rows are read when they are needed."""

    path: Path
    vocab_size: int
    token_ids: np.ndarray  # i32[chunks, context_length]

    @property
    def context_length(self) -> int:
        return int(self.token_ids.shape[1])

    def rows(self, chunk: int, first: int, n: int) -> LogProbs:
        """Distributions after the scored positions first to first + n of a chunk. Raises FormatError."""
        n_codes = _row_codes(self.vocab_size)
        row = chunk * scored_rows(self.context_length) + first
        codes = np.empty((n, n_codes), "<u2")
        with self.path.open("rb") as file:
            file.seek(_HEADER.size + self.token_ids.nbytes + row * 2 * n_codes)
            if file.readinto(codes.data) != codes.nbytes:
                raise FormatError(f"{self.path}: became shorter while it was read; save the distributions again")
        scale, offset = codes[:, :_SCALES].copy().view("<f4").T
        if not (np.isfinite(scale).all() and np.isfinite(offset).all()):
            raise self.damaged(chunk)
        spans_all = scale >= (_SPAN - 1e-3) / _LARGEST_CODE
        floor = np.where(spans_all, np.float32(0), np.float32(np.nan))
        scale, offset = np.ascontiguousarray(scale), np.ascontiguousarray(offset)
        return LogProbs(codes, _SCALES, self.vocab_size, scale, offset, floor)

    def damaged(self, chunk: int) -> FormatError:
        """The error for a chunk whose rows are no distributions."""
        return FormatError(
            f"{self.path}: chunk {chunk + 1} of {len(self.token_ids)} does not hold probabilities that add up to 1; "
            "the file is damaged, save the distributions again"
        )


def open_saved_logits(path: str | os.PathLike[str]) -> SavedLogits:
    """Read the header and the tokens. Raises OptionError when there is no such file, FormatError when it is damaged."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read_header(path, file)
    except OSError as error:
        raise OptionError(f"{path}: cannot read the saved logits: {error.strerror or error}") from None


def _read_header(path: Path, file: BinaryIO) -> SavedLogits:
    size_bytes = os.fstat(file.fileno()).st_size
    header = file.read(_HEADER.size)
    if not header.startswith(_MAGIC):
        raise FormatError(
            f"{path}: begins with {header[:8]!r}, expected {_MAGIC!r}; "
            "give a file that `edge-moe eval --save-logits` or llama-perplexity wrote"
        )
    if len(header) < _HEADER.size:
        raise FormatError(f"{path}: ends within its header; save the distributions again")
    _, context_length, vocab_size, n_chunks = _HEADER.unpack(header)
    if context_length < 4 or vocab_size < 1 or n_chunks < 1:
        raise FormatError(
            f"{path}: says that it holds {n_chunks} chunks of {context_length} tokens out of {vocab_size}; "
            "expected at least 1 chunk, 4 tokens and 1; save the distributions again"
        )
    row_bytes = 2 * _row_codes(vocab_size)
    stated_bytes = _HEADER.size + n_chunks * (4 * context_length + scored_rows(context_length) * row_bytes)
    if size_bytes != stated_bytes:
        raise FormatError(
            f"{path}: has {size_bytes} bytes, expected {stated_bytes} for {n_chunks} chunks of {context_length} tokens "
            f"out of {vocab_size}; it was cut off or damaged, save the distributions again"
        )
    token_ids = np.frombuffer(file.read(4 * n_chunks * context_length), "<i4").reshape(n_chunks, context_length)
    return SavedLogits(path, vocab_size, token_ids)


class LogitsWriter:
    """Writes the rows of a file of distributions, in the order of the text."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, logits: np.ndarray, normalizers: np.ndarray) -> None:
        """Add the next rows. logits f32[T,V], normalizers f64[T] (log of the sum of each row's exponentials)."""
        n_rows, vocab_size = logits.shape
        top = logits.max(axis=1)
        least = np.maximum(logits.min(axis=1), top - np.float32(_SPAN))
        scale = ((top - least) / np.float32(_LARGEST_CODE)).astype(np.float32)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        codes = np.zeros((n_rows, _row_codes(vocab_size)), "<u2")
        codes[:, :_SCALES].view("<f4")[:] = np.stack([scale, least - normalizers], axis=1)
        steps = (logits - least[:, None]) * inverse[:, None]
        np.clip(np.rint(steps), 0, _LARGEST_CODE, out=steps)
        codes[:, _SCALES : _SCALES + vocab_size] = steps
        self._file.write(codes.data)


@contextlib.contextmanager
def saving_logits(
    path: Path, context_length: int, vocab_size: int, chunks: Sequence[Sequence[int]]
) -> Iterator[LogitsWriter]:
    """Write a file of distributions over `chunks` of tokens; it gets its name when all rows are written.

    Raises OptionError when it cannot be written.
    """
    row_bytes = 2 * _row_codes(vocab_size)
    n_bytes = _HEADER.size + len(chunks) * (4 * context_length + scored_rows(context_length) * row_bytes)
    with replacing(path, n_bytes) as file:
        file.write(_HEADER.pack(_MAGIC, context_length, vocab_size, len(chunks)))
        file.write(np.asarray(chunks, "<i4").data)
        yield LogitsWriter(file)
