"""Which block format each tensor of a file becomes: the usual recipes by llama.cpp's rules, and changes to them.

A recipe in text has a line for each rule, a pattern and a type; the last line that fits a tensor counts. A pattern is a
tensor's name, or else a regular expression that is found anywhere in a name.

Source: llama-quant.cpp of llama.cpp (the choice by tensor, and what stands in where rows are not whole blocks).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edge_moe.errors import OptionError, UnsupportedError
from edge_moe.formats import FORMATS, BlockFormat
from edge_moe.metadata import ARCHITECTURES

FORMATS_BY_NAME = {fmt.name: fmt for fmt in FORMATS}

# Name -> format of most matrices, and the number that `general.file_type` has for it.
RECIPES: dict[str, tuple[str, int]] = {
    "F32": ("F32", 0), "F16": ("F16", 1), "BF16": ("BF16", 32),
    "Q8_0": ("Q8_0", 7), "Q6_K": ("Q6_K", 18), "Q5_K_M": ("Q5_K", 17), "Q5_K_S": ("Q5_K", 16),
    "Q4_K_M": ("Q4_K", 15), "Q4_K_S": ("Q4_K", 14), "Q3_K_L": ("Q3_K", 13), "Q3_K_M": ("Q3_K", 12),
    "Q3_K_S": ("Q3_K", 11), "Q2_K": ("Q2_K", 10), "Q5_1": ("Q5_1", 9), "Q5_0": ("Q5_0", 8), "Q4_1": ("Q4_1", 3),
    "Q4_0": ("Q4_0", 2), "IQ4_NL": ("IQ4_NL", 25), "IQ4_XS": ("IQ4_XS", 30),
}  # fmt: skip
FILE_TYPES = {  # of a file by its commonest format, when no recipe was named
    "F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q6_K": 18, "Q5_K": 17, "Q4_K": 15, "Q3_K": 12, "Q2_K": 10,
    "Q5_1": 9, "Q5_0": 8, "Q4_1": 3, "Q4_0": 2, "IQ4_NL": 25, "IQ4_XS": 30,
}  # fmt: skip
_FALLBACK = {"IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class ModelFacts:
    """What the rules ask of a model besides its tensors' names and shapes."""

    n_layers: int
    n_experts: int
    heads_per_kv_head: int
    values_are_few: bool = False  # so much fewer than queries that they get more bits

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> "ModelFacts":
        """Of a GGUF file's metadata. Raises UnsupportedError for other architectures."""
        architecture = metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"architecture {architecture!r}, expected one of {', '.join(ARCHITECTURES)}: only models that "
                "edge_moe runs can be quantized"
            )

        def number(key: str, default: int) -> int:
            value = metadata.get(f"{architecture}.{key}", default)
            return value if isinstance(value, int) else default

        heads, kv_heads = number("attention.head_count", 1), number("attention.head_count_kv", 0)
        n_layers, sharing = number("block_count", 1), heads // kv_heads if kv_heads else 1
        large = architecture == "llama" and n_layers == 80 and sharing > 1  # Llama 2 and 3 of 70 B
        return cls(n_layers, number("expert_count", 0), sharing, large)


@dataclass(frozen=True)
class Rule:
    """A line of a recipe: tensors that the pattern fits become this format."""

    pattern: str
    format: BlockFormat


def parse_rule(pattern: str, type_name: str, where: str) -> Rule:
    """A rule from its two words. Raises OptionError for unknown types and expressions that are none."""
    fmt = FORMATS_BY_NAME.get(type_name.upper())
    if fmt is None:
        raise OptionError(f"{where}: type {type_name!r} is not one of {', '.join(FORMATS_BY_NAME)}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise OptionError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    return Rule(pattern, fmt)


def parse_recipe(text: str, where: str) -> list[Rule]:
    """The rules of a recipe in text; `#` begins a remark. Raises OptionError that names the line."""
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2:
            raise OptionError(f"{where}, line {number}: expected a pattern and a type, found {line.strip()!r}")
        rules.append(parse_rule(words[0], words[1], f"{where}, line {number}"))
    return rules


def choose_formats(
    shapes: Mapping[str, tuple[int, ...]],
    facts: ModelFacts,
    recipe: str | None,
    rules: Sequence[Rule] = (),
    *,
    has_importance: bool = False,
) -> dict[str, BlockFormat]:
    """The format of every tensor: by the named recipe, then by the last rule that fits; norms and router stay F32.

    Rows that are not whole blocks get the format that llama.cpp takes instead.
    Raises OptionError for an unknown recipe, for tensors that nothing chooses a format for, and for rules without use.
    """
    if recipe is not None and recipe not in RECIPES:
        raise OptionError(f"type {recipe!r} is not one of {', '.join(RECIPES)}")
    n_values = sum(_holds_values(name) for name in shapes)
    used: set[int] = set()
    chosen = {}
    i_values = 0
    for name in _in_layers(shapes):
        shape = shapes[name]
        fitting = [i for i, rule in enumerate(rules) if fits(rule.pattern, name, shapes)]
        used.update(fitting)
        if not is_quantizable(name, shape):
            chosen[name] = FORMATS_BY_NAME["F32"]
            continue
        if fitting:
            wanted = rules[fitting[-1]].format.name
        elif recipe is not None:
            tied = name == "token_embd.weight" and "output.weight" not in shapes
            wanted = _by_recipe(
                name, shape, recipe, facts, has_importance, is_output=tied or name == "output.weight",
                i_values=i_values, n_values=n_values,
            )  # fmt: skip
        else:
            raise OptionError(f"the recipe has no line for tensor {name}; add one, or name a --type for the rest")
        i_values += _holds_values(name)
        chosen[name] = fitting_format(wanted, shape[-1])
    for i, rule in enumerate(rules):
        if i not in used:
            raise OptionError(f"pattern {rule.pattern!r} fits no tensor of the model; `edge-moe info` lists them")
    return {name: chosen[name] for name in shapes}


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix, or a stack of some, that is neither norm nor router."""
    n_dims = max((len(shape) - i for i, size in enumerate(shape) if size > 1), default=1)  # as ggml counts
    return n_dims >= 2 and name.endswith("weight") and "_norm.weight" not in name and "ffn_gate_inp.weight" not in name


def fitting_format(name: str, n_cols: int) -> BlockFormat:
    """The format, or what stands in for it where rows of n_cols are not whole blocks."""
    for candidate in (name, _FALLBACK.get(name, name), "F16"):
        if n_cols % FORMATS_BY_NAME[candidate].block_size == 0:
            break
    return FORMATS_BY_NAME[candidate]


def recipe_text(formats: Mapping[str, BlockFormat], shapes: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
    """The lines of a recipe that gives these formats; norms and router, which are always F32, are left out."""
    for name, fmt in formats.items():
        if is_quantizable(name, shapes[name]):
            yield f"{name} {fmt.name}"


def fits(pattern: str, name: str, names: Mapping[str, object]) -> bool:
    """Whether a rule's pattern is for the tensor `name`, one of `names`."""
    return pattern == name if pattern in names else re.search(pattern, name) is not None


def _in_layers(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names by layer, since one rule counts tensors in that order."""

    def layer(name: str) -> int:
        found = _LAYER.match(name)
        return int(found[1]) if found else -1

    return sorted(shapes, key=layer)


def _by_recipe(
    name: str,
    shape: tuple[int, ...],
    recipe: str,
    facts: ModelFacts,
    has_importance: bool,
    *,
    is_output: bool,
    i_values: int,
    n_values: int,
) -> str:
    """The name of the format that llama.cpp chooses for one matrix, before its row length is looked at."""
    base = RECIPES[recipe][0]
    if base in ("F32", "F16", "BF16"):
        return base
    if is_output:
        return "Q8_0" if base == "Q8_0" or shape[-1] % FORMATS_BY_NAME[base].block_size else "Q6_K"
    n = facts.n_layers
    found = _LAYER.match(name)
    layer = int(found[1]) if found else 0
    if _holds_values(name):
        fmt = _for_values(recipe, base, facts, i_values, n_values)
        return "Q5_K" if facts.values_are_few and fmt in ("Q3_K", "Q4_K") else fmt
    if "attn_k.weight" in name and facts.n_experts == 8:
        return "Q8_0"
    if "ffn_down" in name:
        if recipe in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if _more_bits(layer, n) else base
        if recipe == "Q3_K_M":
            return "Q5_K" if layer < n // 16 else "Q4_K"
        if recipe == "Q4_K_S" or (recipe in ("IQ4_NL", "IQ4_XS") and not has_importance):
            return "Q5_K" if layer < n // 8 else base
        if recipe in ("Q4_0", "Q5_0") and has_importance:
            return base.replace("_0", "_1") if layer < n // 8 else base
        return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(recipe, base)
    if "attn_output.weight" in name:
        if facts.n_experts == 8:
            return "Q5_K" if recipe in _OUTPUT_OF_EIGHT else base
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(recipe, base)
    return base


_OUTPUT_OF_EIGHT = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "IQ4_XS", "Q4_K_S", "Q4_K_M")


def _more_bits(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _holds_values(name: str) -> bool:
    """Whether a tensor makes values, alone or, in older files of latent attention, together with keys."""
    return "attn_v.weight" in name or "attn_kv_b.weight" in name


def _for_values(recipe: str, base: str, facts: ModelFacts, i: int, n: int) -> str:
    many = facts.heads_per_kv_head >= 4
    if facts.n_experts == 8:
        return "Q8_0"
    if recipe in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(i, n) else base
    if recipe == "Q2_K":
        return "Q4_K" if many else "Q3_K"
    if recipe == "Q3_K_M":
        return "Q5_K" if i < 2 else "Q4_K"
    if recipe == "Q4_K_S":
        return "Q5_K" if i < 4 else base
    if recipe in ("IQ4_NL", "IQ4_XS"):
        return "Q5_K" if many else base
    return "Q5_K" if recipe == "Q3_K_L" else base
