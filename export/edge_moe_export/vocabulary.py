"""The byte-level BPE tokenizer of a Hugging Face folder as the `tokenizer.` keys of a GGUF file."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edge_moe.errors import FormatError, UnsupportedError
from edge_moe.safetensors import read_json
from edge_moe.vocabulary import TokenKind
from edge_moe_export.hyperparameters import HyperParameters

_IDS = {  # by the name in tokenizer_config.json; the last but one is misspelt in GGUF
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "sep": "seperator_token_id",
    "pad": "padding_token_id", "mask": "mask_token_id", "eot": "eot_token_id", "eom": "eom_token_id",
}  # fmt: skip

# llama.cpp knows a pre-tokenizer by the SHA-256 of the ids of this text, written as a Python list.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you "
    "sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
_NAMES_BY_HASH = {
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
    "9ca2dd618e8afaf09731a7cf6e2105b373ba6a1821559f258b272fe83e6eb902": "glm4",
    "a1336059768a55c99a734006ffb02203cd450fed003e9a71886c88acf24fdbc2": "glm4",
    "cdf5f35325780597efd76153d4d1c16778f766173908894c04afc20108536267": "glm4",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "ad851be1dba641f2e3711822f816db2c265f788b37c63b4e1aeacb9ee92de8eb": "gigachat",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",
    "1994ffd01900cfb37395608534236ecd63f2bd5995d6cb1004dda1af50240f15": "trillion",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "f6791d196f87ce6b56a7d234be618e0d58f8cda3549416635b2bebcd22cd95c4": "midm-2.0",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "4a2e2abae11ca2b86d570fc5b44be4d5eb5e72cc8f22dd136a94b37da83ab665": "kormo",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "36f3066e97b7f3994b379aaacde306c1444c6ae84e81a5ae3cd2b7ed3b8c42d4": "minicpm5",
    "4e2b24cc4770243d65a2c9ec19770a72f08cffc161adbb73fcbb6b7dd45a0aae": "exaone",
}
# Others are known by their regular expressions. "gpt-2" stands for the one that is built into ByteLevel.
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACE
_NAMES_BY_PATTERNS = {
    ("gpt-2",): "gpt-2",
    ("a digit", "gpt-2"): "smollm",
    (_LLAMA3,): "dbrx",
    (_LLAMA3.replace("{1,3}", ""),): "qwen2",
    (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACE,
    ): "deepseek-v3",
}


def vocabulary_metadata(folder: Path, params: HyperParameters) -> dict[str, Any]:
    """All `tokenizer.` keys. Raises FormatError (damaged) and UnsupportedError (no byte-level BPE)."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedError(
            f"{path}: no such file; convert needs a tokenizer.json, tokenizer.model or (of Kimi) tiktoken.model there"
        )
    tokenizer = read_json(path)
    config = tokenizer_config(folder)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        kind = model.get("type") if isinstance(model, dict) else model
        raise UnsupportedError(f"{path}: its model is {str(kind)[:40]!r}, only byte-level BPE is read here")
    loaded = load_tokenizer(path)
    added = added_tokens(loaded, config, folder)
    tokens, kinds = _tokens(loaded, added, params.integer("vocab_size"), path)
    special = SpecialTokens(tokenizer, config, loaded, path)
    special.take_ids(params)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(path, tokenizer, loaded, special.texts.get("bos"), params),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": _merges(model, path),
        **special.metadata(),
        **chat_templates(folder, config),
    }


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """The folder's tokenizer_config.json, empty where it has none."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json as the library has it. Raises FormatError."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no type of its own
        raise FormatError(f"{path}: is no tokenizer ({str(error)[:80]}); download the file again") from None


# ---- tokens ---------------------------------------------------------------------------------------------------------


def added_tokens(loaded: Tokenizer | None, config: Mapping[str, Any], folder: Path) -> dict[int, tuple[str, bool]]:
    """Tokens beside the merges: text, and whether it is special, by the id that the tokenizers library gives them."""
    rows = loaded.get_added_tokens_decoder() if loaded else {}
    added = {token_id: (row.content, row.special) for token_id, row in rows.items()}
    for text, row in (config.get("added_tokens_decoder") or {}).items():
        if not text.isdecimal() or not isinstance(row, dict) or not isinstance(row.get("content"), str):
            raise FormatError(f"{folder}: tokenizer_config.json has an added token {text[:20]!r} without a text")
        added[int(text)] = (row["content"], bool(row.get("special")))
    return added


def _tokens(
    loaded: Tokenizer, added: Mapping[int, tuple[str, bool]], vocab_size: int, path: Path
) -> tuple[list[str], list[int]]:
    """Texts and kinds of all ids below vocab_size; ids without a token are unused."""
    texts = {token_id: text for text, token_id in loaded.get_vocab().items()} | {i: row[0] for i, row in added.items()}
    if (largest := max(texts, default=0)) >= vocab_size:
        raise FormatError(
            f"{path}: has a token {largest}, expected ids below the vocab_size {vocab_size} of config.json"
        )
    tokens, kinds = [], []
    for token_id in range(vocab_size):
        text = texts.get(token_id)
        kind = TokenKind.NORMAL
        if text is None:
            text, kind = f"[PAD{token_id}]", TokenKind.UNUSED
        elif token_id in added:
            is_control = added[token_id][1] or looks_special(text)
            kind = TokenKind.CONTROL if is_control else TokenKind.USER_DEFINED
            text = text if is_control else text.replace("▁", " ")
        tokens.append(text)
        kinds.append(int(kind))
    return tokens, kinds


def looks_special(text: str) -> bool:
    """Some models do not mark their control tokens, which show by their form."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or any(text.startswith(first) and text.endswith(last) for first, last in (("<|", "|>"), ("<｜", "｜>")))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _merges(model: Mapping[str, Any], path: Path) -> list[str]:
    """Merges as `left right`; a space inside a part is written as its byte-level character."""
    merges = model.get("merges")
    if not isinstance(merges, list) or not merges:
        raise FormatError(f"{path}: has no merges; download the file again")
    out = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise FormatError(f"{path}: merge {str(merge)[:40]!r} is no pair of texts; download the file again")
        out.append(" ".join(part.replace(" ", "Ġ") for part in pair))
    return out


# ---- special tokens -------------------------------------------------------------------------------------------------


class SpecialTokens:
    """The ids of special tokens by role, and which of them a text begins or ends with."""

    def __init__(
        self, tokenizer: Mapping[str, Any], config: Mapping[str, Any], loaded: Tokenizer | None, path: Path
    ) -> None:
        """Of a tokenizer.json and what the library makes of it, where there is one, and a tokenizer_config.json."""
        self.ids: dict[str, int] = {}
        self.added_at_ends: dict[str, bool] = {}
        rows = loaded.get_added_tokens_decoder().items() if loaded else ()
        self._added = {row.content: token_id for token_id, row in rows}
        roles = ("bos", "eos", "unk", "sep", "pad", "mask")
        self.texts = {role: text for role in roles if (text := text_of(config.get(f"{role}_token")))}
        post = tokenizer.get("post_processor") or {}
        for processor in post.get("processors", [post]):
            if processor.get("type") == "ByteLevel":
                self.added_at_ends.setdefault("bos", False)
                self.added_at_ends.setdefault("eos", False)
            elif processor.get("type") == "TemplateProcessing":
                self._read_template(processor)
            elif processor.get("type") is not None:
                raise UnsupportedError(f"{path}: post_processor {str(processor.get('type'))[:40]!r} is not read here")
        for role in roles:
            if isinstance(flag := config.get(f"add_{role}_token"), bool) and role in ("bos", "eos", "sep"):
                self.added_at_ends.setdefault(role, flag)

    def _read_template(self, processor: Mapping[str, Any]) -> None:
        """What a single text, and what a pair of texts is framed by."""
        single = [_special_of(item) for item in processor.get("single") or []]
        pair = [_special_of(item) for item in processor.get("pair") or []]
        first = last = None
        if len(single) > 1 and (first := single[0]):
            self.texts.setdefault("bos", first)
            self.added_at_ends["bos"] = first == self.texts["bos"]
        if len(single) > 1 and (last := single[-1]):
            if last != self.texts.get("eos") and "eos" in self.texts:
                self.texts["eot"] = self.texts["eos"]  # what ends a text differs from what ends a turn
            self.texts["eos"] = last
            self.added_at_ends["eos"] = True
        if first and pair[:1] == [first]:
            pair = pair[1:]
        if last and pair[-1:] == [last]:
            pair = pair[:-1]
        between = pair[1:-1]
        if len(pair) > 2 and pair[0] is None and pair[-1] is None:
            ends = (self.texts.get("sep"), self.texts.get("eos"))
            add = (between[0] is not None and between[0] in ends and not last) or (
                len(between) == 2 and between[1] is not None and between[1] in ends
            )
            self.added_at_ends["sep"] = add
            if add and "sep" not in self.texts and "eos" in self.texts:
                self.texts["sep"] = self.texts["eos"]

    def take_ids(self, params: HyperParameters) -> None:
        """Find the ids: by the texts of tokenizer_config.json, then as config.json says, then by the model's family."""
        for role, text in self.texts.items():
            if isinstance(token_id := self._added.get(text), int):
                self.ids[role] = token_id
        for role in ("bos", "eos", "unk", "sep", "pad", "mask"):
            token_id = params.get(f"{role}_token_id")
            if type(token_id) is int and 0 <= token_id < params.integer("vocab_size"):
                self.ids.setdefault(role, token_id)
        if params.architecture == "Glm4MoeLiteForCausalLM":
            family = {"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"}
            for role, text in family.items():
                if text in self._added:
                    self.ids.setdefault(role, self._added[text])

    def metadata(self) -> dict[str, Any]:
        """The keys of what was found."""
        ids = {f"tokenizer.ggml.{_IDS[role]}": token_id for role, token_id in self.ids.items()}
        return ids | {f"tokenizer.ggml.add_{role}_token": flag for role, flag in self.added_at_ends.items()}


def text_of(token: object) -> str | None:
    """The text of a token that tokenizer_config.json gives as a text or an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _special_of(item: Mapping[str, Any]) -> str | None:
    """The special token that an item of a template stands for; None for a text."""
    return (item.get("SpecialToken") or {}).get("id")


# ---- how text is split, and chats -----------------------------------------------------------------------------------


def _pre_tokenizer(
    path: Path, tokenizer: Mapping[str, Any], loaded: Tokenizer, bos: str | None, params: HyperParameters
) -> str:
    """The name that `tokenizer.ggml.pre` has for this tokenizer's splitting rules."""
    ids = loaded.encode(CHECK_TEXT).ids
    # The hashes were made with transformers, which adds the first token by tokenizer_config.json instead of the file.
    bos_id = loaded.token_to_id(bos) if bos else None
    for candidate in (ids, [bos_id, *ids], loaded.encode(CHECK_TEXT, add_special_tokens=False).ids):
        name = _NAMES_BY_HASH.get(hashlib.sha256(str(candidate).encode()).hexdigest())
        if name:
            return name
    patterns = _patterns(tokenizer.get("pre_tokenizer") or {})
    name = _NAMES_BY_PATTERNS.get(tuple(patterns))
    if name == "dbrx" and tokenizer["model"].get("ignore_merges"):
        # the same pattern, with words that are tokens taken whole
        name = "llama-bpe" if params.gguf_architecture == "llama" else "glm4"
    if name is None:
        raise UnsupportedError(
            f"{path}: its pre-tokenizer is none that is known here; "
            f"its patterns are {json.dumps(patterns, ensure_ascii=False)[:160]}"
        )
    return name


def _patterns(pre_tokenizer: Mapping[str, Any]) -> list[str]:
    """The regular expressions of a pre-tokenizer, in order."""
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return [pattern for part in pre_tokenizer.get("pretokenizers") or [] for pattern in _patterns(part)]
    if kind == "ByteLevel":
        space = ["a space before the text"] if pre_tokenizer.get("add_prefix_space") else []
        return space + (["gpt-2"] if pre_tokenizer.get("use_regex", True) else [])
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return ["a digit"]
    pattern = pre_tokenizer.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    is_plain = kind == "Split" and pre_tokenizer.get("behavior") == "Isolated" and not pre_tokenizer.get("invert")
    return [regex if is_plain and isinstance(regex, str) else str(kind)]


def chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The default chat template, and others by name."""
    template = config.get("chat_template")
    if template is None and (folder / "chat_template.jinja").is_file():
        template = _read_text(folder / "chat_template.jinja")
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        if others:
            template = [{"name": "default", "template": template}]
            template += [{"name": other.stem, "template": _read_text(other)} for other in others]
    elif template is None and (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    keys: dict[str, Any] = {}
    names = []
    for choice in template if isinstance(template, list) else []:
        choice = choice if isinstance(choice, dict) else {}
        text, name = choice.get("template"), str(choice.get("name", ""))
        name = "".join(c if c in ascii_letters + digits else "_" for c in name)
        if isinstance(text, str) and name == "default":
            keys["tokenizer.chat_template"] = text
        elif isinstance(text, str) and name:
            keys[f"tokenizer.chat_template.{name}"] = text
            names.append(name)
    return keys | ({"tokenizer.chat_templates": names} if names else {})


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError:
        raise FormatError(f"{path}: is not UTF-8; download the file again") from None
