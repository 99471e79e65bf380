"""Compiling on other processors what a model will need, while this process compiles what it needs first.

numba compiles one function at a time in a process. So workers, which are processes, compile jobs into the cache of
kernels, from the last to the first, and this process loads what they have made. Who begins a job claims it by making a
file, so that none is done twice; a job that a worker has in hand is waited for.
"""

import atexit
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import types

from edge_moe.kernels.blocks import TAGS, FormatTag
from edge_moe.kernels.jit import is_kept

MAX_WORKERS = 3  # each takes some 300 MB, and a model has few kernels that take long
POLL_S = 0.02


class Workers:
    """Processes that compile kernels for formats."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._names: dict[tuple[Any, FormatTag], str] = {}  # of files, of what is being compiled

    def start(self, jobs: Sequence[tuple[Any, FormatTag]], n_workers: int) -> None:
        """Begin with those of the jobs (a kernel of a format tag and a plan, and the tag) that no cache has."""
        if all(each.poll() is not None for each in self._processes):
            self.stop()  # what is left of another model
        missing = [job for job in dict.fromkeys(jobs) if not is_kept(job[0], (job[1], types.int64))]
        n_workers = min(n_workers, MAX_WORKERS, len(missing) - 1)
        if n_workers < 1 or self._processes or not sys.executable or getattr(sys, "frozen", False):
            return
        self._folder = tempfile.TemporaryDirectory(prefix="edge-moe-", ignore_cleanup_errors=True)
        self._names = {job: _file_name(*job) for job in missing}
        command = [sys.executable, "-m", __name__, self._folder.name, *reversed(self._names.values())]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
        no_window = getattr(subprocess, "CREATE_NO_WINDOW", 0)
        with suppress(OSError):  # then this process compiles all
            for _ in range(n_workers):
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    env=env,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    creationflags=no_window,
                )
                self._processes.append(process)
        atexit.register(self.stop)

    def leave_to_caller(self, function: Any, fmt: FormatTag) -> None:
        """Claim the job for the caller, or wait until the worker that has claimed it has done it or given up."""
        name = self._names.pop((function, fmt), None)
        if name is None or self._folder is None:
            return
        folder = Path(self._folder.name)
        if not _claim(folder, name):
            while not (folder / f"{name}.done").exists() and any(each.poll() is None for each in self._processes):
                time.sleep(POLL_S)
        if not self._names:
            self.stop()

    def stop(self) -> None:
        """End the processes; what they have compiled stays in the cache."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes.clear()
        self._names.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _file_name(function: Any, fmt: FormatTag) -> str:
    return f"{function.py_func.__module__}-{function.py_func.__name__}-{fmt.format_name}"


def _claim(folder: Path, name: str) -> bool:
    try:
        (folder / name).touch(exist_ok=False)
    except OSError:  # also of a folder that is gone
        return False
    return True


def _end_with_parent(folder: str) -> None:
    sys.stdin.buffer.read()  # it ends when the process that holds the other end does
    with suppress(OSError):  # another worker was first
        # Under another name, so that nobody claims anything in a folder that is being emptied.
        shutil.rmtree(Path(folder).rename(f"{folder}-ended"))
    os._exit(1)


def main(folder: str, *names: str) -> None:
    """What a worker does: the jobs that nobody has claimed."""
    end = threading.Thread(target=_end_with_parent, args=(folder,), daemon=True)
    end.start()
    for name in names:
        if _claim(Path(folder), name):
            module_name, function, format_name = name.split("-")
            module = importlib.import_module(module_name)
            tags = [*TAGS.values(), *getattr(module, "FORMATS", {}).values()]
            tag = next(each for each in tags if each.format_name == format_name)
            getattr(module, function).compile((tag, types.int64))
            with suppress(FileNotFoundError):
                (Path(folder) / f"{name}.done").touch()
    if not Path(folder).exists():  # the thread removes it
        end.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
