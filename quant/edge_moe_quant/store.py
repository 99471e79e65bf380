"""Encoded tensors kept in a folder until the whole model is written, so that an interrupted run goes on from them."""

import os
import shutil
from pathlib import Path

import numpy as np

from edge_moe.errors import OptionError


class EncodedStore:
    """A folder of encoded tensors by name, for one job only: a store of another job is emptied."""

    def __init__(self, folder: Path, job: str) -> None:
        """`job` names all that decides the bytes. Raises OptionError where the folder cannot be written."""
        self.folder, self.job = folder, job
        label = folder / "job"
        try:
            if folder.exists() and (not label.is_file() or label.read_text() != job):
                shutil.rmtree(folder)
            folder.mkdir(exist_ok=True)
            label.write_text(job)
        except OSError as error:
            raise OptionError(f"{folder}: cannot keep encoded tensors there: {error}") from None

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def get(self, name: str) -> np.ndarray:
        """A tensor's bytes u8[n], mapped."""
        return np.memmap(self._path(name), np.uint8, "r").view(np.ndarray)

    def put(self, name: str, data: np.ndarray) -> None:
        """Keep a tensor's bytes u8[n]. Raises OptionError when they cannot be written."""
        try:
            self._part(name).write_bytes(np.ascontiguousarray(data).data)
        except OSError as error:
            raise self._failed(name, error) from None
        self.finish(name)

    def begin(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A mapped file u8[shape] to be filled with a tensor's bytes. Raises OptionError when there is no space."""
        n_bytes = int(np.prod(shape, dtype=np.int64))
        try:
            with self._part(name).open("wb") as file:
                if hasattr(os, "posix_fallocate"):  # or else a full disk shows as a signal, when pages are written
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                else:
                    file.truncate(n_bytes)
            return np.memmap(self._part(name), np.uint8, "r+", shape=shape).view(np.ndarray)
        except OSError as error:
            raise self._failed(name, error) from None

    def finish(self, name: str) -> None:
        """The tensor's bytes are whole: from now on it is in the store. Raises OptionError."""
        try:
            with self._part(name).open("rb+") as file:
                os.fsync(file.fileno())
            self._part(name).replace(self._path(name))
        except OSError as error:
            raise self._failed(name, error) from None

    def _failed(self, name: str, error: OSError) -> OptionError:
        return OptionError(f"{self._path(name)}: cannot write: {error}; free some space and run the same command again")

    def _part(self, name: str) -> Path:
        return self._path(name).with_suffix(".part")

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"
