"""Recipes: llama.cpp's choices tensor by tensor, texts that can be edited, and wrong ones named."""

import gguf
import llama_cpp
import numpy as np
import pytest
from edge_moe_quant.recipe import RECIPES, ModelFacts, choose_formats, parse_recipe, recipe_text
from gguf_files import write_tiny_deepseek2

from edge_moe.errors import OptionError
from edge_moe.gguf import open_gguf

# 9 layers have all the kinds of layer that the rules tell apart; F = 96 and 48 need the formats that stand in.
MODELS = {
    "plain": {"moe_intermediate_size": 96, "vocab_size": 288},
    "q_lora": {"q_lora_rank": 48, "moe_intermediate_size": 256, "tie_word_embeddings": True, "fused_gate_up": True},
    "kv_b": {"split_kv_b": False, "kv_lora_rank": 256, "num_attention_heads": 4},
    "eight": {"n_routed_experts": 8, "split_kv_b": False, "kv_lora_rank": 256, "moe_intermediate_size": 48},
}


LLAMAS = {  # heads of queries, heads of keys, layers, experts
    "llama": (4, 4, 9, 0),
    "grouped": (8, 2, 9, 0),
    "mixtral": (4, 1, 9, 8),
    "70b": (8, 1, 80, 0),
}


def write_llama(path, n_heads, n_kv_heads, n_layers, n_experts, width=256):
    """A file with the shapes of a Llama; it is quantized, never run."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(n_layers)
    w.add_context_length(64)
    w.add_embedding_length(256)
    w.add_feed_forward_length(width)
    w.add_head_count(n_heads)
    w.add_head_count_kv(n_kv_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(32)
    if n_experts:
        w.add_expert_count(n_experts)
        w.add_expert_used_count(2)
    stack, suffix = ((n_experts,), "_exps") if n_experts else ((), "")
    kv_width = 256 // n_heads * n_kv_heads
    shapes = {"attn_q": (256, 256), "attn_k": (kv_width, 256), "attn_v": (kv_width, 256), "attn_output": (256, 256)}
    shapes |= {f"ffn_{part}{suffix}": (*stack, width, 256) for part in ("gate", "up")}
    shapes |= {f"ffn_down{suffix}": (*stack, 256, width), "attn_norm": (256,), "ffn_norm": (256,)}
    if n_experts:
        shapes["ffn_gate_inp"] = (n_experts, 256)
    tensors = {"token_embd": (32, 256), "output": (32, 256), "output_norm": (256,)}
    tensors |= {f"blk.{i}.{name}": shape for i in range(n_layers) for name, shape in shapes.items()}
    for name, shape in tensors.items():
        w.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.fixture(scope="module", params=[*MODELS, *LLAMAS])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "model.gguf"
    if request.param in LLAMAS:
        write_llama(path, *LLAMAS[request.param])
        return path
    q_lora = {"q_lora_rank": 0} | MODELS[request.param]
    write_tiny_deepseek2(path, hidden_size=256, num_hidden_layers=9, weight_type="F32", **q_lora)
    return path


def shapes_and_facts(path):
    file = open_gguf(path)
    return {name: entry.shape for name, entry in file.tensors.items()}, ModelFacts.from_metadata(file.metadata)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ("F32", "F16", "BF16")])
def test_the_types_are_those_of_llama_quantize(recipe, model, tmp_path):
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = 2, RECIPES[recipe][1]
    out = tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(str(model).encode(), str(out).encode(), params) == 0
    theirs = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    shapes, facts = shapes_and_facts(model)
    assert {name: fmt.name for name, fmt in choose_formats(shapes, facts, recipe).items()} == theirs


SHAPES = {
    "token_embd.weight": (300, 256), "output.weight": (300, 256), "output_norm.weight": (256,),
    "blk.1.attn_q.weight": (64, 256), "blk.11.attn_q.weight": (64, 256), "blk.1.ffn_gate_inp.weight": (4, 256),
    "blk.1.ffn_down_exps.weight": (4, 256, 1408), "blk.1.attn_k_b.weight": (2, 256, 24),
}  # fmt: skip
FACTS = ModelFacts(27, 64, 16)


def names(recipe, text="", **more):
    rules = parse_recipe(text, "recipe.txt")
    return {name: fmt.name for name, fmt in choose_formats(SHAPES, FACTS, recipe, rules, **more).items()}


def test_a_known_recipe():
    assert names("Q4_K_M") == {
        "token_embd.weight": "Q4_K", "output.weight": "Q6_K", "output_norm.weight": "F32",
        "blk.1.attn_q.weight": "Q4_K", "blk.11.attn_q.weight": "Q4_K", "blk.1.ffn_gate_inp.weight": "F32",
        "blk.1.ffn_down_exps.weight": "Q8_0", "blk.1.attn_k_b.weight": "F16",
    }  # fmt: skip


def test_an_importance_matrix_changes_two_recipes():
    down = "blk.1.ffn_down_exps.weight"
    assert (names("Q4_0")[down], names("Q4_0", has_importance=True)[down]) == ("Q4_0", "Q4_1")
    assert (names("IQ4_NL")[down], names("IQ4_NL", has_importance=True)[down]) == ("Q5_1", "IQ4_NL")


def test_the_last_line_counts_and_a_whole_name_is_only_itself():
    text = "# mine\n\nattn_q Q8_0 # all of them\nblk.1.attn_q.weight q6_k\n  _exps\tQ3_K\n. Q5_K\nattn Q5_0"
    found = names("Q4_K_M", text)
    assert (found["blk.1.attn_q.weight"], found["blk.11.attn_q.weight"]) == ("Q5_0", "Q5_0")
    assert found["blk.1.ffn_down_exps.weight"] == "Q5_1"  # 1408 columns are not whole blocks of 256
    found = names("Q4_K_M", "\n".join(text.splitlines()[:5]))
    assert (found["blk.1.attn_q.weight"], found["blk.11.attn_q.weight"]) == ("Q6_K", "Q8_0")
    assert found["blk.1.ffn_gate_inp.weight"] == found["output_norm.weight"] == "F32"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_printed_recipe_gives_the_same(recipe):
    formats = choose_formats(SHAPES, FACTS, recipe)
    text = "\n".join(recipe_text(formats, SHAPES))
    assert choose_formats(SHAPES, FACTS, None, parse_recipe(text, "recipe.txt")) == formats


@pytest.mark.parametrize(
    ("recipe", "text", "message"),
    [
        ("Q4_K_X", "", "type 'Q4_K_X' is not one of F32"),
        ("Q4_K_M", "attn Q9_0", "recipe.txt, line 1: type 'Q9_0' is not one of"),
        ("Q4_K_M", "a b c", "recipe.txt, line 1: expected a pattern and a type, found 'a b c'"),
        ("Q4_K_M", "\n(attn Q8_0", r"recipe.txt, line 2: '\(attn' is no regular expression"),
        ("Q4_K_M", "blk.2.attn Q8_0", "pattern 'blk.2.attn' fits no tensor"),
        (None, "attn Q8_0", "no line for tensor token_embd.weight"),
    ],
)
def test_wrong_recipes(recipe, text, message):
    with pytest.raises(OptionError, match=message):
        names(recipe, text)
