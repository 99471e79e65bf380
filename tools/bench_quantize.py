"""Times `edge-moe quantize` and `llama-quantize` on one file in turn, with their peak memory.

    python tools/bench_quantize.py model-bf16.gguf --type Q4_K_M --llama llama/bin -t 2 --rounds 3

Who begins changes from round to round, so that a busy machine hits both; figures are medians of the rounds. Times are
of whole commands, start to end. Outputs go to a temporary folder beside the model and are removed. One run of ours
comes first, untimed, since the first use of a format compiles its encoder.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_tools import HOW_TO_BUILD, ToolError, find_tool

from edge_moe.api import default_threads
from edge_moe.cli.report import format_bytes, write_json

OURS, THEIRS = "edge_moe", "llama.cpp"


@dataclass(frozen=True)
class Timed:
    """One run of a command: seconds, peak resident bytes, bytes of the file it wrote."""

    seconds: float
    peak_bytes: int
    out_bytes: int


def timed(command: Sequence[str | Path], out: Path) -> Timed:
    """Run a command that writes `out`, measure it, and remove `out`. Raises ToolError with its last words."""
    words = [str(word) for word in command]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            lines = output.read().decode("utf-8", "replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
            raise ToolError(f"{words[0]} failed with status {process.returncode}: {last}")
    peak_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    out_bytes = out.stat().st_size
    out.unlink()
    return Timed(seconds, peak_bytes, out_bytes)


def commands(model: Path, out: Path, kind: str, threads: int, llama_quantize: Path) -> dict[str, list[str | Path]]:
    """What is run for each: the same file, recipe and number of threads."""
    ours: list[str | Path] = [sys.executable, "-m", "edge_moe", "quantize", model, out, "--type", kind]
    return {
        OURS: [*ours, "-t", str(threads)],
        THEIRS: [llama_quantize, model, out, kind, str(threads)],
    }


def measure(jobs: dict[str, list[str | Path]], out: Path, n_rounds: int) -> dict[str, list[Timed]]:
    """All rounds, in turn; progress on standard error."""
    results: dict[str, list[Timed]] = {OURS: [], THEIRS: []}
    timed(jobs[OURS], out)
    for number in range(n_rounds):
        for who in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
            results[who].append(each := timed(jobs[who], out))
            print(f"round {number + 1}: {who} {each.seconds:.1f} s, {format_bytes(each.peak_bytes)}", file=sys.stderr)
    return results


def summary(results: dict[str, list[Timed]]) -> dict[str, object]:
    """Medians by program, and the median over the rounds of their time against ours (above 1: we are faster)."""
    ratio = statistics.median(b.seconds / a.seconds for a, b in zip(results[OURS], results[THEIRS], strict=True))
    report: dict[str, object] = {"speed_ratio": ratio}
    for who, runs in results.items():
        report[who] = {
            "seconds": statistics.median(run.seconds for run in runs),
            "peak_bytes": max(run.peak_bytes for run in runs),
            "out_bytes": runs[0].out_bytes,
            "rounds": [asdict(run) for run in runs],
        }
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HOW_TO_BUILD, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="a .gguf file of BF16, F16 or F32")
    add("--type", default="Q4_K_M", help="the recipe (default Q4_K_M)")
    add("--llama", metavar="DIR", type=Path, help="folder of llama-quantize (default: PATH)")
    add("-t", "--threads", metavar="N", type=int, default=default_threads(), help="threads of both")
    add("--rounds", metavar="N", type=int, default=3, help="rounds (default 3)")
    add("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(argv)
    try:
        if not args.model.is_file():
            raise ToolError(f"{args.model}: is not a file")
        llama_quantize = find_tool("llama-quantize", args.llama)
        with tempfile.TemporaryDirectory(dir=args.model.parent, prefix=".bench-quantize-") as folder:
            out = Path(folder) / "out.gguf"
            jobs = commands(args.model, out, args.type, args.threads, llama_quantize)
            report = summary(measure(jobs, out, args.rounds))
    except ToolError as error:
        print(f"bench_quantize: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        write_json(report)
        return 0
    for who in (OURS, THEIRS):
        row = report[who]
        assert isinstance(row, dict)
        memory, size = format_bytes(row["peak_bytes"]), format_bytes(row["out_bytes"])
        print(f"{who:10} {row['seconds']:8.1f} s   peak {memory}   wrote {size}")
    print(f"edge_moe is {report['speed_ratio']:.2f} times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
