"""A Hugging Face config.json, checked, as the hyperparameters of a `deepseek2` GGUF file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_moe.errors import FormatError, UnsupportedError

# architecture: the routing that its configurations mean when they do not say
_ARCHITECTURES = {
    "DeepseekV2ForCausalLM": {},
    "DeepseekV3ForCausalLM": {"scoring_func": "sigmoid", "norm_topk_prob": True},
    "Glm4MoeLiteForCausalLM": {"scoring_func": "sigmoid", "norm_topk_prob": True},
}
_BY_MODEL_TYPE = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
}
_GATING = {"softmax": 1, "sigmoid": 2}


@dataclass(frozen=True)
class HyperParameters:
    """The values of a config.json, read by type."""

    values: Mapping[str, Any]
    path: Path
    architecture: str

    def get(self, key: str, default: Any = None) -> Any:
        """A value that may be missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str) -> int:
        """A size. Raises FormatError when it is missing or no whole number above 0."""
        value = self.values.get(key)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self.fail(key, value, "a whole number above 0")
        return value

    def fail(self, key: str, found: object, expected: str) -> FormatError:
        """The error for one value."""
        return FormatError(f"{self.path}: {key} is {str(found)[:60]!r}, expected {expected}; download the file again")

    @property
    def n_routed_experts(self) -> int:
        return self.integer("n_routed_experts") if self.get("n_routed_experts") else 0

    @property
    def first_k_dense_replace(self) -> int:
        value = self.get("first_k_dense_replace", 0 if self.n_routed_experts else self.integer("num_hidden_layers"))
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise self.fail("first_k_dense_replace", value, "a whole number")
        return value

    @property
    def scale_block(self) -> tuple[int, int]:
        """Rows and columns that share one scale in FP8 checkpoints."""
        quantization = self.get("quantization_config", {})
        if not isinstance(quantization, dict):
            raise self.fail("quantization_config", quantization, "an object")
        method = quantization.get("quant_method")
        if method not in (None, "fp8"):
            raise UnsupportedError(f"{self.path}: quant_method {str(method)[:40]!r} is not read here, only fp8")
        block = quantization.get("weight_block_size") or [128, 128]
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise self.fail("weight_block_size", block, "two whole numbers")
        return block[0], block[1]

    def metadata(self) -> dict[str, Any]:
        """All `deepseek2.` keys. Raises FormatError and UnsupportedError."""
        R, P = self.integer("kv_lora_rank"), self.integer("qk_rope_head_dim")
        keys: dict[str, Any] = {
            "block_count": self.integer("num_hidden_layers"),
            "context_length": self.integer("max_position_embeddings"),
            "embedding_length": self.integer("hidden_size"),
            "feed_forward_length": self.integer("intermediate_size"),
            "attention.head_count": self.integer("num_attention_heads"),
            "attention.head_count_kv": 1,  # absorbed attention is multi-query attention over the latent
            **self._rope(),
            "attention.layer_norm_rms_epsilon": self._number("rms_norm_eps", 1e-6),
            **self._experts(),
            "leading_dense_block_count": self.first_k_dense_replace,
            "vocab_size": self.integer("vocab_size"),
            "attention.kv_lora_rank": R,
            "attention.key_length": R + P,
            "attention.value_length": R,
            "attention.key_length_mla": self.integer("qk_nope_head_dim") + P,
            "attention.value_length_mla": self.integer("v_head_dim"),
            "rope.dimension_count": P,
        }
        if self.get("q_lora_rank"):
            keys["attention.q_lora_rank"] = self.integer("q_lora_rank")
        return {f"deepseek2.{key}": value for key, value in keys.items()}

    def _number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, value, "a number")
        return float(value)

    def _experts(self) -> dict[str, Any]:
        width = "moe_intermediate_size" if self.n_routed_experts else "intermediate_size"
        keys: dict[str, Any] = {
            "expert_feed_forward_length": self.integer(width),
            "expert_shared_count": self.integer("n_shared_experts") if self.get("n_shared_experts") else 0,
        }
        if not self.n_routed_experts:
            return keys
        keys |= {
            "expert_count": self.n_routed_experts,
            "expert_used_count": self.integer("num_experts_per_tok"),
        }
        for theirs, ours in (("n_group", "expert_group_count"), ("topk_group", "expert_group_used_count")):
            if self.get(theirs) is not None:
                keys[ours] = self.integer(theirs)
        function = self.get("scoring_func")
        if function is not None and function not in _GATING:
            raise UnsupportedError(f"{self.path}: scoring_func {str(function)[:40]!r} is not softmax or sigmoid")
        if function is not None:
            keys["expert_gating_func"] = _GATING[function]
        if self.get("routed_scaling_factor") is not None:
            keys["expert_weights_scale"] = self._number("routed_scaling_factor", 1.0)
        if self.get("norm_topk_prob") is True:
            keys["expert_weights_norm"] = True
        return keys

    def _rope(self) -> dict[str, Any]:
        rope = self.get("rope_parameters", self.get("rope_scaling", {}))
        if not isinstance(rope, dict):
            raise self.fail("rope_scaling", rope, "an object")
        theta = HyperParameters({"rope_theta": self.get("rope_theta")} | rope, self.path, self.architecture)
        kind = rope.get("rope_type", rope.get("type", "default"))
        keys: dict[str, Any] = {"rope.freq_base": theta._number("rope_theta", 10000.0)}
        if kind in ("default", None):
            return keys
        if kind not in ("linear", "yarn"):
            raise UnsupportedError(f"{self.path}: rope type {str(kind)[:40]!r} is not default, linear or yarn")
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": theta._number("factor", 1.0)}
        if kind == "linear":
            return keys
        original = self.get("original_max_position_embeddings")
        lengths = HyperParameters({"original_max_position_embeddings": original} | rope, self.path, self.architecture)
        keys["rope.scaling.original_context_length"] = lengths.integer("original_max_position_embeddings")
        for theirs, ours in (
            ("extrapolation_factor", "yarn_ext_factor"),
            ("attn_factor", "yarn_attn_factor"),
            ("attention_factor", "yarn_attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if rope.get(theirs) is not None:
                keys[f"rope.scaling.{ours}"] = theta._number(theirs, 0.0)
        if rope.get("mscale_all_dim") is not None:
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * theta._number("mscale_all_dim", 0.0)
        return keys


def read_hyperparameters(config: Mapping[str, Any], path: Path) -> HyperParameters:
    """Take a config.json for what it is. Raises UnsupportedError for other architectures."""
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else _BY_MODEL_TYPE.get(str(config.get("model_type")))
    if name not in _ARCHITECTURES:
        found = name or config.get("model_type")
        raise UnsupportedError(
            f"{path}: architecture {str(found)[:80]!r} does not become deepseek2; it must be one of "
            f"{', '.join(_ARCHITECTURES)}"
        )
    given = {key: value for key, value in config.items() if value is not None}
    if name == "DeepseekV3ForCausalLM" and given.get("n_routed_experts") is None:
        raise FormatError(
            f"{path}: n_routed_experts is missing, expected the number of experts; download the file again"
        )
    return HyperParameters(_ARCHITECTURES[name] | given, path, name)
