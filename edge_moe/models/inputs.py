"""What every pass demands of its tokens before it reads memory by them."""

import numpy as np

from edge_moe.config import ModelConfig
from edge_moe.errors import ShapeError
from edge_moe.token_cache import TokenCache


def check_tokens(token_ids: np.ndarray, cache: TokenCache, config: ModelConfig) -> None:
    """Raises ShapeError for ids outside the vocabulary and for more tokens than the cache has room for."""
    if not 1 <= len(token_ids) <= cache.free:
        raise ShapeError(f"{len(token_ids)} tokens do not fit: the cache has room for 1 to {cache.free}")
    if token_ids.min() < 0 or token_ids.max() >= config.vocab_size:
        raise ShapeError(f"token ids {token_ids.tolist()[:8]}: expected 0 to {config.vocab_size - 1}")
