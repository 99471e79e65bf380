"""What every pass demands of its tokens before it reads memory by them."""

import numpy as np

from edge_moe.config import ModelConfig
from edge_moe.errors import ShapeError
from edge_moe.token_cache import TokenCache


def check_tokens(token_ids: np.ndarray, cache: TokenCache, config: ModelConfig) -> None:
    """Raises ShapeError for ids outside the vocabulary and for more tokens than the cache has room for."""
    if not 1 <= len(token_ids) <= cache.free:
        raise ShapeError(f"{len(token_ids)} tokens do not fit: the cache has room for 1 to {cache.free}")
    ids = token_ids.tolist()  # of a single one numpy would take 50 microseconds to find the least
    if min(ids) < 0 or max(ids) >= config.vocab_size:
        raise ShapeError(f"token ids {ids[:8]}: expected 0 to {config.vocab_size - 1}")
