"""Random weight rows in each block format, for tests of the kernels."""

import numpy as np

# Where a block's f16 factors are; the other bytes may be anything.
_HALF_OFFSETS = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


def random_rows(fmt, n_rows, n_cols, rng):
    """Rows of the format's blocks with sane factors -> u8[n_rows, row_bytes]."""
    if fmt.block_size == 1:
        values = rng.standard_normal((n_rows, n_cols)).astype(np.float32)
        if fmt.name == "F16":
            values = values.astype(np.float16)
        elif fmt.name == "BF16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.view(np.uint8)
    data = rng.integers(0, 256, (n_rows, fmt.row_bytes(n_cols)), dtype=np.uint8)
    blocks = data.reshape(n_rows, -1, fmt.block_bytes)
    for offset in _HALF_OFFSETS.get(fmt.name, (0,)):
        factors = rng.uniform(0.005, 0.02, blocks.shape[:2]) * rng.choice([-1, 1], blocks.shape[:2])
        blocks[:, :, offset : offset + 2] = factors.astype(np.float16)[..., None].view(np.uint8)
    return data


def whole_activations(shape, group, rng):
    """Floats that int8 codes hold exactly: whole numbers times one power of two for each group of columns."""
    n_tokens, n_cols = shape
    group = group or n_cols
    x = rng.integers(-127, 128, (n_tokens, n_cols // group, group)).astype(np.float32)
    x[:, :, -1] = 127
    x *= 2.0 ** rng.integers(-9, -4, (n_tokens, n_cols // group, 1))
    return x.reshape(n_tokens, n_cols).astype(np.float32)
