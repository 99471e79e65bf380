"""Writes Hugging Face checkpoints for tests, without torch: the golden models under the names that their makers use."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
from reference import read_gguf

GOLDEN = Path(__file__).parent / "golden"
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "nextn.eh_proj.weight": "eh_proj.weight",
    "nextn.enorm.weight": "enorm.weight",
    "nextn.hnorm.weight": "hnorm.weight",
}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def hf_tensors(tensors):
    """GGUF tensors with split kv_b and stacked experts -> the same under Hugging Face names, f32."""
    out = {}
    for name, value in tensors.items():
        value = value.astype(np.float32)
        if name in _NAMES:
            out[_NAMES[name]] = value
            continue
        _, layer, rest = name.split(".", 2)
        at = f"model.layers.{layer}."
        if rest == "attn_k_b.weight":
            v_b = tensors[f"blk.{layer}.attn_v_b.weight"].astype(np.float32)
            kv_b = np.concatenate([value.transpose(0, 2, 1), v_b], axis=1)
            out[f"{at}self_attn.kv_b_proj.weight"] = kv_b.reshape(-1, kv_b.shape[-1])
        elif rest in _LAYER_NAMES:
            out[at + _LAYER_NAMES[rest]] = value
        elif "_exps" in rest:
            part = rest.removeprefix("ffn_").removesuffix("_exps.weight")
            out |= {f"{at}mlp.experts.{e}.{part}_proj.weight": matrix for e, matrix in enumerate(value)}
        elif rest != "attn_v_b.weight":
            part = rest.removeprefix("ffn_").removesuffix(".weight")
            shared = "shared_experts." if part.endswith("_shexp") else ""
            out[f"{at}mlp.{shared}{part.removesuffix('_shexp')}_proj.weight"] = value
    return out


def hf_config(metadata, tensors):
    """The config.json of a golden model."""
    get = {key.removeprefix("deepseek2."): value for key, value in metadata.items()}.get
    is_v3 = get("expert_gating_func") == 2
    n_nextn = get("nextn_predict_layers", 0)
    rope = get("attention.key_length") - get("attention.kv_lora_rank")
    config = {
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "vocab_size": get("vocab_size"),
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count") - n_nextn,
        "num_nextn_predict_layers": n_nextn,
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": 1e-6,
        "intermediate_size": get("feed_forward_length"),
        "q_lora_rank": get("attention.q_lora_rank"),
        "kv_lora_rank": get("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": get("attention.key_length_mla") - rope,
        "v_head_dim": get("attention.value_length_mla"),
        "first_k_dense_replace": get("leading_dense_block_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "n_routed_experts": get("expert_count"),
        "n_shared_experts": get("expert_shared_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "n_group": get("expert_group_count"),
        "topk_group": get("expert_group_used_count"),
        "scoring_func": "sigmoid" if is_v3 else "softmax",
        "norm_topk_prob": bool(get("expert_weights_norm", False)),
        "routed_scaling_factor": get("expert_weights_scale"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": get("rope.freq_base"),
        "rope_scaling": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if get("rope.scaling.type") == "yarn":
        mscale = round(get("rope.scaling.yarn_log_multiplier", 0) / 0.1, 4)
        config["rope_scaling"] = {
            "type": "yarn",
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": get("rope.scaling.original_context_length"),
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": mscale,
            "mscale_all_dim": mscale,
        }
    return config


def hf_tokenizer(metadata):
    """-> tokenizer.json and tokenizer_config.json of a golden model: byte-level BPE split as GPT-2 does."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    control = gguf.TokenType.CONTROL
    special = [(i, text) for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == control]
    start = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*start, a],
            "pair": [*start, a, *start, b],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True, "normalized": False},
        "pad_token": "<pad>",
        "add_bos_token": True,
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    return tokenizer, config


def write_safetensors(path, tensors):
    """Write tensors, name: (dtype name, numpy array of that size), byte by byte after the format."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, value) in tensors.items():
        raw = np.ascontiguousarray(value).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def stored(value, dtype):
    """f32 -> what a file holds of it: (dtype, array). BF16 is cut off, not rounded: any bf16 number is as good here."""
    if dtype == "BF16":
        return dtype, (np.ascontiguousarray(value, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return dtype, value.astype({"F32": np.float32, "F16": np.float16}[dtype])


def write_hf_checkpoint(folder, golden, *, dtype="F32", n_files=1):
    """Write a golden model as a checkpoint of n_files -> its config."""
    metadata, tensors = read_gguf(GOLDEN / f"{golden}.gguf")
    folder.mkdir(parents=True)
    config = hf_config(metadata, tensors)
    tokenizer, tokenizer_config = hf_tokenizer(metadata)
    documents = {"config.json": config, "tokenizer.json": tokenizer, "tokenizer_config.json": tokenizer_config}
    everything = {name: stored(value, dtype) for name, value in hf_tensors(tensors).items()}
    names = sorted(everything)
    if n_files == 1:
        write_safetensors(folder / "model.safetensors", everything)
    else:
        weight_map = {}
        for i in range(n_files):
            part = f"model-{i + 1:05}-of-{n_files:05}.safetensors"
            write_safetensors(folder / part, {name: everything[name] for name in names[i::n_files]})
            weight_map |= dict.fromkeys(names[i::n_files], part)
        documents["model.safetensors.index.json"] = {"metadata": {}, "weight_map": weight_map}
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    return config


def e4m3(code):
    """One byte of FP8 E4M3 as a number, written after its definition."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))
