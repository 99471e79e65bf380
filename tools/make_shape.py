"""Writes random weights in the full shape of DeepSeek-V2-Lite, to measure speed and memory without a download.

    python tools/make_shape.py v2-lite-q4_k_m.gguf --vocab ggml-vocab-deepseek-llm.gguf

The blocks are random bytes with sane scales: each weight has mean 0 and the size that keeps activations near 1, so that
routing, attention and logits are as spread out as a model's. The types are those llama.cpp's recipe gives each tensor.
The real vocabulary is in llama.cpp's source (models/ggml-vocab-deepseek-llm.gguf); without one, tokens are made up.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace
from math import prod, sqrt
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.lib.stride_tricks import as_strided

CHUNK_BLOCKS = 1 << 17  # random blocks made at a time: tens of megabytes


@dataclass(frozen=True)
class Shape:
    """Sizes of a DeepSeek-V2 model without q_lora, in the names of its config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    first_k_dense_replace: int = 1
    max_position_embeddings: int = 163840


SHAPES = {
    "v2-lite": Shape(
        vocab_size=102400, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, intermediate_size=10944,
        moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    ),
    # The same mixture of row lengths, 256 times and not, in a megabyte.
    "tiny": Shape(
        vocab_size=320, hidden_size=256, num_hidden_layers=3, num_attention_heads=2, intermediate_size=320,
        moe_intermediate_size=96, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, kv_lora_rank=256,
        qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=128, max_position_embeddings=4096,
    ),
}  # fmt: skip

RECIPES = {"Q4_K_M": Type.Q4_K, "Q4_0": Type.Q4_0, "Q8_0": Type.Q8_0, "BF16": Type.BF16}
FILE_TYPES = {
    "Q4_K_M": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
}
# Rows that are no whole number of 256-blocks take a type with smaller blocks.
FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}


def tensor_shapes(s):
    """Name -> shape in numpy order, in the order of the file."""
    H, D, R, F = s.num_attention_heads, s.hidden_size, s.kv_lora_rank, s.moe_intermediate_size
    N, P, V, E = s.qk_nope_head_dim, s.qk_rope_head_dim, s.v_head_dim, s.n_routed_experts
    shapes = {
        "token_embd.weight": (s.vocab_size, D),
        "output.weight": (s.vocab_size, D),
        "output_norm.weight": (D,),
    }
    for i in range(s.num_hidden_layers):
        layer = {
            "attn_norm": (D,),
            "attn_q": (H * (N + P), D),
            "attn_kv_a_mqa": (R + P, D),
            "attn_kv_a_norm": (R,),
            "attn_k_b": (H, R, N),
            "attn_v_b": (H, V, R),
            "attn_output": (D, H * V),
            "ffn_norm": (D,),
        }
        if i < s.first_k_dense_replace:
            gated_mlps = {"": (s.intermediate_size, ())}
        else:
            layer["ffn_gate_inp"] = (E, D)
            gated_mlps = {"_exps": (F, (E,)), "_shexp": (F * s.n_shared_experts, ())}
        for suffix, (width, stack) in gated_mlps.items():
            layer |= {
                f"ffn_gate{suffix}": (*stack, width, D),
                f"ffn_up{suffix}": (*stack, width, D),
                f"ffn_down{suffix}": (*stack, D, width),
            }
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def tensor_type(name, shape, recipe, n_layers):
    """The type llama.cpp's quantizer gives a tensor: norms and the router stay F32, some products get more bits."""
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return Type.F32
    kind = RECIPES[recipe]
    if name == "output.weight" and kind in (Type.Q4_K, Type.Q4_0):
        return Type.Q6_K
    if recipe == "Q4_K_M" and "ffn_down" in name:
        i = int(name.split(".")[1])
        if i < n_layers // 8 or i >= 7 * n_layers // 8 or (i - n_layers // 8) % 3 == 2:
            kind = Type.Q6_K
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = FALLBACK[kind]
    return kind


def weight_size(name, shape):
    """Standard deviation of the weights: a product keeps the size of its input; logits and router are wider."""
    if name == "token_embd.weight":
        return 1.0
    return (2.0 if name == "output.weight" or "ffn_gate_inp" in name else 1.0) / sqrt(shape[-1])


# ---- random blocks


def field(blocks, offset, dtype, count=1):
    """A field of every block as a writable array. blocks u8[n,block_bytes] -> dtype[n,count]."""
    itemsize = np.dtype(dtype).itemsize
    start = blocks.reshape(-1)[offset : offset + itemsize].view(dtype)
    return as_strided(start, (len(blocks), count), (blocks.strides[0], itemsize), writeable=True)


def random_scales(rng, n, size):
    """Scales that differ by block, of either sign, whose root mean square is `size` -> f16[n,1]."""
    table = rng.uniform(0.5, 1.5, 256) * np.where(np.arange(256) % 2, 1, -1)
    table = (table * (size / sqrt(np.mean(table**2)))).astype(np.float16)
    return table[rng.integers(0, 256, n, dtype=np.uint8)][:, None]


def q4_k_scales(rng, n_patterns):
    """Patterns of the 12 bytes that hold eight 6-bit scales and eight 6-bit minima, here equal in pairs.

    Returns u8[n_patterns,12] and the root mean square of the scales.
    """
    scale = rng.integers(24, 64, (n_patterns, 8), dtype=np.uint8)
    low, high = scale[:, :4], scale[:, 4:]
    packed = np.concatenate([low | (high >> 4) << 6, low | (high >> 4) << 6, (high & 15) | (high & 15) << 4], axis=1)
    return packed, sqrt(np.mean(scale.astype(float) ** 2))


def random_blocks(rng, kind, n, size):
    """n blocks of weights of mean 0 and standard deviation `size` -> u8[n,block_bytes]. Source: ggml-common.h."""
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    if kind == Type.F32:
        return rng.standard_normal(n, np.float32).__imul__(np.float32(size)).view(np.uint8).reshape(n, 4)
    blocks = np.frombuffer(bytearray(rng.bytes(n * block_bytes)), np.uint8).reshape(n, block_bytes)
    codes = np.arange(64)
    if kind == Type.BF16:
        # Either sign, two neighbouring exponents, any mantissa: the root mean square is 2.415 of the smaller power.
        exponent = 127 + round(np.log2(size / 2.415))
        values = blocks.view("<u2")
        np.bitwise_and(values, 0x80FF, out=values)
        np.add(values, exponent << 7, out=values)
    elif kind == Type.Q8_0:
        field(blocks, 0, "<f2")[:] = random_scales(rng, n, size / np.std(np.arange(-128, 128)))
    elif kind in (Type.Q4_0, Type.Q5_0):
        n_codes = 16 if kind == Type.Q4_0 else 32
        rms_code = sqrt(np.mean((codes[:n_codes] - n_codes // 2) ** 2.0))
        field(blocks, 0, "<f2")[:] = random_scales(rng, n, size / rms_code)
    elif kind == Type.Q4_K:
        # A weight is scale * (d * code - dmin): with equal scales and minima, dmin = 7.5 d puts its mean at 0.
        packed, rms_scale = q4_k_scales(rng, 4096)
        d = random_scales(rng, n, size / (rms_scale * np.std(codes[:16])))
        field(blocks, 0, "<f2")[:] = d
        field(blocks, 2, "<f2")[:] = d * np.float16(7.5)
        blocks[:, 4:16] = packed[rng.integers(0, len(packed), n, dtype=np.uint16)]
    elif kind == Type.Q6_K:
        scales = rng.integers(40, 128, (4096, 16)) * rng.choice([-1, 1], (4096, 16))
        rms = sqrt(np.mean(scales**2.0) * np.mean((codes - 32) ** 2.0))
        field(blocks, 192, "i1", 16)[:] = scales.astype(np.int8)[rng.integers(0, len(scales), n, dtype=np.uint16)]
        field(blocks, 208, "<f2")[:] = random_scales(rng, n, size / rms)
    else:
        raise ValueError(f"no random blocks for {kind.name}")
    return blocks


def random_tensor(rng, name, shape, kind, n_bytes):
    """The bytes of one tensor -> u8[n_bytes]."""
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape).astype("<f4").view(np.uint8)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty(n_bytes, np.uint8)
    n_blocks = prod(shape) // block_size
    for first in range(0, n_blocks, CHUNK_BLOCKS):
        n = min(CHUNK_BLOCKS, n_blocks - first)
        made = random_blocks(rng, kind, n, weight_size(name, shape))
        out[first * block_bytes : (first + n) * block_bytes] = made.reshape(-1)
    return out


# ---- the file


def write_metadata(w, s, recipe, vocab_path):
    w.add_name(f"random weights in the shape of DeepSeek-V2-Lite, {s.num_hidden_layers} layers")
    w.add_file_type(FILE_TYPES[recipe])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_vocab_size(s.vocab_size)
    w.add_block_count(s.num_hidden_layers)
    w.add_context_length(s.max_position_embeddings)
    w.add_embedding_length(s.hidden_size)
    w.add_feed_forward_length(s.intermediate_size)
    w.add_head_count(s.num_attention_heads)
    w.add_head_count_kv(1)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_leading_dense_block_count(s.first_k_dense_replace)
    w.add_kv_lora_rank(s.kv_lora_rank)
    if s.num_hidden_layers not in (26, 27):
        w.add_q_lora_rank(0)  # llama.cpp knows the lite models by their layer count and asks all others for this
    w.add_key_length(s.kv_lora_rank + s.qk_rope_head_dim)
    w.add_value_length(s.kv_lora_rank)
    w.add_key_length_mla(s.qk_nope_head_dim + s.qk_rope_head_dim)
    w.add_value_length_mla(s.v_head_dim)
    w.add_expert_feed_forward_length(s.moe_intermediate_size)
    w.add_expert_count(s.n_routed_experts)
    w.add_expert_used_count(s.num_experts_per_tok)
    w.add_expert_shared_count(s.n_shared_experts)
    w.add_expert_weights_scale(1.0)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    w.add_rope_dimension_count(s.qk_rope_head_dim)
    w.add_rope_freq_base(10000.0)
    w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    w.add_rope_scaling_factor(40.0)
    w.add_rope_scaling_orig_ctx_len(4096)
    w.add_rope_scaling_yarn_log_mul(0.0707)
    if vocab_path is None:
        write_made_up_vocabulary(w, s.vocab_size)
    else:
        copy_vocabulary(w, s.vocab_size, vocab_path)


def copy_vocabulary(w, vocab_size, path):
    """Copy the tokenizer's keys of another GGUF file; its tokens are cut or padded to `vocab_size`."""
    for name, entry in gguf.GGUFReader(path).fields.items():
        if not name.startswith("tokenizer."):
            continue
        value, element = entry.contents(), entry.types[-1] if len(entry.types) > 1 else None
        if name == "tokenizer.ggml.tokens":
            if len(value) > vocab_size:
                raise SystemExit(f"{path}: {len(value)} tokens do not fit the {vocab_size} of the shape")
            value += [f"[PAD{i}]" for i in range(len(value), vocab_size)]
        elif name == "tokenizer.ggml.token_type":
            value += [int(gguf.TokenType.UNUSED)] * (vocab_size - len(value))
        elif name == "tokenizer.ggml.scores":
            value += [0.0] * (vocab_size - len(value))
        w.add_key_value(name, value, entry.types[0], element)


def write_made_up_vocabulary(w, vocab_size):
    """The 256 bytes, two specials, and words that no text contains."""
    printable = [b for b in range(256) if 33 <= b < 127 or 161 <= b < 173 or b > 173]
    others = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = ["<s>", "</s>", *(characters[b] for b in range(256)), "Ġt"]
    types = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 257
    types += [gguf.TokenType.UNUSED] * (vocab_size - len(tokens))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("deepseek-llm")
    w.add_token_list(tokens + [f"[PAD{i}]" for i in range(len(tokens), vocab_size)])
    w.add_token_types(types)
    w.add_token_merges(["Ġ t"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_add_bos_token(True)


def write_model(path, shape, recipe, *, vocab_path=None, seed=0, progress=lambda done_bytes, all_bytes: None):
    """Write the file under another name, then rename it: what bears the name is whole."""
    rng = np.random.Generator(np.random.SFC64(seed))
    tensors = []
    for name, dims in tensor_shapes(shape).items():
        kind = tensor_type(name, dims, recipe, shape.num_hidden_layers)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        tensors.append((name, dims, kind, prod(dims) // block_size * block_bytes))
    all_bytes = sum(n_bytes for *_, n_bytes in tensors)
    partial = path.with_name(path.name + ".partial")
    w = gguf.GGUFWriter(partial, "deepseek2")
    try:
        write_metadata(w, shape, recipe, vocab_path)
        for name, dims, kind, n_bytes in tensors:
            w.add_tensor_info(name, dims, np.dtype(np.float32), n_bytes, raw_dtype=kind)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_ti_data_to_file()
        done_bytes = 0
        for name, dims, kind, n_bytes in tensors:
            w.write_tensor_data(random_tensor(rng, name, dims, kind, n_bytes))
            done_bytes += n_bytes
            progress(done_bytes, all_bytes)
        w.close()
        partial.replace(path)
    finally:
        w.close()
        partial.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="the GGUF file to write")
    parser.add_argument("--shape", choices=SHAPES, default="v2-lite")
    parser.add_argument("--layers", type=int, help="number of layers, default the shape's")
    parser.add_argument("--type", choices=RECIPES, default="Q4_K_M", dest="recipe")
    parser.add_argument("--vocab", type=Path, help="a GGUF file with the vocabulary to copy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.layers is not None:
        if args.layers < 1:
            parser.error(f"--layers {args.layers}: expected at least 1")
        shape = replace(shape, num_hidden_layers=args.layers)
    start_s = time.monotonic()

    def show(done_bytes, all_bytes):
        if sys.stderr.isatty() or done_bytes == all_bytes:
            taken_s = time.monotonic() - start_s
            print(f"\r{done_bytes / 1e9:6.2f} of {all_bytes / 1e9:.2f} GB, {taken_s:.0f} s ", end="", file=sys.stderr)

    args.path.parent.mkdir(parents=True, exist_ok=True)
    write_model(args.path, shape, args.recipe, vocab_path=args.vocab, seed=args.seed, progress=show)
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
