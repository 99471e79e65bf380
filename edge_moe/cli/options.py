"""Options that several commands share, with the checks of their values."""

import argparse
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edge_moe.config import BACKENDS, KV_KINDS
from edge_moe.errors import OptionError

if TYPE_CHECKING:
    from edge_moe.sampling import SamplingOptions

MAX_TOKENS = 1 << 24  # longer than any model's context; keeps later products far from overflow


class Parser(argparse.ArgumentParser):
    """argparse whose errors are our own one-line errors, and whose positionals may stand anywhere."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message.replace(_MARK, '')} (see {self.prog} --help)")

    def parse_words(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `MODEL -n 5 PROMPT` as well as `-n 5 MODEL PROMPT`; what follows `--` is never an option."""
        # argparse loses a `--` between two optional positionals, so that such words are kept apart by a mark
        cut = list(argv).index("--") if "--" in argv else len(argv)
        words = [_MARK + word for word in argv[cut + 1 :]]
        args = self.parse_intermixed_args([*argv[:cut], *words])
        for name, value in vars(args).items():
            if isinstance(value, str):
                setattr(args, name, value.removeprefix(_MARK))
        return args


_MARK = "\0word:"  # no argument of a program can hold a NUL


def whole_number(low: int, high: int, *, what: str = "a whole number") -> Callable[[str], int]:
    """An argparse type for integers from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {what} from {low} to {high}, found {_shown(text)}")
        return value

    return parse


def number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type for finite floats from low (or above it) to high."""
    lower = f"above {low:g}" if above else f"of at least {low:g}"
    limits = lower if math.isinf(high) else f"{lower} and at most {high:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < low or value > high or (above and value == low):
            raise argparse.ArgumentTypeError(f"expected a number {limits}, found {_shown(text)}")
        return value

    return parse


def byte_size(text: str) -> int:
    """Bytes of a size like 9G, by powers of 1024 as llama.cpp's."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"expected a size like 9G or 700M, found {text!r}")
    return int(float(found[1]) * 1024 ** " KMG".index(found[2].upper() or " "))


def number_list(low: int, high: int) -> Callable[[str], list[int]]:
    """An argparse type for integers separated by commas."""
    parse_one = whole_number(low, high, what="whole numbers separated by commas, each")
    return lambda text: [parse_one(part) for part in text.split(",")]


def add_model_options(parser: argparse.ArgumentParser, *, context: str) -> None:
    """Options of how a model is held: context length (with the text for its default), latent cache and threads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-c", "--ctx-size", metavar="N", type=whole_number(1, MAX_TOKENS), help=f"tokens of context ({context})"
    )
    add_kv_option(group)
    add_backend_option(group)
    add_ram_option(group)
    add_save_routes_option(group)
    add_threads_option(group)


def add_kv_option(parser: argparse._ActionsContainer) -> None:
    """--kv, how the latent cache keeps its numbers."""
    parser.add_argument(
        "--kv",
        choices=KV_KINDS,
        default=KV_KINDS[0],
        help="numbers of the latent cache (default bf16); int8 takes little more than half of that and is faster, "
        "int4 little more than a third, f32 is exact",
    )


def add_backend_option(parser: argparse._ActionsContainer) -> None:
    """--backend, where the model runs, --vram, the memory it may take there, and --gpu-layers, how much of it."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="cpu",
        help="where the model runs: mlx is an Apple GPU, vulkan a GPU by Vulkan, Metal or DirectX; auto takes one if "
        "there is one; "
        "`edge-moe info` says what is there (default cpu)",
    )
    parser.add_argument(
        "--vram",
        metavar="SIZE",
        type=byte_size,
        help="of --backend vulkan: memory of the device, as 4G or 800M: what does not fit of the experts is sent there "
        "when it is used (default: all of the model is kept there)",
    )
    parser.add_argument(
        "-ngl",
        "--gpu-layers",
        metavar="N",
        type=whole_number(1, 1 << 16),
        help="of --backend mlx and vulkan: run the last N layers and the output head there, the others by the cpu "
        "backend (default: all layers)",
    )


def add_ram_option(parser: argparse._ActionsContainer) -> None:
    """--ram, the memory that the whole process may take."""
    parser.add_argument(
        "--ram",
        metavar="SIZE",
        type=byte_size,
        help="memory for all, as 4G or 800M: what does not fit of the experts is read when it is used "
        "(default: what is free, less a tenth)",
    )
    parser.add_argument(
        "--route-slack",
        metavar="X",
        type=number(0, 1),
        default=0.0,
        help="of a model that does not fit: take an expert in memory for one that is not, if the router's score for it "
        "is at most X less; quicker and less exact, `eval` says by how much (default 0: off)",
    )
    parser.add_argument(
        "--routes",
        metavar="FILE",
        help="of a model that does not fit: begin with the experts that an earlier session or text used most, "
        "from --save-routes",
    )


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What these options and those of the cache and threads mean for loading a model. Raises FormatError."""
    routes = None
    if args.routes is not None:
        from edge_moe.routes import load_routes

        routes, _ = load_routes(Path(args.routes))
    return {
        "threads": args.threads,
        "kv": args.kv,
        "ram_bytes": args.ram,
        "route_slack": args.route_slack,
        "routes": routes,
        "backend": args.backend,
        "vram_bytes": args.vram,
        "gpu_layers": args.gpu_layers,
    }


def add_save_routes_option(parser: argparse._ActionsContainer) -> None:
    """--save-routes, for the next session."""
    parser.add_argument(
        "--save-routes", metavar="FILE", help="of a model that does not fit: keep every token's experts, for --routes"
    )


def add_threads_option(parser: argparse._ActionsContainer) -> None:
    """-t/--threads, up to the machine's logical cores."""
    cores = os.cpu_count() or 1
    parser.add_argument(
        "-t", "--threads", metavar="N", type=whole_number(1, cores), help="threads (default: one per physical core)"
    )


def add_generation_options(parser: argparse.ArgumentParser, n_predict: int) -> None:
    """Length, stop strings and sampling; the sampling defaults are those of SamplingOptions."""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "-n",
        "--n-predict",
        metavar="N",
        type=whole_number(1, MAX_TOKENS),
        default=n_predict,
        help=f"most tokens to generate (default {n_predict})",
    )
    group.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], type=_stop_text, help="end before TEXT; may be repeated"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end-of-text token")
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--temp", metavar="X", type=number(0), default=0.8, help="temperature (default 0.8); 0 takes the likeliest")
    add(
        "--top-k",
        metavar="N",
        type=whole_number(0, MAX_TOKENS),
        default=40,
        help="keep the N likeliest (default 40; 0: all)",
    )
    add(
        "--top-p",
        metavar="X",
        type=number(0, 1, above=True),
        default=0.95,
        help="keep this much probability (default 0.95)",
    )
    add("--min-p", metavar="X", type=number(0, 1), default=0.05, help="drop below X of the likeliest (default 0.05)")
    add(
        "--repeat-penalty",
        metavar="X",
        type=number(0, above=True),
        default=1.0,
        help="divide the logits of the last 64 tokens by X (default 1: off)",
    )
    add(
        "--seed",
        metavar="N",
        type=whole_number(0, 2**63 - 1),
        help="same seed, same text (default: a new one each time)",
    )


def sampling_options(args: argparse.Namespace) -> "SamplingOptions":
    """The sampling options of a parsed command line."""
    from edge_moe.sampling import SamplingOptions

    return SamplingOptions(
        temperature=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        seed=args.seed,
    )


def is_model_path(word: str) -> bool:
    """Whether a word names a model file, or a folder with an ONNX model, rather than being a prompt."""
    try:
        return word.endswith(".gguf") or Path(word).is_file() or _is_onnx_folder(Path(word))
    except (OSError, ValueError):  # too long for a file name, or not a possible one
        return False


def check_model_path(path: str, *, may_be_folder: bool = True) -> Path:
    """The path of a readable file, or of a folder with an ONNX model.

    Raises OptionError, before any slow import, when there is no such file.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise OptionError(f"{path}: cannot open the model file: {error.strerror or error}") from None
    except ValueError:
        raise OptionError(f"{_shown(path)} is no file name") from None
    if may_be_folder and _is_onnx_folder(Path(path)):
        return Path(path)
    if not stat.S_ISREG(mode):
        raise OptionError(f"{path}: is not a file; give the model's .gguf file itself")
    if not os.access(path, os.R_OK):
        raise OptionError(f"{path}: cannot open the model file: permission denied")
    return Path(path)


def _is_onnx_folder(path: Path) -> bool:
    if not path.is_dir():
        return False
    from edge_moe.onnx_folder import is_onnx_folder

    return is_onnx_folder(path)


def read_text(path: str) -> str:
    """A UTF-8 text file, `-` for standard input.

    Raises OptionError when it cannot be read, is empty or is not UTF-8.
    """
    if path == "-":
        return read_stdin()
    try:
        return decode_text(Path(path).read_bytes(), path)
    except OSError as error:
        raise OptionError(f"{path}: cannot read the text: {error.strerror or error}") from None
    except ValueError:
        raise OptionError(f"{_shown(path)} is no file name") from None


def read_stdin() -> str:
    """All of standard input, without the newline at its end that shells add.

    Raises OptionError when it is not UTF-8 or there is nothing in it.
    """
    stream = getattr(sys.stdin, "buffer", None)
    data = stream.read() if stream is not None else sys.stdin.read().encode() if sys.stdin else b""
    return decode_text(data, "standard input").removesuffix("\r")


def decode_text(data: bytes, source: str) -> str:
    """UTF-8 bytes as text, without one newline at the end, as llama.cpp reads its prompt files.

    Raises OptionError when there is no text or it is not UTF-8.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{source}: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8; save the text as UTF-8"
        ) from None
    text = text.removesuffix("\n")
    if not text.strip():
        raise OptionError(f"{source}: there is no text in it")
    return text


def check_prompt(text: str) -> str:
    """A text from the command line.

    Raises OptionError when the shell passed bytes that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OptionError(f"the text {_shown(text)} is not UTF-8 at character {error.start}") from None
    return text


def _stop_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected some text, found ''")
    return check_prompt(text)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
