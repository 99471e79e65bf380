"""Rewrites a model so that its latents come out rotated, and every answer stays as it was.

RMSNorm without its gain commutes with an orthogonal H: the latent rows of kv_a_mqa become H times themselves, the gain
of kv_a_norm becomes 1, and k_b and v_b take up both, so that any runtime that knows nothing of it sees a latent whose
channels are alike, which few bits hold better. The rope part is not rotated. Source: QuaRot, arXiv 2404.00456, section
3, for the idea; DeepSeek-V2, arXiv 2405.04434, section 2.1, for what the latent is.
"""

import mmap
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from edge_moe.errors import FormatError, OptionError
from edge_moe.formats import F32
from edge_moe.gguf import GGUFFile, TensorEntry

KEY = "edge_moe.latent_rotation"  # in the metadata of what was rotated, with the rotation's name
ROTATION = "hadamard"
ROTATED = re.compile(r"blk\.\d+\.attn_(kv_a_mqa|kv_a_norm|k_b|v_b|kv_b)\.weight")
_FLOATS = ("F32", "F16", "BF16")


def rotate(x: np.ndarray) -> np.ndarray:
    """Multiply each row with H: Sylvester's Hadamard matrix, orthonormal, in blocks of the largest fitting power of 2.

    f64[..., R] -> f64[..., R]. H is symmetric, so that it undoes itself.
    """
    n = x.shape[-1]
    block = n & -n
    out = x.reshape(*x.shape[:-1], n // block, block)
    half = 1
    while half < block:
        pairs = out.reshape(*out.shape[:-1], block // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        out = np.stack([first + second, first - second], axis=-2).reshape(out.shape)
        half *= 2
    return out.reshape(x.shape) / np.sqrt(block)


def rotated(source: GGUFFile, folder: Path, *, allow_requantize: bool = False) -> GGUFFile:
    """The model with its latents rotated; the rewritten tensors, in F32, lie in a file in `folder` that has no name.

    Raises OptionError when it is rotated already, holds quantized ones of these tensors (unless allow_requantize), or
    the file cannot be written; FormatError when it has no latent attention.
    """
    if KEY in source.metadata:
        raise OptionError(f"{source.path}: its latent is rotated already; leave out --rotate-latent")
    entries = {name: entry for name, entry in source.tensors.items() if ROTATED.fullmatch(name)}
    gains = {name: entry for name, entry in entries.items() if "kv_a_norm" in name}
    if not gains:
        raise FormatError(f"{source.path}: has no attn_kv_a_norm, so no latent that could be rotated")
    for entry in entries.values():
        if entry.format.name not in _FLOATS and not allow_requantize:
            raise OptionError(
                f"{source.path}: tensor {entry.name} is {entry.format.name} already; start from an F16, BF16 or F32 "
                "file, or accept the loss with --allow-requantize"
            )
    n_bytes = 4 * sum(int(np.prod(entry.shape, dtype=np.int64)) for entry in entries.values())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(n_bytes)
            memory = mmap.mmap(file.fileno(), n_bytes)
    except OSError as error:
        raise OptionError(f"{folder}: cannot keep {n_bytes} bytes of rotated tensors there: {error}") from None
    data, at, tensors = np.frombuffer(memory, np.uint8), 0, dict(source.tensors)
    for name, entry in entries.items():
        layer = name.split(".")[1]
        gain = gains.get(f"blk.{layer}.attn_kv_a_norm.weight")
        if gain is None:
            raise FormatError(f"{source.path}: tensor blk.{layer}.attn_kv_a_norm.weight is missing; convert it again")
        values = _rewritten(entry, gain.format.decode(gain.data).astype(np.float64)).astype(np.float32)
        part = data[at : at + values.nbytes]
        part[:] = values.reshape(-1).view(np.uint8)
        at += values.nbytes
        tensors[name] = replace(entry, format=F32, data=part)
    return replace(source, tensors=tensors, metadata=source.metadata | {KEY: ROTATION})


def _rewritten(entry: TensorEntry, gain: np.ndarray) -> np.ndarray:
    """One tensor's new values, in its shape. gain f64[R]."""
    values = entry.format.decode(entry.data).reshape(entry.shape).astype(np.float64)
    kind = entry.name.split(".")[2]
    rank = len(gain)
    axis = {"attn_kv_a_mqa": 0, "attn_k_b": -2}.get(kind, -1)
    width = values.shape[axis] if values.ndim >= abs(axis) else 0
    if width < rank if kind == "attn_kv_a_mqa" else width != rank:
        raise FormatError(
            f"{entry.path}: tensor {entry.name} has shape {list(entry.shape)}, which does not fit {rank} latents; "
            "convert the model again"
        )
    if kind == "attn_kv_a_norm":
        return np.ones(rank)
    if kind == "attn_kv_a_mqa":  # [R+P, D]: the latent's rows are mixed
        values[:rank] = rotate(values[:rank].T).T
        return values
    if kind == "attn_k_b":  # [H, R, N]
        return rotate((values * gain[:, None]).swapaxes(-1, -2)).swapaxes(-1, -2)
    return rotate(values * gain)  # [H, V, R], or [H(N+V), R]
