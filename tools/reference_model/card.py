"""Write MODEL_CARD.md and its pictures from one training state: numbers are measured here or read from a log."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from data import CACHE, HERE
from evaluate import Measurement, held_out, overall
from model import DeepseekV2
from tokenizers import Tokenizer
from train import newest

GOAL_TOKENS = 12_000_000
PROMPTS = (
    "It is a truth universally acknowledged",
    "And the LORD spake unto",
    "The :mod:`json` module",
    "To create an index on a table,",
    "hacker\n n.\n\n   ",
    "cat, feline (noun):",
)


@torch.no_grad()
def sample(model: DeepseekV2, tokenizer: Tokenizer, prompt: str, tokens: int = 60, temperature: float = 0.7) -> str:
    """Continue a prompt; the seed is fixed."""
    generator = torch.Generator().manual_seed(0)
    ids = tokenizer.encode(prompt).ids
    for _ in range(tokens):
        probs = (model(torch.tensor([ids]))[0, -1] / temperature).softmax(-1)
        top, index = probs.topk(40)
        chosen = int(index[torch.multinomial(top, 1, generator=generator)])
        if chosen == model.config["eos_token_id"]:
            break
        ids.append(chosen)
    return tokenizer.decode(ids)


def chi_square(table: np.ndarray) -> tuple[float, int, float]:
    """Test of independence of a table of counts [domain, expert] -> (statistic, degrees of freedom, Cramer's V)."""
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    statistic = float(((table - expected) ** 2 / np.maximum(expected, 1e-9)).sum())
    rows, columns = table.shape
    cramer = (statistic / table.sum() / (min(rows, columns) - 1)) ** 0.5
    return statistic, (rows - 1) * (columns - 1), cramer


def draw_experts(report: dict[str, Measurement], path: Path, first_layer: int) -> None:
    """One heat map for each MoE layer: the share of a domain's tokens that each expert takes."""
    counts = np.stack([m.expert_counts for m in report.values()])  # [domain, layer, expert]
    share = 100 * counts / counts.sum(-1, keepdims=True)
    layers = share.shape[1]
    figure, axes = plt.subplots(layers, 1, figsize=(8, 1.7 * layers + 0.6), layout="constrained", squeeze=False)
    for i, axis in enumerate(axes[:, 0]):
        image = axis.imshow(share[:, i], vmin=0, vmax=share.max(), cmap="viridis", aspect="auto")
        axis.set_yticks(range(len(report)), list(report), fontsize=7)
        axis.set_xticks(range(share.shape[2]), range(share.shape[2]), fontsize=7)
        axis.set_title(f"layer {first_layer + i}", fontsize=8, loc="left")
    axes[-1, 0].set_xlabel("expert")
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="% of the domain's expert choices")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_loss(logs: dict[str, list[dict]], path: Path) -> None:
    """Training loss and held-out bits per byte against tokens seen."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for label, records in logs.items():
        if not records:
            continue
        tokens = np.array([r["tokens"] for r in records]) / 1e6
        loss = np.array([r["loss"] for r in records])
        width = max(1, min(5, len(loss) // 10))
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        left.plot(tokens, loss, alpha=0.25)
        left.plot(tokens[width - 1 :], smooth, label=f"{label} (mean of {width})")
        measured = [r for r in records if "bits_per_byte" in r]
        for i, domain in enumerate(measured[0]["bits_per_byte"] if measured else []):
            right.plot(
                [r["tokens"] / 1e6 for r in measured],
                [r["bits_per_byte"][domain] for r in measured],
                marker=".",
                color="black" if domain == "overall" else f"C{i}",
                linestyle="-" if label == "stable" else "--",
                label=domain if label == "stable" else None,
            )
    left.set(xlabel="million tokens", ylabel="training loss, nats per token")
    right.set(xlabel="million tokens", ylabel="held-out bits per byte (part of eval.txt)")
    left.legend(fontsize=8)
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def read_log(path: Path) -> list[dict]:
    """The records of a log; where training was repeated from an older checkpoint, the last run counts."""
    if not path.exists():
        return []
    records: dict[int, dict] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        records = {t: r for t, r in records.items() if t < record["tokens"]}
        records[record["tokens"]] = record
    return list(records.values())


def thinned(records: list[dict], every: int = 50_000) -> list[dict]:
    """Records joined so that one stands for about `every` tokens: means, and the last held-out measurement."""
    out: list[dict] = []
    group: list[dict] = []
    for i, record in enumerate(records):
        group.append(record)
        if i + 1 < len(records) and record["tokens"] - group[0]["tokens"] < every:
            continue
        joined = {"tokens": record["tokens"]}
        for key in ("loss", "balance", "lr", "tok_per_s"):
            joined[key] = round(float(np.mean([r[key] for r in group])), 4)
        joined |= {r: m[r] for m in group for r in ("bits_per_byte",) if r in m}
        out.append(joined)
        group = []
    return out


def committed_log(path: Path, records: list[dict]) -> list[dict]:
    """The log that is kept with the model, brought up to date: a machine's own log is lost with it."""
    older = read_log(path)
    if records:
        older = [r for r in older if r["tokens"] < records[0]["tokens"]]
    merged = older + thinned(records)
    path.write_text("".join(json.dumps(r) + "\n" for r in merged))
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--state", type=Path, help="default: the newest decayed state, else the newest stable one")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    path = args.state or newest(args.cache / "decayed") or newest(args.cache / "stable")
    if path is None:
        parser.error(f"no training state in {args.cache}")
    state = torch.load(path, weights_only=True)
    model = DeepseekV2(state["config"])
    # The checkpoint is published in bf16, so that is what is measured.
    model.load_state_dict({name: weight.bfloat16().float() for name, weight in state["model"].items()})
    tokenizer = Tokenizer.from_file(str(args.cache / "tokenizer.json"))
    report = held_out(model, tokenizer)
    total = overall(report)
    decayed = path.parent.name == "decayed"
    logs = {"stable": committed_log(args.out / "training.jsonl", read_log(args.cache / "log.jsonl"))}
    if decayed:
        logs["decay"] = read_log(args.cache / "log_decay.jsonl")
    first_layer = state["config"]["first_k_dense_replace"]
    draw_loss(logs, args.out / "loss.png")
    draw_experts(report, args.out / "experts.png", first_layer)

    share = total.expert_counts / total.expert_counts.sum(-1, keepdims=True)
    counts = np.stack([m.expert_counts for m in report.values()])
    layers = []
    for i in range(counts.shape[1]):
        statistic, freedom, cramer = chi_square(counts[:, i])
        layers.append(
            {
                "layer": first_layer + i,
                "expert_share_min": float(share[i].min()),
                "expert_share_max": float(share[i].max()),
                "chi_square": statistic,
                "degrees_of_freedom": freedom,
                "cramers_v": cramer,
            }
        )
    numbers = {
        "tokens_seen": state["tokens"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "decayed": decayed,
        "bits_per_byte": {domain: m.bits_per_byte for domain, m in report.items()} | {"overall": total.bits_per_byte},
        "bytes": {domain: m.text_bytes for domain, m in report.items()} | {"overall": total.text_bytes},
        "tokens": {domain: m.tokens for domain, m in report.items()} | {"overall": total.tokens},
        "layers": layers,
    }
    (args.out / "card.json").write_text(json.dumps(numbers, indent=2) + "\n")
    samples = [(prompt, sample(model, tokenizer, prompt)) for prompt in PROMPTS]
    (args.out / "MODEL_CARD.md").write_text(render(numbers, logs, samples, state["config"]))


def render(numbers: dict, logs: dict[str, list[dict]], samples: list[tuple[str, str]], config: dict) -> str:
    """The card's text."""
    manifest = json.loads((HERE / "manifest.json").read_text())
    seen = numbers["tokens_seen"]
    phase = "after the learning-rate decay" if numbers["decayed"] else "in the stable phase, before any decay"
    final = seen >= GOAL_TOKENS and numbers["decayed"]
    lines = [
        "# Model card: the reference model",
        "",
        "A small DeepSeek-V2-style language model (multi-head latent attention, mixture of experts), trained from",
        "scratch for this project, so that runtime, quantization and expert caching meet a real, learned router.",
        "",
        f"**State:** {seen:,} tokens seen, {phase}."
        + ("" if final else f" **Not final**: the goal is at least {GOAL_TOKENS:,} tokens and a decay at the end."),
        "",
        "## Model",
        "",
        f"{numbers['parameters']:,} parameters. {config['num_hidden_layers']} layers of width {config['hidden_size']}, "
        f"the first {config['first_k_dense_replace']} dense;",
        f"{config['n_routed_experts']} routed experts of width {config['moe_intermediate_size']}, "
        f"{config['num_experts_per_tok']} active, {config['n_shared_experts']} shared; softmax router, scaling "
        f"{config['routed_scaling_factor']};",
        f"{config['num_attention_heads']} heads, kv_lora_rank {config['kv_lora_rank']}, "
        f"q_lora_rank {config['q_lora_rank']}, head sizes {config['qk_nope_head_dim']} + {config['qk_rope_head_dim']} "
        f"rope, values {config['v_head_dim']};",
        f"byte-level BPE of {config['vocab_size']:,} tokens with GPT-2's pre-tokenizer; windows of 512 tokens.",
        "",
        "## Data",
        "",
        "English text from Debian packages; versions, sizes and hashes are in `manifest.json`. Whole documents are",
        "held out for `eval.txt` and `calibration.txt`; no paragraph of 40 characters of them is in the training text.",
        "",
        "| domain | package | version | licence | text bytes |",
        "|---|---|---|---|---|",
    ]
    for p in manifest["packages"]:
        lines.append(f"| {p['domain']} | {p['package']} | {p['version']} | {p['licence']} | {p['text_bytes']:,} |")
    lines += [
        "",
        "## Training",
        "",
        "AdamW for embedding, head, router and norms, Muon for all other matrices; a balance loss over the batch",
        "(0.01); warm-up, a constant learning rate, then a linear decay to zero.",
        "",
        "![training loss and held-out bits per byte](loss.png)",
        "",
    ]
    for label, records in logs.items():
        if records:
            speed = np.median([r["tok_per_s"] for r in records])
            last = np.mean([r["loss"] for r in records[-20:]])
            lines.append(
                f"- {label}: up to {records[-1]['tokens']:,} tokens; median {speed:.0f} tokens/s on 2 shared cores; "
                f"mean loss of the last {len(records[-20:])} steps {last:.3f} nats per token."
            )
    lines += [
        "",
        "## Held-out bits per byte",
        "",
        "`eval.txt`, each domain in windows of 512 tokens that begin with BOS, all other tokens scored; bf16 weights.",
        "",
        "| domain | bytes | tokens | bits per byte |",
        "|---|---|---|---|",
    ]
    for domain, bits in numbers["bits_per_byte"].items():
        lines.append(f"| {domain} | {numbers['bytes'][domain]:,} | {numbers['tokens'][domain]:,} | {bits:.3f} |")
    lines += [
        "",
        "## Use of experts on eval.txt",
        "",
        "![share of each expert by layer and domain](experts.png)",
        "",
        "Chi-square is of the table domain x expert. Neighbouring tokens are not independent, so read it with",
        "Cramer's V (0: use does not depend on the domain, 1: it is settled by it).",
        "",
        "| layer | least used expert | most used expert | chi-square | degrees of freedom | Cramer's V |",
        "|---|---|---|---|---|---|",
    ]
    for row in numbers["layers"]:
        lines.append(
            f"| {row['layer']} | {row['expert_share_min']:.2%} | {row['expert_share_max']:.2%} | "
            f"{row['chi_square']:,.0f} | {row['degrees_of_freedom']} | {row['cramers_v']:.3f} |"
        )
    lines += ["", "## Samples", "", "Temperature 0.7, top-k 40, fixed seed, at most 60 tokens, not chosen.", ""]
    for _, text in samples:
        lines += ["```text", text, "```", ""]
    lines += [
        "## Limits",
        "",
        "It knows only the style of its seven domains, states no facts reliably, follows no instructions and was tried",
        "in English only. It learned from windows of 512 tokens; longer contexts are untrained. Old texts among the",
        "sources carry the views of their time. Use it to test software, not to inform anyone.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
