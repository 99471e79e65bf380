"""Quantizes a GGUF file to another, slice by slice on all threads, in little memory however large the model is."""

import hashlib
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from edge_moe_export.encode import encode as encode_plain
from edge_moe_export.gguf import NewTensor, write_gguf

from edge_moe.errors import FormatError, OptionError
from edge_moe.formats import BlockFormat
from edge_moe.gguf import GGUFFile, TensorEntry
from edge_moe_quant.encode import encode_rows, prepare
from edge_moe_quant.importance import Importance
from edge_moe_quant.pages import forget_pages
from edge_moe_quant.rotation import KEY as ROTATION_KEY
from edge_moe_quant.store import EncodedStore

_SLICE_VALUES = 1 << 19  # 2 MiB of f32; some such slices for each thread are in memory at a time
_FLOATS = ("F32", "F16", "BF16")
_VERSION = 1  # of what the encoders make: part of the key by which an interrupted run goes on


@dataclass(frozen=True)
class Quantized:
    """What was written: the file's size, its tensors by format, and bits for each weight."""

    size_bytes: int
    n_tensors: dict[str, int]
    bits_per_weight: float


def quantize(
    source: GGUFFile,
    out: Path,
    formats: Mapping[str, BlockFormat],
    *,
    file_type: int,
    importance: Importance | None = None,
    store: EncodedStore | None = None,
    allow_requantize: bool = False,
    n_threads: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Quantized:
    """Write `source` to `out` with its tensors in other formats (by name); all metadata comes along.

    Tensors that `store` has are written as they are there.

    Interrupted, the same call goes on where it was and makes the same bytes.
    Raises OptionError (out of space, requantizing without allow_requantize), FormatError (weights that are not finite,
    importance of another model).
    """
    for entry in source.tensors.values():
        fmt = formats[entry.name]
        if entry.format.name not in _FLOATS and fmt is not entry.format and not allow_requantize:
            raise OptionError(
                f"{source.path}: tensor {entry.name} is {entry.format.name} already and would become {fmt.name}; "
                "start from an F16, BF16 or F32 file, or accept the loss with --allow-requantize"
            )
    if any(Path(entry.path).resolve() == out.resolve() for entry in source.tensors.values()):
        raise OptionError(f"{out}: is the source itself; choose another name")
    metadata = _metadata(source, file_type, importance)
    with ThreadPoolExecutor(n_threads or os.cpu_count() or 1) as pool:
        work = _Work(source, formats, importance, store, pool, 3 * (n_threads or os.cpu_count() or 1))
        tensors = [
            NewTensor(entry.name, formats[entry.name], entry.shape, partial(work.parts, index))
            for index, entry in enumerate(source.tensors.values())
        ]
        prepare({formats[entry.name].name for entry in source.tensors.values() if work.is_encoded(entry)})
        try:
            size_bytes = write_gguf(
                out,
                metadata,
                tensors,
                progress=progress,
                resume_key=_key(source, metadata, formats, importance, store),
            )
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.format.name] = counts.get(tensor.format.name, 0) + 1
    n_weights = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors)
    return Quantized(size_bytes, counts, 8 * sum(tensor.n_bytes for tensor in tensors) / n_weights)


@dataclass(frozen=True)
class _Slice:
    entry: TensorEntry
    first_row: int
    n_rows: int


class _Work:
    """Encodes the slices of all tensors in order, some ahead of the one that is written."""

    def __init__(
        self,
        source: GGUFFile,
        formats: Mapping[str, BlockFormat],
        importance: Importance | None,
        store: EncodedStore | None,
        pool: ThreadPoolExecutor,
        n_ahead: int,
    ) -> None:
        self.entries = list(source.tensors.values())
        self.formats, self.importance, self.store, self.pool, self.n_ahead = formats, importance, store, pool, n_ahead
        self._begun: deque[tuple[str, Future[np.ndarray]]] = deque()
        self._slices: Iterator[_Slice] | None = None

    def parts(self, index: int) -> Iterator[np.ndarray]:
        """The encoded slices of a tensor; tensors are asked for in order, but for those left out at the start."""
        if self._slices is None:
            self._slices = (each for entry in self.entries[index:] for each in _slices(entry))
        name = self.entries[index].name
        while True:
            while len(self._begun) < self.n_ahead and (following := next(self._slices, None)) is not None:
                self._begun.append((following.entry.name, self.pool.submit(self._encode, following)))
            if not self._begun or self._begun[0][0] != name:
                return
            yield self._begun.popleft()[1].result()

    def is_encoded(self, entry: TensorEntry) -> bool:
        """Whether a tensor is changed to a quantized format, rather than copied or made floats."""
        fmt = self.formats[entry.name]
        return fmt is not entry.format and fmt.name not in _FLOATS

    def _encode(self, part: _Slice) -> np.ndarray:
        entry, fmt = part.entry, self.formats[part.entry.name]
        if self.store is not None and entry.name in self.store:
            out_bytes = fmt.row_bytes(entry.shape[-1])
            return self.store.get(entry.name)[part.first_row * out_bytes : (part.first_row + part.n_rows) * out_bytes]
        row_bytes = entry.format.row_bytes(entry.shape[-1])
        data = entry.data[part.first_row * row_bytes : (part.first_row + part.n_rows) * row_bytes]
        if fmt is entry.format:
            encoded = data.copy()
        else:
            values = entry.format.decode(data.reshape(part.n_rows, row_bytes))
            if self.is_encoded(entry):
                encoded = self._encode_rows(entry, part.first_row, values, fmt)
            else:
                encoded = encode_plain(values, fmt)
        forget_pages(data)
        return encoded.reshape(-1)

    def _encode_rows(self, entry: TensorEntry, first_row: int, values: np.ndarray, fmt: BlockFormat) -> np.ndarray:
        weights = self.importance.of(entry.name, entry.shape) if self.importance else None
        rows_of_matrix = entry.shape[-2]
        try:
            return encode_rows(values, fmt, None if weights is None else weights[first_row // rows_of_matrix])
        except FormatError as error:
            raise FormatError(f"{entry.path}: tensor {entry.name} {error}; make the file anew") from None


def _slices(entry: TensorEntry) -> Iterator[_Slice]:
    """Rows of a tensor, a number at a time; no slice holds rows of two matrices of a stack."""
    n_rows = int(np.prod(entry.shape[:-1], dtype=np.int64))
    rows_of_matrix = entry.shape[-2] if len(entry.shape) > 1 else 1
    step = max(1, _SLICE_VALUES // entry.shape[-1])
    for matrix in range(0, n_rows, rows_of_matrix):
        for row in range(matrix, matrix + rows_of_matrix, step):
            yield _Slice(entry, row, min(step, matrix + rows_of_matrix - row))


# ---- metadata -------------------------------------------------------------------------------------------------------


def _metadata(source: GGUFFile, file_type: int, importance: Importance | None) -> dict[str, object]:
    """The source's values with their types as they are, but for what says how it is split and quantized."""
    kept: dict[str, object] = {
        key: value for key, value in _raw_metadata(source.path).items() if not key.startswith("split.")
    }
    kept |= {"general.quantization_version": 2, "general.file_type": file_type}
    if source.alignment != 32:
        kept.pop("general.alignment", None)  # the writer has its own
    if ROTATION_KEY in source.metadata:
        kept[ROTATION_KEY] = source.metadata[ROTATION_KEY]
    if importance is not None:
        kept["quantize.imatrix.file"] = importance.path.name
        if importance.datasets:
            kept["quantize.imatrix.dataset"] = importance.datasets[0]
        kept["quantize.imatrix.entries_count"] = len(importance.values)
        kept["quantize.imatrix.chunks_count"] = importance.n_chunks
    return kept


_BYTES_OF_TYPE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def _raw_metadata(path: Path) -> dict[str, bytes]:
    """The metadata of a file that open_gguf has checked, each value's type and bytes. Source: GGUF, v2 and v3."""
    values = {}
    with path.open("rb") as file:

        def unpack(layout: str) -> tuple[int, ...]:
            return struct.unpack(layout, file.read(struct.calcsize(layout)))

        def skip_strings(count: int) -> None:
            for _ in range(count):
                file.seek(unpack("<Q")[0], os.SEEK_CUR)

        _, _, _, n_keys = unpack("<4sIQQ")
        for _ in range(n_keys):
            key = file.read(unpack("<Q")[0]).decode("utf-8", "replace")
            start = file.tell()
            (kind,) = unpack("<I")
            if kind == _ARRAY:
                kind, count = unpack("<IQ")
            else:
                count = 1
            if kind == _STRING:
                skip_strings(count)
            else:
                file.seek(count * _BYTES_OF_TYPE[kind], os.SEEK_CUR)
            end = file.tell()
            file.seek(start)
            values[key] = file.read(end - start)
    return values


def _key(
    source: GGUFFile,
    metadata: Mapping[str, object],
    formats: Mapping[str, BlockFormat],
    importance: Importance | None,
    store: EncodedStore | None = None,
) -> str:
    """A hash of all that decides the bytes of the output, the source's content taken by size and time of change."""
    digest = hashlib.sha256(f"edge_moe {_VERSION}\n".encode())
    for path in dict.fromkeys(entry.path for entry in source.tensors.values()):
        state = path.stat()
        digest.update(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
    digest.update(repr(list(metadata.items())).encode())
    digest.update(repr([(name, fmt.name) for name, fmt in formats.items()]).encode())
    if store is not None:
        digest.update(store.job.encode())
    for name, values in _sorted_values(importance):
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()


def calibration_key(source: GGUFFile, formats: Mapping[str, BlockFormat], windows: np.ndarray) -> str:
    """A hash of all that decides what calibration on these tokens i64[N,L] makes of a model."""
    rotation = {ROTATION_KEY: source.metadata.get(ROTATION_KEY)}
    digest = hashlib.sha256(_key(source, rotation, formats, None).encode())
    digest.update(repr(windows.shape).encode() + np.ascontiguousarray(windows).tobytes())
    return digest.hexdigest()


def _sorted_values(importance: Importance | None) -> Sequence[tuple[str, np.ndarray]]:
    return sorted(importance.values.items()) if importance else ()
