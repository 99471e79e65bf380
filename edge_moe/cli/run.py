"""`edge-moe run`: complete a prompt, streaming the text as it comes."""

import argparse
import sys
from pathlib import Path

from edge_moe.cli.answer import report, stats_line, stream
from edge_moe.cli.loading import keep_routes, load_model, save_kept_routes
from edge_moe.cli.options import (
    Parser,
    add_generation_options,
    add_model_options,
    check_model_path,
    check_prompt,
    is_model_path,
    model_settings,
    read_stdin,
    sampling_options,
)
from edge_moe.cli.report import INTERRUPTED, Display, print_dim, write_json
from edge_moe.errors import OptionError

_DESCRIPTION = """\
Complete a prompt and print the text as it comes; the statistics follow on standard error.

Without MODEL the small model that comes with edge_moe answers. Without PROMPT, or with `-`, the prompt is read
from standard input. A single word that is no file and does not end in .gguf is the prompt."""

_EXAMPLES = """\
examples:
  edge-moe run "The city of Paris"
  edge-moe run model.gguf "def fibonacci(n):" -n 64 --temp 0
  edge-moe run model.gguf --chat "Why is the sky blue?"
  edge-moe run model.gguf --json --seed 1 < prompt.txt"""


def parser(prog: str) -> Parser:
    """The options of `run`."""
    parser = Parser(prog=prog, description=_DESCRIPTION, epilog=_EXAMPLES, usage=f"{prog} [MODEL] [PROMPT] [options]")
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a .gguf file, or an exported ONNX folder (default: the embedded model)",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to go on from")
    parser.add_argument("--chat", action="store_true", help="answer the prompt by the model's chat template")
    add_generation_options(parser, n_predict=256)
    add_model_options(parser, context="default: the model's own, at most 16384")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON document instead of the text as it comes")
    group.add_argument("--no-stats", action="store_true", help="leave out the statistics")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Run the model once; INTERRUPTED after Ctrl-C."""
    path, prompt = _model_and_prompt(args.model, args.prompt)
    options = sampling_options(args)
    with Display() as display:
        model = load_model(path, display, context_length=args.ctx_size, **model_settings(args))
        keep_routes(model, args.save_routes)
        ids: str | list[int] = prompt
        stop = args.stop
        if args.chat:
            from edge_moe.cli.chat import chat_prompt

            ids, template_stop = chat_prompt(model, [{"role": "user", "content": prompt}])
            stop = [*stop, *template_stop]
        pieces = model.generate(
            ids,
            max_new_tokens=args.n_predict,
            stop=stop,
            options=options,
            ignore_eos=args.ignore_eos,
            on_progress=lambda done, total: display.show("reading the prompt", done, total),
        )
        text, interrupted = stream(pieces, display, echo=not args.json)
    save_kept_routes(model, args.save_routes)
    if args.json:
        write_json(report(text, model.last_stats, model.expert_store))
    elif not args.no_stats:
        print_dim(stats_line(model.last_stats, model.expert_store))
    return INTERRUPTED if interrupted else 0


def _model_and_prompt(model: str | None, prompt: str | None) -> tuple[Path | None, str]:
    """Tell the two words apart: MODEL PROMPT, MODEL with the prompt on standard input, or PROMPT alone."""
    if prompt is None and model is not None and not is_model_path(model):
        model, prompt = None, model
    path = check_model_path(model) if model is not None else None
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise OptionError('no prompt: give one as the last argument, as in `edge-moe run "The city of Paris"`')
    return path, read_stdin() if prompt is None or prompt == "-" else check_prompt(prompt)
