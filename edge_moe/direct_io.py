"""Reads slices of a file past the system's page cache, from several threads at once.

The page cache would keep a second copy of what is read, and push out what is needed more. Linux: O_DIRECT; macOS:
F_NOCACHE; Windows: FILE_FLAG_NO_BUFFERING. Where none works, pages are given back as soon as they are read.
"""

import io
import mmap
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from edge_moe.errors import ReadError

ALIGNMENT = 4096  # of offsets and memory; no disk asks for more


def aligned_bytes(n_bytes: int) -> int:
    """Memory for a slice of n_bytes wherever it begins in its file: aligned outward on both sides."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT


def aligned_memory(n_bytes: int) -> np.ndarray:
    """Zeroed memory u8[n_bytes] that begins at a page; pages are taken from the system when they are written."""
    return np.frombuffer(mmap.mmap(-1, max(n_bytes, 1)), np.uint8, n_bytes)


class DirectFile:
    """A file open for direct reading by `n_readers` threads, each with a handle of its own."""

    def __init__(self, path: Path, n_readers: int = 1) -> None:
        """Raises ReadError when the file cannot be opened."""
        self.path = path
        self._handles: list[io.FileIO] = []
        try:
            for _ in range(n_readers):
                self._handles.append(_open(path))
            self._state = self._now(0)
        except OSError as error:
            self.close()
            raise ReadError(f"{path}: cannot be opened ({error.strerror or error}); check the disk") from None

    def read(self, reader: int, offset: int, n_bytes: int, memory: np.ndarray) -> int:
        """Read a slice into page-aligned memory u8[aligned_bytes(n_bytes)]; returns where in it the slice begins.

        Raises ReadError for a disk error, a slice beyond the end, and a file that changed since it was opened.
        """
        lead = offset % ALIGNMENT
        start, needed = offset - lead, lead + n_bytes
        view = memoryview(memory.data)[: -(-needed // ALIGNMENT) * ALIGNMENT]
        got = 0
        try:
            while got < needed:
                n = self._read_some(reader, start + got, view[got:])
                got += n
                if n == 0 or (got < needed and got % ALIGNMENT):  # the end of the file is the only odd one
                    raise ReadError(
                        f"{self.path}: ends at byte {start + got}, expected {n_bytes} bytes at {offset}; "
                        "it was cut while in use, load the model again"
                    )
            state = self._now(reader)
        except OSError as error:
            raise ReadError(
                f"{self.path}: {n_bytes} bytes at {offset} cannot be read ({error.strerror or error}); check the disk"
            ) from None
        if state != self._state:
            raise ReadError(
                f"{self.path}: changed while in use (bytes and time of change {state}, expected {self._state}); "
                "load the model again"
            )
        return lead

    def close(self) -> None:
        """Close all handles."""
        for handle in self._handles:
            with suppress(OSError):
                handle.close()

    def close_one(self, reader: int) -> None:
        """Close the handle of one reader."""
        with suppress(OSError):
            self._handles[reader].close()

    def _read_some(self, reader: int, offset: int, view: memoryview) -> int:
        handle = self._handles[reader]
        handle.seek(offset)
        n = handle.readinto(view) or 0
        if not getattr(handle, "is_direct", False) and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fileno(), offset, n, os.POSIX_FADV_DONTNEED)
        return n

    def _now(self, reader: int) -> tuple[int, int]:
        found = os.fstat(self._handles[reader].fileno())
        return found.st_size, found.st_mtime_ns


class _Handle(io.FileIO):
    is_direct = False


def _open(path: Path) -> io.FileIO:
    if sys.platform == "win32":
        return _open_on_windows(path)
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        with suppress(OSError):  # some file systems have none
            handle = _Handle(os.open(path, os.O_RDONLY | direct), "rb")
            try:
                handle.readinto(aligned_memory(ALIGNMENT).data)  # others say so at the first read
            except OSError:
                handle.close()
            else:
                handle.is_direct = True
                return handle
    handle = _Handle(os.open(path, os.O_RDONLY), "rb")
    if sys.platform == "darwin":
        import fcntl

        with suppress(OSError):
            fcntl.fcntl(handle.fileno(), fcntl.F_NOCACHE, 1)
            handle.is_direct = True
    return handle


def _open_on_windows(path: Path) -> io.FileIO:
    """By CreateFileW, since only it knows FILE_FLAG_NO_BUFFERING."""
    import ctypes
    import msvcrt

    generic_read, share_all, open_existing, no_buffering = 0x80000000, 7, 3, 0x20000000
    create = ctypes.windll.kernel32.CreateFileW  # type: ignore[attr-defined]
    create.restype = ctypes.c_void_p
    found = create(str(path), generic_read, share_all, None, open_existing, no_buffering, None)
    if found is None or found == ctypes.c_void_p(-1).value:
        return _Handle(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb")
    handle = _Handle(msvcrt.open_osfhandle(found, os.O_RDONLY), "rb")  # type: ignore[attr-defined]
    handle.is_direct = True
    return handle
