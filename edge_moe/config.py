"""The one frozen configuration of a model, in the names of the models' own config.json."""

import math
from dataclasses import dataclass

KV_KINDS = ("bf16", "int8", "int4", "f32")  # how the latent cache can keep its numbers; the first is the default
BACKENDS = ("auto", "cpu", "mlx", "vulkan")  # where a pass can run; auto is whatever the machine has


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a model stretches RoPE beyond its first training length. Source: YaRN, arXiv 2309.00071.

    `mscale_all_dim` scales the attention logits; `attention_factor` scales cos and sin, and is 1 for DeepSeek's models.
    """

    rope_type: str  # "linear" | "yarn"
    factor: float
    original_max_position_embeddings: int
    mscale_all_dim: float = 0.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @property
    def mscale(self) -> float:
        """Length-dependent factor of queries and keys; its square multiplies the attention logits."""
        if self.rope_type != "yarn" or self.factor <= 1:
            return 1.0
        return 1.0 + 0.1 * self.mscale_all_dim * math.log(self.factor)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and rules that every model has. `n_routed_experts` 0 means that every layer is dense."""

    architecture: str
    name: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    # feed-forward
    intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int


@dataclass(frozen=True, slots=True)
class DeepseekV2Config(ModelConfig):
    """A model of latent attention and, from layer `first_k_dense_replace` on, experts beside shared ones."""

    # multi-head latent attention
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    # experts
    first_k_dense_replace: int
    moe_intermediate_size: int
    n_shared_experts: int
    # router
    scoring_func: str  # "softmax" | "sigmoid"
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    # how the file was made, not what the model is
    latent_is_rotated: bool = False

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values kept per token and layer: the latent and the shared rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor of the attention logits, with YaRN's temperature. Source: DeepSeek-V2's yarn_get_mscale."""
        mscale = self.rope_scaling.mscale if self.rope_scaling else 1.0
        return mscale * mscale / math.sqrt(self.qk_head_dim)

    @property
    def group_score_experts(self) -> int:
        """Best experts summed into a group's score: one in DeepSeek-V2 (softmax), two in V3 (sigmoid)."""
        return 1 if self.scoring_func == "softmax" else 2

    def is_moe_layer(self, layer: int) -> bool:
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace


@dataclass(frozen=True, slots=True)
class LlamaConfig(ModelConfig):
    """A model of grouped-query attention: Llama, Mistral, and Mixtral, whose every layer has experts."""

    num_key_value_heads: int
    head_dim: int
    sliding_window: int | None  # tokens that a token sees, itself among them; None: all before it
