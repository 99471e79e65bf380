"""Opens a GGUF file: its metadata, and a table of its tensors as views on the mapped file.

Everything the file says about itself is checked against its real size before use, so that a damaged file gives one
clear error. Strings of arrays (a vocabulary has 200,000) are only located here, and decoded when they are asked for.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian.
"""

import itertools
import mmap
import re
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np

from edge_moe.errors import FormatError, OptionError, UnsupportedError
from edge_moe.formats import FORMATS, FORMATS_BY_GGML_TYPE, BlockFormat

# No real file comes near these; they bound the memory and time that a damaged or hostile one can cost.
_MAX_HEADER_BYTES = 64 << 20  # metadata and tensor table
_MAX_TEXT_BYTES = 8 << 20  # all strings outside arrays together
_MAX_KEYS = _MAX_TENSORS = 1 << 16
_MAX_STRINGS = 1 << 20  # of one array

_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_NUMBERS: dict[int, np.dtype[Any]] = {  # by GGUF value type
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9

_OTHER_GGML_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class StringArray(Sequence[str]):
    """The strings of one metadata array, decoded when asked for; bytes that are not UTF-8 become U+FFFD."""

    def __init__(self, buffer: bytes, starts: np.ndarray):
        """starts i64[n + 1]: where each string's u64 length is in the buffer, and the end of the last string."""
        self._buffer = buffer
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return self._buffer[self._starts[i] + 8 : self._starts[i + 1]].decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        """All strings, decoded together: five times faster than one by one, but not when they use all of ASCII."""
        first, last = int(self._starts[0]), int(self._starts[-1])
        block = np.frombuffer(self._buffer[first:last], np.uint8).copy()
        starts = self._starts[:-1] - first
        is_text = np.ones(len(block), np.bool_)
        is_text[starts[:, None] + np.arange(8)] = False  # the length before each string
        unused = np.flatnonzero(np.bincount(block[is_text], minlength=128)[:128] == 0)
        if not len(unused):
            return (self[i] for i in range(len(self)))
        block[starts] = unused[0]  # the first byte of its length becomes the mark between strings
        is_text[starts] = True
        return iter(block[is_text].tobytes().decode("utf-8", "replace").split(chr(unused[0]))[1:])

    def __repr__(self) -> str:
        return f"<StringArray of {len(self)} strings>"


@dataclass(frozen=True, eq=False, slots=True)
class TensorEntry:
    """One tensor as it lies in the file."""

    name: str
    format: BlockFormat
    shape: tuple[int, ...]  # slowest axis first, as in numpy; the last is the row length
    data: np.ndarray  # u8[n_bytes], a read-only view of the mapped file
    path: Path
    offset: int = 0  # where in the file it begins


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """An open GGUF model; with several parts, the metadata of the first and the tensors of all."""

    path: Path  # of the first part
    metadata: dict[str, Any]  # int, float, bool, str, numeric array, or StringArray
    tensors: dict[str, TensorEntry]
    size_bytes: int  # of all parts
    version: int
    alignment: int
    maps: dict[Path, np.ndarray] = field(default_factory=dict)  # each part as it is mapped, u8[n_bytes]


def open_gguf(path: str | PathLike[str]) -> GGUFFile:
    """Open a GGUF file, or all parts of a split one when given any of them.

    Raises OptionError when there is no readable file, FormatError when it is damaged, UnsupportedError for other
    versions, byte orders and tensor types. Source: GGUF specification; the parts' keys are those of gguf-split.
    """
    opened = _open_part(Path(path))
    count = _split_number(opened, "split.count", default=1)
    return _join_parts(opened, count) if count > 1 else opened


# ---- split files ----------------------------------------------------------------------------------------------------


def _join_parts(opened: GGUFFile, count: int) -> GGUFFile:
    """Open the other parts beside the opened one, which says that there are `count`."""
    number = _split_number(opened, "split.no", default=0) + 1
    name = _PART_NAME.fullmatch(opened.path.name)
    if not name or (int(name["number"]), int(name["count"])) != (number, count):
        raise FormatError(
            f"{_shown(opened.path)}: says that it is part {number} of {count} of a split model, expected its name to "
            f"end in -{number:05}-of-{count:05}.gguf; give the parts their original names"
        )
    paths = [opened.path.with_name(f"{name['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    for i, path in enumerate(paths, 1):
        if not path.exists():
            raise FormatError(
                f"{_shown(path)}: no such file, expected part {i} of {count} of a split model; "
                "put all parts into one folder"
            )
    parts = [opened if path == opened.path else _open_part(path) for path in paths]
    tensors: dict[str, TensorEntry] = {}
    for i, part in enumerate(parts, 1):
        says = (_split_number(part, "split.no", default=0) + 1, _split_number(part, "split.count", default=1))
        if says != (i, count):
            raise FormatError(
                f"{_shown(part.path)}: says that it is part {says[0]} of {says[1]}, expected part {i} of {count}; "
                "download it again"
            )
        for entry in part.tensors.values():
            if entry.name in tensors:
                raise FormatError(
                    f"{_shown(part.path)}: tensor {_shown(entry.name)} is also in {_shown(tensors[entry.name].path)}, "
                    "expected in one part only; download the parts again"
                )
            tensors[entry.name] = entry
    expected = _split_number(parts[0], "split.tensors.count", default=len(tensors))
    if expected != len(tensors):
        raise FormatError(
            f"{_shown(paths[0])}: its {count} parts hold {len(tensors)} tensors, expected {expected} as "
            "split.tensors.count says; download the parts again"
        )
    maps = {path: data for part in parts for path, data in part.maps.items()}
    return replace(parts[0], tensors=tensors, size_bytes=sum(part.size_bytes for part in parts), maps=maps)


def _split_number(part: GGUFFile, key: str, default: int) -> int:
    value = part.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise FormatError(f"{_shown(part.path)}: {key} is {_shown(repr(value))}, expected a count; download it again")
    return value


# ---- one file -------------------------------------------------------------------------------------------------------


def _open_part(path: Path) -> GGUFFile:
    buffer = _map_file(path)
    header = _Header(buffer, path)
    version = _read_version(header)
    n_tensors = header.number(_U64, "the tensor count")
    n_keys = header.number(_U64, "the metadata count")
    # A key takes at least 14 bytes, a tensor 33; a count beyond that is wild whatever follows.
    header.check_count(n_keys, 14, _MAX_KEYS, "metadata keys")
    header.check_count(n_tensors, 33, _MAX_TENSORS, "tensors")
    metadata = _read_metadata(header, n_keys)
    alignment = _alignment(metadata, path)
    rows = [_read_tensor_row(header) for _ in range(n_tensors)]
    file_bytes = np.frombuffer(buffer, np.uint8)
    tensors = _tensor_table(rows, file_bytes, -(-header.offset // alignment) * alignment, alignment, path)
    return GGUFFile(path, metadata, tensors, len(buffer), version, alignment, {path: file_bytes})


def _map_file(path: Path) -> mmap.mmap:
    """A model file mapped to be read, by huge pages where the system can. Raises OptionError, FormatError."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise OptionError(f"{_shown(path)}: is a folder, expected a .gguf file; name the file in it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            raise OptionError(f"{_shown(path)}: is not a regular file, expected a .gguf file")
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise FormatError(f"{_shown(path)}: is empty, expected a GGUF file; download it again")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                # What is not in memory yet is then read and mapped by 2 MiB at a time, where the file system can: a
                # token reads weights from all over the file, and looking up 4 KiB pages costs it 3 to 5 %.
                with suppress(OSError):
                    mapped.madvise(mmap.MADV_HUGEPAGE)
            return mapped
    except FileNotFoundError:
        raise OptionError(f"{_shown(path)}: no such file; check the path") from None
    except PermissionError:
        raise OptionError(f"{_shown(path)}: no permission to read it; change its permissions") from None
    except (OSError, ValueError, OverflowError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(f"{_shown(path)}: cannot be opened ({reason}); check the path") from None


class _Header:
    """Reads the header from front to back; nothing is read that is not there."""

    def __init__(self, buffer: mmap.mmap, path: Path):
        self.buffer = buffer
        self.path = path
        self.offset = 0
        self._end = min(len(buffer), _MAX_HEADER_BYTES)
        self._text_bytes = 0

    def error(self, problem: str) -> FormatError:
        return FormatError(f"{_shown(self.path)}: {problem}; the file is damaged, download it again")

    def take(self, n_bytes: int, what: str) -> int:
        """Step over n_bytes and return the offset where they begin. Raises FormatError when they are not there."""
        if n_bytes > self._end - self.offset:
            if self._end < len(self.buffer):
                raise self.error(f"{what} takes the header beyond {_MAX_HEADER_BYTES} bytes, more than any model's")
            raise self.error(f"it is {len(self.buffer)} bytes, {what} needs {self.offset + n_bytes}")
        start = self.offset
        self.offset += n_bytes
        return start

    def check_count(self, count: int, min_bytes_each: int, limit: int, what: str) -> None:
        if count > limit or count * min_bytes_each > self._end - self.offset:
            raise self.error(
                f"it claims {count} {what}, expected at most {min(limit, (self._end - self.offset) // min_bytes_each)} "
                f"in its {len(self.buffer)} bytes"
            )

    def number(self, layout: struct.Struct, what: str) -> int:
        value: int = layout.unpack_from(self.buffer, self.take(layout.size, what))[0]
        return value

    def text_bytes(self, what: str) -> bytes:
        length = self.number(_U64, f"the length of {what}")
        self._text_bytes += length
        start = self.take(length, what)
        if self._text_bytes > _MAX_TEXT_BYTES:
            raise self.error(f"{what} is {length} bytes, with the texts before it more than {_MAX_TEXT_BYTES}")
        return self.buffer[start : start + length]

    def name(self, what: str) -> str:
        """A key or a tensor's name: a text that is not empty and is UTF-8."""
        raw = self.text_bytes(what)
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is {_shown(repr(raw))}, expected UTF-8") from None
        if not name:
            raise self.error(f"{what} is empty, expected a name")
        return name


def _read_version(header: _Header) -> int:
    magic = header.buffer[: min(4, len(header.buffer))]
    path = _shown(header.path)
    if magic in (b"lmgg", b"fmgg", b"tjgg", b"algg"):
        raise UnsupportedError(f"{path}: is a GGML file from before GGUF; get or convert a GGUF version of the model")
    if magic == b"vers" and header.buffer[:32].startswith(b"version https://git-lfs"):
        raise FormatError(f"{path}: is a Git LFS pointer, not the model itself; fetch that with `git lfs pull`")
    if magic != b"GGUF":
        raise FormatError(f"{path}: is not a GGUF file: it begins with {magic!r}, expected b'GGUF'; check the file")
    header.take(4, "the magic")
    version = header.number(_U32, "the version")
    if version and version & 0xFFFF == 0:
        raise UnsupportedError(f"{path}: is big-endian GGUF, expected little-endian; convert the model again")
    if version not in (2, 3):
        raise UnsupportedError(f"{path}: has GGUF version {version}, expected 2 or 3; convert the model again")
    return version


# ---- metadata -------------------------------------------------------------------------------------------------------


def _read_metadata(header: _Header, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(n_keys):
        key = header.name(f"the name of metadata key {index}")
        if key in metadata:
            raise header.error(f"metadata key {_shown(key)} is there twice")
        what = f"metadata key {_shown(key)}"
        metadata[key] = _read_value(header, header.number(_U32, what), what)
    return metadata


def _read_value(header: _Header, value_type: int, what: str) -> Any:
    if value_type == _STRING:
        return header.text_bytes(what).decode("utf-8", "replace")
    if value_type == _ARRAY:
        return _read_array(header, what)
    return _read_numbers(header, value_type, 1, what)[0].item()


def _read_numbers(header: _Header, value_type: int, count: int, what: str) -> np.ndarray:
    """`count` numbers or bools, copied out of the header, where they are not aligned."""
    if value_type != _BOOL and value_type not in _NUMBERS:
        raise header.error(f"{what} has value type {value_type}, expected 0 to 12")
    dtype = _NUMBERS.get(value_type, np.dtype("u1"))
    start = header.take(count * dtype.itemsize, what)
    numbers = np.frombuffer(header.buffer, dtype, count, start).astype(dtype.newbyteorder("="))
    if value_type == _BOOL:
        if (highest := numbers.max(initial=0)) > 1:
            raise header.error(f"{what} holds {highest} as a bool, expected 0 or 1")
        return numbers.view(np.bool_)
    return numbers


def _read_array(header: _Header, what: str) -> np.ndarray | StringArray:
    item_type = header.number(_U32, what)
    count = header.number(_U64, what)
    if item_type == _ARRAY:
        raise UnsupportedError(
            f"{_shown(header.path)}: {what} is an array of arrays, expected numbers or strings; convert the model again"
        )
    if item_type != _STRING:
        return _read_numbers(header, item_type, count, what)
    header.check_count(count, 8, _MAX_STRINGS, f"strings in {what}")
    # The only long loop of opening a file: a string begins where the one before it ends.
    starts = []
    end = header.offset
    length_at = _U64.unpack_from
    buffer = header.buffer
    try:
        for _ in itertools.repeat(None, count):
            starts.append(end)
            (length,) = length_at(buffer, end)
            end += 8 + length
    except (struct.error, OverflowError, ValueError):
        end = len(buffer) + 8  # beyond the file: refused below
    starts.append(end)
    header.take(end - header.offset, f"string {len(starts) - 2} of {what}")
    # A copy: a file that another program cuts while it is mapped must not end this one.
    return StringArray(bytes(buffer[starts[0] : starts[-1]]), np.array(starts, dtype=np.int64) - starts[0])


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise FormatError(
            f"{_shown(path)}: general.alignment is {_shown(repr(alignment))}, expected a power of two of at least 8; "
            "the file is damaged, download it again"
        )
    return alignment


# ---- tensors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _TensorRow:
    """One row of the tensor table, its offset counted from the start of the tensor data."""

    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


def _read_tensor_row(header: _Header) -> _TensorRow:
    name = header.name("the name of a tensor")
    what = f"tensor {_shown(name)}"
    n_dims = header.number(_U32, what)
    if not 1 <= n_dims <= _MAX_DIMENSIONS:
        raise header.error(f"{what} has {n_dims} dimensions, expected 1 to {_MAX_DIMENSIONS}")
    shape = tuple(header.number(_U64, what) for _ in range(n_dims))[::-1]
    ggml_type = header.number(_U32, what)
    offset = header.number(_U64, what)
    fmt = FORMATS_BY_GGML_TYPE.get(ggml_type)
    if fmt is None:
        found = _OTHER_GGML_TYPES.get(ggml_type, "unknown")
        raise UnsupportedError(
            f"{_shown(header.path)}: {what} has type {ggml_type} ({found}), expected one of "
            f"{', '.join(each.name for each in FORMATS)}; quantize the model to one of these"
        )
    if min(shape) < 1 or shape[-1] % fmt.block_size:
        raise header.error(
            f"{what} has shape {shape} in {fmt.name}, expected a row length that is a positive multiple of "
            f"{fmt.block_size} and no empty dimension"
        )
    n_bytes = fmt.row_bytes(shape[-1])
    for size in shape[:-1]:
        n_bytes *= size
    return _TensorRow(name, fmt, shape, offset, n_bytes)


def _tensor_table(
    rows: list[_TensorRow], file_bytes: np.ndarray, data_start: int, alignment: int, path: Path
) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for row in rows:
        problem = None
        start = data_start + row.offset
        if row.name in tensors:
            problem = "is there twice"
        elif row.offset % alignment:
            problem = f"has offset {row.offset}, expected a multiple of {alignment}"
        elif start + row.n_bytes > len(file_bytes):
            problem = (
                f"ends at byte {start + row.n_bytes}, but the file is {len(file_bytes)} bytes and its table needs "
                f"{data_start + max(each.offset + each.n_bytes for each in rows)}"
            )
        if problem:
            raise FormatError(
                f"{_shown(path)}: tensor {_shown(row.name)} {problem}; the file is damaged or incomplete, "
                "download it again"
            )
        data = file_bytes[start : start + row.n_bytes]
        tensors[row.name] = TensorEntry(row.name, row.format, row.shape, data, path, start)
    in_order = sorted(rows, key=lambda row: row.offset)
    for one, following in itertools.pairwise(in_order):
        if one.offset + one.n_bytes > following.offset:
            raise FormatError(
                f"{_shown(path)}: tensors {_shown(one.name)} and {_shown(following.name)} overlap; "
                "the file is damaged, download it again"
            )
    return tensors


def _shown(text: str | Path) -> str:
    """The text as it can stand in a one-line message."""
    text = str(text)
    if len(text) > 200:
        text = f"{text[:200]}..."
    return text if text.isprintable() else repr(text)
