"""The command line `edge-moe`: finds the subcommand and turns every error into one line and an exit status."""

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from edge_moe.cli.options import Parser
from edge_moe.cli.report import INTERRUPTED, prepare_output, print_error
from edge_moe.errors import EdgeMoeError

# the modules are imported when their command is called, so that --help and errors stay quick
COMMANDS = {
    "run": "complete a prompt, or answer it with --chat",
    "chat": "talk with a model in the terminal",
    "info": "show what a model file holds and the memory it needs",
    "bench": "measure prompt and generation speed",
    "eval": "measure perplexity, and the divergence from a reference model",
    "experts": "show which experts a text uses, and how many a budget of memory would hold",
    "convert": "turn a Hugging Face checkpoint into a GGUF file, quantized if asked",
    "quantize": "make a GGUF file smaller: 2- to 8-bit blocks",
    "imatrix": "write which columns of a model's matrices matter, for quantizing",
    "export": "write a model as an ONNX folder",
}
BAD_INPUT = 2
INTERNAL_ERROR = 70
CLOSED_PIPE = 141  # what a shell reports for a program that SIGPIPE ended

_HELP = f"""\
usage: edge-moe COMMAND [options]

Run Mixture-of-Experts language models with latent attention (DeepSeek-V2, -V3 and kin) from one GGUF file.

commands:
{"".join(f"  {name:<9}{text}" + chr(10) for name, text in COMMANDS.items())}
options:
  -h, --help     show this help; `edge-moe COMMAND --help` shows a command's options
  --version      show the version

examples:
  edge-moe run "The city of Paris"                 complete a prompt with the small model that comes along
  edge-moe run model.gguf "def fibonacci(n):" -n 64 --temp 0
  edge-moe chat DeepSeek-V2-Lite-Chat.Q4_K_M.gguf
  edge-moe info model.gguf --json

exit status: 0 done, 2 bad input or an output that could not be finished (one line on standard error says what),
130 stopped by Ctrl-C.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, and prints one line on standard error when it is BAD_INPUT."""
    try:
        prepare_output()
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # a closed pipe or a full disk must show here, not at the interpreter's end
        return status
    except SystemExit as stop:  # argparse after --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return CLOSED_PIPE
    except EdgeMoeError as error:
        print_error(str(error))
        return BAD_INPUT
    except OSError as error:
        print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
        _discard_output()
        return BAD_INPUT
    except MemoryError:
        print_error("out of memory; a smaller context (-c) needs less, `edge-moe info` shows how much")
        return BAD_INPUT
    except Exception as error:
        if os.environ.get("EDGE_MOE_TRACEBACK"):
            raise
        kind = type(error).__name__
        print_error(f"internal error: {kind}: {error}; EDGE_MOE_TRACEBACK=1 shows where, please report it")
        return INTERNAL_ERROR


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_HELP)
        return 0
    if argv[0] == "--version":
        from edge_moe import __version__

        sys.stdout.write(f"edge-moe {__version__}\n")
        return 0
    if argv[0] not in COMMANDS:
        kind = "option" if argv[0].startswith("-") else "command"
        Parser(prog="edge-moe").error(f"unknown {kind} {argv[0]!r}; the commands are {', '.join(COMMANDS)}")
    command = importlib.import_module(f"edge_moe.cli.{argv[0]}")
    args = command.parser(f"edge-moe {argv[0]}").parse_words(argv[1:])
    return command.execute(args)


def _discard_output() -> None:
    """Point standard output at nothing, since the interpreter flushes it once more at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "w") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), sys.stdout.fileno())
