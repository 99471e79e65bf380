"""Writes Hugging Face checkpoints of Llama's family for tests, without torch: the goldens, each with a tokenizer."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
from hf_checkpoints import hf_tokenizer, stored, write_safetensors
from reference import read_gguf

GOLDEN = Path(__file__).parent / "golden_llama"
PIECES = GOLDEN / "tokenizer.model"  # SentencePiece's own, made by tools/make_converted_goldens.py
CONVERTED = GOLDEN / "tokenizer.json"  # the same as transformers converts it
TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# name: golden, tokenizer, what else is in the files
CHECKPOINTS = {
    "llama-tiny-chat": ("llama", "bytes", {"config": {"rope_parameters": None, "head_dim": None}}),
    "Llama-3-8B-Instruct": ("llama3", "bytes", {"pattern": LLAMA3_WORDS, "config": {"eos_token_id": [1, 2]}}),
    "linear": ("llama_linear", "pieces", {}),
    "Mistral-7B-v0.1": ("mistral", "both", {"vocab_size": 400, "config": {"pad_token_id": 400}}),
    "Mixtral-8x7B-Instruct-v0.1": ("mixtral", "converted", {"tokenizer_config": {"add_prefix_space": False}}),
}


def read_safetensors(path):
    """-> name: f32 array."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header, out = json.loads(data[8 : 8 + n]), {}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32"
            start, end = entry["data_offsets"]
            out[name] = np.frombuffer(data[8 + n + start : 8 + n + end], np.float32).reshape(entry["shape"])
    return out


def write_llama_checkpoint(folder, name, *, dtype="F32"):
    """Write one of CHECKPOINTS to a folder; the embeddings' rows are repeated up to the tokenizer's vocabulary."""
    golden, tokenizer, more = CHECKPOINTS[name]
    folder.mkdir(parents=True)
    config = json.loads((GOLDEN / golden / "config.json").read_text())
    files = {}
    tokenizer_config = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True, "normalized": False},
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": TEMPLATE,
    }
    if tokenizer == "bytes":
        files["tokenizer.json"], tokenizer_config = hf_tokenizer(read_gguf(GOLDEN / f"{golden}.gguf")[0])
        if pattern := more.get("pattern"):
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            to_bytes = files["tokenizer.json"]["pre_tokenizer"] | {"use_regex": False}
            files["tokenizer.json"]["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, to_bytes]}
            files["tokenizer.json"]["model"]["ignore_merges"] = True
            del tokenizer_config["chat_template"]
            (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        n_tokens = len(files["tokenizer.json"]["model"]["vocab"])
        config |= {"bos_token_id": 0, "eos_token_id": 1}
    else:
        config |= {"bos_token_id": 1, "eos_token_id": 2}
        n_tokens = len(json.loads(CONVERTED.read_text())["model"]["vocab"])
        if tokenizer in ("pieces", "both"):
            shutil.copy(PIECES, folder / "tokenizer.model")
        if tokenizer in ("converted", "both"):
            files["tokenizer.json"] = json.loads(CONVERTED.read_text())
        if tokenizer == "both":
            files["added_tokens.json"] = {"<extra>": n_tokens, "<beyond>": 4000}
            row = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
            tokenizer_config["added_tokens_decoder"] = {
                str(i): {"content": text, "special": special, **row}
                for i, text, special in ((0, "<unk>", True), (1, "<s>", True), (2, "</s>", True))
            } | {
                str(n_tokens + 1): {"content": "▁▁two", "special": False, **row},
                str(n_tokens + 2): {"content": "<|tool|>", "special": False, **row},
            }
        if tokenizer == "converted":
            files["tokenizer.json"]["added_tokens"] += [
                {
                    "id": n_tokens + i, "content": text, "special": special, "normalized": False,
                    "single_word": False, "lstrip": False, "rstrip": False,
                }
                for i, (text, special) in enumerate((("<pad>", True), ("<call>", False)))
            ]  # fmt: skip
            tokenizer_config["pad_token"] = "<pad>"
            n_tokens += 2
    config["vocab_size"] = more.get("vocab_size", n_tokens)
    config |= more.get("config", {})
    files |= {"config.json": config, "tokenizer_config.json": tokenizer_config | more.get("tokenizer_config", {})}
    tensors = {
        key: np.resize(value, (config["vocab_size"], value.shape[1])) if "embed" in key or "lm_head" in key else value
        for key, value in read_safetensors(GOLDEN / golden / "model.safetensors").items()
    }
    write_safetensors(folder / "model.safetensors", {key: stored(value, dtype) for key, value in tensors.items()})
    for file, document in files.items():
        (folder / file).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return folder
