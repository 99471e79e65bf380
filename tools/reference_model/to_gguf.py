"""Write a transformers checkpoint of the reference model as GGUF, architecture `deepseek2`, with the `gguf` package.

Norms and the router stay F32; every other tensor takes the wanted type.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from data import CACHE
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from safetensors.torch import load_file

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}

RENAMED = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def gguf_tensors(weights: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """Rename and reshape a checkpoint's tensors; the last axis here is GGUF's first."""
    w = {name: weight.float() for name, weight in weights.items()}
    out = {
        "token_embd.weight": w["model.embed_tokens.weight"],
        "output_norm.weight": w["model.norm.weight"],
        "output.weight": w["lm_head.weight"],
    }
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    for i in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{i}.", f"blk.{i}."
        for theirs, ours in RENAMED.items():
            if f"{source}{theirs}.weight" in w:
                out[f"{target}{ours}.weight"] = w[f"{source}{theirs}.weight"]
        # [H (N+V), R]; the keys' half is stored transposed, as absorbed attention multiplies by it from the other side.
        kv_b = w[f"{source}self_attn.kv_b_proj.weight"].view(config["num_attention_heads"], nope + value, -1)
        out[f"{target}attn_k_b.weight"] = kv_b[:, :nope].transpose(1, 2)
        out[f"{target}attn_v_b.weight"] = kv_b[:, nope:]
        if i >= config["first_k_dense_replace"]:
            for part in ("gate", "up", "down"):
                out[f"{target}ffn_{part}_exps.weight"] = torch.stack(
                    [w[f"{source}mlp.experts.{e}.{part}_proj.weight"] for e in range(config["n_routed_experts"])]
                )
    return out


def add_metadata(writer: GGUFWriter, config: dict) -> None:
    """Write the model's hyperparameters."""
    writer.add_name("edge-moe reference")
    writer.add_license("apache-2.0")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    # To llama.cpp the absorbed form is multi-query attention over the latent, hence one kv head of latent size.
    rope, rank = config["qk_rope_head_dim"], config["kv_lora_rank"]
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_expert_weights_norm(False)
    writer.add_expert_weights_scale(config["routed_scaling_factor"])


def add_tokenizer(writer: GGUFWriter, tokenizer: dict, config: dict) -> None:
    """Write vocabulary and merges of a byte-level BPE tokenizer.json."""
    vocab = tokenizer["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(True)


def write_gguf(checkpoint: Path, out: Path, kind: str) -> None:
    """Write one GGUF file; it appears under its name only when it is whole."""
    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    quantization, file_type = TYPES[kind]
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_suffix(".new")
    writer = GGUFWriter(fresh, "deepseek2")
    add_metadata(writer, config)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, tokenizer, config)
    for name, tensor in gguf_tensors(load_file(checkpoint / "model.safetensors"), config).items():
        data = np.ascontiguousarray(tensor.numpy())
        wanted = GGMLQuantizationType.F32 if data.ndim == 1 or "ffn_gate_inp" in name else quantization
        writer.add_tensor(name, gguf.quantize(data, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fresh.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--checkpoint", type=Path, help="default: CACHE/checkpoint")
    parser.add_argument("--out", type=Path, help="folder of the files; default: CACHE/gguf")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    args = parser.parse_args()
    for kind in args.types:
        out = args.out or args.cache / "gguf"
        write_gguf(args.checkpoint or args.cache / "checkpoint", out / f"reference-{kind}.gguf", kind)


if __name__ == "__main__":
    main()
