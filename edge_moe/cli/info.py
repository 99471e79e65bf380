"""`edge-moe info`: what a model file holds and the memory it needs."""

import argparse
import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Any

from edge_moe.cli.options import MAX_TOKENS, Parser, check_model_path, whole_number
from edge_moe.cli.report import format_bytes, print_facts, print_table, write_json
from edge_moe.errors import OptionError

if TYPE_CHECKING:
    from edge_moe.checkpoint import Checkpoint

_DESCRIPTION = """\
Show a model's architecture, the sizes of its parts, the formats of its weights, the memory that a context needs, and
the backends that could run it here, with what is missing for each. Without MODEL it is the model that comes along.

The weights stay in the file and are read as they are used; what they take in memory is the system's file cache,
which it gives back under pressure. The latent cache and the scratch come on top."""

_EXAMPLES = """\
examples:
  edge-moe info model.gguf
  edge-moe info model.gguf -c 32768 --json"""


def parser(prog: str) -> Parser:
    """The options of `info`."""
    parser = Parser(prog=prog, description=_DESCRIPTION, epilog=_EXAMPLES, usage=f"{prog} [MODEL] [options]")
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a .gguf file, or the first of a split one")
    add("-c", "--ctx-size", metavar="N", type=whole_number(1, MAX_TOKENS), help="show the memory of this context only")
    add("--json", action="store_true", help="print one JSON document")
    return parser


def execute(args: argparse.Namespace) -> int:
    """Open the file, without reading its weights, and print what is in it."""
    path = check_model_path(args.model, may_be_folder=False) if args.model is not None else None
    from edge_moe.checkpoint import open_checkpoint

    if path is None:
        from edge_moe.api import embedded_model_path

        path = embedded_model_path()
    checkpoint = open_checkpoint(path)
    document = describe(checkpoint, args.ctx_size)
    if args.json:
        write_json(document)
    else:
        _print(document)
    return 0


def describe(checkpoint: "Checkpoint", context_length: int | None = None) -> dict[str, Any]:
    """All that `info` shows, as one JSON document.

    Raises OptionError when the context is longer than the model's own.
    """
    from edge_moe import plan
    from edge_moe.backends.choice import backends
    from edge_moe.generate import PREFILL_CHUNK
    from edge_moe.models.architectures import load_weights
    from edge_moe.tokenizer import Tokenizer

    config = checkpoint.config
    if context_length is not None and context_length > config.max_position_embeddings:
        raise OptionError(f"-c {context_length}: the model's context is {config.max_position_embeddings} tokens")
    model_parts = plan.parts(load_weights(checkpoint))
    n_weights = sum(part.n_weights for part in model_parts)
    n_bytes = sum(part.n_bytes for part in model_parts)
    formats: dict[str, int] = {}
    for part in model_parts:
        for name, size in part.bytes_by_format.items():
            formats[name] = formats.get(name, 0) + size
    active_weights, active_bytes = plan.active_weights(config, model_parts)
    tokenizer = Tokenizer.from_metadata(checkpoint.metadata, checkpoint.path)
    contexts = [context_length] if context_length is not None else plan.usual_contexts(config)
    return {
        "path": str(checkpoint.path),
        "architecture": config.architecture,
        "name": config.name,
        "file_bytes": checkpoint.size_bytes,
        "weights": n_weights,
        "weight_bytes": n_bytes,
        "unused_weights": sum(math.prod(entry.shape) for entry in checkpoint.tensors.values()) - n_weights,
        "bits_per_weight": 8 * n_bytes / n_weights,
        "active_weights_per_token": active_weights,
        "active_bytes_per_token": active_bytes,
        "config": dataclasses.asdict(config),
        "parts": [
            {
                "part": part.name,
                "weights": part.n_weights,
                "bytes": part.n_bytes,
                "bits_per_weight": part.bits_per_weight,
                "formats": part.bytes_by_format,
            }
            for part in model_parts
        ],
        "formats": dict(sorted(formats.items(), key=lambda item: -item[1])),
        "memory": [
            dataclasses.asdict(plan.memory(config, length, PREFILL_CHUNK)) | {"file_bytes": checkpoint.size_bytes}
            for length in contexts
        ],
        "tokenizer": {
            "kind": tokenizer.kind,
            "pre_tokenizer": tokenizer.pre_tokenizer,
            "vocab_size": tokenizer.vocab_size,
            "chat_template": tokenizer.chat_template is not None,
        },
        "backends": [dataclasses.asdict(each) for each in backends()],
    }


def _print(document: dict[str, Any]) -> None:
    config, tokenizer = document["config"], document["tokenizer"]
    experts = (
        f"{config['n_routed_experts']} routed, {config['num_experts_per_tok']} used by a token, "
        f"{config.get('n_shared_experts', 0)} shared; from layer {config.get('first_k_dense_replace', 0)} on"
        if config["n_routed_experts"]
        else "none"
    )
    scaling = config["rope_scaling"]
    unused = document["unused_weights"]
    print_facts(
        [
            ("file", f"{document['path']}, {format_bytes(document['file_bytes'])}"),
            ("model", f"{document['name']} ({document['architecture']})"),
            (
                "weights",
                f"{_count(document['weights'])} at {document['bits_per_weight']:.2f} bits; a token uses "
                f"{_count(document['active_weights_per_token'])} ({format_bytes(document['active_bytes_per_token'])})"
                + (f"; {_count(unused)} more, for speculation, are not used" if unused else ""),
            ),
            (
                "layers",
                f"{config['num_hidden_layers']} of size {config['hidden_size']}; {config['num_attention_heads']} heads "
                + (
                    f"on a latent of {config['kv_lora_rank']} + {config['qk_rope_head_dim']}"
                    if "kv_lora_rank" in config
                    else f"on {config['num_key_value_heads']} of keys and values, of size {config['head_dim']}"
                ),
            ),
            ("experts", experts),
            (
                "context",
                f"{config['max_position_embeddings']} tokens"
                + (f" ({scaling['rope_type']}, factor {scaling['factor']:g})" if scaling else ""),
            ),
            (
                "tokenizer",
                f"{tokenizer['kind']}, {tokenizer['vocab_size']} tokens; "
                + ("with a chat template" if tokenizer["chat_template"] else "no chat template"),
            ),
        ]
    )
    total = document["weight_bytes"]
    sys.stdout.write("\n")
    print_table(
        "Parts",
        ["part", "weights", "size", "share", "bits/weight", "formats"],
        [
            [
                part["part"],
                _count(part["weights"]),
                format_bytes(part["bytes"]),
                f"{100 * part['bytes'] / total:.1f} %",
                f"{part['bits_per_weight']:.2f}",
                ", ".join(sorted(part["formats"])),
            ]
            for part in document["parts"]
        ],
    )
    sys.stdout.write("\n")
    print_table(
        "Formats",
        ["format", "size", "share"],
        [[name, format_bytes(size), f"{100 * size / total:.1f} %"] for name, size in document["formats"].items()],
    )
    sys.stdout.write("\nBackends\n")
    print_facts(
        [
            (each["name"], each["detail"] if each["is_there"] else f"missing: {each['detail']}")
            for each in document["backends"]
        ]
    )
    sys.stdout.write("\n")
    print_table(
        "Memory",
        [
            "context",
            *(f"cache, {kind}" for kind in document["memory"][0]["cache_bytes_by_kind"]),
            "scratch",
            "file (when all of it was used)",
        ],
        [
            [
                f"{row['context_length']}",
                *map(format_bytes, row["cache_bytes_by_kind"].values()),
                format_bytes(row["scratch_bytes"]),
                format_bytes(row["file_bytes"]),
            ]
            for row in document["memory"]
        ],
    )


def _count(n: int) -> str:
    """A number of weights: 15.71 B, 46.2 M."""
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M" if n >= 1e6 else f"{n / 1e3:.1f} k"
