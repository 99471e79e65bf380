"""`edge-moe convert`: a Hugging Face checkpoint to one GGUF file."""

import argparse
import time
from pathlib import Path

from edge_moe.cli.options import Parser
from edge_moe.cli.report import Display, format_bytes, format_duration, print_dim, write_json
from edge_moe.errors import OptionError

_DESCRIPTION = """\
Convert a Hugging Face checkpoint of a DeepSeek-V2 or -V3 kind (safetensors in bf16, f16, f32 or fp8, with a byte-level
BPE tokenizer.json) to one GGUF file. OUT appears when it is complete; until then nothing is there or replaced."""

_EXAMPLES = """\
examples:
  edge-moe convert DeepSeek-V2-Lite-Chat/ v2-lite.gguf
  edge-moe convert DeepSeek-V2-Lite-Chat/ v2-lite-q8.gguf --type q8_0"""


def parser(prog: str) -> Parser:
    """The options of `convert`."""
    parser = Parser(prog=prog, description=_DESCRIPTION, epilog=_EXAMPLES, usage=f"{prog} HF_DIR OUT.gguf [options]")
    add = parser.add_argument
    add("folder", metavar="HF_DIR", help="a folder with config.json, tokenizer.json and *.safetensors")
    add("out", metavar="OUT.gguf", help="the file to write")
    add(
        "--type",
        choices=("f32", "f16", "bf16", "q8_0"),
        default="bf16",
        help="how matrices are stored (default bf16); norms and the router stay f32",
    )
    add("--json", action="store_true", help="print one JSON document")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Convert, with a progress bar on a terminal, and say what was written."""
    from edge_moe_export.convert import convert

    try:
        folder, out = Path(args.folder), Path(args.out)
        out.exists()
    except ValueError:
        raise OptionError(f"{args.out!r} is no file name") from None
    started = time.perf_counter()
    with Display() as display:

        def show(done_bytes: int, total_bytes: int, tensor_name: str) -> None:
            display.show("converting", done_bytes, total_bytes, tensor_name)

        conversion = convert(folder, out, args.type, progress=show)
    seconds = time.perf_counter() - started
    if args.json:
        write_json(
            {
                "path": str(out),
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
        f"wrote {out}: {conversion.n_tensors} tensors, {format_bytes(conversion.size_bytes)} "
        f"in {format_duration(seconds)}"
    )
    return 0
