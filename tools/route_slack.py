"""What --route-slack costs and gives: divergence against bytes read for a token, for several slacks.

    python tools/route_slack.py model.gguf --text eval.txt --ram 4G --slacks 0.02,0.05,0.1,0.2 --plot slack.png

The text is run token by token, as it would be generated; the divergence is that from the same model without a slack.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from edge_moe.cli.report import print_error, write_json


def main() -> int:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path)
    add("--text", required=True)
    add("--ram", required=True, help="memory for all, less than the model needs")
    add("--slacks", type=lambda text: [float(part) for part in text.split(",")], default=[0.02, 0.05, 0.1, 0.2])
    add("-c", "--ctx-size", type=int, default=512)
    add("--chunks", type=int, default=2)
    add("--plot", metavar="FILE", type=Path)
    add("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for slack in [1e-9, *args.slacks]:  # the first favours nothing, but runs token by token like the others
        words = [sys.executable, "-m", "edge_moe", "eval", args.model, "--reference", args.model, "--text", args.text]
        words += ["--ram", args.ram, "--route-slack", slack, "-c", args.ctx_size, "--chunks", args.chunks, "--json"]
        # a process for each: what the ones before left in memory would take from the budget
        done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, check=False)
        if done.returncode:
            return done.returncode
        row = json.loads(done.stdout)
        if "expert_hit_rate" not in row:
            print_error(f"--ram {args.ram}: {args.model} fits; give less")
            return 2
        rows.append(row)
    if args.plot:
        _draw(rows, args.plot)
    if args.json:
        write_json(rows)
        return 0
    print(f"{'slack':>8}{'mean KL':>12}{'perplexity':>12}{'in memory':>11}{'MB a token':>12}")
    for row in rows:
        print(
            f"{row['route_slack']:>8.2g}{row['kld_mean']:>12.3g}{row['ppl']:>12.3f}"
            f"{100 * row['expert_hit_rate']:>9.1f} %{row['bytes_read_per_token'] / 1e6:>12.3f}"
        )
    return 0


def _draw(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    most = rows[0]["bytes_read_per_token"]
    axes.plot([most / row["bytes_read_per_token"] for row in rows], [row["kld_mean"] for row in rows], marker="o")
    for row in rows[1:]:
        at = most / row["bytes_read_per_token"], row["kld_mean"]
        axes.annotate(f"{row['route_slack']:g}", at, textcoords="offset points", xytext=(4, 4))
    axes.set(xlabel="times fewer bytes read for a token", ylabel="mean KL divergence (nats)", title="--route-slack")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
