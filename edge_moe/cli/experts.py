"""`edge-moe experts`: which experts a text uses, and how many of them a budget of memory would hold."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.cli.options import Parser, add_threads_option, check_model_path, read_text, whole_number
from edge_moe.cli.report import Display, format_bytes, print_dim, print_table, write_json
from edge_moe.errors import OptionError

if TYPE_CHECKING:
    import numpy as np

_DESCRIPTION = """\
Run a model over a text and show how the router uses its experts: a heat map by layer (--plot), and for several budgets
the share of experts that a token would find in memory."""

_EXAMPLES = """\
examples:
  edge-moe experts model.gguf --text chat.txt --plot experts.png
  edge-moe experts model.gguf --text chat.txt --save-routes chat.routes.npz"""

_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
_MOST_TOKENS = 8192


def parser(prog: str) -> Parser:
    """The options of `experts`."""
    parser = Parser(prog=prog, description=_DESCRIPTION, epilog=_EXAMPLES, usage=f"{prog} MODEL --text FILE [options]")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a .gguf file with experts")
    add("-f", "--file", "--text", dest="text", metavar="FILE", required=True, help="the text to run it over")
    add(
        "-n",
        "--tokens",
        metavar="N",
        type=whole_number(2, 1 << 24),
        default=_MOST_TOKENS,
        help=f"only the first N tokens (default {_MOST_TOKENS})",
    )
    add("--plot", metavar="FILE", help="draw the heat map and the shares as PNG or SVG")
    add("--save-routes", metavar="FILE", help="keep every token's experts, for tools/replay_routes.py")
    add_threads_option(parser)
    add("--json", action="store_true", help="print one JSON document")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Record, replay, report."""
    path = check_model_path(args.model, may_be_folder=False)
    text = read_text(args.text)
    from edge_moe.api import default_threads
    from edge_moe.checkpoint import open_checkpoint
    from edge_moe.eviction import AgedFrequency
    from edge_moe.memory_plan import expert_layers
    from edge_moe.routes import record_routes, replay, save_routes, shares
    from edge_moe.tokenizer import Tokenizer

    checkpoint = open_checkpoint(path)
    layers = expert_layers(checkpoint)
    if not layers:
        raise OptionError(f"{path}: has no experts")
    ids = Tokenizer.from_metadata(checkpoint.metadata, checkpoint.path).encode(text)[: args.tokens]
    if len(ids) < 2:
        raise OptionError(f"{args.text}: has {len(ids)} tokens, expected at least 2")
    with Display() as display:
        display.watch_compilation()
        display.show("recording routes", 0, None)
        routes = record_routes(checkpoint, ids, args.threads or default_threads())
        n_experts, n_layers = layers[0][0].shape[0], len(layers)
        used, rates = shares(routes, n_experts), []
        for i, share in enumerate(_SHARES):
            display.show("replaying", i, len(_SHARES))
            n_slots = max(int(share * n_layers * n_experts), routes.shape[2])
            rates.append(replay(routes, n_experts, n_slots, AgedFrequency(n_layers, n_experts)))
    expert_bytes = sum(weight.n_bytes for layer in layers for weight in layer)
    if args.save_routes:
        save_routes(Path(args.save_routes), routes, n_experts)
    if args.plot:
        _draw(used, rates, expert_bytes, Path(args.plot), path.name)
    if args.json:
        write_json(
            {
                "path": str(path),
                "tokens": len(routes),
                "use_per_token": used.tolist(),
                "budgets": [
                    {"expert_share": share, "bytes": int(share * expert_bytes), "expert_hit_rate": rate}
                    for share, rate in zip(_SHARES, rates, strict=True)
                ],
            }
        )
        return 0
    rows = [
        [f"{100 * share:.0f} %", format_bytes(share * expert_bytes), f"{100 * rate:.1f} %"]
        for share, rate in zip(_SHARES, rates, strict=True)
    ]
    print_table(f"{path.name}, {len(routes)} tokens", ["experts that fit", "memory", "found in memory"], rows)
    tenth = max(1, n_experts // 10)
    busiest = [sum(sorted(layer)[-tenth:]) / routes.shape[2] for layer in used.tolist()]
    print_dim(
        f"the busiest tenth of a layer's experts has {100 * min(busiest):.0f} to {100 * max(busiest):.0f} % of its use"
    )
    return 0


def _draw(used: "np.ndarray", rates: list[float], expert_bytes: int, path: Path, name: str) -> None:
    """The heat map of use f64[layers, experts] above the hit rates by memory. Raises OptionError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise OptionError("--plot needs matplotlib: pip install 'edge-moe[plots]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 7), height_ratios=(2, 1))
    image = above.imshow(100 * used, aspect="auto", cmap="magma", interpolation="nearest")
    figure.colorbar(image, ax=above, label="tokens that use it (%)")
    above.set(xlabel="expert", ylabel="layer with experts", title=f"{name}: use of experts")
    gigabytes = [share * expert_bytes / 1e9 for share in _SHARES]
    below.plot(gigabytes, [100 * rate for rate in rates], marker="o")
    below.set(xlabel="memory for experts (GB)", ylabel="found in memory (%)", ylim=(0, 101))
    below.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
