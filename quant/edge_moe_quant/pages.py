"""Mapped files and the memory of this process."""

import mmap

import numpy as np


def forget_pages(data: np.ndarray) -> None:
    """Let go of the pages of a part of a mapped file; they would count as memory of this process."""
    whole = data
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    mapped = whole.base.obj if isinstance(whole.base, memoryview) else whole.base
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        start = data.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, first, start + data.nbytes - first)
