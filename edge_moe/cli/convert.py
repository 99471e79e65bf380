"""`edge-moe convert`: a Hugging Face checkpoint to one GGUF file."""

import argparse
import time
from pathlib import Path

from edge_moe.cli.conversion import all_or_nothing, convert_quantized, report_conversion
from edge_moe.cli.conversion import type_name as recipe_name
from edge_moe.cli.options import Parser, add_threads_option
from edge_moe.cli.report import Display
from edge_moe.errors import OptionError

_PLAIN_TYPES = ("f32", "f16", "bf16", "q8_0")

_DESCRIPTION = """\
Convert a Hugging Face checkpoint of a DeepSeek-V2 or -V3 kind, or of Llama, Mistral or Mixtral, to one GGUF file: its
safetensors in bf16, f16, f32 or fp8, and its tokenizer.json, tiktoken.model or tokenizer.model. OUT appears when it is
complete; until then nothing is there or replaced."""

_EXAMPLES = """\
examples:
  edge-moe convert DeepSeek-V2-Lite-Chat/ v2-lite.gguf
  edge-moe convert DeepSeek-V2-Lite-Chat/ v2-lite-q8.gguf --type q8_0
  edge-moe convert DeepSeek-V2-Lite-Chat/ v2-lite-q4.gguf --type q4_k_m"""


def parser(prog: str) -> Parser:
    """The options of `convert`."""
    parser = Parser(prog=prog, description=_DESCRIPTION, epilog=_EXAMPLES, usage=f"{prog} HF_DIR OUT.gguf [options]")
    add = parser.add_argument
    add("folder", metavar="HF_DIR", help="a folder with config.json, *.safetensors and the tokenizer's files")
    add("out", metavar="OUT.gguf", help="the file to write")
    add(
        "--type",
        metavar="TYPE",
        type=_type_name,
        default="bf16",
        help="how matrices are stored (default bf16): f32, f16, bf16, q8_0 or a recipe of `edge-moe quantize`, such as "
        "q4_k_m; norms and the router stay f32",
    )
    add_threads_option(parser)
    add("--json", action="store_true", help="print one JSON document")
    return parser


def _type_name(text: str) -> str:
    if text.lower() in _PLAIN_TYPES:
        return text.lower()
    try:
        return recipe_name(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or q8_0, bf16, f16, f32") from None


def execute(args: argparse.Namespace) -> int:
    """Convert, with a progress bar on a terminal, and say what was written."""
    try:
        folder, out = Path(args.folder), Path(args.out)
        out.exists()
    except ValueError:
        raise OptionError(f"{args.out!r} is no file name") from None
    from edge_moe_export.convert import convert

    started = time.perf_counter()
    with Display() as display:

        def show(done_bytes: int, total_bytes: int, tensor_name: str) -> None:
            display.show("converting", done_bytes, total_bytes, tensor_name)

        if args.type in _PLAIN_TYPES:
            with all_or_nothing(out):
                conversion = convert(folder, out, args.type, progress=show)
        else:
            display.watch_compilation()
            conversion = convert_quantized(folder, out, args.type, [], args.threads, show)
    seconds = time.perf_counter() - started
    return report_conversion(args, conversion, seconds)
