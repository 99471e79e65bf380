"""The compressed cache: one latent and one rope key per token and layer, in bf16."""

import numpy as np

from edge_moe.config import ModelConfig
from edge_moe.errors import OptionError
from edge_moe.kernels.elementwise import store_bf16


def latent_cache_bytes(config: ModelConfig, context_length: int) -> int:
    """Bytes of a cache for `context_length` tokens."""
    return config.num_hidden_layers * context_length * config.latent_dim * 2


class LatentCache:
    """Latents of the tokens seen so far. Pages are taken from the system as the context grows.

    `rows[layer]` is u16[S,R+P]: bf16 bits of the normed latent, then of the rotated rope key.
    """

    def __init__(self, config: ModelConfig, context_length: int) -> None:
        if not 1 <= context_length <= config.max_position_embeddings:
            raise OptionError(
                f"context length {context_length}: the model takes 1 to {config.max_position_embeddings} tokens"
            )
        self.context_length = context_length
        self.length = 0
        # np.zeros leaves the pages to the system until they are written
        self.rows = np.zeros((config.num_hidden_layers, context_length, config.latent_dim), np.uint16)
        self._rank = config.kv_lora_rank

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole cache, used or not."""
        return self.rows.nbytes

    @property
    def free(self) -> int:
        """Tokens that still fit."""
        return self.context_length - self.length

    def write(self, layer: int, c_kv: np.ndarray, k_pe: np.ndarray) -> np.ndarray:
        """Store c_kv f32[T,R] and k_pe f32[T,P] behind the tokens seen; returns the layer's rows u16[length+T,R+P].

        The tokens count as seen once `advance` is called, after the last layer.
        """
        end = self.length + c_kv.shape[0]
        new = self.rows[layer, self.length : end]
        store_bf16(c_kv, new[:, : self._rank])
        store_bf16(k_pe, new[:, self._rank :])
        return self.rows[layer, :end]

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` that every layer has written."""
        self.length += n_tokens

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        if not 0 <= length <= self.length:
            raise OptionError(f"cannot cut the cache to {length} tokens: it holds {self.length}")
        self.length = length
