"""`edge-moe run`: complete a prompt, streaming the text as it comes."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.cli.loading import load_model
from edge_moe.cli.options import (
    Parser,
    add_generation_options,
    add_model_options,
    check_model_path,
    check_prompt,
    is_model_path,
    read_stdin,
    sampling_options,
)
from edge_moe.cli.report import (
    INTERRUPTED,
    Display,
    format_duration,
    format_speed,
    is_terminal,
    peak_rss_bytes,
    print_dim,
    write_json,
)
from edge_moe.errors import OptionError

if TYPE_CHECKING:
    from edge_moe.generate import GenerationStats

# control characters that a model makes up must not command the terminal; pipes and files get them unchanged
_HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}

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
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a .gguf file (default: the embedded model)")
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
        model = load_model(path, display, threads=args.threads, context_length=args.ctx_size)
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
    if args.json:
        write_json(report(text, model.last_stats))
    elif not args.no_stats:
        print_dim(stats_line(model.last_stats))
    return INTERRUPTED if interrupted else 0


def stream(pieces: Iterator[str], display: Display, *, echo: bool) -> tuple[str, bool]:
    """Collect the pieces of a text, printing each at once if `echo`; also returns whether Ctrl-C cut it short."""
    texts: list[str] = []
    interrupted = False
    on_terminal = is_terminal(sys.stdout)
    try:
        for piece in _after_compilation(pieces, display):
            display.clear()
            display.streaming = True
            texts.append(piece)
            if echo:
                sys.stdout.write(piece.translate(_HARMLESS) if on_terminal else piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
        display.clear()
    finally:
        display.streaming = False
    text = "".join(texts)
    if echo and not text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    return text, interrupted


def _after_compilation(pieces: Iterator[str], display: Display) -> Iterator[str]:
    """Pieces, the first of a first use held back until the next is there: generation compiles kernels, too."""
    first = next(pieces, "")
    if display.n_compiled:
        first += next(pieces, "")
    if first:
        yield first
    yield from pieces


def report(text: str, stats: "GenerationStats") -> dict[str, object]:
    """The document that `run --json` prints."""
    return {
        "text": text,
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "first_token_s": stats.first_token_s,
        "prefill_tok_per_s": stats.prefill_tok_per_s,
        "decode_tok_per_s": stats.decode_tok_per_s,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def stats_line(stats: "GenerationStats") -> str:
    """The statistics of one answer in one line."""
    if not stats.completion_tokens:
        return f"stopped before the first token · peak {peak_rss_bytes() / 1e6:.0f} MB"
    return " · ".join(
        [
            f"prompt {stats.prompt_tokens} tokens, {format_speed(stats.prefill_tok_per_s)}",
            f"first token {format_duration(stats.first_token_s)}",
            f"generated {stats.completion_tokens} tokens, {format_speed(stats.decode_tok_per_s)}",
            f"peak {peak_rss_bytes() / 1e6:.0f} MB",
        ]
    )


def _model_and_prompt(model: str | None, prompt: str | None) -> tuple[Path | None, str]:
    """Tell the two words apart: MODEL PROMPT, MODEL with the prompt on standard input, or PROMPT alone."""
    if prompt is None and model is not None and not is_model_path(model):
        model, prompt = None, model
    path = check_model_path(model) if model is not None else None
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise OptionError('no prompt: give one as the last argument, as in `edge-moe run "The city of Paris"`')
    return path, read_stdin() if prompt is None or prompt == "-" else check_prompt(prompt)
