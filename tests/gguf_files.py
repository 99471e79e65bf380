"""Writes GGUF files for tests by the gguf package: random tiny models that really run, rewritten ones, wrong ones."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

ARRAY = gguf.GGUFValueType.ARRAY

FLOATS_AND_32_BLOCKS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # gguf.quantize has these
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
MERGES = (("Ġ", "t"), ("h", "e"), ("Ġ", "a"), ("i", "n"), ("Ġt", "he"))


def write_tiny_deepseek2(
    path: Path,
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    first_k_dense_replace: int = 1,
    intermediate_size: int = 96,
    moe_intermediate_size: int = 32,
    n_routed_experts: int = 4,
    num_experts_per_tok: int = 2,
    n_shared_experts: int = 1,
    num_attention_heads: int = 2,
    q_lora_rank: int | None = None,
    kv_lora_rank: int = 32,
    qk_nope_head_dim: int = 32,
    qk_rope_head_dim: int = 16,
    v_head_dim: int = 32,
    max_position_embeddings: int = 256,
    rope_theta: float = 10000.0,
    rope_scaling: Mapping[str, float] | None = None,
    scoring_func: str = "softmax",
    selection_bias: bool = False,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
    tie_word_embeddings: bool = False,
    split_kv_b: bool = True,
    fused_gate_up: bool = False,
    weight_type: str = "mixed",
    vocab_size: int = 272,
    tensors_per_part: int = 0,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Write a random model; returns what its tensors decode to, f32 by GGUF name, shaped as in numpy.

    Names are those of the transformers config. `rope_scaling` is YaRN's {factor, original_max_position_embeddings,
    mscale_all_dim}. `weight_type` is the format of all matrices but the router, or "mixed" (F32, F16 and Q8_0); rows
    that do not fit a 256-element format are Q8_0. q_lora_rank 0 writes the key and a plain attn_q, as llama.cpp wants
    it of models that are not V2-Lite's depth. With tensors_per_part the files are <stem>-00001-of-0000N.gguf.
    """
    rng = np.random.default_rng(seed)
    D, H, R, P, N, V = hidden_size, num_attention_heads, kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim
    E, F = n_routed_experts, moe_intermediate_size
    writer = gguf.GGUFWriter(path, "deepseek2", split_max_tensors=tensors_per_part)
    decoded: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int, mixed: str = "F32", norm: bool = False, always_f32: bool = False) -> None:
        type_name = "F32" if norm or always_f32 else mixed if weight_type == "mixed" else weight_type
        ggml_type = fitting_type(shape[-1], type_name)
        raw = random_tensor(rng, shape, ggml_type, around=1.0 if norm else 0.0)
        writer.add_tensor(name, raw, raw_dtype=ggml_type)
        decoded[name] = gguf.dequantize(raw, ggml_type).reshape(shape)

    writer.add_name("tiny deepseek2")
    writer.add_block_count(num_hidden_layers)
    writer.add_context_length(max_position_embeddings)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(intermediate_size)
    writer.add_head_count(H)
    writer.add_head_count_kv(1 if split_kv_b else H)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_leading_dense_block_count(first_k_dense_replace)
    writer.add_vocab_size(vocab_size)
    if q_lora_rank is not None:
        writer.add_q_lora_rank(q_lora_rank)
    writer.add_kv_lora_rank(R)
    if split_kv_b:
        writer.add_key_length(R + P)
        writer.add_value_length(R)
        writer.add_key_length_mla(N + P)
        writer.add_value_length_mla(V)
    else:
        writer.add_key_length(N + P)
        writer.add_value_length(V)
    writer.add_rope_dimension_count(P)
    writer.add_rope_freq_base(rope_theta)
    if rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope_scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(int(rope_scaling["original_max_position_embeddings"]))
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope_scaling["mscale_all_dim"])
    writer.add_expert_count(E)
    writer.add_expert_used_count(num_experts_per_tok)
    writer.add_expert_shared_count(n_shared_experts)
    writer.add_expert_feed_forward_length(F)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType[scoring_func.upper()])
    writer.add_expert_weights_norm(norm_topk_prob)
    writer.add_expert_weights_scale(routed_scaling_factor)
    if n_group > 1:
        writer.add_expert_group_count(n_group)
        writer.add_expert_group_used_count(topk_group)
    add_byte_level_vocabulary(writer, vocab_size)

    add("token_embd.weight", vocab_size, D, mixed="F16")
    add("output_norm.weight", D, norm=True)
    if not tie_word_embeddings:
        add("output.weight", vocab_size, D, mixed="Q8_0")
    for layer in range(num_hidden_layers):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm.weight", D, norm=True)
        if q_lora_rank:
            add(f"{block}.attn_q_a.weight", q_lora_rank, D, mixed="Q8_0")
            add(f"{block}.attn_q_a_norm.weight", q_lora_rank, norm=True)
            add(f"{block}.attn_q_b.weight", H * (N + P), q_lora_rank, mixed="F16")
        else:
            add(f"{block}.attn_q.weight", H * (N + P), D, mixed="Q8_0")
        add(f"{block}.attn_kv_a_mqa.weight", R + P, D, mixed="Q8_0")
        add(f"{block}.attn_kv_a_norm.weight", R, norm=True)
        if split_kv_b:
            add(f"{block}.attn_k_b.weight", H, R, N, mixed="F16")
            add(f"{block}.attn_v_b.weight", H, V, R, mixed="Q8_0")
        else:
            add(f"{block}.attn_kv_b.weight", H * (N + V), R, mixed="Q8_0")
        add(f"{block}.attn_output.weight", D, H * V)
        add(f"{block}.ffn_norm.weight", D, norm=True)
        if layer < first_k_dense_replace:
            add(f"{block}.ffn_gate.weight", intermediate_size, D)
            add(f"{block}.ffn_up.weight", intermediate_size, D, mixed="Q8_0")
            add(f"{block}.ffn_down.weight", D, intermediate_size, mixed="F16")
            continue
        add(f"{block}.ffn_gate_inp.weight", E, D, always_f32=True)
        if selection_bias:
            add(f"{block}.exp_probs_b.bias", E, always_f32=True)
        if fused_gate_up:
            add(f"{block}.ffn_gate_up_exps.weight", E, 2 * F, D, mixed="Q8_0")
        else:
            add(f"{block}.ffn_gate_exps.weight", E, F, D, mixed="Q8_0")
            add(f"{block}.ffn_up_exps.weight", E, F, D, mixed="F16")
        add(f"{block}.ffn_down_exps.weight", E, D, F, mixed="Q8_0")
        if n_shared_experts:
            add(f"{block}.ffn_gate_shexp.weight", n_shared_experts * F, D)
            add(f"{block}.ffn_up_shexp.weight", n_shared_experts * F, D, mixed="Q8_0")
            add(f"{block}.ffn_down_shexp.weight", D, n_shared_experts * F, mixed="F16")

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def fitting_type(n_cols: int, type_name: str) -> gguf.GGMLQuantizationType:
    """The format itself, or Q8_0 where rows are not whole blocks of it, or F32 where they are not that either."""
    for candidate in (gguf.GGMLQuantizationType[type_name], gguf.GGMLQuantizationType.Q8_0):
        if n_cols % gguf.GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return gguf.GGMLQuantizationType.F32


def random_tensor(
    rng: np.random.Generator, shape: tuple[int, ...], ggml_type: gguf.GGMLQuantizationType, around: float = 0.0
) -> np.ndarray:
    """A random tensor of about unit gain in the format's blocks, u8[..., row_bytes]."""
    if ggml_type.name in FLOATS_AND_32_BLOCKS:
        values = (around + rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
        return gguf.quantize(values, ggml_type).view(np.uint8)
    return _random_blocks(rng, shape, ggml_type)


# Where the f16 scales of a block lie, for the formats that gguf cannot quantize to.
_HALVES_AT = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)
}  # fmt: skip


def _random_blocks(
    rng: np.random.Generator, shape: tuple[int, ...], ggml_type: gguf.GGMLQuantizationType
) -> np.ndarray:
    """Random bits under scales that make the values about as large as a trained matrix's."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block_size, block_bytes), dtype=np.uint8)
    for at in _HALVES_AT[ggml_type.name]:
        blocks[..., at : at + 2] = np.array([0], np.float16).view(np.uint8)
    at = _HALVES_AT[ggml_type.name][0]
    blocks[..., at : at + 2] = np.array([1], np.float16).view(np.uint8)
    spread = gguf.dequantize(blocks.reshape(*shape[:-1], -1), ggml_type).std()
    for at in _HALVES_AT[ggml_type.name]:
        scales = rng.uniform(0.5, 1.5, blocks.shape[:-1]) * (shape[-1] ** -0.5 / spread)
        blocks[..., at : at + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def add_byte_level_vocabulary(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """256 byte tokens, a few merges, begin and end of sentence, and unused tokens up to vocab_size."""
    tokens = [*byte_tokens(), *("".join(pair) for pair in MERGES), BOS, EOS]
    types = [gguf.TokenType.NORMAL] * (len(tokens) - 2) + [gguf.TokenType.CONTROL] * 2
    assert vocab_size >= len(tokens)
    n_unused = vocab_size - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-llm")
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in range(n_unused)])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * n_unused)
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(tokens.index(BOS))
    writer.add_eos_token_id(tokens.index(EOS))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def byte_tokens() -> list[str]:
    """The printable characters that stand for the bytes 0 to 255 in byte-level BPE."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = (chr(256 + n) for n in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def rewrite(source, target, *, matrices=None, keys=None, tensors=None, architecture=None):
    """Copy a model file.

    matrices: the type every matrix of the model is converted to; the router and all vectors stay F32.
    keys: metadata that is added or replaced, {name: (value, GGUFValueType)}; `architecture` is a key, too.
    tensors: arrays that are added, by name.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, architecture or reader.fields["general.architecture"].contents())
    metadata = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            metadata[name] = (field.contents(), field.types[0], field.types[-1] if field.types[0] == ARRAY else None)
    for name, (value, kind, element) in (metadata | {k: (*v, None) for k, v in (keys or {}).items()}).items():
        writer.add_key_value(name, value, kind, element)
    for tensor in reader.tensors:
        name, data, kind = tensor.name, tensor.data, tensor.tensor_type
        if matrices is not None and len(tensor.shape) > 1 and "ffn_gate_inp" not in name:
            data, kind = gguf.quantize(gguf.dequantize(data, kind), matrices), matrices
        writer.add_tensor(name, data, raw_dtype=kind)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@dataclass(frozen=True)
class RawTensor:
    """A row of a tensor table, right or wrong. dims are in file order, the row length first."""

    name: bytes
    dims: tuple[int, ...]
    ggml_type: int = 0
    offset: int = 0


def raw_gguf(
    keys: Sequence[tuple[bytes, int, bytes]] = (),
    tensors: Sequence[RawTensor] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file byte by byte, from (key, value type, value bytes) and table rows, with none of a writer's checks."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    parts = [b"GGUF", struct.pack("<IQQ", version, *counts)]
    for key, value_type, value in keys:
        parts += [raw_string(key), struct.pack("<I", value_type), value]
    for tensor in tensors:
        parts += [raw_string(tensor.name), struct.pack("<I", len(tensor.dims))]
        parts += [struct.pack("<Q", size) for size in tensor.dims]
        parts += [struct.pack("<IQ", tensor.ggml_type, tensor.offset)]
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment) + data


def raw_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def raw_array(item_type: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", item_type, count) + items
