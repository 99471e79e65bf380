"""Measures edge_moe and llama.cpp on one file in turn, and how far both are from what the memory allows.

    python tools/bench_peers.py model.gguf --llama llama/bin --rounds 5 --contexts 0,1024,4096,16384 \\
        --prompts 128,512,2048 --log model.jsonl --plot speed.png

Each round runs `edge-moe bench` and `llama-bench` one after the other for every test, and who begins changes from round
to round, so that a busy or throttled machine hits both. A figure is the median of the rounds. Every result is
appended to the log at once: called again with the same setup, the program goes on where it was stopped, and a
larger --rounds adds rounds.

The bound of generation is the speed of reading memory divided by the bytes that one token must read: all weights but
the embeddings and the idle experts, and the cache. What a shared machine's memory gives may change from second to
second: so edge_moe generates once more, a few tokens and reads of memory in turn, and the share of the bound is the
median of these comparisons. Memory is read by the fastest loop known and by a plain one, which does not ask for lines
ahead: some CPUs read a fifth slower so. A model that fits the processor's cache may exceed its bound. Not all memory
need be equally fast, least of all a virtual machine's: of a large model the file's own pages are read, too, by the
fastest loop.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llama_tools import HOW_TO_BUILD, ToolError, find_tool, run
from memory_bound import MEMORY, PAGES, PLAIN, Pacer, Traffic, fits_memory, traffic_of

from edge_moe.__main__ import keep_freed_memory
from edge_moe.checkpoint import open_checkpoint
from edge_moe.cli.report import Display, format_bytes, write_json
from edge_moe.config import KV_KINDS
from edge_moe.errors import EdgeMoeError

OURS, THEIRS, PACE = "edge_moe", "llama.cpp", "edge_moe and the memory in turn"
CACHE_TYPES = {"f32": "f32", "bf16": "bf16", "f16": "f16", "int8": "q8_0", "int4": "q4_0"}  # what llama.cpp calls them


@dataclass(frozen=True)
class Test:
    """Reading a prompt of n_tokens ("pp"), or generating n_tokens behind `depth` tokens of context ("tg")."""

    kind: str
    n_tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}{self.n_tokens}" + (f"@d{self.depth}" if self.depth else "")


# ---- running the two


def our_speed(args: argparse.Namespace, test: Test) -> float:
    """Tokens per second by `edge-moe bench`."""
    prompt, generated = (test.n_tokens, 0) if test.kind == "pp" else (0, test.n_tokens)
    words = ["-p", prompt, "-n", generated, "-d", test.depth, "-r", args.repetitions, "--json"]
    words += ["-t", args.threads] if args.threads else []
    words += ["--kv", args.kv] if args.kv else []
    output = run([sys.executable, "-m", "edge_moe", "bench", args.model, *map(str, words)])
    entries = json_in(output, "[", "edge-moe bench")
    if len(entries) != 1 or entries[0]["test"] != test.name:
        raise ToolError(f"edge-moe bench measured {[each['test'] for each in entries]}, expected {test.name}")
    return float(entries[0]["tok_per_s"])


def llama_speed(args: argparse.Namespace, test: Test) -> float:
    """Tokens per second by llama-bench: the median of its runs."""
    prompt, generated = (test.n_tokens, 0) if test.kind == "pp" else (0, test.n_tokens)
    words = ["-p", prompt, "-n", generated, "-d", test.depth, "-r", args.repetitions, "-o", "json"]
    words += ["-t", args.threads] if args.threads else []
    words += ["-fa", "1"]  # with which it is faster, and without which it takes values in f16 only
    kind = args.llama_kv or args.kv
    if kind:
        words += ["-ctk", CACHE_TYPES[kind]]
        words += ["-ctv", CACHE_TYPES[kind]] if args.has_values else []
    output = run([find_tool("llama-bench", args.llama), "-m", args.model, *map(str, words)])
    entries = json_in(output, "[", "llama-bench")
    sizes = [(each["n_prompt"], each["n_gen"], each["n_depth"]) for each in entries]
    if sizes != [(prompt, generated, test.depth)]:
        raise ToolError(f"llama-bench measured {sizes}, expected {test.name}")
    return float(statistics.median(entries[0]["samples_ts"]))


def json_in(output: str, start: str, program: str) -> Any:
    """The JSON document that begins a line of a program's output, between what it says on standard error."""
    at = 0 if output.startswith(start) else output.find("\n" + start) + 1
    try:
        return json.JSONDecoder().raw_decode(output[at:])[0]
    except ValueError:
        raise ToolError(f"{program} printed no JSON: {output[:200]!r}") from None


# ---- the log


class Log:
    """Results of finished measurements in a file of JSON lines; the first line says of what."""

    def __init__(self, path: Path, setup: dict[str, Any]) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        whole = lines[:-1]  # what follows the last line end was cut off while it was written
        if whole:
            found = json.loads(whole[0])
            differing = sorted(key for key in setup if found.get(key) != setup[key])
            if differing:
                raise ToolError(
                    f"{path}: is of another setup ({', '.join(differing)} differ); name another --log, or remove it"
                )
            self.entries = [json.loads(line) for line in whole[1:]]
        if lines[-1:] != [""] or not whole:
            text = "".join(line + "\n" for line in whole) if whole else json.dumps(setup) + "\n"
            partial = path.with_name(path.name + ".part")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)

    def add(self, entry: dict[str, Any]) -> None:
        """Append a result; it is on the disk when this returns."""
        self.entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def has(self, round_number: int, who: str, test: str) -> bool:
        """Whether a measurement is there already."""
        return any((each["round"], each["who"], each["test"]) == (round_number, who, test) for each in self.entries)

    def values(self, who: str, test: str) -> dict[int, Any]:
        """Results of a test by round: tokens a second, or what a Pacer returns."""
        return {each["round"]: each["value"] for each in self.entries if (each["who"], each["test"]) == (who, test)}


def measure(
    log: Log,
    tests: Sequence[Test],
    rounds: int,
    engines: dict[str, Callable[[Test], float]],
    pace: Callable[[Test], dict[str, Any]] | None,
    show: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> None:
    """Run what the log does not have yet: each round each test by both, in turn, and our tokens in turn with memory."""
    done = 0
    for number in range(1, rounds + 1):
        order = list(engines) if number % 2 else list(engines)[::-1]
        jobs: list[tuple[str, Test, Callable[[Test], Any]]] = []
        for test in tests:
            jobs += [(who, test, engines[who]) for who in order]
            if pace is not None and test.kind == "tg":
                jobs.append((PACE, test, pace))
        total = rounds * len(jobs)
        for who, test, job in jobs:
            if not log.has(number, who, test.name):
                show(done, total, f"round {number}, {who} {test.name}")
                log.add({"round": number, "who": who, "test": test.name, "value": job(test)})
            done += 1


# ---- the report


def report(log: Log, tests: Sequence[Test], traffic: Traffic) -> dict[str, Any]:
    """Medians, ratios and bounds."""
    rows = []
    reads: dict[str, list[float]] = {MEMORY: [], PLAIN: [], PAGES: []}
    for test in tests:
        ours, theirs = log.values(OURS, test.name), log.values(THEIRS, test.name)
        ratios = [ours[number] / theirs[number] for number in sorted(ours) if number in theirs]
        row: dict[str, Any] = {
            "test": test.name,
            **dataclasses.asdict(test),
            "ours_tok_per_s": statistics.median(ours.values()),
            "ours_runs": [ours[number] for number in sorted(ours)],
            "llama_tok_per_s": statistics.median(theirs.values()),
            "llama_runs": list(theirs.values()),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
        if test.kind == "tg":
            row["bytes_per_token"] = traffic.bytes_at(test.depth + (test.n_tokens - 1) / 2)
            paces = list(log.values(PACE, test.name).values())
            for name, what in (("bound", MEMORY), ("plain", PLAIN), ("pages", PAGES)):
                if paces and what in paces[0]["reads"]:
                    speeds = [pace["reads"][what] for pace in paces]
                    reads[what] += speeds
                    row[f"{name}_tok_per_s"] = statistics.median(speeds) / row["bytes_per_token"]
                    row[f"{name}_shares"] = [pace["shares"][what] for pace in paces]
                    row[f"{name}_share"] = statistics.median(row[f"{name}_shares"])
        rows.append(row)
    found: dict[str, Any] = {"weights_bytes_per_token": traffic.weights_bytes, "tests": rows}
    for name, what in (("read", MEMORY), ("plain", PLAIN), ("pages", PAGES)):
        if speeds := reads[what]:
            found |= {f"{name}_bytes_per_s": statistics.median(speeds), f"{name}_runs": speeds}
    return found


def print_report(title: str, found: dict[str, Any]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("test")
    columns = ["edge_moe tok/s", "llama.cpp tok/s", "ratio (range)", "memory's bound", "of the bound"]
    columns += ["of a plain loop"] if "plain_runs" in found else []
    columns += ["of reading the file"] if "pages_runs" in found else []
    for column in columns:
        table.add_column(column, justify="right")
    for row in found["tests"]:
        cells = [
            row["test"],
            f"{row['ours_tok_per_s']:.2f}",
            f"{row['llama_tok_per_s']:.2f}",
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
        ]
        if "bound_tok_per_s" in row:
            cells.append(f"{row['bound_tok_per_s']:.1f}")
            for shares in (row[f"{name}_shares"] for name in ("bound", "plain", "pages") if f"{name}_shares" in row):
                reach = f"({100 * min(shares):.1f} to {100 * max(shares):.1f})"
                cells.append(f"{100 * statistics.median(shares):.1f} % {reach}")
        table.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 180)  # a pipe has no width: cells must not be cut there
    console.print(table)
    lines = [f"a token reads {format_bytes(found['weights_bytes_per_token'])} of weights"]
    for name, what in (("pages", PAGES), ("plain", PLAIN), ("read", MEMORY)):
        if speeds := found.get(f"{name}_runs"):
            low, high = format_bytes(min(speeds)), format_bytes(max(speeds))
            lines.insert(0, f"{what}: {format_bytes(found[f'{name}_bytes_per_s'])}/s ({low} to {high})")
    console.print(", ".join(lines))


def plot(path: Path, title: str, found: dict[str, Any]) -> None:
    """Generation against context, and prompt speed against its length, in one picture. Raises ToolError."""
    try:
        import matplotlib
    except ImportError:
        raise ToolError("--plot needs matplotlib: pip install 'edge-moe[plots]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    panels = [
        ("tg", "depth", "tokens of context", "generation (tok/s)"),
        ("pp", "n_tokens", "tokens of prompt", "prompt (tok/s)"),
    ]
    panels = [panel for panel in panels if any(row["kind"] == panel[0] for row in found["tests"])]
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.2), layout="constrained", squeeze=False
    )
    for axes, (kind, size, x_label, y_label) in zip(all_axes[0], panels, strict=True):
        rows = sorted((row for row in found["tests"] if row["kind"] == kind), key=lambda row: row[size])
        x = [row[size] for row in rows]
        for name, key, marker in ((OURS, "ours", "o"), (THEIRS, "llama", "s")):
            middle = np.array([row[f"{key}_tok_per_s"] for row in rows])
            runs = [row[f"{key}_runs"] for row in rows]
            reach = [middle - [min(each) for each in runs], [max(each) for each in runs] - middle]
            axes.errorbar(x, middle, reach, marker=marker, capsize=2, label=name)
        if kind == "tg":
            if all("bound_tok_per_s" in row for row in rows):
                axes.plot(x, [row["bound_tok_per_s"] for row in rows], "k:", label="memory's bound")
        else:
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [str(n) for n in x])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_ylim(bottom=0)
        axes.grid(True, alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- the command


def sizes(low: int) -> Callable[[str], list[int]]:
    """An argparse type: whole numbers from `low` on, separated by commas, or nothing."""

    def parse(text: str) -> list[int]:
        values = [int(part) for part in text.split(",") if part]
        if any(value < low for value in values):
            raise argparse.ArgumentTypeError(f"expected numbers of at least {low}, found {text!r}")
        return values

    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    head, _, body = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head,
        epilog=f"{body}\nllama.cpp's programs: {HOW_TO_BUILD}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="a .gguf file that both can run, of a split model the first part")
    add("--llama", metavar="DIR", type=Path, help="folder of llama-bench (default: PATH)")
    add("-t", "--threads", metavar="N", type=int, help="threads of both (default: one per physical core)")
    add("--rounds", metavar="N", type=int, default=3, help="rounds (default 3)")
    add("--contexts", metavar="N,N", type=sizes(0), default="0,1024,4096,16384", help="tokens before generation")
    add("--prompts", metavar="N,N", type=sizes(1), default="128,512,2048", help="tokens of the prompts")
    add("-n", "--n-gen", metavar="N", type=int, default=32, help="tokens to generate (default 32)")
    add("-r", "--repetitions", metavar="N", type=int, default=1, help="runs within a round (default 1)")
    add(
        "--kv",
        choices=[kind for kind in KV_KINDS if kind in CACHE_TYPES],
        help="cache of both (default: each's own)",
    )
    add("--llama-kv", choices=list(CACHE_TYPES), help="another cache for llama.cpp, whose own is f16 (default: --kv's)")
    add("--log", metavar="FILE", type=Path, help="JSON lines of the results (default MODEL's name with .bench.jsonl)")
    add("--plot", metavar="FILE", type=Path, help="write speed against context and prompt length (PNG or SVG)")
    add("--json", action="store_true", help="print one JSON document instead of the table")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.n_gen < 1 or args.repetitions < 1:
        parser.error("--rounds, -n and -r: expected at least 1")
    return args


def execute(args: argparse.Namespace) -> None:
    """Measure what is missing, print. Raises ToolError and the errors of edge_moe."""
    from edge_moe.api import default_threads

    args.threads = args.threads or default_threads()
    kv = args.kv or KV_KINDS[0]
    checkpoint = open_checkpoint(args.model)
    traffic = traffic_of(checkpoint, kv)
    args.has_values = traffic.has_values
    find_tool("llama-bench", args.llama)
    tests = [Test("tg", args.n_gen, depth) for depth in args.contexts] + [Test("pp", n) for n in args.prompts]
    if not tests:
        raise ToolError("nothing to measure: --contexts and --prompts are both empty")
    setup = {
        "model": str(args.model.resolve()),
        "model_bytes": checkpoint.size_bytes,
        "threads": args.threads,
        "kv": args.kv,
        "llama_kv": args.llama_kv or args.kv,
        "repetitions": args.repetitions,
        "memory": "in turn with a few tokens each",
    }
    log = Log(args.log or Path(args.model.stem + ".bench.jsonl"), setup)
    engines = {OURS: lambda test: our_speed(args, test), THEIRS: lambda test: llama_speed(args, test)}
    with Display() as display:

        def show(done: int, total: int, what: str) -> None:
            display.show("measuring", done, total, what)

        pacer = Pacer(checkpoint, kv, args.threads, traffic)
        pace = (lambda test: pacer(test.n_tokens, test.depth)) if fits_memory(checkpoint.size_bytes) else None
        measure(log, tests, args.rounds, engines, pace, show)
    found = report(log, tests, traffic)
    rounds = max(entry["round"] for entry in log.entries)
    how_often = f"{rounds} rounds" if rounds > 1 else "1 round"
    title = f"{args.model.name}, {args.threads} threads, cache {args.kv or 'by default'}, {how_often}"
    if args.json:
        write_json({**setup, "rounds": rounds, **found})
    else:
        print_report(title, found)
    if args.plot is not None:
        plot(args.plot, title, found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    try:
        execute(parse_arguments(argv))
    except (ToolError, EdgeMoeError) as error:
        print(f"bench_peers: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bench_peers: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench_peers: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    keep_freed_memory()  # as the program `edge-moe` does, whose generation is measured here once more
    sys.exit(main())
