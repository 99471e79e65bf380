"""The angles of RoPE at some positions, as all backends have them."""

import numpy as np


def rotations_at(first: int, n: int, inv_freq: np.ndarray, factor: float) -> np.ndarray:
    """cos and sin f32[2,n,P/2] of n positions, times `factor`. inv_freq f64[P/2].

    Angles are in f64: those of long contexts are too coarse in f32.
    """
    angles = np.arange(first, first + n)[:, None] * inv_freq
    return (np.stack([np.cos(angles), np.sin(angles)]) * factor).astype(np.float32)
