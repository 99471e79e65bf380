"""Makes tests/golden/: tiny random DeepSeek-V2/V3 models as GGUF files, with the logits that transformers computes.

    python -m pip install -r tools/requirements-goldens.txt && python tools/make_goldens.py

The model is built and run by transformers in float64 (its norms, rotations and router compute in float32 inside), the
weights are written as F32 under the names of a `deepseek2` GGUF file. tests/reference.py checks each file before it is
kept, and picks the tokens: one after the other, such that no choice of experts is near a tie.

Where transformers 5.23 differs from other implementations, and what the goldens do about it:
- Its V2 has no `norm_topk_prob` and always multiplies by `routed_scaling_factor`; DeepSeek's own V2 code does one or
  the other. No V2 golden normalizes.
- Its V2 scores a group of experts by the best one, as DeepSeek's does; llama.cpp sums the best two for every model.
- The norms of the two latents always have eps 1e-6, whatever `rms_norm_eps` says; a GGUF file has one. All use 1e-6.
- YaRN multiplies cos and sin by ms(mscale) / ms(mscale_all_dim), which a `deepseek2` file cannot express. It is 1 for
  every released model, since both are equal; so they are here. With neither key, cos and sin carry 1 + 0.1 ln(factor)
  and the softmax scale nothing (v3_no_norm); llama.cpp then puts the temperature into both.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT / "tests"))

from reference import ReferenceModel  # noqa: E402

N_TOKENS = 32
MIN_ROUTER_MARGIN = {"softmax": 0.004, "sigmoid": 0.01}  # in the scores that are compared
N_CANDIDATE_TOKENS = 40
MAX_BF16_DISTANCE = 7e-4  # of the logits' range: what rounding the cached latents to bf16 may change

YARN_V2 = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
YARN_V3 = YARN_V2 | {"mscale": 1.0, "mscale_all_dim": 1.0}
# The ramp between kept and slowed pairs lies across more pairs, within the 32 tokens of a golden.
# Without mscale keys, cos and sin carry YaRN's temperature instead of the softmax scale.
YARN_SHORT = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16,
    "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 3, "kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "first_k_dense_replace": 1, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "routed_scaling_factor": 1.0,
}  # fmt: skip
V2 = SMALL | {"topk_method": "greedy", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
V3 = SMALL | {
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "num_mtp_layers": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}  # fmt: skip

# name: (what the file shows, settings of transformers, how the file stores it)
GOLDENS = {
    # Every row is a whole number of 32-blocks, so that the tests can make quantized files of this one.
    "v2_lite": (
        V2 | {"rope_parameters": YARN_V2, "qk_nope_head_dim": 32, "moe_intermediate_size": 32,
              "intermediate_size": 64, "n_shared_experts": 2},
        {},
    ),
    "v2_legacy_kv_b": (V2 | {"rope_parameters": YARN_V2, "n_shared_experts": 2}, {"kv_b": "joint"}),
    "v2_no_dense_layer": (
        V2 | {"q_lora_rank": 24, "first_k_dense_replace": 0, "routed_scaling_factor": 1.5, "num_attention_heads": 4,
              "num_key_value_heads": 4, "n_routed_experts": 6, "num_experts_per_tok": 2},
        {},
    ),
    "v2_groups": (
        V2 | {"q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_routed_experts": 12, "n_group": 4,
              "topk_group": 2, "routed_scaling_factor": 4.0, "rope_parameters": YARN_V2},
        {},
    ),
    "v2_tied": (V2 | {"tie_word_embeddings": True, "num_hidden_layers": 3, "first_k_dense_replace": 2}, {}),
    "v3": (
        V3 | {"q_lora_rank": 24, "rope_parameters": YARN_V3, "n_routed_experts": 12, "n_group": 4, "topk_group": 2,
              "num_experts_per_tok": 4, "routed_scaling_factor": 2.5, "num_hidden_layers": 3,
              "first_k_dense_replace": 2},
        {},
    ),
    "v3_no_norm": (
        V3 | {"q_lora_rank": 24, "rope_parameters": YARN_SHORT, "n_group": 2, "topk_group": 1, "norm_topk_prob": False,
              "first_k_dense_replace": 0, "qk_rope_head_dim": 16, "num_hidden_layers": 1},
        {},
    ),
    # A block for multi-token prediction follows the layers; it takes no part in plain decoding.
    "v3_lite": (V3 | {"routed_scaling_factor": 2.446, "n_shared_experts": 2}, {"nextn_layers": 1}),
    "v3_fused_gate_up": (V3 | {"routed_scaling_factor": 1.8, "q_lora_rank": 24}, {"experts": "fused"}),
}  # fmt: skip

SPECIALS = ["<s>", "</s>", "<pad>"]
MERGES = ["t h", "th e", "Ġ t", "Ġ a", "i n", "e r", "a n", "an d"]


def vocabulary():
    """A byte-level vocabulary of the printable ASCII characters -> tokens, token types."""
    characters = ["Ġ", "Ċ", "ĉ", *map(chr, range(33, 127))]
    tokens = SPECIALS + characters + [merge.replace(" ", "") for merge in MERGES]
    tokens += [f"<unused{i}>" for i in range(-len(tokens) % 8)]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    return tokens, [control if token in SPECIALS or token.startswith("<unused") else normal for token in tokens]


def gain_of(name):
    """How much a random matrix amplifies: little in attention, so that what a bf16 cache rounds stays small."""
    if "q_" in name or "kv_" in name:
        return 0.4
    if "_proj" in name:
        return 0.65
    return 1.7  # embedding, router, output


def build(settings, seed):
    """A random model of transformers in float64; its weights are exactly float32 numbers."""
    is_v2 = "topk_method" in settings
    config_class = DeepseekV2Config if is_v2 else DeepseekV3Config
    model_class = DeepseekV2ForCausalLM if is_v2 else DeepseekV3ForCausalLM
    # A copy, since transformers standardizes the rope settings in place.
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
        elif "e_score_correction_bias" in name:
            new = rng.normal(0, 0.2, value.shape)
        else:
            new = rng.normal(0, gain_of(name) / np.sqrt(value.shape[-1]), value.shape)
        state[name] = torch.from_numpy(new.astype(np.float32))
    model.load_state_dict(state)
    if settings["tie_word_embeddings"]:
        model.tie_weights()
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    # The frequencies stay what they are in float32.
    return model.double()


def gguf_tensors(model, settings, storage):
    """The model's weights under GGUF names -> dict of f32 arrays."""
    state = {name: value.to(torch.float32).numpy() for name, value in model.state_dict().items()}
    H, N, V = (settings[key] for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    out = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    if not settings["tie_word_embeddings"]:
        out["output.weight"] = state["lm_head.weight"]
    plain = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
        "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
        "mlp.shared_experts.down_proj": "ffn_down_shexp",
    }  # fmt: skip
    for i in range(settings["num_hidden_layers"]):
        layer = {
            name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): value
            for name, value in state.items()
            if name.startswith(f"model.layers.{i}.")
        }
        for name, gguf_name in plain.items():
            if name in layer:
                out[f"blk.{i}.{gguf_name}.weight"] = layer.pop(name)
        kv_b = layer.pop("self_attn.kv_b_proj")
        if storage.get("kv_b") == "joint":
            out[f"blk.{i}.attn_kv_b.weight"] = kv_b
        else:
            k_b, v_b = np.split(kv_b.reshape(H, N + V, -1), [N], axis=1)
            out[f"blk.{i}.attn_k_b.weight"] = k_b.transpose(0, 2, 1)
            out[f"blk.{i}.attn_v_b.weight"] = v_b
        if "mlp.experts.gate_up_proj" in layer:
            gate_up = layer.pop("mlp.experts.gate_up_proj")
            if storage.get("experts") == "fused":
                out[f"blk.{i}.ffn_gate_up_exps.weight"] = gate_up
            else:
                gate, up = np.split(gate_up, 2, axis=1)
                out[f"blk.{i}.ffn_gate_exps.weight"] = gate
                out[f"blk.{i}.ffn_up_exps.weight"] = up
            out[f"blk.{i}.ffn_down_exps.weight"] = layer.pop("mlp.experts.down_proj")
        if "mlp.gate.e_score_correction_bias" in layer:
            out[f"blk.{i}.exp_probs_b.bias"] = layer.pop("mlp.gate.e_score_correction_bias")
        assert not layer, f"not converted: {sorted(layer)}"
    if storage.get("nextn_layers"):
        last, D = settings["num_hidden_layers"], settings["hidden_size"]
        block = {k.replace(f".{last - 1}.", f".{last}.", 1): v for k, v in out.items() if f"blk.{last - 1}." in k}
        projection = np.concatenate([np.eye(D, dtype=np.float32)] * 2, axis=1)
        norms = {f"blk.{last}.nextn.{norm}.weight": np.ones(D, np.float32) for norm in ("enorm", "hnorm")}
        out |= block | norms | {f"blk.{last}.nextn.eh_proj.weight": projection}
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def write_gguf(path, name, settings, storage, tensors):
    w = gguf.GGUFWriter(path, "deepseek2")
    w.add_name(f"edge_moe golden {name}")
    N, P, V, R = (settings[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    nextn_layers = storage.get("nextn_layers", 0)
    w.add_block_count(settings["num_hidden_layers"] + nextn_layers)
    if nextn_layers:
        w.add_nextn_predict_layers(nextn_layers)
    w.add_context_length(settings["max_position_embeddings"])
    w.add_embedding_length(settings["hidden_size"])
    w.add_feed_forward_length(settings["intermediate_size"])
    w.add_head_count(settings["num_attention_heads"])
    w.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    w.add_leading_dense_block_count(settings["first_k_dense_replace"])
    w.add_kv_lora_rank(R)
    if settings["q_lora_rank"]:
        w.add_q_lora_rank(settings["q_lora_rank"])
    if storage.get("kv_b") == "joint":
        w.add_head_count_kv(settings["num_attention_heads"])
        w.add_key_length(N + P)
        w.add_value_length(V)
    else:
        w.add_head_count_kv(1)
        w.add_key_length(R + P)
        w.add_value_length(R)
        w.add_key_length_mla(N + P)
        w.add_value_length_mla(V)
    w.add_expert_feed_forward_length(settings["moe_intermediate_size"])
    w.add_expert_count(settings["n_routed_experts"])
    w.add_expert_used_count(settings["num_experts_per_tok"])
    w.add_expert_shared_count(settings["n_shared_experts"])
    w.add_expert_weights_scale(settings["routed_scaling_factor"])
    if "topk_method" in settings:
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    else:
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        w.add_expert_weights_norm(settings["norm_topk_prob"])
    if "n_group" in settings:
        w.add_expert_group_count(settings["n_group"])
        w.add_expert_group_used_count(settings["topk_group"])
    rope = settings["rope_parameters"]
    w.add_rope_dimension_count(P)
    w.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(rope["factor"])
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "mscale_all_dim" in rope:
            w.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    tokens, types = vocabulary()
    w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(types)
    w.add_token_merges(MERGES)
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_pad_token_id(2)
    w.add_add_bos_token(True)
    for tensor_name, value in tensors.items():
        w.add_tensor(tensor_name, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def choose_tokens(reference, margin, seed):
    """A random sequence without a near-tie in the router -> ids [N_TOKENS], or None where no token is found."""
    rng = np.random.default_rng(seed)
    ids = [0]
    while len(ids) < N_TOKENS:
        for candidate in rng.permutation(np.arange(3, len(vocabulary()[0])))[:N_CANDIDATE_TOKENS]:
            reference.min_router_margin = np.inf
            reference.logits([*ids, candidate])
            if reference.min_router_margin > margin:
                ids.append(int(candidate))
                break
        else:
            return None
    return ids


def distance(a, b):
    return np.abs(a - b).max() / np.ptp(b)


def make(name, settings, storage, first_seed):
    path = GOLDEN / f"{name}.gguf"
    margin = MIN_ROUTER_MARGIN["softmax" if "topk_method" in settings else "sigmoid"]
    for seed in range(first_seed, first_seed + 50):
        model = build(settings, seed)
        write_gguf(path, name, settings, storage, gguf_tensors(model, settings, storage))
        reference = ReferenceModel.from_gguf(path)
        ids = choose_tokens(reference, margin, seed)
        if ids is None:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
        rounded = distance(ReferenceModel.from_gguf(path, bf16_latents=True).logits(ids), logits)
        if rounded < MAX_BF16_DISTANCE:
            break
    else:
        raise SystemExit(f"{name}: every seed had a near-tie in the router, or was too sensitive to rounding")
    difference = distance(reference.logits(ids), logits)
    assert difference < 1e-5, f"{name}: tests/reference.py differs from transformers by {difference:.1e} of the range"
    np.savez_compressed(GOLDEN / f"{name}.npz", ids=np.array(ids, np.int32), logits=logits.astype(np.float32))
    size_bytes = sum((GOLDEN / f"{name}{suffix}").stat().st_size for suffix in (".gguf", ".npz"))
    print(
        f"{name:18} seed {seed} {size_bytes / 1e3:6.0f} kB, router margin {reference.min_router_margin:.4f}, "
        f"logits {logits.min():.1f} to {logits.max():.1f}, "
        f"reference differs by {difference:.1e}, with a bf16 cache by {rounded:.1e} of the range"
    )


def main():
    GOLDEN.mkdir(exist_ok=True)
    torch.manual_seed(0)
    chosen = sys.argv[1:] or list(GOLDENS)
    for i, (name, (settings, storage)) in enumerate(GOLDENS.items()):
        if name in chosen:
            make(name, settings, storage, first_seed=100 * i)


if __name__ == "__main__":
    main()
