"""Compares quantized files with the model that they were made from: divergence against size, ours beside llama.cpp's.

    python tools/quality_table.py model-F16.gguf --text eval.txt --make-ours Q4_K_M,Q8_0 --make-theirs Q4_K_M,Q8_0 \\
        --calibration calibration.txt --plot quality.png

The source's distributions over the text are saved once; every file is judged against them by `edge-moe eval`'s method.
With --llama-perplexity the same is done a second time by llama.cpp alone, source and files. What has been measured or
made is kept in the work folder, so that a table that was cut short goes on where it stopped.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_tools import HOW_TO_BUILD, ToolError, find_tool, parse_statistics, run

import edge_moe
from edge_moe.cli.options import read_text
from edge_moe.cli.report import Display, format_bytes, write_json
from edge_moe.errors import EdgeMoeError

OURS, THEIRS = "edge_moe", "llama.cpp"
SHARED_LINE = 40  # characters from which a line of both texts is no coincidence
MOST_SHARED = 0.02  # of the evaluation text's characters: licences and the like recur


@dataclass(frozen=True)
class Candidate:
    """A quantized file, who made it, and the name that pairs it with the other maker's."""

    maker: str
    label: str
    path: Path


def named_file(maker: str, text: str) -> Candidate:
    """A candidate from LABEL=FILE, or from FILE under its own stem."""
    label, equals, path = text.partition("=")
    return Candidate(maker, label, Path(path)) if equals else Candidate(maker, Path(text).stem, Path(text))


def shared_part(text: str, calibration: str) -> float:
    """Part of the text's characters in long lines that the calibration text has, too."""
    known = {line.strip() for line in calibration.splitlines() if len(line.strip()) >= SHARED_LINE}
    shared = sum(len(line) for line in text.splitlines() if line.strip() in known)
    return shared / max(1, len(text))


def check_texts(text_path: Path, text: str, calibration_path: Path | None) -> None:
    """Raises ToolError when the evaluation text is, or holds, the calibration text."""
    if calibration_path is None:
        return
    part = shared_part(text, read_text(str(calibration_path)))
    if calibration_path.samefile(text_path) or part > MOST_SHARED:
        raise ToolError(
            f"{text_path}: shares {100 * part:.0f} % with the calibration text {calibration_path}; "
            "evaluate on a text that the quantizer has not seen"
        )


def identity(path: Path) -> dict[str, Any]:
    """What tells one state of a file from another."""
    status = path.stat()
    return {"path": str(path.resolve()), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def sources(package: Path) -> str:
    """A short name for the state of a package's code, so that what older code made or measured is not taken for new."""
    files = sorted(path for path in package.rglob("*.py") if path.parent.name != "cli")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def digest(document: Any) -> str:
    """A short name for a JSON document."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]


class Results:
    """Measurements by key, kept in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the last line, if the program was stopped while it wrote
                    continue
                self._known[entry["key"]] = entry["figures"]

    def get(self, key: str) -> dict[str, Any] | None:
        """The figures of a key, if they were measured."""
        return self._known.get(key)

    def add(self, key: str, figures: dict[str, Any]) -> None:
        """Keep figures; they are on the disk when this returns."""
        self._known[key] = figures
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" if file.tell() and not self.path.read_bytes().endswith(b"\n") else "")
            file.write(json.dumps({"key": key, "figures": figures}) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Judge:
    """Measures files against one source on one text, each once."""

    def __init__(self, args: argparse.Namespace, text: str) -> None:
        self.args, self.text, self.work = args, text, args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.results = Results(self.work / "results.jsonl")
        self.setup = {
            "engine": sources(Path(edge_moe.__file__).parent),
            "source": identity(args.source),
            "text": hashlib.sha256(text.encode()).hexdigest(),
            "context_length": args.ctx_size,
            "chunks": args.chunks,
        }

    def figures(self, path: Path, display: Display) -> dict[str, Any]:
        """Our evaluation of a file against the saved distributions of the source."""
        from edge_moe.cli.loading import load_model
        from edge_moe.evaluate import evaluate
        from edge_moe.saved_logits import open_saved_logits

        key = digest({"by": "edge_moe", "file": identity(path), **self.setup})
        if (known := self.results.get(key)) is not None:
            return known
        options = {"context_length": self.args.ctx_size, "max_windows": self.args.chunks}
        base = self.work / f"base-{digest(self.setup)}.kld"
        if not base.exists():
            source = load_model(self.args.source, display, threads=self.args.threads)
            show = _shower(display, self.args.source)
            evaluate(source, self.text, save_logits=base, on_window=show, **options)
            display.clear()
        model = load_model(path, display, threads=self.args.threads)
        saved = open_saved_logits(base)
        result = evaluate(model, self.text, reference=saved, on_window=_shower(display, path), **options)
        display.clear()
        figures = dataclasses.asdict(result)
        self.results.add(key, figures)
        return figures

    def llama_figures(self, path: Path) -> dict[str, Any]:
        """llama-perplexity's evaluation of a file against its own distributions of the source."""
        key = digest({"by": "llama.cpp", "file": identity(path), **self.setup})
        if (known := self.results.get(key)) is not None:
            return known
        tool = find_tool("llama-perplexity", self.args.llama)
        base = self.work / f"llama-base-{digest(self.setup)}.kld"
        common = [tool, "-c", str(self.args.ctx_size)]
        common += ["-t", str(self.args.threads)] if self.args.threads else []
        if not base.exists():
            partial = base.with_suffix(".part")
            limit = ["--chunks", str(self.args.chunks)] if self.args.chunks else []
            words = ["-m", self.args.source, "-f", self.args.text, "--save-all-logits", partial]
            run([*common, *words, *limit])
            partial.replace(base)
        output = run([*common, "-m", path, "--kl-divergence", "--kl-divergence-base", base])
        figures: dict[str, Any] = parse_statistics(output)
        self.results.add(key, figures)
        return figures


def _shower(display: Display, path: Path) -> Any:
    return lambda done, total, ppl: display.show(path.name, done, total, f"perplexity {ppl:.3f}")


def importance_matrix(args: argparse.Namespace) -> Path | None:
    """The importance matrix that both quantizers get: the one given, or one that llama-imatrix makes, or none."""
    if args.imatrix is not None or args.calibration is None:
        return args.imatrix
    what = [identity(args.source), identity(args.calibration)]
    path: Path = args.work / f"imatrix-{digest(what)}.gguf"
    if not path.exists():
        partial = path.with_name(path.stem + "-part.gguf")
        run([find_tool("llama-imatrix", args.llama), "-m", args.source, "-f", args.calibration, "-o", partial])
        partial.replace(path)
    return path


def made_by_llama(args: argparse.Namespace, kind: str, imatrix: Path | None) -> Candidate:
    """A file by llama-quantize."""
    what = [identity(args.source), identity(imatrix) if imatrix else None]
    path = args.work / f"{args.source.stem}-llama-{kind}-{digest(what)}.gguf"
    if not path.exists():
        partial = path.with_name(path.stem + "-part.gguf")
        options = ["--imatrix", imatrix] if imatrix else []
        run([find_tool("llama-quantize", args.llama), *options, args.source, partial, kind])
        partial.replace(path)
    return Candidate(THEIRS, kind, path)


def type_options(kind: str) -> list[str]:
    """Options of `edge-moe quantize` for a type, or for auto-4.5: types chosen for so many bits per weight."""
    name, _, bits = kind.partition("-")
    return ["--type", name, "--bpw", bits] if name == "auto" else ["--type", kind]


def made_by_us(args: argparse.Namespace, kind: str, imatrix: Path | None) -> Candidate:
    """A file by `edge-moe quantize`."""
    import edge_moe_quant

    options = shlex.split(args.ours_options) if args.ours_options is not None else []
    if args.ours_options is None and imatrix is not None:
        options = ["--imatrix", str(imatrix)]
    what = [identity(args.source), options, sources(Path(edge_moe_quant.__file__).parent)]
    path = args.work / f"{args.source.stem}-edge_moe-{kind}-{digest(what)}.gguf"
    if not path.exists():  # edge-moe itself writes under another name first
        run([sys.executable, "-m", "edge_moe", "quantize", args.source, path, *type_options(kind), *options])
    return Candidate(OURS, kind, path)


def measured_rows(args: argparse.Namespace, judge: Judge, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """One entry for each file: what it is, its bytes, its figures, and llama.cpp's where asked for."""
    from edge_moe.gguf import open_gguf

    rows = []
    with Display() as display:
        for candidate in candidates:
            opened = open_gguf(candidate.path)
            n_weights = sum(math.prod(entry.shape) for entry in opened.tensors.values())
            weights_bytes = sum(entry.data.nbytes for entry in opened.tensors.values())
            row = {
                "maker": candidate.maker,
                "type": candidate.label,
                "path": str(candidate.path),
                "bytes": opened.size_bytes,
                "bits_per_weight": 8 * weights_bytes / n_weights,
                "figures": judge.figures(candidate.path, display),
            }
            if args.llama_perplexity:
                row["llama_perplexity"] = judge.llama_figures(candidate.path)
            rows.append(row)
    for row in rows:
        other = next((each for each in rows if each["type"] == row["type"] and each["maker"] == THEIRS), None)
        if other is not None and row["maker"] == OURS and other["figures"]["kld_mean"]:
            row["kld_ratio"] = row["figures"]["kld_mean"] / other["figures"]["kld_mean"]
            row["bytes_ratio"] = row["bytes"] / other["bytes"]
    return rows


def print_rows(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """The table, smallest file first."""
    from rich.console import Console
    from rich.table import Table

    first = rows[0]["figures"]
    title = f"{args.source.name} quantized, {first['tokens']} tokens of {args.text.name} in chunks of {args.ctx_size}"
    table = Table(title=title, title_justify="left")
    columns = ["type", "by", "size", "bits", "mean KL", "99 %", "99.9 %", "same top", "RMS Δp", "PPL ratio", "KL ratio"]
    columns += ["mean KL, by llama.cpp"] * args.llama_perplexity
    for column in columns:
        table.add_column(column, justify="left" if column in ("type", "by") else "right")
    for row in sorted(rows, key=lambda each: each["bytes"]):
        f = row["figures"]
        cells = [
            row["type"],
            row["maker"],
            format_bytes(row["bytes"]),
            f"{row['bits_per_weight']:.2f}",
            f"{f['kld_mean']:.3g} ± {f['kld_mean_stderr']:.1g}",
            f"{f['kld_p99']:.3g}",
            f"{f['kld_p999']:.3g}",
            f"{100 * f['top1_agreement']:.2f} %",
            f"{100 * f['delta_p_rms']:.2f} %",
            f"{f['ppl_ratio']:.4f} ± {f['ppl_ratio_stderr']:.1g}",
            f"{row['kld_ratio']:.2f}" if "kld_ratio" in row else "",
        ]
        if args.llama_perplexity:
            cells.append(f"{row['llama_perplexity']['kld_mean']:.3g}")
        table.add_row(*cells)
    # a pipe has no width: cells must not be cut there
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def plot(path: Path, args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Mean divergence (log) against bytes, one line for each maker. Raises ToolError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ToolError("--plot needs matplotlib: pip install 'edge-moe[plots]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for maker, marker in ((THEIRS, "s"), (OURS, "o")):
        own = sorted((row for row in rows if row["maker"] == maker), key=lambda each: each["bytes"])
        own = [row for row in own if row["figures"]["kld_mean"] > 0]  # the source itself has no place on a log axis
        if not own:
            continue
        sizes = [row["bytes"] / 1e6 for row in own]
        means = [row["figures"]["kld_mean"] for row in own]
        errors = [row["figures"]["kld_mean_stderr"] for row in own]
        axes.errorbar(sizes, means, errors, marker=marker, capsize=2, label=maker)
        for row, x, y in zip(own, sizes, means, strict=True):
            axes.annotate(row["type"], (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("file size (MB)")
    axes.set_ylabel("mean KL divergence from the source (nats per token)")
    axes.set_title(f"{args.source.name} on {args.text.name}")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    head, _, body = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head,
        epilog=f"{body}\nllama.cpp's programs: {HOW_TO_BUILD}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names: Any = {"metavar": "[LABEL=]FILE", "action": "append", "default": []}
    types: Any = {"metavar": "TYPE,TYPE", "default": "", "type": str}
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="the model in F16, BF16 or F32 (GGUF)")
    add("--text", metavar="FILE", type=Path, required=True, help="text to judge on, never the one calibrated with")
    add("--ours", help="a file of ours; the same LABEL pairs it with one of theirs", **names)
    add("--theirs", help="a file by llama-quantize", **names)
    add("--make-ours", help="make these by `edge-moe quantize`; auto-4.5 is --type auto --bpw 4.5", **types)
    add("--ours-options", metavar="WORDS", help="options of `edge-moe quantize`, as one argument (default: --imatrix)")
    add("--make-theirs", help="make these by llama-quantize", **types)
    add("--calibration", metavar="FILE", type=Path, help="text from which llama-imatrix makes an importance matrix")
    add("--imatrix", metavar="FILE", type=Path, help="an importance matrix that is there already, for both")
    add("--llama", metavar="DIR", type=Path, help="folder of llama.cpp's programs (default: PATH)")
    add("--llama-perplexity", action="store_true", help="have llama-perplexity judge the files, too")
    add("--work", metavar="DIR", type=Path, default=Path("quality"), help="folder of what is made (default quality)")
    add("-c", "--ctx-size", metavar="N", type=int, default=512, help="tokens of a chunk (default 512)")
    add("--chunks", metavar="N", type=int, help="judge on the first N chunks only")
    add("-t", "--threads", metavar="N", type=int, help="threads (default: one per physical core)")
    add("--plot", metavar="FILE", type=Path, help="write mean divergence against size (PNG or SVG)")
    add("--json", action="store_true", help="print one JSON document instead of the table")
    return parser.parse_args(argv)


def execute(args: argparse.Namespace) -> None:
    """Make what is missing, measure, print. Raises ToolError and the errors of edge_moe."""
    text = read_text(str(args.text))
    check_texts(args.text, text, args.calibration)
    args.work.mkdir(parents=True, exist_ok=True)
    candidates = [named_file(OURS, each) for each in args.ours] + [named_file(THEIRS, each) for each in args.theirs]
    imatrix = importance_matrix(args) if args.make_ours or args.make_theirs else None
    candidates += [made_by_us(args, kind, imatrix) for kind in args.make_ours.split(",") if kind]
    candidates += [made_by_llama(args, kind, imatrix) for kind in args.make_theirs.split(",") if kind]
    if not candidates:
        raise ToolError("nothing to compare: give --ours, --theirs, --make-ours or --make-theirs")
    rows = measured_rows(args, Judge(args, text), candidates)
    if args.json:
        write_json({"source": str(args.source), "text": str(args.text), "context_length": args.ctx_size, "rows": rows})
    else:
        print_rows(args, rows)
    if args.plot is not None:
        plot(args.plot, args, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    try:
        execute(parse(argv))
    except (ToolError, EdgeMoeError) as error:
        print(f"quality_table: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"quality_table: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
