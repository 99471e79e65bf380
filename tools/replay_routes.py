"""Replays recorded routes on stores of several sizes: share of experts in memory by rule of eviction, and Belady's.

    edge-moe experts model.gguf --text chat.txt --save-routes chat.routes.npz
    python tools/replay_routes.py chat.routes.npz --plot rules.png

Rules: lru, lfu (with ageing, by half-life in tokens), both (lfu and what was used lately), pins (lfu that begins with
the shares of the first half of the routes; judged, like all others then, by the second half only).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_moe.cli.report import print_error, write_json
from edge_moe.errors import EdgeMoeError
from edge_moe.eviction import AgedFrequency, Eviction, FrequencyAndRecency, LeastRecent
from edge_moe.routes import Farthest, load_routes, replay, shares

Rule = Callable[[np.ndarray, int, np.ndarray], Eviction]  # of routes, experts in a layer, shares of other routes
SHARES = (0.1, 0.25, 0.5, 0.75)


def _seeded(rule: AgedFrequency, known: np.ndarray) -> AgedFrequency:
    rule.seed(known)
    return rule


RULES: dict[str, Rule] = {
    "lru": lambda routes, n, known: LeastRecent(routes.shape[1], n),
    "lfu 16": lambda routes, n, known: AgedFrequency(routes.shape[1], n, 16),
    "lfu 64": lambda routes, n, known: AgedFrequency(routes.shape[1], n, 64),
    "lfu 256": lambda routes, n, known: AgedFrequency(routes.shape[1], n, 256),
    "lfu 1024": lambda routes, n, known: AgedFrequency(routes.shape[1], n, 1024),
    "both": lambda routes, n, known: FrequencyAndRecency(routes.shape[1], n),
    "pins": lambda routes, n, known: _seeded(AgedFrequency(routes.shape[1], n, 256), known),
    "optimum": lambda routes, n, known: Farthest(routes, n),
}


def main() -> int:
    """Print the table, or JSON; draw the plot if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("routes", type=Path, help="a file of routes")
    parser.add_argument("--plot", type=Path, help="a PNG or SVG file to draw")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    try:
        routes, n_experts = load_routes(args.routes)
    except EdgeMoeError as error:
        print_error(str(error))
        return 2
    half = len(routes) // 2
    known, judged = shares(routes[:half], n_experts), routes[half:]
    total = judged.shape[1] * n_experts
    rates = {
        name: [replay(judged, n_experts, int(share * total), rule(judged, n_experts, known)) for share in SHARES]
        for name, rule in RULES.items()
    }
    if args.json:
        write_json({"tokens": len(judged), "shares": SHARES, "hit_rates": rates})
    else:
        print(f"{len(judged)} tokens, {judged.shape[1]} layers of {n_experts} experts, {judged.shape[2]} a token")
        print(f"{'experts in memory':<18}" + "".join(f"{100 * share:>8.0f} %" for share in SHARES))
        for name, row in rates.items():
            print(f"{name:<18}" + "".join(f"{100 * rate:>8.1f} %" for rate in row))
    if args.plot:
        _draw(rates, args.plot)
    return 0


def _draw(rates: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, row in rates.items():
        axes.plot([100 * share for share in SHARES], [100 * rate for rate in row], marker="o", label=name)
    axes.plot([0, 100], [0, 100], color="gray", linestyle=":", label="any expert alike")
    axes.set(xlabel="experts that fit (%)", ylabel="found in memory (%)", title="Rules of eviction")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
