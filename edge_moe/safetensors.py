"""Reads safetensors checkpoints, one file or many: the header checked in full, the values decoded to f32 part by part.

Data are read when they are asked for and not mapped, so that converting a model holds only the part at hand.

Source: the safetensors format; OCP's 8-bit floating point specification (E4M3); DeepSeek-V3's block scales.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from edge_moe.errors import FormatError, OptionError, UnsupportedError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_SCALE_SUFFIX = "_scale_inv"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """One tensor as it lies in its file."""

    name: str
    dtype: str  # "BF16", "F8_E4M3", ...
    shape: tuple[int, ...]
    path: Path
    offset: int  # from the start of the file

    def decode(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Slices start:stop of the first axis, without their block scales -> f32[stop - start, ...].

        Raises UnsupportedError for dtypes that are no weights, FormatError when the file has become shorter.
        """
        if self.dtype not in _DECODERS:
            raise UnsupportedError(
                f"{self.path}: tensor {self.name} is {self.dtype}, expected one of {', '.join(_DECODERS)}; "
                "use a checkpoint in one of these"
            )
        n_slices, rest = (self.shape[0], self.shape[1:]) if self.shape else (1, ())
        start, stop, _ = slice(start, stop).indices(n_slices)
        slice_bytes = math.prod(rest) * _ITEM_BYTES[self.dtype]
        n_bytes = max(0, stop - start) * slice_bytes
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset + start * slice_bytes)
                data = np.fromfile(file, np.uint8, n_bytes)
        except OSError as error:
            raise FormatError(f"{self.path}: tensor {self.name} cannot be read: {error.strerror or error}") from None
        if len(data) != n_bytes:
            raise FormatError(f"{self.path}: tensor {self.name} ends early; the file has changed while it was read")
        return (
            _DECODERS[self.dtype](data).reshape(max(0, stop - start), *rest)
            if self.shape
            else _DECODERS[self.dtype](data)
        )


class SafetensorsModel:
    """The tensors of a checkpoint folder by name; the scales of FP8 weights are applied, not listed."""

    def __init__(self, path: Path, entries: Mapping[str, SafetensorsEntry], scale_block: tuple[int, int]) -> None:
        self.path = path
        self._scale_block = scale_block
        self._scales = {
            name.removesuffix(_SCALE_SUFFIX): entry for name, entry in entries.items() if name.endswith(_SCALE_SUFFIX)
        }
        self.entries: dict[str, SafetensorsEntry] = {
            name: entry for name, entry in entries.items() if not name.endswith(_SCALE_SUFFIX)
        }
        for name, scale in self._scales.items():
            self._check_scale(name, scale)

    def decode(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Slices start:stop of a tensor's first axis -> f32[stop - start, ...]. Raises as SafetensorsEntry.decode."""
        entry = self.entries[name]
        values = entry.decode(start, stop)
        scale = self._scales.get(name)
        if scale is None:
            if entry.dtype == "F8_E4M3":
                raise FormatError(
                    f"{entry.path}: tensor {name} is {entry.dtype} without {name}{_SCALE_SUFFIX}; download it again"
                )
            return values
        n_rows, n_cols = self._scale_block
        scales = scale.decode(start // n_rows, -(-(start + len(values)) // n_rows))
        first = start % n_rows
        by_row = np.repeat(scales, n_rows, axis=0)[first : first + len(values)]
        for at in range(scales.shape[1]):
            values[:, at * n_cols : (at + 1) * n_cols] *= by_row[:, at : at + 1]
        return values

    def _check_scale(self, name: str, scale: SafetensorsEntry) -> None:
        weight = self.entries.get(name)
        if weight is None or len(weight.shape) != 2:
            raise FormatError(f"{scale.path}: tensor {scale.name} scales no matrix; the checkpoint is incomplete")
        expected = tuple(-(-size // block) for size, block in zip(weight.shape, self._scale_block, strict=True))
        if scale.shape != expected:
            raise FormatError(
                f"{scale.path}: tensor {scale.name} has shape {list(scale.shape)}, expected {list(expected)} "
                f"for blocks of {self._scale_block[0]} x {self._scale_block[1]}; download it again"
            )


def open_safetensors(folder: str | PathLike[str], *, scale_block: tuple[int, int] = (128, 128)) -> SafetensorsModel:
    """Open the checkpoint in a folder: the files of model.safetensors.index.json, or model.safetensors alone.

    Raises OptionError (no checkpoint there), FormatError (damaged, or a file or tensor is missing).
    """
    folder = Path(folder)
    index = folder / _INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise OptionError(f"{folder}: holds neither {_INDEX} nor model.safetensors; name a checkpoint's folder")
        return SafetensorsModel(folder, _read_header(single), scale_block)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError(f"{index}: has no weight_map from tensors to files; download it again")
    entries: dict[str, SafetensorsEntry] = {}
    for name in sorted(set(weight_map.values())):
        part = folder / name
        if Path(name).name != name or not part.is_file():
            raise FormatError(f"{part}: no such file, but {_INDEX} names it; download the missing part")
        entries |= _read_header(part)
    for name, part_name in weight_map.items():
        if name not in entries or entries[name].path.name != part_name:
            raise FormatError(f"{folder / part_name}: tensor {name} is missing; download this part again")
    return SafetensorsModel(folder, {name: entries[name] for name in entries if name in weight_map}, scale_block)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises OptionError (no such file) or FormatError (no such JSON)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is no JSON ({str(error)[:80]}); download it again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a {type(value).__name__}, expected an object; download it again")
    return value


# ---- one file -------------------------------------------------------------------------------------------------------


def _read_header(path: Path) -> dict[str, SafetensorsEntry]:
    """The tensors of one file, which must fill it exactly, as the format demands."""

    def fail(problem: str) -> FormatError:
        return FormatError(f"{path}: {problem}; the file is damaged or incomplete, download it again")

    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(_MAX_HEADER_BYTES, size_bytes - 8):
                raise fail(f"it is {size_bytes} bytes, its header would need {length + 8}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise OptionError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise fail("its header is no JSON") from None
    if not isinstance(header, dict):
        raise fail("its header is no JSON object")
    header.pop("__metadata__", None)
    data_start = 8 + length
    entries: dict[str, SafetensorsEntry] = {}
    spans = []
    for name, row in header.items():
        if not isinstance(row, dict) or row.get("dtype") not in _ITEM_BYTES:
            raise fail(f"tensor {name[:80]!r} has no dtype of the format")
        shape, offsets = row.get("shape"), row.get("data_offsets")
        if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
            raise fail(f"tensor {name[:80]!r} has no shape or offsets in whole numbers")
        start, stop = offsets
        if stop - start != math.prod(shape) * _ITEM_BYTES[row["dtype"]]:
            raise fail(f"tensor {name[:80]!r} has {stop - start} bytes, but is {row['dtype']} of shape {shape}")
        entries[name] = SafetensorsEntry(name, row["dtype"], tuple(shape), path, data_start + start)
        spans.append((start, stop, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise fail(f"tensor {name[:80]!r} begins at byte {start} of the data, expected {end}")
        end = stop
    if data_start + end != size_bytes:
        raise fail(f"it is {size_bytes} bytes, its tensors need {data_start + end}")
    return entries


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


# ---- values ---------------------------------------------------------------------------------------------------------


def _e4m3_values() -> np.ndarray:
    """All 256 values of FP8 E4M3 without infinities, f32[256]: 4 bits of exponent (bias 7), 3 of mantissa."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values = np.where(code & 128, -magnitude, magnitude)
    values[[0x7F, 0xFF]] = np.nan
    return values.astype(np.float32)


_E4M3_VALUES = _e4m3_values()

_DECODERS = {
    "F32": lambda data: data.view("<f4").astype(np.float32),
    "F16": lambda data: data.view("<f2").astype(np.float32),
    "BF16": lambda data: (data.view("<u2").astype(np.uint32) << 16).view(np.float32),
    "F8_E4M3": lambda data: _E4M3_VALUES[data],
}
