"""The frequencies of rotary position embeddings, as models stretch them."""

import math

import numpy as np

from edge_moe.config import RopeScaling


def rope_frequencies(dim: int, rope_theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each pair of `dim` rope dimensions, f64[dim/2].

    Source: RoFormer, arXiv 2104.09864; YaRN, arXiv 2309.00071, section 3.2 ("NTK-by-parts").
    """
    freq = rope_theta ** (-np.arange(0, dim, 2) / dim)
    if scaling is None:
        return freq
    if scaling.rope_type == "linear":
        return freq / scaling.factor

    def dimension_of(n_rotations: float) -> float:
        """The dimension that turns `n_rotations` times over the first training length."""
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (n_rotations * 2 * math.pi)) / (2 * math.log(rope_theta))

    low = max(0, math.floor(dimension_of(scaling.beta_fast)))
    high = min(dim - 1, math.ceil(dimension_of(scaling.beta_slow)))
    slow = np.clip((np.arange(dim // 2) - low) / max(0.001, high - low), 0, 1)  # 0 keeps a frequency, 1 stretches it
    return freq / scaling.factor * slow + freq * (1 - slow)
