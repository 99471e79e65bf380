"""Take up training from a GGUF file, when the training state was lost with its machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

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


def state_from_gguf(path: Path, config: dict) -> dict[str, Tensor]:
    """The weights of a GGUF file by the names of model.py, in f32, as exact as the file's blocks hold them."""
    tensors = {t.name: t for t in GGUFReader(path).tensors}

    def take(name: str) -> Tensor:
        data = np.array(dequantize(tensors[name].data, tensors[name].tensor_type), np.float32)
        return torch.from_numpy(data)

    out = {
        "model.embed_tokens.weight": take("token_embd.weight"),
        "model.norm.weight": take("output_norm.weight"),
        "lm_head.weight": take("output.weight"),
    }
    for i in range(config["num_hidden_layers"]):
        source, target = f"blk.{i}.", f"model.layers.{i}."
        for theirs, ours in RENAMED.items():
            if f"{source}{ours}.weight" in tensors:
                out[f"{target}{theirs}.weight"] = take(f"{source}{ours}.weight")
        # The keys' half was stored transposed (see to_gguf.py).
        halves = take(f"{source}attn_k_b.weight").transpose(1, 2), take(f"{source}attn_v_b.weight")
        out[f"{target}self_attn.kv_b_proj.weight"] = torch.cat(halves, dim=1).flatten(0, 1)
        if i >= config["first_k_dense_replace"]:
            gate, up, down = (take(f"{source}ffn_{part}_exps.weight") for part in ("gate", "up", "down"))
            out[f"{target}mlp.experts.gate_up_proj"] = torch.cat((gate, up), dim=1)
            out[f"{target}mlp.experts.down_proj"] = down
    return out
