"""Measures edge_moe and llama.cpp on a model that is larger than the memory they may use, cold, each really limited.

    sudo python tools/bench_budget.py model.gguf --llama llama/bin --caps 4,6,8 --plot budget.png

Linux with control groups (version 1 or 2) only. For each cap in GiB, in each round: the file leaves the page cache, and
`edge-moe bench --ram` runs in a group with that limit; then llama-bench likewise, with --repack 0, since its repacked
copies of the weights do not fit. A figure is the median of the rounds.

The bound is what the disk allows: bytes read for a token divided by the speed at which this disk gives slices of
experts, measured before and after (the better counts: shared disks vary), plus the part of a token's time without any
limit that cannot overlap with reading (all weights but experts).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_tools import HOW_TO_BUILD, ToolError, find_tool

from edge_moe.checkpoint import open_checkpoint
from edge_moe.cli.report import write_json
from edge_moe.errors import EdgeMoeError
from edge_moe.memory_plan import disk_bytes_per_s, expert_layers

GROUPS = Path("/sys/fs/cgroup")
MARGIN_BYTES = 64 << 20  # of a cap: what the kernel counts beside the process's own pages
PROBE_S = 2.0


@contextmanager
def memory_group(limit_bytes: int, root: Path = GROUPS):
    """A control group with a limit; gives the file that takes the processes. Raises ToolError."""
    version_1 = (root / "memory").is_dir()
    group = (root / "memory" if version_1 else root) / f"edge-moe-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit_bytes))
        if not version_1 and (group / "memory.swap.max").exists():
            (group / "memory.swap.max").write_text("0")
    except OSError as error:
        raise ToolError(f"{group}: no control group can be made ({error.strerror}); run it as root on Linux") from None
    try:
        yield group / "cgroup.procs"
    finally:
        try:
            group.rmdir()
        except OSError:
            print(f"{group} could not be removed", file=sys.stderr)


def forget_file(path: Path) -> None:
    """Let the page cache forget a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def run_limited(words: list[str], procs: Path | None, timeout_s: float) -> str | None:
    """Standard output of a command run in a group; None if it was killed or took too long."""

    def join() -> None:
        if procs is not None:
            procs.write_text(str(os.getpid()))

    try:
        done = subprocess.run(words, capture_output=True, timeout=timeout_s, check=False, preexec_fn=join)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode == -9:
        return None
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ToolError(f"{words[0]} failed with status {done.returncode}: {lines[-1] if lines else 'it said nothing'}")
    return done.stdout.decode("utf-8", "replace")


def ours(args: argparse.Namespace, procs: Path | None, ram_bytes: int | None) -> dict[str, Any]:
    """The entry of `edge-moe bench` for generation. Raises ToolError."""
    words = [sys.executable, "-m", "edge_moe", "bench", str(args.model), "-p", "0", "-n", str(args.n_gen), "-r", "1"]
    words += ["-t", str(args.threads), "--kv", "int8", "--json"]
    output = run_limited(words + (["--ram", str(ram_bytes)] if ram_bytes else []), procs, args.timeout)
    if output is None:
        raise ToolError("edge-moe bench was killed, or took longer than --timeout")
    entry: dict[str, Any] = json.loads(output)[0]
    return entry


def theirs(args: argparse.Namespace, procs: Path) -> float | None:
    """Tokens per second of llama-bench, or None."""
    words = [str(find_tool("llama-bench", args.llama)), "-m", str(args.model), "-p", "0", "-n", str(args.n_gen_llama)]
    words += ["-r", "1", "-t", str(args.threads), "-fa", "1", "--repack", "0", "-o", "json"]
    output = run_limited(words, procs, args.timeout)
    return None if output is None else float(json.loads(output)[0]["avg_ts"])


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each cap."""
    layers = expert_layers(open_checkpoint(args.model))
    if not layers:
        raise ToolError(f"{args.model}: has no experts")
    config = open_checkpoint(args.model).config
    experts = sum(weight.n_bytes for layer in layers for weight in layer)
    always = args.model.stat().st_size - experts
    active = experts * config.num_experts_per_tok // config.n_routed_experts
    token_s = 1 / ours(args, None, None)["tok_per_s"]
    rows = []
    for cap in args.caps:
        limit = int(cap * (1 << 30))
        speeds: dict[str, list[float]] = {"ours": [], "llama.cpp": [], "bound": []}
        entry: dict[str, Any] = {}
        for _ in range(args.rounds):
            before = disk_bytes_per_s(layers[0][0], seconds=PROBE_S)
            with memory_group(limit) as procs:
                forget_file(args.model)
                entry = ours(args, procs, limit - MARGIN_BYTES)
            speeds["ours"].append(entry["tok_per_s"])
            disk = max(before, disk_bytes_per_s(layers[-1][0], seconds=PROBE_S))
            alone_s = token_s * always / (always + active)
            speeds["bound"].append(1 / (entry.get("bytes_read_per_token", 0) / disk + alone_s))
            found = None
            if not args.alone:
                with memory_group(limit) as procs:
                    forget_file(args.model)
                    found = theirs(args, procs)
            if found is not None:
                speeds["llama.cpp"].append(found)
        middle = {who: statistics.median(values) if values else None for who, values in speeds.items()}
        rows.append({"cap_gib": cap, **middle, **{key: entry.get(key) for key in entry if key not in ("test", "runs")}})
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second by cap. Raises ToolError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ToolError("--plot needs matplotlib: pip install 'edge-moe[plots]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    caps = [row["cap_gib"] for row in rows]
    for who, style in (("bound", ":"), ("ours", "-"), ("llama.cpp", "-")):
        axes.plot(caps, [row[who] or 0 for row in rows], style, marker="o", label=who)
    axes.set(xlabel="memory that the process may use (GiB)", ylabel="tokens per second", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> int:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HOW_TO_BUILD, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="a .gguf file with experts, in one part")
    add("--llama", metavar="DIR", type=Path, help="folder of llama-bench (default: PATH)")
    add("--alone", action="store_true", help="leave llama.cpp out")
    add("--caps", metavar="G,G", type=lambda text: [float(part) for part in text.split(",")], default=[4.0, 6.0, 8.0])
    add("-n", "--n-gen", metavar="N", type=int, default=32, help="tokens that edge_moe generates (default 32)")
    add("--n-gen-llama", metavar="N", type=int, default=6, help="tokens that llama.cpp generates (default 6)")
    add("-t", "--threads", metavar="N", type=int, default=os.cpu_count() or 1)
    add("--rounds", metavar="N", type=int, default=3)
    add("--timeout", metavar="S", type=float, default=600, help="seconds for one run (default 600)")
    add("--plot", metavar="FILE", type=Path, help="a PNG or SVG file to draw")
    add("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    try:
        rows = measure(args)
        if args.plot:
            draw(rows, args.plot)
    except (ToolError, EdgeMoeError) as error:
        print(f"bench_budget: {error}", file=sys.stderr)
        return 2
    if args.json:
        write_json(rows)
        return 0
    print(f"{args.model.name}, {args.threads} threads, tokens per second, median of {args.rounds}")
    print(f"{'cap':>8}{'ours':>8}{'llama.cpp':>11}{'ratio':>8}{'bound':>8}{'of bound':>10}{'hits':>7}{'MB/token':>10}")
    for row in rows:
        peer = row["llama.cpp"]
        peer_words = f"{peer:>11.2f}{row['ours'] / peer:>8.2f}" if peer else f"{'-':>11}{'':>8}"
        print(
            f"{row['cap_gib']:>4.0f} GiB{row['ours']:>8.2f}{peer_words}{row['bound']:>8.2f}"
            f"{100 * row['ours'] / row['bound']:>8.0f} %{100 * row['expert_hit_rate']:>5.0f} %"
            f"{row['bytes_read_per_token'] / 1e6:>10.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
