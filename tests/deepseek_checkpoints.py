"""Small checkpoints of DeepSeek's kind with all that may be beside the weights: cards, and each kind of vocabulary."""

import base64
import hashlib
import json
import random
import shutil
from pathlib import Path

import gguf
import numpy as np
from hf_checkpoints import GOLDEN, e4m3, hf_tensors, stored, write_hf_checkpoint, write_safetensors
from reference import read_gguf

SENTENCEPIECE_MODEL = Path(__file__).parent / "golden_llama" / "tokenizer.model"
N_RANKS = 420
CARD = """---
license: [mit, other]
license_name: modified # by a comment
license_link: https://example.org/L
base_model:
- some-org/Some-Model-v2-Chat
- https://huggingface.co/another/Base-7B-v1.5
- https://example.org/else
- "plain-name"
- {name: Own, author: Me, repo_url: "https://example.org/own", more: 1}
datasets: org/Text
model_creator: Some Org
author:
model_type: Tiny
url: https://example.org/model
model_doi: 10.1/2
description: >-
  two
  lines
language:
- en
- no
tags: [moe, "1"]
pipeline_tag: text-generation
---
# Title
"""
SAMPLING = {
    "top_k": 20, "top_p": 0.95, "temperature": 0.3, "repetition_penalty": 1.1, "mirostat": 2, "min_p": 0.1,
    "sequence": "k;p", "penalty_last_n": 64,
}  # fmt: skip
# The Python module that comes with the models; none of its code is ever run by us.
TOKENIZATION_MODULE = r'''
import base64
from pathlib import Path

import tiktoken
from transformers import PreTrainedTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode


class TikTokenTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tiktoken.model"}
    num_reserved_special_tokens = 256
    pat_str = "|".join(
        [
            r"""[\p{Han}]+""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    )

    def __init__(self, vocab_file, added_tokens_decoder=None, **kwargs):
        lines = Path(vocab_file).read_bytes().split()
        ranks = {base64.b64decode(token): int(rank) for token, rank in zip(lines[::2], lines[1::2])}
        named = {i: str(token) for i, token in (added_tokens_decoder or {}).items()}
        ids = range(len(ranks), len(ranks) + self.num_reserved_special_tokens)
        self.special_tokens = {named.get(i, f"<|reserved_token_{i}|>"): i for i in ids}
        tokens = {"mergeable_ranks": ranks, "special_tokens": self.special_tokens}
        self.model = tiktoken.Encoding("kimi", pat_str=self.pat_str, **tokens)
        letters = bytes_to_unicode()
        all_bytes = map(self.model.decode_single_token_bytes, range(ids.stop))
        self.decoder = {i: "".join(letters[b] for b in token) for i, token in enumerate(all_bytes)}
        self.encoder = {text: i for i, text in self.decoder.items()}
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.decoder)

    def get_vocab(self):
        return self.encoder

    def _tokenize(self, text, **kwargs):
        return [self.decoder[i] for i in self.model.encode(text, allowed_special="all")]

    def _convert_token_to_id(self, token):
        return self.encoder.get(token)

    def _convert_id_to_token(self, index):
        return self.decoder.get(index)
'''


def write_json(path, document):
    path.write_text(json.dumps(document), encoding="utf-8")


def edited_config(folder, **values):
    """Change a config.json; None takes a key away, as it does those that were null."""
    config = json.loads((folder / "config.json").read_text()) | values
    write_json(folder / "config.json", {key: value for key, value in config.items() if value is not None})


def grow_vocabulary(folder, golden, vocab_size, dtype="BF16"):
    """Give a golden model's weights as many rows as a vocabulary has tokens."""
    weights = hf_tensors(read_gguf(GOLDEN / f"{golden}.gguf")[1])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = np.resize(weights[name], (vocab_size, weights[name].shape[1]))
    write_safetensors(folder / "model.safetensors", {name: stored(value, dtype) for name, value in weights.items()})


def made_up_ranks(seed=0):
    """All bytes in a mixed order, then tokens of two known ones each, as training makes them; some of them are not."""
    rng = random.Random(seed)
    single = [bytes([byte]) for byte in range(256)]
    rng.shuffle(single)
    ranks = {token: rank for rank, token in enumerate(single)}
    letters = [bytes([byte]) for byte in b"  \n.adehinorstw0123"] + [bytes([byte]) for byte in "你漢е".encode()]
    pool = list(letters)
    while len(ranks) < N_RANKS:
        token = rng.choice(pool) + rng.choice(pool)
        if len(ranks) % 40 == 0:
            token += rng.choice(letters) + rng.choice(letters)  # perhaps not to be reached by merges
        if len(token) < 9 and token not in ranks:
            ranks[token] = len(ranks)
            pool.append(token)
    return ranks


def kimi_folder(folder, *, vocab_size=N_RANKS + 256 + 4, ranks=None):
    """A checkpoint with a tiktoken.model -> its ranks."""
    write_hf_checkpoint(folder, "v3")
    (folder / "tokenizer.json").unlink()
    ranks = ranks or made_up_ranks()
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    names = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 9: "<think>", 254: "[UNK]", 255: "[PAD]"}
    config = {
        "added_tokens_decoder": {
            str(N_RANKS + i): {"content": text, "special": text != "<think>"} for i, text in names.items()
        },
        "bos_token": "[BOS]",
        "eos_token": "<|im_end|>",
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "tokenization_moonshot.py").write_text(TOKENIZATION_MODULE)
    edited_config(folder, vocab_size=vocab_size, bos_token_id=N_RANKS, eos_token_id=N_RANKS + 2)
    grow_vocabulary(folder, "v3", vocab_size)
    return ranks


def sentencepiece_folder(folder, *, vocab_size=402):
    """A checkpoint with a tokenizer.model of 380 pieces, and tokens that other files add to them."""
    write_hf_checkpoint(folder, "v3")
    (folder / "tokenizer.json").unlink()
    shutil.copy(SENTENCEPIECE_MODEL, folder / "tokenizer.model")
    write_json(folder / "added_tokens.json", {"<more>": 391, "<late>": 5000})
    added = {
        "1": {"content": "<s>", "special": True},
        "392": {"content": "<|im|>", "special": False},
        "393": {"content": "▁▁x", "special": False},
        "394": {"content": "<q>", "special": True},
        "9999": {"content": "<z>", "special": True},
    }
    config = {"add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": added, "bos_token": "<s>"}
    write_json(folder / "tokenizer_config.json", config)
    edited_config(folder, vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, pad_token_id=395, sep_token_id=5000)
    grow_vocabulary(folder, "v3", vocab_size)


def glm_folder(folder):
    """GLM-4.7-Flash: other special tokens, and several ids that end a text."""
    config = write_hf_checkpoint(folder, "v3")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = len(tokenizer["model"]["vocab"])
    flags = {key: value for key, value in tokenizer["added_tokens"][0].items() if key not in ("id", "content")}
    for i, text in enumerate(("<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>", "<think>")):
        row = {"id": first + i, "content": text, **flags, "special": text != "<think>"}
        tokenizer["added_tokens"].append(row)
    tokenizer["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    write_json(folder / "tokenizer.json", tokenizer)
    end = "<|endoftext|>"
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    write_json(folder / "tokenizer_config.json", names)
    edited_config(
        folder, architectures=["Glm4MoeLiteForCausalLM"], model_type="glm4_moe_lite", vocab_size=first + 8,
        eos_token_id=[first, first + 2, first + 3], pad_token_id=first, bos_token_id=None, rope_theta=None,
        rope_scaling=None,
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
    )  # fmt: skip
    grow_vocabulary(folder, "v3", first + 8)


def fp8_checkpoint(folder, golden, block):
    """A golden model whose projections are FP8 with one scale per block -> what they decode to, by name."""
    config = write_hf_checkpoint(folder, golden)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block], "fmt": "e4m3"}
    write_json(folder / "config.json", config)
    _, tensors = read_gguf(GOLDEN / f"{golden}.gguf")
    numbers = np.array([e4m3(code) for code in range(127)], np.float32)  # the positive ones, ascending
    everything, decoded = {}, {}
    for name, value in hf_tensors(tensors).items():
        decoded[name] = value
        everything[name] = ("F32", value)
        if name.endswith("_proj.weight") and "eh_proj" not in name:
            n_rows, n_cols = (-(-size // block) for size in value.shape)
            scales = np.empty((n_rows, n_cols), np.float32)
            codes = np.empty(value.shape, np.uint8)
            decoded[name] = np.empty_like(value)
            for i in range(n_rows):
                for j in range(n_cols):
                    at = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
                    scales[i, j] = np.abs(value[at]).max() / 448
                    nearest = np.abs(np.abs(value[at])[..., None] / scales[i, j] - numbers).argmin(-1)
                    codes[at] = nearest | np.where(value[at] < 0, 128, 0)
                    decoded[name][at] = np.where(value[at] < 0, -1, 1) * numbers[nearest] * scales[i, j]
            everything[name] = ("F8_E4M3", codes)
            everything[f"{name}_scale_inv"] = ("F32", scales)
    write_safetensors(folder / "model.safetensors", everything)
    return decoded


def _with_card(folder):
    write_hf_checkpoint(folder, "v2_lite", dtype="F16")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    write_json(folder / "generation_config.json", SAMPLING)


def _with_template(folder):
    write_hf_checkpoint(folder, "v3", dtype="BF16", n_files=3)
    edited_config(folder, _name_or_path="some-org/Some-V3-8x1B-Chat")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")


CHECKPOINTS = {  # the folder's name: who writes it
    "DeepSeek-V2-tiny-Chat": _with_card,
    "deepseek-v2-236b-base": lambda folder: write_hf_checkpoint(folder, "v2_groups", dtype="F32"),
    "tied": lambda folder: write_hf_checkpoint(folder, "v2_tied", dtype="BF16"),
    "DeepSeek-V3-0324": _with_template,
    "DeepSeek-R1-fp8": lambda folder: fp8_checkpoint(folder, "v3", 16),
    "no-norm": lambda folder: write_hf_checkpoint(folder, "v3_no_norm", dtype="BF16"),
    "with-mtp": lambda folder: write_hf_checkpoint(folder, "v3_lite", dtype="BF16"),
    "GLM-4.7-Flash": glm_folder,
    "Moonlight-16B-A3B-Instruct": kimi_folder,
    "sentencepiece": sentencepiece_folder,
}


def described(path):
    """A GGUF file in short -> keys, with a digest of each long list, and a text for each tensor."""
    reader = gguf.GGUFReader(path)
    keys = {}
    for name, field in reader.fields.items():
        value = field.contents()
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, list) and len(value) > 8:
            value = f"{len(value)} values, {hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]}"
        if not name.startswith("GGUF."):
            keys[name] = value
    tensors = {}
    for tensor in reader.tensors:
        shape = "x".join(str(n) for n in reversed(tensor.shape.tolist()))
        digest = hashlib.sha256(tensor.data.tobytes()).hexdigest()[:16]
        tensors[tensor.name] = f"{tensor.tensor_type.name} {shape} {digest}"
    return keys, tensors
