"""Makes tests/golden_llama/: tiny random Llama, Mistral and Mixtral models, with the logits that transformers computes.

    python -m pip install -r tools/requirements-goldens.txt && python tools/make_llama_goldens.py

As make_goldens.py, whose vocabulary they have: run by transformers in float64, weights written as F32 under the names
of a `llama` GGUF file, rows of queries and keys in adjacent pairs. Beside each lies the checkpoint that transformers
saved, for tests of the converter. tests/reference_llama.py checks each before it is kept.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from make_goldens import MAX_BF16_DISTANCE, MERGES, N_CANDIDATE_TOKENS, N_TOKENS, distance, vocabulary
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden_llama"
sys.path.insert(0, str(ROOT / "tests"))

from reference_llama import ReferenceLlama  # noqa: E402

MIN_ROUTER_MARGIN = 0.02  # of logits
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GOLDENS = {
    "llama": (LlamaConfig, LlamaForCausalLM, SMALL | {"tie_word_embeddings": True}),
    "llama3": (LlamaConfig, LlamaForCausalLM, SMALL | {"head_dim": 16, "rope_parameters": LLAMA3,
                                                       "hidden_size": 48, "num_attention_heads": 6}),
    "llama_linear": (LlamaConfig, LlamaForCausalLM, SMALL | {"num_key_value_heads": 4, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral": (MistralConfig, MistralForCausalLM, SMALL | {"sliding_window": 7, "num_key_value_heads": 1,
                                                            "head_dim": 20}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, SMALL | {"num_local_experts": 6, "num_experts_per_tok": 2,
                                                            "sliding_window": None}),
}  # fmt: skip


def gain_of(name):
    if "q_proj" in name or "k_proj" in name or "v_proj" in name:
        return 0.5
    return 0.65 if "_proj" in name else 1.7


def build(config_class, model_class, settings, seed):
    """A random model of transformers in float64; its weights are exactly float32 numbers."""
    settings = settings | {"rope_parameters": dict(settings["rope_parameters"])}
    config = config_class(vocab_size=len(vocabulary()[0]), bos_token_id=0, eos_token_id=1, **settings)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = model_class(config).eval()
    rng = np.random.default_rng(seed)
    state = {}
    for name, value in model.state_dict().items():
        if "norm" in name:
            new = rng.uniform(0.5, 1.5, value.shape)
        else:
            new = rng.normal(0, gain_of(name) / np.sqrt(value.shape[-1]), value.shape)
        state[name] = torch.from_numpy(new.astype(np.float32))
    model.load_state_dict(state)
    if settings["tie_word_embeddings"]:
        model.tie_weights()
    return model.double()


def adjacent(rows, n_heads):
    """Rows in halves, as transformers rotates them, to adjacent pairs."""
    halves = rows.reshape(n_heads, 2, -1, rows.shape[-1])
    return halves.transpose(0, 2, 1, 3).reshape(rows.shape)


def gguf_tensors(model, settings):
    """The model's weights under GGUF names -> dict of f32 arrays."""
    state = {name: value.to(torch.float32).numpy() for name, value in model.state_dict().items()}
    out = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    if not settings["tie_word_embeddings"]:
        out["output.weight"] = state["lm_head.weight"]
    rope = settings["rope_parameters"]
    if rope["rope_type"] == "llama3":
        dim = settings["head_dim"]
        factors = []
        for i in range(0, dim, 2):
            turns = rope["original_max_position_embeddings"] * rope["rope_theta"] ** (-i / dim) / (2 * math.pi)
            kept = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            kept = min(max(kept, 0.0), 1.0)
            factors.append(1 / (kept + (1 - kept) / rope["factor"]))
        out["rope_freqs.weight"] = np.array(factors, np.float32)
    plain = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    }  # fmt: skip
    for i in range(settings["num_hidden_layers"]):
        at = f"model.layers.{i}."
        layer = {k.removeprefix(at).removesuffix(".weight"): v for k, v in state.items() if k.startswith(at)}
        layer["self_attn.q_proj"] = adjacent(layer["self_attn.q_proj"], settings["num_attention_heads"])
        layer["self_attn.k_proj"] = adjacent(layer["self_attn.k_proj"], settings["num_key_value_heads"])
        if "mlp.experts.gate_up_proj" in layer:
            gate, up = np.split(layer.pop("mlp.experts.gate_up_proj"), 2, axis=1)
            out[f"blk.{i}.ffn_gate_exps.weight"], out[f"blk.{i}.ffn_up_exps.weight"] = gate, up
            out[f"blk.{i}.ffn_down_exps.weight"] = layer.pop("mlp.experts.down_proj")
        for name, gguf_name in plain.items():
            if name in layer:
                out[f"blk.{i}.{gguf_name}.weight"] = layer.pop(name)
        assert not layer, f"not converted: {sorted(layer)}"
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def write_gguf(path, name, settings, tensors):
    w = gguf.GGUFWriter(path, "llama")
    w.add_name(f"edge_moe golden {name}")
    head_dim = settings.get("head_dim", settings["hidden_size"] // settings["num_attention_heads"])
    w.add_block_count(settings["num_hidden_layers"])
    w.add_context_length(settings["max_position_embeddings"])
    w.add_embedding_length(settings["hidden_size"])
    w.add_feed_forward_length(settings["intermediate_size"])
    w.add_head_count(settings["num_attention_heads"])
    w.add_head_count_kv(settings["num_key_value_heads"])
    if "head_dim" in settings:
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    w.add_rope_dimension_count(head_dim)
    rope = settings["rope_parameters"]
    w.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope["factor"])
    if settings.get("sliding_window"):
        w.add_sliding_window(settings["sliding_window"])
    if "num_local_experts" in settings:
        w.add_expert_count(settings["num_local_experts"])
        w.add_expert_used_count(settings["num_experts_per_tok"])
    tokens, types = vocabulary()
    w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(types)
    w.add_token_merges(MERGES)
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_add_bos_token(True)
    for tensor_name, value in tensors.items():
        w.add_tensor(tensor_name, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def choose_tokens(reference, seed):
    """A random sequence without a near-tie in the router -> ids [N_TOKENS], or None where no token is found."""
    rng = np.random.default_rng(seed)
    ids = [0]
    while len(ids) < N_TOKENS:
        for candidate in rng.permutation(np.arange(3, len(vocabulary()[0])))[:N_CANDIDATE_TOKENS]:
            reference.min_router_margin = np.inf
            reference.logits([*ids, candidate])
            if reference.min_router_margin > MIN_ROUTER_MARGIN:
                ids.append(int(candidate))
                break
        else:
            return None
    return ids


def make(name, config_class, model_class, settings, first_seed):
    path = GOLDEN / f"{name}.gguf"
    for seed in range(first_seed, first_seed + 50):
        model = build(config_class, model_class, settings, seed)
        write_gguf(path, name, settings, gguf_tensors(model, settings))
        reference = ReferenceLlama.from_gguf(path)
        ids = choose_tokens(reference, seed)
        if ids is None:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
        rounded = distance(ReferenceLlama.from_gguf(path, bf16_cache=True).logits(ids), logits)
        if rounded < MAX_BF16_DISTANCE:
            break
    else:
        raise SystemExit(f"{name}: every seed had a near-tie in the router, or was too sensitive to rounding")
    difference = distance(reference.logits(ids), logits)
    assert difference < 1e-5, f"{name}: tests/reference_llama.py differs by {difference:.1e} of the range"
    np.savez_compressed(GOLDEN / f"{name}.npz", ids=np.array(ids, np.int32), logits=logits.astype(np.float32))
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.float32).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    print(
        f"{name:14} seed {seed}, router margin {reference.min_router_margin:.3f}, logits {logits.min():.1f} to "
        f"{logits.max():.1f}, reference differs by {difference:.1e}, with a bf16 cache by {rounded:.1e} of the range"
    )


def main():
    GOLDEN.mkdir(exist_ok=True)
    torch.manual_seed(0)
    chosen = sys.argv[1:] or list(GOLDENS)
    for i, (name, golden) in enumerate(GOLDENS.items()):
        if name in chosen:
            make(name, *golden, first_seed=100 * i)


if __name__ == "__main__":
    main()
