"""What a GGUF file says about its model in general: names, licence, origins, and the sampling its makers recommend."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from edge_moe.safetensors import read_json
from edge_moe_export.naming import parts_of_name, size_label

_SAMPLING = {  # in generation_config.json: in GGUF; of two for one key the first counts
    "sequence": ("sequence", str),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "xtc_probability": ("xtc_probability", float),
    "xtc_threshold": ("xtc_threshold", float),
    "temperature": ("temp", float),
    "penalty_last_n": ("penalty_last_n", int),
    "penalty_repeat": ("penalty_repeat", float),
    "repetition_penalty": ("penalty_repeat", float),
    "mirostat": ("mirostat", int),
    "mirostat_tau": ("mirostat_tau", float),
    "mirostat_eta": ("mirostat_eta", float),
}
_PARTS = ("name", "author", "version", "organization", "finetune", "basename", "description", "size_label")
_LATE_NAMES = {
    "author": "model_creator",
    "basename": "model_type",
}  # in cards without the usual ones
_SOURCES = ("url", "doi", "uuid", "repo_url")
_ORIGIN_PARTS = ("name", "author", "version", "organization", "description", *_SOURCES)
_ORIGINS = {  # of GGUF: of cards, the first that is there counts
    "base_model": ("base_model", "base_models", "base_model_sources"),
    "dataset": ("datasets", "dataset", "dataset_sources"),
}
_HUB = "https://huggingface.co/"


def describe_model(folder: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, Any]:
    """The `general.` keys that follow from the folder's name, its README, generation_config.json and the tensors."""
    n_weights = sum(math.prod(shape) for shape in shapes.values())
    card = _front_matter(folder / "README.md")
    source = config.get("_name_or_path")
    names = [source] if isinstance(source, str) and source and source.count("/") <= 1 else []
    parts = _texts(card, _PARTS)
    for part, late_name in _LATE_NAMES.items():
        if part not in parts and isinstance(value := card.get(late_name), str):
            parts[part] = value
    for name in [*names, folder.resolve().name]:
        parts = parts_of_name(name, n_weights) | parts  # what is known already counts
    parts.setdefault("name", folder.resolve().name)
    parts.setdefault("size_label", size_label(shapes))
    keys = _sampling(folder) | {part: parts[part] for part in _PARTS if part in parts}
    licence = card.get("license")
    if isinstance(licence, list):
        licence = ",".join(each for each in licence if isinstance(each, str))
    licences = {"license": licence, "license.name": card.get("license_name"), "license.link": card.get("license_link")}
    keys |= {key: value for key, value in licences.items() if isinstance(value, str)}
    keys |= {f"source.{part}": text for part, text in _texts(card, _SOURCES).items()}
    for kind, names_in_card in _ORIGINS.items():
        for name in [name for name in names_in_card if name in card][:1]:
            keys |= _origins(kind, card[name], n_weights)
    for key, first, second in (("tags", "tags", "pipeline_tag"), ("languages", "languages", "language")):
        found = [*_as_list(card.get(first)), *_as_list(card.get(second))]
        if words := [each for each in found if isinstance(each, str)]:
            keys[key] = words
    return {f"general.{key}": value for key, value in keys.items()}


def _sampling(folder: Path) -> dict[str, Any]:
    """What generation_config.json recommends."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    keys: dict[str, Any] = {}
    for theirs, (ours, kind) in _SAMPLING.items():
        value = generation.get(theirs)
        if isinstance(value, str if kind is str else int | float) and not isinstance(value, bool):
            keys.setdefault(f"sampling.{ours}", np.int32(value) if kind is int else kind(value))
    return keys


def _texts(card: Mapping[str, Any], parts: Iterable[str]) -> dict[str, str]:
    """Values of a card by `part`, or else by `model_part`."""
    return {part: value for part in parts for key in (f"model_{part}", part) if isinstance(value := card.get(key), str)}


def _origins(kind: str, value: object, n_weights: int) -> dict[str, Any]:
    """The keys about models or data that a model was made from, given by name, by address or in parts."""
    origins = _as_list(value)
    keys: dict[str, Any] = {f"{kind}.count": len(origins)}
    for i, origin in enumerate(origins):
        parts = _origin_parts(origin, n_weights) if isinstance(origin, str) else origin
        if isinstance(parts, dict):
            keys |= {f"{kind}.{i}.{part}": parts[part] for part in _ORIGIN_PARTS if isinstance(parts.get(part), str)}
    return keys


def _origin_parts(origin: str, n_weights: int) -> dict[str, str]:
    """Name, organization, version and address of something on Hugging Face's hub; of other addresses these alone."""
    parts: dict[str, str] = {}
    model_id: str | None = origin
    if origin.startswith(("http://", "https://", "ssh://")):
        on_hub = re.match(r"https?://huggingface\.co/([^/]+/[^/]+)$", origin)
        parts, model_id = {"repo_url": origin}, on_hub and on_hub[1]
    if model_id is not None:
        found = parts_of_name(model_id, n_weights)
        if "organization" in found and not parts:
            parts["repo_url"] = _HUB + model_id
        parts |= {part: found[part] for part in ("name", "organization", "version") if part in found}
    return parts


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML between the `---` lines that a model card begins with; nothing where there is none that loads."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    if lines[:1] != ["---"]:
        return {}
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    # Norwegian's code would be read as "false"; tabs, which YAML does not allow, are in some cards.
    text = ("\n".join(lines[1:end]) + "\n").replace("- no\n", '- "no"\n').replace("\t", "  ")
    try:
        card = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}
