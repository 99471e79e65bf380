"""A model's name taken apart by the GGUF naming convention, base-size-finetune-version, and the label of its size.

As llama.cpp's converter does it.
"""

import math
import re
from collections.abc import Mapping

_VERSION = re.compile(r"(v|iter)?\d+(\.\d+)*", re.IGNORECASE)
_TYPE = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_SIZE = re.compile(r"((a|\d+x)?\d+([._]\d+)?[kmbt]\d?|small|mini|medium|large|x?xl)", re.IGNORECASE)
_FINETUNE = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)


def parts_of_name(model_id: str, n_weights: int) -> dict[str, str]:
    """deepseek-ai/DeepSeek-V2-Lite-Chat -> name, organization, basename, finetune; parts that it lacks are left out."""
    if " " in model_id:
        return {"name": model_id}
    organization, slash, full_name = model_id.partition("/")
    if not slash:
        organization, full_name = "", model_id
    words: list[str] = []
    kinds: list[str | None] = []
    for i, word in enumerate(filter(None, full_name.split("-"))):
        word, kind = _classify(word, i == 0, n_weights)
        words.append(word)
        kinds.append(kind)
    if any(kind == "size_label" and word[-2:-1].isdigit() for word, kind in zip(words, kinds, strict=True)):
        kinds = [None if k == "size_label" and w.isalpha() else k for w, k in zip(words, kinds, strict=True)]
    # The base is what comes first, up to the first word that is neither a plain one nor a version.
    n_base = 0
    while n_base < len(words) and (
        kinds[n_base] == "version" or (kinds[n_base] is None and words[n_base][0].isalpha())
    ):
        n_base += 1
    if n_base == len(words):
        while n_base and kinds[n_base - 1] == "version":
            n_base -= 1  # versions at the very end stand for themselves
    kinds = [*["basename"] * n_base, *(kind or "finetune" for kind in kinds[n_base:])]
    parts = {
        part: "-".join(dict.fromkeys(found) if part == "size_label" else found)
        for part in ("basename", "size_label", "finetune", "version")
        if (found := [word for word, kind in zip(words, kinds, strict=True) if kind == part])
    }
    if parts.keys() == {"basename"}:
        parts = {}  # one word alone may be anything
    if organization and not organization.startswith("."):
        parts["organization"] = _title(organization)
    return parts | {"name": _title(full_name)}


def _classify(word: str, is_first: bool, n_weights: int) -> tuple[str, str | None]:
    """A word of a name, its unit in the usual case, and what it is; None for any other word."""
    if _VERSION.fullmatch(word):
        return word, "version"
    if _TYPE.fullmatch(word):
        return word.upper(), "type"
    if not is_first and _SIZE.fullmatch(word):
        word = word.replace("_", ".")
        if word[-1].isdigit():  # 7b1 is 7.1B
            word = f"{word[:-2]}.{word[-1]}{word[-2]}"
        if word[-2:-1].isdigit():
            word = word[:-1] + word[-1].upper()
        try:
            claimed = float(word[:-1]) * 1000.0 ** " KMBT".find(word[-1])
        except ValueError:
            return word, "size_label"
        if abs(claimed - n_weights) > 7 * n_weights // 8:  # far off: rather a context length
            return word[:-1] + word[-1].lower(), "finetune"
        return word, "size_label"
    return word, "finetune" if not is_first and _FINETUNE.fullmatch(word) else None


def _title(name: str) -> str:
    """A name with capitals, but for versions and words that have some: deepseek-v2-lite -> Deepseek v2 Lite."""
    words = name.replace("-", " ").split()
    return " ".join(
        word.title() if word.islower() and not re.fullmatch(r"v\d+(\.\d+)*|\d.*", word) else word for word in words
    )


def size_label(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Weights of a model with one expert per layer, after the number of experts: 64x1.6B."""
    n_weights, counts = 0, []
    for name, shape in shapes.items():
        is_experts = "_exps." in name
        n_weights += math.prod(shape[1:] if is_experts else shape)
        if is_experts:
            counts.append(shape[0])
    units = (("T", 1e12), ("B", 1e9), ("M", 1e6))
    unit, scale = next(((unit, scale) for unit, scale in units if n_weights > scale), ("K", 1e3))
    value = n_weights / scale
    n_digits = len(str(round(value)).lstrip("0"))
    label = f"{value:.{max(2 - n_digits, 0)}f}{unit}"
    return f"{sum(counts) // len(counts)}x{label}" if counts else label
