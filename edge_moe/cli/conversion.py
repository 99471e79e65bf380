"""What `convert` and `quantize` share: the names of recipes, converting to quantized formats, and the report of it."""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.cli.report import format_bytes, format_duration, print_dim, write_json
from edge_moe.errors import OptionError

if TYPE_CHECKING:
    from edge_moe_export.convert import Conversion
    from edge_moe_quant.recipe import Rule

TYPES = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
    "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "BF16", "F16", "F32",
)  # fmt: skip


def type_name(text: str) -> str:
    """The name of a recipe as `quantize` has it. Raises ArgumentTypeError."""
    if text.upper() not in TYPES:
        raise argparse.ArgumentTypeError(f"expected one of {' '.join(TYPES)}, found {text!r}")
    return text.upper()


@contextlib.contextmanager
def all_or_nothing(out: Path) -> Iterator[None]:
    """Ctrl-C while `out` is made: said in a line, since nothing of it stays."""
    try:
        yield
    except KeyboardInterrupt:
        raise OptionError(f"{out}: not written, since the run was interrupted; nothing of it is left") from None


def report_conversion(args: argparse.Namespace, conversion: "Conversion", seconds: float) -> int:
    """Say what was written to args.out, as one JSON document where args.json asks for it."""
    if args.json:
        write_json(
            {
                "path": str(args.out),
                "type": args.type,
                "bytes": conversion.size_bytes,
                "tensors": conversion.n_tensors,
                "notes": list(conversion.notes),
                "seconds": seconds,
            }
        )
        return 0
    for note in conversion.notes:
        print_dim(note)
    print_dim(
        f"wrote {args.out}: {conversion.n_tensors} tensors, {format_bytes(conversion.size_bytes)} "
        f"in {format_duration(seconds)}"
    )
    return 0


def convert_quantized(
    folder: Path,
    out: Path,
    recipe: str | None,
    rules: "Sequence[Rule]",
    threads: int | None,
    progress: Callable[[int, int, str], None],
) -> "Conversion":
    """Convert and quantize in one pass, on so many threads."""
    from concurrent.futures import ThreadPoolExecutor

    from edge_moe_export.convert import convert
    from edge_moe_quant.stream import encoding

    from edge_moe.api import default_threads

    n_threads = threads or default_threads()
    with all_or_nothing(out), ThreadPoolExecutor(n_threads) as pool:
        return convert(folder, out, encoding(recipe, rules, pool, n_threads), progress=progress)
