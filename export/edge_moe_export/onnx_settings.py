"""The files beside an exported ONNX graph: what other programs expect, and the model's own metadata for edge_moe."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_moe.checkpoint import Checkpoint
from edge_moe.config import DeepseekV2Config
from edge_moe.encoders import ByteLevelEncoder
from edge_moe.models.deepseek2 import config_of
from edge_moe.onnx_folder import int8_row
from edge_moe.pretokenizers import PRE_TOKENIZERS
from edge_moe.tokenizer import Tokenizer
from edge_moe.vocabulary import PREFIX, TokenKind, Vocabulary

_KEPT_KEYS = ("general.architecture", "general.name", "deepseek2.", "tokenizer.")


def settings_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """The keys that edge_moe reads to run the folder: those of the file about the model and its tokenizer."""
    kept = {key: value for key, value in checkpoint.metadata.items() if key.startswith(_KEPT_KEYS)}
    return {**kept, "deepseek2.vocab_size": checkpoint.config.vocab_size}


def write_settings(folder: Path, checkpoint: Checkpoint, kv: str) -> tuple[str, ...]:
    """Write config.json, genai_config.json and the tokenizer's files; returns remarks for the user.

    Raises FormatError when the file's tokenizer is damaged.
    """
    config, notes = config_of(checkpoint), []
    _write_json(folder / "config.json", transformers_config(config))
    tokenizer = None
    if PREFIX + "model" in checkpoint.metadata:
        tokenizer = Tokenizer.from_metadata(checkpoint.metadata, checkpoint.path)
        _write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, config))
        if tokenizer.chat_template:
            (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
        if tokenizer.kind == "gpt2":
            text = byte_level_tokenizer(checkpoint.metadata, checkpoint.path, tokenizer)
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        else:
            notes.append("no tokenizer.json: the vocabulary is SentencePiece's; edge-moe reads it from settings.gguf")
    _write_json(folder / "genai_config.json", genai_config(config, tokenizer, kv))
    return tuple(notes)


def transformers_config(c: DeepseekV2Config) -> dict[str, Any]:
    """The configuration under the names that transformers has for it."""
    version = "v3" if c.scoring_func == "sigmoid" else "v2"
    scaling = c.rope_scaling
    rope_scaling = scaling and {
        "type": scaling.rope_type,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "mscale": scaling.mscale_all_dim or 1.0,
        "mscale_all_dim": scaling.mscale_all_dim,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
    }
    method = {"v3": "noaux_tc", "v2": "group_limited_greedy" if c.n_group > 1 else "greedy"}[version]
    values = asdict(c)  # most names are those of config.json already
    for own in ("architecture", "name", "rope_scaling"):
        del values[own]
    return {
        "architectures": [f"Deepseek{version.upper()}ForCausalLM"],
        "model_type": f"deepseek_{version}",
        **values,
        "num_key_value_heads": c.num_attention_heads,
        "topk_method": method,
        "rope_scaling": rope_scaling,
        "hidden_act": "silu",
    }


def genai_config(c: DeepseekV2Config, tokenizer: Tokenizer | None, kv: str) -> dict[str, Any]:
    """The settings of onnxruntime-genai: one key-value head, whose key and value are the halves of the latent."""
    bos_id = tokenizer.bos_id if tokenizer else None
    eos_ids = sorted(tokenizer.eos_ids) if tokenizer else []
    inputs = ("input_ids", "attention_mask", "position_ids")
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": bos_id if bos_id is not None else 0,
            "eos_token_id": eos_ids or [0],
            "pad_token_id": eos_ids[0] if eos_ids else 0,
            "context_length": c.max_position_embeddings,
            "vocab_size": c.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "hidden_size": c.hidden_size,
                "num_hidden_layers": c.num_hidden_layers,
                "num_attention_heads": c.num_attention_heads,
                "num_key_value_heads": 1,
                "head_size": int8_row(c).width if kv == "int8" else c.latent_dim // 2,
                "inputs": {
                    **{name: name for name in inputs},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": c.max_position_embeddings,
            "do_sample": False,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
            "past_present_share_buffer": False,
        },
    }


def tokenizer_config(tokenizer: Tokenizer, c: DeepseekV2Config) -> dict[str, Any]:
    """What transformers wants to know beside tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": c.max_position_embeddings,
        "bos_token": tokenizer.bos_token or None,
        "eos_token": tokenizer.eos_token or None,
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.add_eos,
        "clean_up_tokenization_spaces": False,
        **({"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
    }


def byte_level_tokenizer(metadata: Mapping[str, Any], path: Path, tokenizer: Tokenizer) -> str:
    """The text of tokenizer.json: the encoder that edge_moe builds itself, with special tokens and a decoder."""
    from tokenizers import AddedToken, decoders, processors

    vocabulary = Vocabulary(metadata, path)
    merges = vocabulary.read_texts("merges") or []
    built = ByteLevelEncoder(vocabulary, merges, PRE_TOKENIZERS[tokenizer.pre_tokenizer]).library_tokenizer
    for token_id in vocabulary.special_ids():
        is_control = vocabulary.kinds[token_id] != TokenKind.USER_DEFINED
        token = AddedToken(vocabulary.tokens[token_id], special=is_control, normalized=False)
        (built.add_special_tokens if is_control else built.add_tokens)([token])
    built.decoder = decoders.ByteLevel()
    first = [tokenizer.bos_token] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    last = [tokenizer.eos_token] if tokenizer.add_eos and tokenizer.eos_id is not None else []
    if first or last:
        ids = {tokenizer.bos_token: tokenizer.bos_id, tokenizer.eos_token: tokenizer.eos_id}
        built.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", "$B", *last],
            special_tokens=[(token, ids[token]) for token in dict.fromkeys([*first, *last])],
        )
    return str(built.to_str(pretty=False))


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
