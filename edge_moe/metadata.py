"""Reads a model's config from GGUF metadata, every value checked for its type, its range and against the others."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edge_moe.config import DeepseekV2Config, LlamaConfig, ModelConfig, RopeScaling
from edge_moe.errors import FormatError, UnsupportedError
from edge_moe.gguf import GGUFFile


def read_config(gguf: GGUFFile, *, has_weights: bool = True) -> ModelConfig:
    """Metadata to the config of the architecture that the file declares. Raises FormatError, UnsupportedError.

    Without weights the size of the vocabulary is that of the metadata instead of the embeddings'.
    """
    general = _Keys(gguf.path, gguf.metadata, "")
    architecture = general.text("general.architecture", _REQUIRED)
    read = _READERS.get(architecture)
    if read is None:
        raise UnsupportedError(
            f"{gguf.path}: architecture {_shown(architecture)} is not one that edge_moe runs "
            f"({', '.join(_READERS)}); use a model of one of these"
        )
    keys = _Keys(gguf.path, gguf.metadata, f"{architecture}.")
    embedding = gguf.tensors.get("token_embd.weight")
    if has_weights and (embedding is None or len(embedding.shape) != 2):
        raise FormatError(
            f"{gguf.path}: tensor token_embd.weight is missing or no matrix; "
            "the file holds no model (perhaps a vocabulary only), download it again"
        )
    if keys.number("attention.temperature_scale", 0.0):
        raise UnsupportedError(
            f"{gguf.path}: metadata {architecture}.attention.temperature_scale asks for position-dependent attention "
            "temperature, which edge_moe does not have"
        )
    vocab_size = embedding.shape[0] if embedding else keys.integer("vocab_size", _REQUIRED, 1)
    n_layers = keys.integer("block_count", _REQUIRED, 1, 10_000)
    n_nextn = keys.integer("nextn_predict_layers", 0, 0, n_layers - 1)  # heads for speculation, which is not done here
    n_experts = keys.integer("expert_count", 0)
    common: dict[str, Any] = {
        "architecture": architecture,
        "name": general.text("general.name", gguf.path.stem),
        "vocab_size": vocab_size,
        "hidden_size": keys.integer("embedding_length", _REQUIRED, 1),
        "num_hidden_layers": n_layers - n_nextn,
        "num_attention_heads": keys.integer("attention.head_count", _REQUIRED, 1),
        "max_position_embeddings": keys.integer("context_length", _REQUIRED, 1, 1 << 31),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", _REQUIRED, 0.0, 1.0),
        "rope_theta": keys.number("rope.freq_base", 10000.0, 1.001),
        "rope_scaling": _read_rope_scaling(keys),
        "intermediate_size": keys.integer("feed_forward_length", 0),
        "n_routed_experts": n_experts,
        "num_experts_per_tok": keys.integer("expert_used_count", _REQUIRED if n_experts else 0),
    }
    if n_experts and not 1 <= common["num_experts_per_tok"] <= n_experts:
        keys.fail("expert_used_count", common["num_experts_per_tok"], f"1 to expert_count, {n_experts}")
    return read(keys, common)


def _read_deepseek2(keys: "_Keys", common: dict[str, Any]) -> DeepseekV2Config:
    n_layers, n_experts = keys.integer("block_count", _REQUIRED), common["n_routed_experts"]
    config = DeepseekV2Config(
        **common,
        q_lora_rank=keys.integer("attention.q_lora_rank", 0) or None,
        kv_lora_rank=keys.integer("attention.kv_lora_rank", _REQUIRED, 1),
        **_read_head_dims(keys),
        first_k_dense_replace=keys.integer("leading_dense_block_count", 0) if n_experts else n_layers,
        moe_intermediate_size=keys.integer("expert_feed_forward_length", _REQUIRED if n_experts else 0),
        n_shared_experts=keys.integer("expert_shared_count", _REQUIRED if n_experts else 0),
        scoring_func=_read_scoring_func(keys, n_layers, common["vocab_size"]),
        norm_topk_prob=keys.flag("expert_weights_norm", False),
        routed_scaling_factor=keys.number("expert_weights_scale", 0.0) or 1.0,
        n_group=keys.integer("expert_group_count", 0) or 1,
        topk_group=keys.integer("expert_group_used_count", 0) or 1,
        latent_is_rotated=keys.is_in_file("edge_moe.latent_rotation"),
    )
    _check_router(keys, config)
    return config


def _read_llama(keys: "_Keys", common: dict[str, Any]) -> LlamaConfig:
    n_heads, hidden_size = common["num_attention_heads"], common["hidden_size"]
    n_kv_heads = keys.integer("attention.head_count_kv", n_heads, 1, n_heads)
    if n_heads % n_kv_heads:
        keys.fail("attention.head_count_kv", n_kv_heads, f"a divisor of attention.head_count, {n_heads}")
    head_dim = keys.integer("attention.key_length", max(2, hidden_size // n_heads), 2)
    if head_dim % 2:
        keys.fail("attention.key_length", head_dim, "an even number")
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            keys.fail(key, keys.integer(key, head_dim), f"the size of a head, {head_dim}")
    if common["intermediate_size"] < 1:
        keys.fail("feed_forward_length", common["intermediate_size"], "at least 1")
    return LlamaConfig(
        **common,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim,
        sliding_window=keys.integer("attention.sliding_window", 0, 0, 1 << 31) or None,
    )


class _Keys:
    """Typed, bounded reading of metadata under one architecture's prefix."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], prefix: str) -> None:
        self.path, self._metadata, self._prefix = path, metadata, prefix

    def fail(self, key: str, found: object, expected: str) -> NoReturn:
        raise FormatError(
            f"{self.path}: metadata {self._prefix}{key} is {_shown(found)}, expected {expected}; "
            "convert the model again"
        )

    def raw(self, key: str, default: Any) -> Any:
        value = self._metadata.get(self._prefix + key, default)
        if value is _REQUIRED:
            raise FormatError(
                f"{self.path}: metadata {self._prefix}{key} is missing; "
                "the file is incomplete or too old, download or convert it again"
            )
        return value

    def integer(self, key: str, default: Any, low: int = 0, high: int = 1 << 24) -> int:
        value = self.raw(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # some writers give one value per layer
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fail(key, value, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: Any, low: float = 0.0, high: float = 1e12) -> float:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.fail(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            self.fail(key, value, "true or false")
        return value

    def text(self, key: str, default: Any) -> str:
        value = self.raw(key, default)
        if not isinstance(value, str):
            self.fail(key, value, "a text")
        return value

    def is_in_file(self, key: str) -> bool:
        """Whether the file has a key outside the architecture's own."""
        return key in self._metadata

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._metadata


_REQUIRED = object()


def _shown(value: object) -> str:
    """A value short enough for one line of an error."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_head_dims(keys: _Keys) -> dict[str, Any]:
    """Head sizes. Files with kv_b split give the latent's sizes as key_length and the head's own with `_mla`."""
    suffix = "_mla" if "attention.key_length_mla" in keys and "attention.value_length_mla" in keys else ""
    qk_head_dim = keys.integer(f"attention.key_length{suffix}", _REQUIRED, 2)
    qk_rope_head_dim = keys.integer("rope.dimension_count", _REQUIRED, 2, qk_head_dim - 1)
    if qk_rope_head_dim % 2:
        keys.fail("rope.dimension_count", qk_rope_head_dim, "an even number")
    return {
        "qk_nope_head_dim": qk_head_dim - qk_rope_head_dim,
        "qk_rope_head_dim": qk_rope_head_dim,
        "v_head_dim": keys.integer(f"attention.value_length{suffix}", _REQUIRED, 1),
    }


def _read_scoring_func(keys: _Keys, n_layers: int, vocab_size: int) -> str:
    # GLM-4.7-Flash files from before the key existed are known by their sizes
    default = 2 if n_layers in (47, 48) and vocab_size == 154880 else 1
    function = keys.integer("expert_gating_func", default) or default
    if function not in (1, 2):
        keys.fail("expert_gating_func", function, "1 (softmax) or 2 (sigmoid)")
    return "softmax" if function == 1 else "sigmoid"


def _read_rope_scaling(keys: _Keys) -> RopeScaling | None:
    factor = keys.number("rope.scaling.factor", 0.0)
    rope_type = keys.text("rope.scaling.type", "linear")
    if rope_type == "none" or factor in (0.0, 1.0):
        return None
    if rope_type not in ("linear", "yarn"):
        raise UnsupportedError(
            f"{keys.path}: rope.scaling.type {_shown(rope_type)} is not one that edge_moe has (none, linear, yarn)"
        )
    if factor < 1 and rope_type == "yarn":
        keys.fail("rope.scaling.factor", factor, "1 or more")
    # The key holds 0.1 * mscale_all_dim (0.0707 for DeepSeek-V2, 0.1 for V3). With it, YaRN's temperature is in the
    # softmax scale and cos and sin keep their size; without it, cos and sin carry the temperature, as in the paper.
    mscale_all_dim = keys.number("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
    temperature = 1.0 if mscale_all_dim or rope_type != "yarn" else 1.0 + 0.1 * math.log(factor)
    return RopeScaling(
        rope_type=rope_type,
        factor=factor,
        original_max_position_embeddings=keys.integer(
            "rope.scaling.original_context_length", keys.integer("context_length", _REQUIRED, 1, 1 << 31), 1, 1 << 31
        ),
        mscale_all_dim=mscale_all_dim,
        attention_factor=temperature * keys.number("rope.scaling.attn_factor", 1.0),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0, 1e-3),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0, 1e-3),
    )


def _check_router(keys: _Keys, c: DeepseekV2Config) -> None:
    if c.n_routed_experts == 0:
        return
    if c.n_routed_experts % c.n_group:
        keys.fail("expert_group_count", c.n_group, f"a divisor of expert_count, {c.n_routed_experts}")
    group_size = c.n_routed_experts // c.n_group
    if c.n_group > 1 and group_size < c.group_score_experts:
        keys.fail("expert_group_count", c.n_group, f"at most {c.n_routed_experts // c.group_score_experts}")
    if c.topk_group > c.n_group or (c.n_group > 1 and c.topk_group * group_size < c.num_experts_per_tok):
        keys.fail(
            "expert_group_used_count",
            c.topk_group,
            f"groups enough for {c.num_experts_per_tok} experts and at most expert_group_count, {c.n_group}",
        )


_READERS: dict[str, Callable[["_Keys", dict[str, Any]], ModelConfig]] = {
    "deepseek2": _read_deepseek2,
    "llama": _read_llama,
}
ARCHITECTURES = tuple(_READERS)
