"""`edge-moe chat`: talk with a model in the terminal."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from edge_moe.cli.answer import stats_line, stream
from edge_moe.cli.loading import keep_routes, load_model, save_kept_routes
from edge_moe.cli.options import (
    Parser,
    add_generation_options,
    add_model_options,
    check_model_path,
    check_prompt,
    model_settings,
    sampling_options,
)
from edge_moe.cli.report import Display, is_terminal, print_dim, print_error
from edge_moe.errors import EdgeMoeError

if TYPE_CHECKING:
    from edge_moe.api import Model

_DESCRIPTION = """\
Talk with a model, turn by turn, by the chat template in its file. What was said stays in the latent cache, so that
each turn reads only what is new.

Ctrl-C stops an answer, Ctrl-D leaves. /reset forgets the conversation, /exit leaves, /help lists the commands."""

_EXAMPLES = """\
examples:
  edge-moe chat DeepSeek-V2-Lite-Chat.Q4_K_M.gguf
  edge-moe chat model.gguf --system "Answer in one sentence." --temp 0.3"""

_COMMANDS = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"

# for files without a template: the form of DeepSeek-V2's, in words that any base model can go on from
PLAIN_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% if message.role == "user" %}User: {{ message.content }}

{% elif message.role == "assistant" %}Assistant: {{ message.content }}

{% else %}{{ message.content }}

{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""
PLAIN_STOP = "\nUser:"


def parser(prog: str) -> Parser:
    """The options of `chat`."""
    parser = Parser(prog=prog, description=_DESCRIPTION, epilog=_EXAMPLES, usage=f"{prog} [MODEL] [options]")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a .gguf file (default: the embedded model)")
    parser.add_argument("--system", metavar="TEXT", type=check_prompt, help="a system message to begin with")
    add_generation_options(parser, n_predict=1024)
    add_model_options(parser, context="default: the model's own, at most 16384")
    group = parser.add_argument_group("output")
    group.add_argument("--no-stats", action="store_true", help="leave out the statistics after each answer")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Read lines and answer them until the input ends."""
    path = check_model_path(args.model) if args.model is not None else None
    options = sampling_options(args)
    with Display() as display:
        model = load_model(path, display, context_length=args.ctx_size, **model_settings(args))
        keep_routes(model, args.save_routes)
        conversation = Conversation(model, args.system)
        print_dim(f"{model.config.name}: {_COMMANDS}")
        if not model.tokenizer.chat_template:
            print_dim("the file has no chat template: a plain User/Assistant one is used")
        for line in _lines():
            if line == "/reset":
                conversation = Conversation(model, args.system)
                print_dim("the conversation is forgotten")
            elif line == "/exit":
                break
            elif line.startswith("/"):
                print_dim(_COMMANDS)
            elif line:
                try:
                    ids, stop = conversation.ask(check_prompt(line))
                    pieces = model.generate(
                        ids,
                        max_new_tokens=args.n_predict,
                        stop=[*args.stop, *stop],
                        options=options,
                        ignore_eos=args.ignore_eos,
                        session=conversation.session,
                        on_progress=lambda done, total: display.show("reading the prompt", done, total),
                    )
                    text, _ = stream(without_leading_space(pieces), display, echo=True)
                except EdgeMoeError as error:
                    conversation.forget_question()
                    print_error(f"{error}; /reset forgets the conversation")
                    continue
                conversation.hear(text)
                if not args.no_stats:
                    print_dim(stats_line(model.last_stats, model.expert_store))
        save_kept_routes(model, args.save_routes)
    return 0


class Conversation:
    """The messages so far, and the session whose latent cache holds them."""

    def __init__(self, model: "Model", system: str | None) -> None:
        self.session = model.new_session()
        self._model = model
        self._messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str) -> tuple[list[int], list[str]]:
        """Add a question; returns the token ids of the whole conversation and the strings that end the answer."""
        self._messages.append({"role": "user", "content": text})
        return chat_prompt(self._model, self._messages)

    def hear(self, text: str) -> None:
        """Add the answer, also one that was cut short."""
        self._messages.append({"role": "assistant", "content": text.strip()})

    def forget_question(self) -> None:
        """Take back a question that could not be answered."""
        self._messages.pop()


def chat_prompt(model: "Model", messages: list[dict[str, str]]) -> tuple[list[int], list[str]]:
    """Token ids of messages in the model's chat template, and strings that end an answer beside its end tokens.

    Raises FormatError when the template cannot be rendered.
    """
    from edge_moe.chat import render_chat

    tokenizer = model.tokenizer
    text = render_chat(
        tokenizer.chat_template or PLAIN_TEMPLATE,
        messages,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = tokenizer.encode(text, add_special=not has_bos, parse_special=True)
    return ids, [] if tokenizer.chat_template else [PLAIN_STOP]


def without_leading_space(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces without the white space before the first word: templates end right after "Assistant:"."""
    started = False
    for piece in pieces:
        shown = piece if started else piece.lstrip()
        started = started or bool(shown)
        if shown:
            yield shown


def _lines() -> Iterator[str]:
    """Lines of the user without white space around them; Ctrl-C at the prompt starts a new line."""
    if is_terminal(sys.stdin):
        with suppress(ImportError):
            import readline  # noqa: F401 (gives input() editing and a history)
    while True:
        try:
            yield (input("> ") if is_terminal(sys.stdin) else _piped_line()).strip()
        except EOFError:
            if is_terminal(sys.stdin):
                sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")


def _piped_line() -> str:
    line = sys.stdin.readline() if sys.stdin is not None else ""
    if not line:
        raise EOFError
    return line
