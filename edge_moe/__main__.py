"""The program `edge-moe`: the command line in a process of its own."""

import ctypes
import sys

from edge_moe.cli import main

# Numbers of mallopt: what is at least so large is given back when freed, and what is free at the heap's end.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what comes next; does nothing where it has no such setting.

    A prompt's layers need the same buffers of tens of megabytes again and again. glibc would give each back to the
    system, which clears it once more, page by page: a tenth of a prompt's time. It holds for the whole process, so only
    the program does it, not the library. Source: mallopt(3).
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has none without a name
        return
    for option in (MMAP_THRESHOLD, TRIM_THRESHOLD):
        set_option(option, KEPT_BYTES)


def program() -> int:
    """Run the command line; returns the exit status."""
    keep_freed_memory()
    return main()


if __name__ == "__main__":
    sys.exit(program())
