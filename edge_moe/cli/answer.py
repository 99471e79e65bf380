"""One answer of a model: its text printed as it comes, then its statistics."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edge_moe.cli.report import Display, format_bytes, format_duration, format_speed, is_terminal, peak_rss_bytes

if TYPE_CHECKING:
    from edge_moe.expert_store import ExpertStore
    from edge_moe.generate import GenerationStats

# control characters that a model makes up must not command the terminal; pipes and files get them unchanged
_HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def stream(pieces: Iterator[str], display: Display, *, echo: bool) -> tuple[str, bool]:
    """Collect the pieces of a text, printing each at once if `echo`; also returns whether Ctrl-C cut it short."""
    texts: list[str] = []
    interrupted = False
    on_terminal = is_terminal(sys.stdout)
    try:
        for piece in _after_compilation(pieces, display):
            display.check_interrupt()
            display.clear()
            display.streaming = True
            texts.append(piece)
            if echo:
                sys.stdout.write(piece.translate(_HARMLESS) if on_terminal else piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
        display.forget_interrupt()
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


def report(text: str, stats: "GenerationStats", store: "ExpertStore | None" = None) -> dict[str, object]:
    """The document that `run --json` prints."""
    return {
        "text": text,
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "first_token_s": stats.first_token_s,
        "prefill_tok_per_s": stats.prefill_tok_per_s,
        "decode_tok_per_s": stats.decode_tok_per_s,
        "peak_rss_bytes": peak_rss_bytes(),
        **(store.stats.report() if store is not None else {}),
    }


def stats_line(stats: "GenerationStats", store: "ExpertStore | None" = None) -> str:
    """The statistics of one answer in one line."""
    if not stats.completion_tokens:
        return f"stopped before the first token · peak {peak_rss_bytes() / 1e6:.0f} MB"
    return " · ".join(
        [
            f"prompt {stats.prompt_tokens} tokens, {format_speed(stats.prefill_tok_per_s)}",
            f"first token {format_duration(stats.first_token_s)}",
            f"generated {stats.completion_tokens} tokens, {format_speed(stats.decode_tok_per_s)}",
            f"peak {peak_rss_bytes() / 1e6:.0f} MB",
            *([experts_line(store)] if store is not None else []),
        ]
    )


def experts_line(store: "ExpertStore") -> str:
    """What a store of experts did, in a few words."""
    figures = store.stats.report()
    hit_rate, n_bytes = figures["expert_hit_rate"], figures["bytes_read_per_token"]
    words = [f"waited {format_duration(store.stats.wait_s)} for the disk"]
    if hit_rate is not None and n_bytes is not None:
        words = [f"{100 * hit_rate:.0f} % of experts in memory", f"{format_bytes(n_bytes)} read a token", *words]
    if (accuracy := figures["prediction_accuracy"]) is not None:
        words.append(f"{100 * accuracy:.0f} % predicted")
    return " · ".join(words)
