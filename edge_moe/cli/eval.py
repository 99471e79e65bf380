"""`edge-moe eval`: how well a model predicts a text, and how far it is from a reference."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.cli.answer import experts_line
from edge_moe.cli.loading import load_model
from edge_moe.cli.options import (
    MAX_TOKENS,
    Parser,
    add_backend_option,
    add_kv_option,
    add_ram_option,
    add_threads_option,
    check_model_path,
    model_settings,
    read_text,
    whole_number,
)
from edge_moe.cli.report import (
    Display,
    print_dim,
    print_facts,
    write_json,
)
from edge_moe.errors import OptionError

if TYPE_CHECKING:
    from edge_moe.divergence import Evaluation

_DESCRIPTION = """\
Measure the perplexity of a text and its bits per byte. With a reference also compare the two models' distributions at
each scored position: the Kullback-Leibler divergence of the model from the reference in nats (mean, median, 99 % and
99.9 % quantile, maximum), how often both find the same token likeliest, the change of the probability of the token
that came (root mean square and mean), and the ratio of the perplexities.

The method is that of llama-perplexity, so that the figures compare: the text is cut into chunks of the context's
length, each begins with the BOS token if the model has one, and the second half of each chunk is scored. A file of
--save-logits is what llama-perplexity calls --kl-divergence-base; each program reads what the other wrote. It takes two
bytes for each scored token and entry of the vocabulary.

Error bars are standard errors by the bootstrap over chunks; that of the perplexity alone is llama-perplexity's."""

_EXAMPLES = """\
examples:
  edge-moe eval model-Q4_K_M.gguf --text wiki.test.raw
  edge-moe eval model-Q4_K_M.gguf --text wiki.test.raw --reference model-F16.gguf -c 512 --json
  edge-moe eval model-F16.gguf --text wiki.test.raw --save-logits f16.kld
  edge-moe eval model-Q4_K_M.gguf --text wiki.test.raw --reference-logits f16.kld"""

_DEFAULT_CONTEXT = 512


def parser(prog: str) -> Parser:
    """The options of `eval`."""
    parser = Parser(prog=prog, description=_DESCRIPTION, epilog=_EXAMPLES, usage=f"{prog} MODEL --text FILE [options]")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a .gguf file")
    add("--text", metavar="FILE", required=True, help="UTF-8 text to predict; `-` is standard input")
    references = parser.add_mutually_exclusive_group()
    references.add_argument("--reference", metavar="MODEL", help="a .gguf file of the same vocabulary to compare with")
    references.add_argument(
        "--reference-logits", metavar="FILE", help="compare with distributions that --save-logits wrote for this text"
    )
    add("--save-logits", metavar="FILE", help="write the model's distributions, to compare others with")
    add(
        "-c",
        "--ctx-size",
        metavar="N",
        type=whole_number(4, MAX_TOKENS),
        help=f"tokens of a chunk (default {_DEFAULT_CONTEXT}, or that of --reference-logits)",
    )
    add("--chunks", metavar="N", type=whole_number(1, MAX_TOKENS), help="score the first N chunks only")
    add(
        "--stride",
        metavar="N",
        type=whole_number(1, MAX_TOKENS),
        help="let the chunks overlap, each N tokens after the other, and score the last N of each",
    )
    add_kv_option(parser)
    add_backend_option(parser)
    add_ram_option(parser)
    add_threads_option(parser)
    add("--json", action="store_true", help="print one JSON document")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Load the models, score the text, print the figures."""
    path = check_model_path(args.model)
    reference_path = check_model_path(args.reference) if args.reference is not None else None
    text = read_text(args.text)
    saved = None
    if args.reference_logits is not None:
        from edge_moe.saved_logits import open_saved_logits

        saved = open_saved_logits(args.reference_logits)
    context_length = args.ctx_size or (saved.context_length if saved is not None else _DEFAULT_CONTEXT)
    with Display() as display:
        context = context_length if args.ram is not None else None
        model = load_model(path, display, context_length=context, **model_settings(args))
        reference = load_model(reference_path, display, threads=args.threads) if reference_path is not None else None
        for loaded in (model, reference):
            if loaded is not None and context_length > loaded.config.max_position_embeddings:
                raise OptionError(
                    f"-c {context_length}: the context of {loaded.checkpoint.path} "
                    f"is {loaded.config.max_position_embeddings} tokens"
                )
        from edge_moe.evaluate import evaluate

        result = evaluate(
            model,
            text,
            reference=saved or reference,
            context_length=context_length,
            stride=args.stride,
            max_windows=args.chunks,
            save_logits=Path(args.save_logits) if args.save_logits is not None else None,
            on_window=lambda done, total, ppl: display.show("scoring", done, total, f"perplexity {ppl:.3f}"),
        )
    if args.json:
        store = model.expert_store
        experts = store.stats.report() | {"route_slack": store.route_slack} if store is not None else {}
        settings = {"context_length": context_length, "stride": args.stride}
        write_json(settings | dataclasses.asdict(result) | experts)
    else:
        print_facts(_facts(result))
        if model.expert_store is not None:
            print_dim(experts_line(model.expert_store))
    return 0


def _facts(result: "Evaluation") -> list[tuple[str, str]]:
    """Names and values of the table."""

    def percent(name: str, digits: int) -> str:
        return f"{100 * getattr(result, name):.{digits}f} ± {100 * getattr(result, f'{name}_stderr'):.{digits}f} %"

    def nats(name: str) -> str:
        return f"{getattr(result, name):.4g} ± {getattr(result, f'{name}_stderr'):.2g}"

    facts = [
        ("tokens scored", f"{result.tokens} in {result.windows} chunks, {result.scored_bytes} bytes"),
        ("surprise", f"{result.nats:.2f} nats"),
        ("perplexity", f"{result.ppl:.4f} ± {result.ppl_stderr:.4f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f} ± {result.bits_per_byte_stderr:.4f}"),
    ]
    if result.kld_mean is None:
        return facts
    return [
        *facts,
        ("perplexity of the reference", f"{result.reference_ppl:.4f}"),
        ("ratio of the perplexities", f"{result.ppl_ratio:.6f} ± {result.ppl_ratio_stderr:.6f}"),
        ("KL divergence, mean", nats("kld_mean")),
        ("KL divergence, median", nats("kld_median")),
        ("KL divergence, 99 %", nats("kld_p99")),
        ("KL divergence, 99.9 %", nats("kld_p999")),
        ("KL divergence, maximum", f"{result.kld_max:.4g}"),
        ("same likeliest token", percent("top1_agreement", 2)),
        ("change of probability, RMS", percent("delta_p_rms", 3)),
        ("change of probability, mean", percent("delta_p_mean", 3)),
    ]
