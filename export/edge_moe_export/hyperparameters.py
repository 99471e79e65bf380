"""A Hugging Face config.json, checked, as the hyperparameters of a GGUF file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edge_moe.errors import FormatError, UnsupportedError

# architecture: what its configurations mean when they do not say
_DEEPSEEK: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": {},
    "DeepseekV3ForCausalLM": {"scoring_func": "sigmoid", "norm_topk_prob": True},
    "Glm4MoeLiteForCausalLM": {"scoring_func": "sigmoid", "norm_topk_prob": True},
}
_LLAMA: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"rms_norm_eps": 1e-6, "rope_theta": 1e4},
    "LLaMAForCausalLM": {"rms_norm_eps": 1e-6, "rope_theta": 1e4},
    "MistralForCausalLM": {
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "num_key_value_heads": 8, "sliding_window": 4096,
    },
    "MixtralForCausalLM": {
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip
_BY_MODEL_TYPE = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
_GATING = {"softmax": 1, "sigmoid": 2}


@dataclass(frozen=True)
class HyperParameters:
    """The values of a config.json, read by type; what they are called in a file, each architecture says itself."""

    gguf_architecture: ClassVar[str]
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
        """All keys of the architecture. Raises FormatError and UnsupportedError."""
        raise NotImplementedError

    def number(self, key: str, default: float) -> float:
        """A number that may be missing or null. Raises FormatError when it is something else."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, value, "a number")
        return float(value)

    @property
    def rope(self) -> "HyperParameters":
        """What is said about RoPE; older files say some of it beside the object that is for it."""
        rope = self.get("rope_parameters", self.get("rope_scaling", {}))
        if not isinstance(rope, dict):
            raise self.fail("rope_scaling", rope, "an object")
        beside = {key: self.get(key) for key in ("rope_theta", "original_max_position_embeddings")}
        return HyperParameters(beside | rope, self.path, self.architecture)

    def rope_metadata(self, *kinds: str) -> dict[str, Any]:
        """The keys of RoPE, of the default kind or one of `kinds`. Raises FormatError and UnsupportedError."""
        rope = self.rope
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", *kinds):
            raise UnsupportedError(f"{self.path}: rope type {str(kind)[:40]!r} is not default, {', '.join(kinds)}")
        keys: dict[str, Any] = {}
        if rope.get("rope_theta") is not None:
            keys["rope.freq_base"] = rope.number("rope_theta", 0.0)
        if kind in ("default", "llama3"):
            return keys
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": rope.number("factor", 1.0)}
        if kind == "linear":
            return keys
        keys["rope.scaling.original_context_length"] = rope.integer("original_max_position_embeddings")
        for theirs, ours in (
            ("extrapolation_factor", "yarn_ext_factor"),
            ("attn_factor", "yarn_attn_factor"),
            ("attention_factor", "yarn_attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if rope.get(theirs) is not None:
                keys[f"rope.scaling.{ours}"] = rope.number(theirs, 0.0)
        if rope.get("mscale_all_dim") is not None:
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope.number("mscale_all_dim", 0.0)
        return keys


class DeepseekParameters(HyperParameters):
    """The values of DeepSeek-V2 and its family."""

    gguf_architecture = "deepseek2"

    @property
    def n_routed_experts(self) -> int:
        return self.integer("n_routed_experts") if self.get("n_routed_experts") else 0

    @property
    def first_k_dense_replace(self) -> int:
        value = self.get("first_k_dense_replace", 0 if self.n_routed_experts else self.integer("num_hidden_layers"))
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise self.fail("first_k_dense_replace", value, "a whole number")
        return value

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
            "rope.freq_base": 10000.0,
            **self.rope_metadata("linear", "yarn"),
            "attention.layer_norm_rms_epsilon": self.number("rms_norm_eps", 1e-6),
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
            keys["expert_weights_scale"] = self.number("routed_scaling_factor", 1.0)
        if self.get("norm_topk_prob") is True:
            keys["expert_weights_norm"] = True
        return keys


class LlamaParameters(HyperParameters):
    """The values of Llama, Mistral and Mixtral."""

    gguf_architecture = "llama"

    @property
    def n_routed_experts(self) -> int:
        return self.integer("num_local_experts") if self.get("num_local_experts") else 0

    @property
    def num_key_value_heads(self) -> int:
        return self.integer("num_key_value_heads" if self.get("num_key_value_heads") else "num_attention_heads")

    @property
    def head_dim(self) -> int:
        if self.get("head_dim"):
            return self.integer("head_dim")
        return self.integer("hidden_size") // self.integer("num_attention_heads")

    def metadata(self) -> dict[str, Any]:
        """All `llama.` keys. Raises FormatError and UnsupportedError."""
        for key, known in (("hidden_act", "silu"), ("partial_rotary_factor", 1.0)):
            if self.get(key, known) != known:
                raise UnsupportedError(f"{self.path}: {key} is {str(self.get(key))[:40]!r}, only {known} is read here")
        keys: dict[str, Any] = {
            "block_count": self.integer("num_hidden_layers"),
            "context_length": self.integer("max_position_embeddings"),
            "embedding_length": self.integer("hidden_size"),
            "feed_forward_length": self.integer("intermediate_size"),
            "attention.head_count": self.integer("num_attention_heads"),
            "attention.head_count_kv": self.num_key_value_heads,
            **self.rope_metadata("linear", "yarn", "llama3"),
            "attention.layer_norm_rms_epsilon": self.number("rms_norm_eps", 1e-6),
        }
        if self.n_routed_experts:
            keys["expert_count"] = self.n_routed_experts
            keys["expert_used_count"] = self.integer("num_experts_per_tok")
        if self.get("head_dim") or self.architecture != "MixtralForCausalLM":  # whose head_dim stays unsaid
            keys |= {"attention.key_length": self.head_dim, "attention.value_length": self.head_dim}
        if self.get("sliding_window") and self.architecture not in ("LlamaForCausalLM", "LLaMAForCausalLM"):
            keys["attention.sliding_window"] = self.integer("sliding_window")
        keys |= {"vocab_size": self.integer("vocab_size"), "rope.dimension_count": self.head_dim}
        return {f"llama.{key}": value for key, value in keys.items()}

    def rope_divisors(self) -> np.ndarray | None:
        """What Llama 3 divides RoPE's frequencies by, f32[N/2]: short waves stay, long ones are stretched.

        Source: transformers, _compute_llama3_parameters; in f32 with torch's roundings, so that files are equal.
        """
        rope = self.rope
        if rope.get("rope_type", rope.get("type")) != "llama3":
            return None
        theta, factor = rope.number("rope_theta", 10000.0), rope.number("factor", 8.0)
        low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
        original = rope.get("original_max_position_embeddings", 8192)
        if not (theta > 0 and factor > 0 and high > low > 0) or type(original) is not int or original < 1:
            raise self.fail(
                "rope_scaling", dict(rope.values), "positive numbers, high_freq_factor above low_freq_factor"
            )
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        frequencies = np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)
        wave_lengths = (np.float32(1) / frequencies) * np.float32(2 * math.pi)  # torch divides by reciprocals
        smooth = ((np.float32(1) / wave_lengths) * np.float32(original) - np.float32(low)) / np.float32(high - low)
        between = np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)
        stretched = np.where(wave_lengths > original / low, np.float32(factor), between)
        return np.where(wave_lengths < original / high, np.float32(1), stretched).astype(np.float32)


def read_hyperparameters(config: Mapping[str, Any], path: Path) -> HyperParameters:
    """Take a config.json for what it is. Raises UnsupportedError for other architectures."""
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else _BY_MODEL_TYPE.get(str(config.get("model_type")))
    if name not in _DEEPSEEK | _LLAMA:
        found = name or config.get("model_type")
        raise UnsupportedError(
            f"{path}: architecture {str(found)[:80]!r} is none that is read here; it must be one of "
            f"{', '.join([*_DEEPSEEK, *_LLAMA])}"
        )
    given = {key: value for key, value in config.items() if value is not None}
    if name in _LLAMA:
        unsaid = {key: value for key, value in _LLAMA[name].items() if key not in config}  # null says something
        return LlamaParameters(unsaid | given, path, name)
    if name == "DeepseekV3ForCausalLM" and given.get("n_routed_experts") is None:
        raise FormatError(
            f"{path}: n_routed_experts is missing, expected the number of experts; download the file again"
        )
    return DeepseekParameters(_DEEPSEEK[name] | given, path, name)
