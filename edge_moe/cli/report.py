"""What the commands print: JSON documents, tables, progress, statistics and errors."""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
PROGRESS_DELAY_S = 2.0


def print_error(message: str) -> None:
    """Print `edge-moe: error: message` as exactly one line on standard error."""
    _print_to_stderr(f"edge-moe: error: {one_line(message)}")


def _print_to_stderr(text: str) -> None:
    if sys.stderr is not None:  # closed by the shell: print would take standard output instead
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """Text with line ends and control characters written out, since names from files and shells may hold any."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def write_json(document: Any) -> None:
    """Write one JSON document to standard output; numbers that JSON has no way to write become null."""
    document = _finite(document)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:  # another encoding than UTF-8, or a file name of stray bytes
        text = json.dumps(document, indent=2, allow_nan=False)
    sys.stdout.write(text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def prepare_output() -> None:
    """Let standard output take any text: what its encoding lacks is replaced, rather than an error amid an answer."""
    if sys.stdout is None:  # closed by the shell
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def print_dim(text: str) -> None:
    """Print a line on standard error, dimmed on a terminal."""
    _print_to_stderr(dimmed(text, sys.stderr))


def dimmed(text: str, stream: TextIO | None) -> str:
    """Text in a fainter colour where the stream is a terminal and colours are wanted."""
    return f"\x1b[2m{text}\x1b[0m" if is_terminal(stream) and not os.environ.get("NO_COLOR") else text


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that can overwrite a line."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output, numbers to the right and words to the left."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    numeric = [all(not cell or cell[0].isdigit() for cell in column) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        fitted = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(fitted).rstrip()

    sys.stdout.write("\n".join([title, dimmed(line(columns), sys.stdout), *map(line, rows)]) + "\n")


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print name and value pairs, one a line, to standard output."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        sys.stdout.write(f"{name:<{width}}  {one_line(value)}\n")


def format_bytes(n: float) -> str:
    """Bytes in decimal units, as disks and model pages count: 10.36 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}" if unit != "kB" else f"{n / scale:.0f} kB"
    return f"{n:.0f} B"


def format_duration(seconds: float) -> str:
    """Seconds with the digits that matter: 85 ms, 1.24 s, 41.3 s."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def format_speed(tok_per_s: float) -> str:
    """Tokens per second with three digits or so; 0 means that nothing was measured."""
    if not tok_per_s:
        return "- tok/s"
    return f"{tok_per_s:.2f} tok/s" if tok_per_s < 100 else f"{tok_per_s:.0f} tok/s"


def peak_rss_bytes() -> int:
    """Most memory that this process has held, the touched pages of the model file included."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        # getrusage would count the memory of the process that started us, as long as it is ours
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    peak = getattr(memory, "peak_wset", None)  # Windows
    if peak is None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(peak)


class Display:
    """A transient line on standard error while work lasts; silent when it is no terminal.

    Used as a context it also tells of compilation, and is cleared at the end.
    """

    def __init__(self) -> None:
        self._terminal = is_terminal(sys.stderr)
        self._bar: Any = None
        self._started: float | None = None
        self.n_compiled = 0
        self.streaming = False  # text is written to the terminal: the line would cut into it
        self._exits = contextlib.ExitStack()
        self._interrupted = False

    def show(
        self, label: str, done: int, total: int | None, note: str = "", *, delay_s: float = PROGRESS_DELAY_S
    ) -> None:
        """Say how far the work is; the line appears when it has lasted for delay_s."""
        if not self._terminal or self.streaming:
            return
        now = time.perf_counter()
        self._started = now if self._started is None else self._started
        if self._bar is None:
            if now - self._started < delay_s:
                return
            self._bar = _bar()
            self._bar.start()
        if not self._bar.tasks or self._bar.tasks[0].total != total:  # a task cannot be set back to an unknown total
            for task_id in self._bar.task_ids:
                self._bar.remove_task(task_id)
            self._bar.add_task(label, total=total, note=note)
        self._bar.update(self._bar.task_ids[0], description=label, completed=done, note=note)

    def clear(self) -> None:
        """Remove the line; the next work counts its time anew."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._started = None

    def __enter__(self) -> "Display":
        try:
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._exits.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, self._interrupt))
        except ValueError:  # not in the main thread, which alone is interrupted
            pass
        return self

    def check_interrupt(self) -> None:
        """Raise a KeyboardInterrupt that came while C code called back, from which none gets out."""
        if self._interrupted:
            raise KeyboardInterrupt

    def forget_interrupt(self) -> None:
        """It was dealt with."""
        self._interrupted = False

    def _interrupt(self, _signal: int, frame: FrameType | None) -> None:
        self._interrupted = True
        while frame is not None:
            if frame.f_code.co_name == "__del__":  # an exception would be printed there, and lost
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        self._exits.close()
        self.clear()

    def watch_compilation(self) -> None:
        """From now to the context's end, say that kernels are compiled; a log gets one plain line instead."""
        from edge_moe.kernels.jit import observe_compilation

        self._exits.enter_context(observe_compilation(self._compiling))

    def _compiling(self, _kernel_name: str) -> None:
        self.n_compiled += 1
        text = "compiling kernels for this CPU (first use only)"
        self.show(f"{text}: {self.n_compiled} ...", 0, None, delay_s=0)
        if self.n_compiled == 1 and not self._terminal:
            print_dim(text)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        console=Console(file=sys.stderr),
        transient=True,
    )
