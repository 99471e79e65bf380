"""`edge-moe export`: a model as a folder for ONNX Runtime."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.cli.conversion import all_or_nothing
from edge_moe.cli.loading import load_model
from edge_moe.cli.options import MAX_TOKENS, Parser, add_threads_option, check_model_path, read_text, whole_number
from edge_moe.cli.report import Display, format_bytes, format_duration, print_dim, write_json
from edge_moe.errors import OptionError

if TYPE_CHECKING:
    from edge_moe.checkpoint import Checkpoint
    from edge_moe.divergence import Evaluation

CHUNK_TOKENS = 512
_DESCRIPTION = """\
Write a model as an ONNX folder: the graph with its weights, whose cache is the compressed latent, and beside it the
tokenizer, the chat template and genai_config.json. `edge-moe run OUT_DIR` runs it. OUT_DIR appears when it is complete.

--bits is about the routed experts. Beside them Q4_0 stays 4-bit and all else becomes 8-bit. Weights in Q4_0 and Q8_0
keep their exact values where the bits are theirs; others are rounded anew, and the report says what that lost: by
weights, and with --text by the answers."""

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
    add("--imatrix", metavar="FILE", help="which columns matter where weights are rounded anew: `edge-moe imatrix`")
    add("--text", metavar="FILE", help="report how far the answers on this text are from MODEL's (KL divergence)")
    add(
        "--chunks",
        metavar="N",
        type=whole_number(1, MAX_TOKENS),
        default=8,
        help=f"how much of --text: N times {CHUNK_TOKENS} tokens (default 8)",
    )
    add_threads_option(parser)
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

    checkpoint = open_checkpoint(path)
    importance = None
    if args.imatrix is not None:
        from edge_moe_quant.importance import read_importance

        importance = read_importance(Path(args.imatrix)).of
    text, context_length = (None, 0) if args.text is None else _text(args.text, checkpoint)
    started = time.perf_counter()
    with all_or_nothing(Path(args.out)), Display() as display:
        export = export_onnx(
            checkpoint,
            Path(args.out),
            bits=args.bits,
            block=args.block,
            kv=args.kv,
            optimized=args.optimized,
            importance=importance,
            progress=lambda done, total: display.show("exporting", done, total, "layers"),
        )
    seconds = time.perf_counter() - started
    lost = _divergence(path, args, text, context_length) if text is not None else None
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
                "divergence": dataclasses.asdict(lost) if lost is not None else None,
                "seconds": seconds,
            }
        )
        return 0
    for note in export.notes:
        print_dim(note)
    size = format_bytes(sum(export.file_bytes.values()))
    print_dim(f"wrote {args.out}: {len(export.file_bytes)} files, {size} in {format_duration(seconds)}")
    if lost is not None:
        print_dim(
            f"KL divergence from {args.model}: {lost.kld_mean:.4g} ± {lost.kld_mean_stderr:.2g} nats a token, "
            f"same likeliest token {100 * (lost.top1_agreement or 0):.1f} % ({lost.tokens} tokens of {args.text})"
        )
    return 0


def _text(name: str, checkpoint: "Checkpoint") -> tuple[str, int]:
    """The text to compare on, and the tokens of its chunks. Raises OptionError when it is too short."""
    from edge_moe.tokenizer import Tokenizer

    text = read_text(name)
    n_tokens = len(Tokenizer.from_metadata(checkpoint.metadata, checkpoint.path).encode(text))
    context_length = min(CHUNK_TOKENS, n_tokens, checkpoint.config.max_position_embeddings)
    if context_length < 16:
        raise OptionError(f"--text {name}: has {n_tokens} tokens, too few to compare on; give a longer text")
    return text, context_length


def _divergence(path: Path, args: argparse.Namespace, text: str, context_length: int) -> "Evaluation":
    """How far the folder's answers are from the file's."""
    from edge_moe.evaluate import evaluate

    with Display() as display:
        return evaluate(
            load_model(Path(args.out), display, threads=args.threads),
            text,
            reference=load_model(path, display, threads=args.threads),
            context_length=context_length,
            max_windows=args.chunks,
            on_window=lambda done, total, ppl: display.show("comparing", done, total, f"perplexity {ppl:.3f}"),
        )
