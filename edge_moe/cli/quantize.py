"""`edge-moe quantize`: a GGUF file to one with smaller blocks."""

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_moe.cli.conversion import TYPES, convert_quantized, report_conversion, type_name
from edge_moe.cli.options import (
    Parser,
    add_threads_option,
    byte_size,
    check_model_path,
    read_text,
    whole_number,
)
from edge_moe.cli.report import Display, format_bytes, format_duration, one_line, print_dim, write_json
from edge_moe.errors import OptionError

if TYPE_CHECKING:
    from edge_moe_quant.calibrate import Coverage
    from edge_moe_quant.importance import Importance
    from edge_moe_quant.recipe import Rule
    from edge_moe_quant.store import EncodedStore

    from edge_moe.formats import BlockFormat
    from edge_moe.gguf import GGUFFile

_AUTO = "auto"

_DESCRIPTION = """\
Quantize a GGUF file of F32, F16 or BF16. Each type is a recipe: most tensors get the format in its name, some a better
one, by llama.cpp's rules; norms and the router stay F32. OUT appears when it is complete. An interrupted run leaves
.OUT.part, and the same command goes on from there."""

_EXAMPLES = f"""\
types:
  {" ".join(TYPES[:10])}
  {" ".join(TYPES[10:])}

examples:
  edge-moe quantize v2-lite-bf16.gguf v2-lite-q4.gguf --type Q4_K_M --imatrix v2-lite.imatrix.gguf
  edge-moe quantize v2-lite-bf16.gguf v2-lite-q4.gguf --type Q4_K_M --calibrate text.txt --chunks 128
  edge-moe quantize v2-lite-bf16.gguf v2-lite-auto.gguf --type auto --bpw 4.5 --calibrate text.txt
  edge-moe quantize v2-lite-bf16.gguf v2-lite-q4.gguf --type Q4_K_M --tensor-type attn_=Q8_0
  edge-moe quantize v2-lite-bf16.gguf --type Q4_K_M --print-recipe > recipe.txt
  edge-moe quantize v2-lite-bf16.gguf v2-lite-mine.gguf --recipe recipe.txt

A recipe in text has a pattern and a type on each line; the last line that fits a tensor counts. A pattern is a tensor's
name, or else a regular expression that is found anywhere in a name."""


def parser(prog: str) -> Parser:
    """The options of `quantize`."""
    parser = Parser(
        prog=prog, description=_DESCRIPTION, epilog=_EXAMPLES, usage=f"{prog} SRC.gguf OUT.gguf --type TYPE [options]"
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        help="the .gguf file to quantize, the first part of a split one, or a folder of Hugging Face",
    )
    add("out", metavar="OUT.gguf", nargs="?", help="the file to write")
    add("--type", metavar="TYPE", type=_type_name, help="the recipe (see below), or auto: chosen by measurement")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--bpw", metavar="N", type=_bits, help="of --type auto: bits for each weight, all tensors together"
    )
    budget.add_argument("--size", metavar="SIZE", type=byte_size, help="of --type auto: the file's size, as 9G or 700M")
    add("--recipe", metavar="FILE", help="lines that say which tensors get which type; --type is for the rest")
    add(
        "--tensor-type",
        metavar="PATTERN=TYPE",
        action="append",
        default=[],
        help="a type for the tensors that a pattern fits; may be repeated, counts above the recipe",
    )
    add("--imatrix", metavar="FILE", help="llama.cpp's importance matrix: which columns matter, for each expert")
    add(
        "--calibrate",
        metavar="FILE",
        help="a text; each layer is quantized by what its matrices take in on it, errors of one column made good by "
        "others (GPTQ)",
    )
    add(
        "--chunks",
        metavar="N",
        type=whole_number(1, 1 << 20),
        help="the first N chunks of 512 tokens of that text (default: what a gigabyte of memory takes of it)",
    )
    add(
        "--rotate-latent",
        action="store_true",
        help="rewrite the model so that its latents come out rotated, for caches of few bits; answers stay the same",
    )
    add("--allow-requantize", action="store_true", help="accept a source that is quantized already, at a loss")
    add("--print-recipe", action="store_true", help="print the type of each tensor, and write nothing")
    add_threads_option(parser)
    add("--json", action="store_true", help="print one JSON document")
    return parser


def _bits(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 32:
        raise argparse.ArgumentTypeError(f"expected bits from 1 to 32, found {text!r}")
    return value


def _type_name(text: str) -> str:
    return _AUTO if text.lower() == _AUTO else type_name(text)


def execute(args: argparse.Namespace) -> int:
    """Quantize, with a progress bar on a terminal, and say what was written."""
    from edge_moe_quant.importance import read_importance
    from edge_moe_quant.quantize import quantize
    from edge_moe_quant.recipe import FILE_TYPES, RECIPES, ModelFacts, choose_formats, recipe_text

    from edge_moe.gguf import open_gguf

    if args.type is None and args.recipe is None:
        raise OptionError("say what to make of the model: --type Q4_K_M, or another type, or --recipe FILE")
    if args.out is None and not args.print_recipe:
        raise OptionError("name the file to write: edge-moe quantize SRC.gguf OUT.gguf")
    if Path(args.source).is_dir():
        return _from_checkpoint(args)
    source = open_gguf(check_model_path(args.source))
    importance = read_importance(Path(args.imatrix)) if args.imatrix else None
    if args.chunks is not None and args.calibrate is None:
        raise OptionError("--chunks: is of the text of --calibrate FILE, which is not given")
    _check_budget(args)
    shapes = {name: entry.shape for name, entry in source.tensors.items()}
    facts = ModelFacts.from_metadata(source.metadata)
    rules = _rules(args)
    is_auto = args.type == _AUTO
    allocated, measured = _allocated(args, source, rules) if is_auto else ([], None)
    formats = choose_formats(
        shapes,
        facts,
        None if is_auto else args.type,
        [*allocated, *rules],
        has_importance=bool(importance or args.calibrate),
    )
    if args.print_recipe:
        return _print_recipe(args, formats, list(recipe_text(formats, shapes)))
    file_type = RECIPES[args.type][1] if args.type and not is_auto else FILE_TYPES[_commonest(source, formats)]
    started = time.perf_counter()
    if args.rotate_latent:
        source, importance = _rotated(args, source, importance)
    with Display() as display:
        display.watch_compilation()

        def show(done_bytes: int, total_bytes: int, tensor_name: str) -> None:
            display.show("quantizing", done_bytes, total_bytes, tensor_name)

        coverage, store = _calibrated(args, source, formats, display) if args.calibrate else (None, None)
        done = quantize(
            source,
            Path(args.out),
            formats,
            file_type=file_type,
            importance=importance,
            store=store,
            allow_requantize=args.allow_requantize,
            n_threads=args.threads,
            progress=show,
        )
    for each in (store, measured):
        if each is not None:
            each.remove()
    seconds = time.perf_counter() - started
    without = [] if importance is None else [n for n in _encoded(source, formats) if n not in importance.values]
    if args.json:
        document: dict[str, Any] = {
            "path": args.out,
            "type": args.type,
            "bytes": done.size_bytes,
            "source_bytes": source.size_bytes,
            "tensors": done.n_tensors,
            "bits_per_weight": done.bits_per_weight,
            "tensors_without_importance": without,
            "seconds": seconds,
        }
        if coverage is not None:
            document["calibration_tokens"] = coverage.n_tokens
            document["expert_hits"] = {str(layer): hits.tolist() for layer, hits in coverage.hits.items()}
            document["experts_seldom_hit"] = coverage.seldom
        write_json(document)
        return 0
    if without:
        names = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
        print_dim(one_line(f"{args.imatrix} says nothing about {names}"))
    if coverage is not None:
        _print_coverage(args, coverage)
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(done.n_tensors.items(), key=lambda kind: -kind[1]))
    print_dim(
        f"wrote {one_line(args.out)}: {format_bytes(source.size_bytes)} to {format_bytes(done.size_bytes)}, "
        f"{done.bits_per_weight:.2f} bits per weight ({kinds}) in {format_duration(seconds)}"
    )
    return 0


def _from_checkpoint(args: argparse.Namespace) -> int:
    """Convert and quantize a Hugging Face folder in one pass, as far as that needs no model that runs."""
    wanted = {
        "--type auto": args.type == _AUTO, "--calibrate": args.calibrate, "--imatrix": args.imatrix,
        "--rotate-latent": args.rotate_latent, "--print-recipe": args.print_recipe,
    }  # fmt: skip
    for option, is_given in wanted.items():
        if is_given:
            raise OptionError(
                f"{option}: needs a GGUF file, and {args.source} is a folder; first run edge-moe convert {args.source}"
            )
    started = time.perf_counter()
    with Display() as display:
        display.watch_compilation()

        def show(done_bytes: int, total_bytes: int, tensor_name: str) -> None:
            display.show("quantizing", done_bytes, total_bytes, tensor_name)

        conversion = convert_quantized(Path(args.source), Path(args.out), args.type, _rules(args), args.threads, show)
    return report_conversion(args, conversion, time.perf_counter() - started)


def _rotated(
    args: argparse.Namespace, source: "GGUFFile", importance: "Importance | None"
) -> "tuple[GGUFFile, Importance | None]":
    from edge_moe_quant.rotation import rotated

    source = rotated(source, Path(args.out).parent, allow_requantize=args.allow_requantize)
    if importance is not None:  # what the channels of the latent were worth says nothing of the rotated ones
        kept = {name: each for name, each in importance.values.items() if not re.search(r"attn_(k?v_b)\.", name)}
        importance = replace(importance, values=kept)
    return source, importance


def _calibrated(
    args: argparse.Namespace, source: "GGUFFile", formats: "Mapping[str, BlockFormat]", display: Display
) -> "tuple[Coverage, EncodedStore]":
    from edge_moe_quant.calibrate import calibrate, most_windows, text_windows
    from edge_moe_quant.quantize import calibration_key
    from edge_moe_quant.store import EncodedStore

    from edge_moe.api import default_threads
    from edge_moe.checkpoint import Checkpoint
    from edge_moe.tokenizer import Tokenizer

    checkpoint = Checkpoint(source)
    tokenizer = Tokenizer.from_metadata(source.metadata, source.path)
    length = _window_length(source)
    limit = args.chunks or most_windows(checkpoint.config.hidden_size, length)
    windows = text_windows(tokenizer, read_text(args.calibrate), length, limit)
    out = Path(args.out)
    store = EncodedStore(out.parent / f".{out.name}.calibrated", calibration_key(source, formats, windows))

    def show(done: int, total: int, what: str) -> None:
        display.show("calibrating", done, total, what)

    threads = args.threads or default_threads()
    return calibrate(checkpoint, windows, formats, store, n_threads=threads, progress=show), store


def _check_budget(args: argparse.Namespace) -> None:
    """Raises OptionError unless --type auto comes with a budget and a text, and nothing else with a budget."""
    has_budget = args.bpw is not None or args.size is not None
    if args.type == _AUTO and not has_budget:
        raise OptionError("--type auto: say how large the model may become: --bpw 4.5 or --size 9G")
    if args.type == _AUTO and args.calibrate is None:
        raise OptionError("--type auto: name a text to measure on: --calibrate FILE")
    if has_budget and args.type != _AUTO:
        raise OptionError("--bpw and --size: are for --type auto")


def _allocated(
    args: argparse.Namespace, source: "GGUFFile", rules: "Sequence[Rule]"
) -> "tuple[list[Rule], EncodedStore | None]":
    """A rule for each tensor, by measured sensitivity under the budget; what was measured is kept beside the output."""
    from edge_moe_quant.allocate import allocate, measured_choices, probed_windows
    from edge_moe_quant.calibrate import text_windows
    from edge_moe_quant.quantize import calibration_key
    from edge_moe_quant.recipe import Rule
    from edge_moe_quant.store import EncodedStore

    from edge_moe.api import default_threads
    from edge_moe.tokenizer import Tokenizer

    if args.size is not None:
        # the header with its vocabulary stays nearly as it is; between tensors there are gaps
        weights_bytes = sum(entry.data.nbytes for entry in source.tensors.values())
        budget_bytes = args.size - (source.size_bytes - weights_bytes) - 32 * len(source.tensors) - 1024
    else:
        n_weights = sum(math.prod(entry.shape) for entry in source.tensors.values())
        budget_bytes = int(args.bpw * n_weights / 8)
    tokenizer = Tokenizer.from_metadata(source.metadata, source.path)
    windows = text_windows(tokenizer, read_text(args.calibrate), _window_length(source), args.chunks)
    windows = probed_windows(windows, tokenizer.vocab_size)
    store = None
    if args.out is not None and not args.print_recipe:
        out = Path(args.out)
        store = EncodedStore(out.parent / f".{out.name}.measured", calibration_key(source, {}, windows))
    with Display() as display:
        display.watch_compilation()

        def show(done: int, total: int, name: str) -> None:
            display.show("measuring", done, total, name)

        choices = measured_choices(
            source, windows, rules, n_threads=args.threads or default_threads(), store=store, progress=show
        )
    return [Rule(name, fmt) for name, fmt in allocate(choices, budget_bytes).items()], store


def _window_length(source: "GGUFFile") -> int:
    from edge_moe.metadata import read_config

    return min(512, read_config(source).max_position_embeddings)


def _print_coverage(args: argparse.Namespace, coverage: "Coverage") -> None:
    line = f"calibrated on {coverage.n_tokens} tokens"
    if coverage.hits:
        line += f"; the least used expert had {coverage.least}"
    if coverage.seldom:
        line += (
            f"; {coverage.seldom} experts had too few for error compensation and were searched by their layer's "
            f"figures: a longer or more varied text than {args.calibrate} would help"
        )
    print_dim(one_line(line))


def _rules(args: argparse.Namespace) -> "list[Rule]":
    from edge_moe_quant.recipe import parse_recipe, parse_rule

    rules = parse_recipe(read_text(args.recipe), args.recipe) if args.recipe else []
    for text in args.tensor_type:
        pattern, equals, type_name = text.rpartition("=")
        if not (pattern and equals and type_name):
            raise OptionError(f"--tensor-type: expected PATTERN=TYPE, found {text!r}")
        rules.append(parse_rule(pattern, type_name, "--tensor-type"))
    return rules


def _print_recipe(args: argparse.Namespace, formats: "Mapping[str, BlockFormat]", lines: list[str]) -> int:
    if args.json:
        write_json({"type": args.type, "tensors": {name: fmt.name for name, fmt in formats.items()}})
        return 0
    print(f"# {args.type or args.recipe} of {Path(args.source).name}: the last line that fits a tensor counts")
    for line in lines:
        print(one_line(line))
    return 0


def _commonest(source: "GGUFFile", formats: "Mapping[str, BlockFormat]") -> str:
    """The format of the most bytes of the source."""
    sizes: Counter[str] = Counter()
    for name, entry in source.tensors.items():
        sizes[formats[name].name] += entry.data.nbytes
    return sizes.most_common(1)[0][0]


def _encoded(source: "GGUFFile", formats: "Mapping[str, BlockFormat]") -> list[str]:
    return [
        name
        for name, entry in source.tensors.items()
        if formats[name] is not entry.format and formats[name].name not in ("F32", "F16", "BF16")
    ]
