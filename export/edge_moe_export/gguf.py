"""Writes GGUF files tensor by tensor, such that a file appears under its name only when it is whole.

Source: the GGUF specification (ggml, docs/gguf.md), version 3, little-endian.
"""

import contextlib
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edge_moe.errors import FormatError, OptionError, ShapeError
from edge_moe.files import replacing, sync_folder
from edge_moe.formats import BlockFormat

ALIGNMENT = 32
_MAX_NAME_BYTES = 63  # ggml keeps a tensor's name in 64 bytes, the last one being zero
_MAX_DIMENSIONS = 4

# The value types of the specification; numpy scalars and arrays say theirs by their dtype.
_TYPE_OF_DTYPE = {
    "u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: `parts` makes its bytes, u8 arrays in order, when its turn has come."""

    name: str
    format: BlockFormat
    shape: tuple[int, ...]  # slowest axis first; the last is the row length
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def n_bytes(self) -> int:
        """Bytes in the file. Raises FormatError when a row is not a whole number of blocks."""
        n_bytes = self.format.row_bytes(self.shape[-1])
        for size in self.shape[:-1]:
            n_bytes *= size
        return n_bytes


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[NewTensor],
    *,
    progress: Callable[[int, int, str], None] | None = None,
    resume_key: str | None = None,
) -> int:
    """Write a file and return its size in bytes; an existing file is replaced at the very end.

    Values of `metadata`: str, bool, int (u32 or, below 0, i32), float (f32), numpy scalars and arrays for every other
    number type, sequences of str, and bytes: a value with its type as another file has it.
    `progress(done_bytes, total_bytes, tensor_name)` is called after each part. With resume_key, which stands for all
    that decides the content, an interrupted run leaves what it has, and the next one with the same key goes on behind
    the last whole tensor.
    Raises OptionError when the file cannot be written (no such folder, no space), ShapeError for values or tensors that
    a GGUF file cannot hold. Source: GGUF specification.
    """
    header, starts, end = _layout(metadata, tensors)
    total_bytes = len(header) + end
    ends = [len(header) + each for each in [*starts, end][1:]]
    with contextlib.ExitStack() as stack:
        if resume_key is None:
            _check_space(path, total_bytes)
            file, kept_bytes = stack.enter_context(replacing(path, total_bytes)), 0
        else:
            whole = [len(header), *ends]
            file, kept_bytes = stack.enter_context(_continuing(path, resume_key, whole))
        if not kept_bytes:
            file.write(header)
        done_bytes = len(header)
        for tensor, start, following in zip(tensors, starts, [*starts, end][1:], strict=True):
            if len(header) + following <= kept_bytes:
                done_bytes = len(header) + following
                continue
            n_written = 0
            for part in tensor.parts():
                if part.dtype != np.uint8:
                    raise ShapeError(f"tensor {tensor.name}: a part is {part.dtype}, expected uint8")
                n_written += part.nbytes
                if n_written > tensor.n_bytes:
                    break
                file.write(np.ascontiguousarray(part).data)
                if progress:
                    progress(done_bytes + n_written, total_bytes, tensor.name)
            if n_written != tensor.n_bytes:
                raise ShapeError(f"tensor {tensor.name}: its parts make {n_written} bytes, expected {tensor.n_bytes}")
            file.write(bytes(following - start - n_written))
            done_bytes = len(header) + following
    return total_bytes


# ---- header ---------------------------------------------------------------------------------------------------------


def _layout(metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> tuple[bytes, list[int], int]:
    """The bytes before the tensor data, where each tensor begins behind them, and where the last one ends."""
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    parts += [_string(key) + _value(key, value) for key, value in metadata.items()]
    starts, end, names = [], 0, set()
    for tensor in tensors:
        name = tensor.name.encode()
        if tensor.name in names or not 0 < len(name) <= _MAX_NAME_BYTES:
            raise ShapeError(f"tensor {tensor.name!r}: expected names of 1 to {_MAX_NAME_BYTES} bytes, each one once")
        if not 0 < len(tensor.shape) <= _MAX_DIMENSIONS or min(tensor.shape) < 1:
            raise ShapeError(
                f"tensor {tensor.name}: shape {tensor.shape}, expected 1 to {_MAX_DIMENSIONS} sizes above 0"
            )
        names.add(tensor.name)
        starts.append(end)
        parts.append(struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape)))
        parts.append(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
        parts.append(struct.pack("<IQ", tensor.format.ggml_type, end))
        end += _aligned(tensor.n_bytes)
    header = b"".join(parts)
    return header + bytes(_aligned(len(header)) - len(header)), starts, end


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    # a lone surrogate, which JSON can hold, has no UTF-8
    data = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    """A value's type and bytes."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, bool):
        value = np.bool_(value)
    elif isinstance(value, int):
        if not -(1 << 31) <= value < 1 << 32:
            raise ShapeError(f"metadata {key} is {value}, beyond 32 bits; pass it as a numpy integer of 64 bits")
        value = np.uint32(value) if value >= 0 else np.int32(value)
    elif type(value) is float:  # numpy's own f64 is one, too, and stays what it is
        value = np.float32(value)
    if isinstance(value, np.generic | np.ndarray):
        array = np.asarray(value)
        value_type = _TYPE_OF_DTYPE.get(array.dtype.str[1:])
        if value_type is None or array.ndim > 1:
            raise ShapeError(f"metadata {key} is {array.dtype} of shape {array.shape}, expected numbers in one row")
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        if array.ndim == 0:
            return struct.pack("<I", value_type) + data
        return struct.pack("<IIQ", _ARRAY, value_type, len(array)) + data
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    raise ShapeError(
        f"metadata {key} is a {type(value).__name__}, expected a text, a number, a truth value or a row of them"
    )


# ---- the file -------------------------------------------------------------------------------------------------------


def _check_space(path: Path, n_bytes: int) -> None:
    """Refuse at once what cannot fit beside a file of that name, which stays until the new one is whole."""
    try:
        free_bytes = shutil.disk_usage(path.absolute().parent).free
    except OSError:
        return  # opening the file says what is wrong
    if free_bytes < n_bytes:
        raise OptionError(
            f"{path}: needs {n_bytes} bytes, but only {free_bytes} are free there; make room or choose another place"
        )


@contextlib.contextmanager
def _continuing(path: Path, key: str, whole_bytes: Sequence[int]) -> Iterator[tuple[BinaryIO, int]]:
    """A file `.NAME.part` that stays when the block is cut short, and the bytes in it that need not be written again.

    whole_bytes: the sizes that it has after the header and after each tensor. `.NAME.part.key` says whose it is.
    """
    if path.is_dir():
        raise OptionError(f"{path}: is a folder, expected the name of a new file")
    fresh, label = (path.with_name(f".{path.name[:100]}.part{suffix}") for suffix in ("", ".key"))
    try:
        with fresh.open("ab+", buffering=1 << 20) as file:
            _lock(file, path)
            known = label.read_text(encoding="utf-8", errors="replace") if label.exists() else ""
            size = file.seek(0, os.SEEK_END) if known == key else 0
            kept_bytes = max((each for each in whole_bytes if each <= size), default=0)
            if not kept_bytes:
                label.unlink(missing_ok=True)  # before the content changes: the old key never stands for new bytes
            file.truncate(kept_bytes)
            try:
                _check_space(path, whole_bytes[-1] - kept_bytes)
            except OptionError:
                if not kept_bytes:
                    fresh.unlink()
                raise
            if not kept_bytes:
                label.write_text(key, encoding="utf-8")
            try:
                yield file, kept_bytes
            except (FormatError, ShapeError):  # the next run would meet the same
                fresh.unlink()
                label.unlink()
                raise
            file.flush()
            os.fsync(file.fileno())
            fresh.replace(path)
        label.unlink(missing_ok=True)
    except OSError as error:
        raise OptionError(
            f"{path}: cannot be written: {error.strerror or error}; its {whole_bytes[-1]} bytes need a folder with "
            f"room for them; what is done stays in {fresh.name}, and the same command goes on from there"
        ) from None
    sync_folder(path.absolute().parent)


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep a second run from writing the same file; where the system has no such locks, nothing keeps it."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OptionError(f"{path}: another run is writing it; wait for that one, or choose another name") from None
