"""`edge-moe eval`: how well a model predicts a text, and how far it is from a reference."""

import argparse
import dataclasses

from edge_moe.cli.loading import load_model
from edge_moe.cli.options import (
    MAX_TOKENS,
    Parser,
    add_threads_option,
    check_model_path,
    read_text,
    whole_number,
)
from edge_moe.cli.report import (
    Display,
    print_facts,
    write_json,
)
from edge_moe.errors import OptionError

_DESCRIPTION = """\
Measure the perplexity of a text and its bits per byte; with --reference also the Kullback-Leibler divergence of the
model's distributions from the reference's (mean, 99 % and 99.9 % quantile, in nats) and how often both find the same
token likeliest.

The method is that of llama-perplexity, so that the figures compare: the text is cut into chunks of the context's
length, each begins with the BOS token if the model has one, and the second half of each chunk is scored."""

_EXAMPLES = """\
examples:
  edge-moe eval model-Q4_K_M.gguf --text wiki.test.raw
  edge-moe eval model-Q4_K_M.gguf --text wiki.test.raw --reference model-F16.gguf -c 512 --json"""


def parser(prog: str) -> Parser:
    """The options of `eval`."""
    parser = Parser(prog=prog, description=_DESCRIPTION, epilog=_EXAMPLES, usage=f"{prog} MODEL --text FILE [options]")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a .gguf file")
    add("--text", metavar="FILE", required=True, help="UTF-8 text to predict; `-` is standard input")
    add("--reference", metavar="MODEL", help="a .gguf file of the same vocabulary to compare with")
    add(
        "-c",
        "--ctx-size",
        metavar="N",
        type=whole_number(4, MAX_TOKENS),
        default=512,
        help="tokens of a chunk (default 512)",
    )
    add(
        "--stride",
        metavar="N",
        type=whole_number(1, MAX_TOKENS),
        help="let the chunks overlap, each N tokens after the other, and score the last N of each",
    )
    add_threads_option(parser)
    add("--json", action="store_true", help="print one JSON document")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Load the models, score the text, print the figures."""
    path = check_model_path(args.model)
    reference_path = check_model_path(args.reference) if args.reference is not None else None
    text = read_text(args.text)
    with Display() as display:
        model = load_model(path, display, threads=args.threads)
        reference = load_model(reference_path, display, threads=args.threads) if reference_path is not None else None
        for loaded in (model, reference):
            if loaded is not None and args.ctx_size > loaded.config.max_position_embeddings:
                raise OptionError(
                    f"-c {args.ctx_size}: the context of {loaded.checkpoint.path} "
                    f"is {loaded.config.max_position_embeddings} tokens"
                )
        from edge_moe.evaluate import evaluate

        result = evaluate(
            model,
            text,
            reference=reference,
            context_length=args.ctx_size,
            stride=args.stride,
            on_window=lambda done, total, ppl: display.show("scoring", done, total, f"perplexity {ppl:.3f}"),
        )
    if args.json:
        write_json(dataclasses.asdict(result))
        return 0
    facts = [
        ("tokens scored", f"{result.tokens}"),
        ("perplexity", f"{result.ppl:.4f} ± {result.ppl_stderr:.4f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
    ]
    if reference is not None:
        facts += [
            ("KL divergence, mean", f"{result.kld_mean:.6f}"),
            ("KL divergence, 99 %", f"{result.kld_p99:.6f}"),
            ("KL divergence, 99.9 %", f"{result.kld_p999:.6f}"),
            ("same likeliest token", f"{100 * (result.top1_agreement or 0):.2f} %"),
        ]
    print_facts(facts)
    return 0
