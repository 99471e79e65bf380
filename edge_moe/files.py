"""Output files and folders that bear their name only when they are whole."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edge_moe.errors import OptionError

try:
    import fcntl
except ImportError:  # Windows, which lets nobody delete a file that is open
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: Path, n_bytes: int) -> Iterator[BinaryIO]:
    """A file of n_bytes that becomes `path` when the block ends well, and of which nothing stays otherwise.

    What a process that was killed has left of the same file is removed. Raises OptionError when it cannot be written.
    """
    try:
        if path.is_dir():
            raise OptionError(f"{path}: is a folder, expected the name of a new file")
        _remove_abandoned(path)
        fresh, file = _create_file(path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if fcntl is not None:
                    fresh.replace(path)  # while it is still held, so that nobody takes it for abandoned
            if fcntl is None:
                fresh.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OptionError(
            f"{path}: cannot be written: {error.strerror or error}; "
            f"its {n_bytes} bytes need a folder with room for them"
        ) from None
    sync_folder(path.absolute().parent)


@contextlib.contextmanager
def new_folder(path: Path, n_bytes: int) -> Iterator[Path]:
    """A folder of about n_bytes that becomes `path` when the block ends well, and of which nothing stays otherwise.

    What a process that was killed has left of the same folder is removed. Raises OptionError when it cannot be written,
    or something is there already.
    """
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OptionError(f"{path}: exists already; name a new folder, or remove that one")
        _remove_abandoned(path)
        fresh, hold = _create_folder(path.absolute())
        try:
            with hold:
                yield fresh
                for each in fresh.iterdir():
                    _sync(each)
                fresh.replace(path)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    except OSError as error:
        raise OptionError(
            f"{path}: cannot be written: {error.strerror or error}; "
            f"about {n_bytes} bytes need a folder with room for them"
        ) from None
    sync_folder(path.absolute().parent)


def sync_folder(folder: Path) -> None:
    """Have a new name in a folder survive a power cut, too; not on Windows."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- parts: files and folders in the making, each held by a lock that ends with its process ------------------------


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")


def _create_file(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        fresh = _part_of(path)
        file = fresh.open("xb", buffering=1 << 20)
        if _hold(file.fileno(), fresh):
            return fresh, file
        file.close()


def _create_folder(path: Path) -> tuple[Path, contextlib.ExitStack]:
    while True:
        fresh, stack = _part_of(path), contextlib.ExitStack()
        fresh.mkdir()
        if fcntl is None:
            return fresh, stack
        descriptor = os.open(fresh, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        if _hold(descriptor, fresh):
            return fresh, stack
        stack.close()


def _hold(descriptor: int, part: Path) -> bool:
    """Mark a part as one in the making. False if another run has taken it for abandoned just before."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks, on which nothing is taken for abandoned
    try:
        return os.path.samestat(os.fstat(descriptor), part.lstat())
    except FileNotFoundError:
        return False


def _remove_abandoned(path: Path) -> None:
    """Remove what runs that were killed have left of `path`, and nothing that is still in the making."""
    name = re.compile(re.escape(f".{path.name[:100]}.") + r"[0-9a-f]{8}\.part")
    with contextlib.suppress(OSError):
        for part in [each for each in path.absolute().parent.iterdir() if name.fullmatch(each.name)]:
            with contextlib.suppress(OSError):
                _remove_unless_held(part)


def _remove_unless_held(part: Path) -> None:
    """Raises OSError where it is held."""
    if fcntl is None:
        if part.is_file():
            part.unlink()
        return
    descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()
    finally:
        os.close(descriptor)
