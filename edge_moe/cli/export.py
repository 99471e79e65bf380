"""`edge-moe export`: a model as a folder for ONNX Runtime."""

import argparse
import time
from pathlib import Path

from edge_moe.cli.conversion import all_or_nothing
from edge_moe.cli.options import Parser, check_model_path
from edge_moe.cli.report import Display, format_bytes, format_duration, print_dim, write_json
from edge_moe.errors import OptionError

_DESCRIPTION = """\
Write a model as an ONNX folder: the graph with its weights, whose cache is the compressed latent, and beside it the
tokenizer, the chat template and genai_config.json. `edge-moe run OUT_DIR` runs it. OUT_DIR appears when it is complete.

--bits is about the routed experts. Beside them Q4_0 stays 4-bit and all else becomes 8-bit. Weights in Q4_0 and Q8_0
keep their exact values where the bits are theirs; others are rounded anew, and the report says what that lost."""

_EXAMPLES = """\
examples:
  edge-moe export onnx model-Q8_0.gguf model-onnx
  edge-moe export onnx model-Q8_0.gguf model-onnx-8 --bits 8 --kv fp16"""


def parser(prog: str) -> Parser:
    """The options of `export`."""
    parser = Parser(prog=prog, description=_DESCRIPTION, epilog=_EXAMPLES, usage=f"{prog} onnx MODEL OUT_DIR [options]")
    add = parser.add_argument
    add("format", choices=("onnx",), metavar="onnx", help="the kind of folder")
    add("model", metavar="MODEL", help="a .gguf file")
    add("out", metavar="OUT_DIR", help="the folder to write; it must be new")
    add(
        "--bits",
        type=int,
        choices=(4, 8, 32),
        default=4,
        help="bits of the experts' weights (default 4); 32: all weights f32 and standard operators only, which is slow",
    )
    add("--block", type=int, choices=(16, 32, 64, 128), default=32, help="weights that share a scale (default 32)")
    add("--kv", choices=("fp32", "fp16", "int8"), default="fp32", help="the cache's numbers (default fp32)")
    add(
        "--optimized",
        action="store_true",
        help="save the graph as onnxruntime packs it for this CPU: a larger file that needs less memory when it runs",
    )
    add("--json", action="store_true", help="print one JSON document")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Export, with a progress bar on a terminal, and say what was written and what was lost."""
    path = check_model_path(args.model, may_be_folder=False)
    try:
        from edge_moe_export.onnx import export_onnx
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise OptionError("export needs the package onnx; install it by `pip install 'edge-moe[onnx]'`") from None
    from edge_moe.checkpoint import open_checkpoint

    started = time.perf_counter()
    with all_or_nothing(Path(args.out)), Display() as display:
        export = export_onnx(
            open_checkpoint(path),
            Path(args.out),
            bits=args.bits,
            block=args.block,
            kv=args.kv,
            optimized=args.optimized,
            progress=lambda done, total: display.show("exporting", done, total, "layers"),
        )
    seconds = time.perf_counter() - started
    if args.json:
        write_json(
            {
                "path": args.out,
                "bits": args.bits,
                "block": args.block,
                "kv": args.kv,
                "optimized": args.optimized,
                "bytes": sum(export.file_bytes.values()),
                "files": export.file_bytes,
                "relative_error": export.requantized,
                "notes": list(export.notes),
                "seconds": seconds,
            }
        )
        return 0
    for note in export.notes:
        print_dim(note)
    size = format_bytes(sum(export.file_bytes.values()))
    print_dim(f"wrote {args.out}: {len(export.file_bytes)} files, {size} in {format_duration(seconds)}")
    return 0
