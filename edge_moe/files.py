"""Output files that bear their name only when they are whole."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edge_moe.errors import OptionError


@contextlib.contextmanager
def replacing(path: Path, n_bytes: int) -> Iterator[BinaryIO]:
    """A file of n_bytes that becomes `path` when the block ends well, and of which nothing stays otherwise.

    Raises OptionError when it cannot be written.
    """
    fresh = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        if path.is_dir():
            raise OptionError(f"{path}: is a folder, expected the name of a new file")
        try:
            with fresh.open("xb", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
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
