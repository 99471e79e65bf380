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
        path = self._path(name)
        part = path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                file.write(np.ascontiguousarray(data).data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise OptionError(
                f"{path}: cannot write: {error}; free some space and run the same command again"
            ) from None

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"
