"""`edge-moe imatrix`: which columns of a model's matrices matter on a text, in llama.cpp's file format."""

import argparse
import time
from pathlib import Path

from edge_moe.cli.options import Parser, add_threads_option, check_model_path, read_text, whole_number
from edge_moe.cli.report import Display, format_bytes, format_duration, one_line, print_dim, write_json

_DESCRIPTION = """\
Run a model over a text and write its importance matrix: the mean squares of what each matrix takes in, for each expert
of the tokens that the router sends it. `edge-moe quantize --imatrix` and llama-quantize take the file."""

_EXAMPLES = """\
examples:
  edge-moe imatrix v2-lite-bf16.gguf -f text.txt -o v2-lite.imatrix.gguf --chunks 128
  edge-moe quantize v2-lite-bf16.gguf v2-lite-q4.gguf --type Q4_K_M --imatrix v2-lite.imatrix.gguf"""

_CHUNK_TOKENS = 512


def parser(prog: str) -> Parser:
    """The options of `imatrix`."""
    parser = Parser(prog=prog, description=_DESCRIPTION, epilog=_EXAMPLES, usage=f"{prog} MODEL.gguf -f TEXT -o OUT")
    add = parser.add_argument
    add("model", metavar="MODEL.gguf", help="the model, best before it is quantized")
    add("-f", "--file", "--text", dest="text", metavar="TEXT", required=True, help="the text to run it over")
    add("-o", "--output", metavar="OUT.gguf", required=True, help="the file to write")
    add("-c", "--ctx-size", metavar="N", type=whole_number(1, 1 << 20), help="tokens of a chunk (default 512)")
    add("--chunks", metavar="N", type=whole_number(1, 1 << 20), help="only the first N chunks (default: all)")
    add_threads_option(parser)
    add("--json", action="store_true", help="print one JSON document")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Collect with a progress bar on a terminal, write, and say what was written."""
    from edge_moe_quant.calibrate import text_windows
    from edge_moe_quant.imatrix import collect, write_imatrix

    from edge_moe.api import default_threads
    from edge_moe.checkpoint import open_checkpoint
    from edge_moe.tokenizer import Tokenizer

    checkpoint = open_checkpoint(check_model_path(args.model, may_be_folder=False))
    tokenizer = Tokenizer.from_metadata(checkpoint.metadata, checkpoint.path)
    length = min(args.ctx_size or _CHUNK_TOKENS, checkpoint.config.max_position_embeddings)
    windows = text_windows(tokenizer, read_text(args.text), length, args.chunks)
    started = time.perf_counter()
    with Display() as display:
        display.watch_compilation()

        def show(done: int, total: int, what: str) -> None:
            display.show("collecting", done, total, what)

        sums = collect(checkpoint, windows, n_threads=args.threads or default_threads(), progress=show)
    size_bytes = write_imatrix(Path(args.output), checkpoint, sums, windows, Path(args.text).name)
    seconds = time.perf_counter() - started
    least = min((int(counts.min()) for counts in sums.counts.values() if counts.size > 1), default=None)
    if args.json:
        write_json(
            {
                "path": args.output,
                "bytes": size_bytes,
                "tensors": len(sums.sums),
                "chunks": len(windows),
                "tokens": int(windows.size),
                "least_expert_hits": least,
                "seconds": seconds,
            }
        )
        return 0
    print_dim(
        f"wrote {one_line(args.output)}: {len(sums.sums)} tensors, {format_bytes(size_bytes)}, "
        f"from {windows.size} tokens in {format_duration(seconds)}"
        + (f"; the least used expert had {least}" if least is not None else "")
    )
    return 0
