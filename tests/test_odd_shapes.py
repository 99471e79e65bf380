"""The engine equals the twin on random models: sizes that no vector width divides, features in any combination."""

import numpy as np
import pytest
from gguf_files import write_tiny_deepseek2
from reference import ReferenceModel

import edge_moe


def random_settings(seed):
    rng = np.random.default_rng(seed)

    def number(low, high):
        return int(rng.integers(low, high + 1))

    def one_of(*values):
        return values[number(0, len(values) - 1)]

    n_group, n_layers = one_of(1, 1, 2, 4), number(1, 3)
    per_group, topk_group = number(2, 5), number(1, n_group)
    yarn = {"factor": 40.0, "original_max_position_embeddings": 64, "mscale_all_dim": one_of(0.707, 1.0)}
    return {
        "hidden_size": number(8, 90),
        "num_hidden_layers": n_layers,
        "first_k_dense_replace": number(0, n_layers),
        "intermediate_size": number(3, 70),
        "moe_intermediate_size": number(3, 50),
        "n_routed_experts": n_group * per_group,
        "num_experts_per_tok": number(1, min(6, topk_group * per_group)),
        "n_shared_experts": number(0, 2),
        "num_attention_heads": number(1, 5),
        "q_lora_rank": one_of(None, 0, number(4, 50)),
        "kv_lora_rank": number(4, 60),
        "qk_nope_head_dim": number(3, 40),
        "qk_rope_head_dim": 2 * number(1, 16),
        "v_head_dim": number(3, 40),
        "rope_theta": one_of(1e4, 1e6),
        "rope_scaling": one_of(None, yarn),
        "scoring_func": one_of("softmax", "sigmoid"),
        "selection_bias": one_of(False, True),
        "n_group": n_group,
        "topk_group": topk_group,
        "norm_topk_prob": one_of(False, True),
        "routed_scaling_factor": one_of(1.0, 2.5),
        "tie_word_embeddings": one_of(False, True),
        "split_kv_b": one_of(False, True),
        "fused_gate_up": one_of(False, True),
        "weight_type": one_of("F32", "F16", "BF16"),
    }


@pytest.mark.parametrize("seed", range(16))
def test_engine_equals_twin(seed, tmp_path):
    path = tmp_path / "model.gguf"
    write_tiny_deepseek2(path, **random_settings(seed), seed=seed)
    ids = np.random.default_rng(seed).integers(0, 256, 24)
    expected = ReferenceModel.from_gguf(path, bf16_latents=True).logits(ids)
    model = edge_moe.load(path)
    cache = model.new_cache(len(ids))
    parts = [model.forward(part, cache, all_logits=True) for part in (ids[:9], ids[9:19], *ids[19:, None])]
    for logits in (model.logits(ids.tolist()), np.concatenate(parts)):
        assert np.sqrt(np.mean((logits - expected) ** 2)) < 1e-4 * np.ptp(expected)
