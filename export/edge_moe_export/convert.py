"""Converts a Hugging Face checkpoint to a GGUF file of one of the architectures that the runtime has, part by part.

The keys and tensors are those that llama.cpp's convert_hf_to_gguf.py writes, with these differences: DeepSeek-V3
configurations that leave out the router's scoring function get sigmoid, as in transformers; layers for multi-token
prediction are left out for every model; the sliding window of Mistral is written; a head that config.json ties to the
embeddings is left out; and a vocabulary is filled up to the embeddings' size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_moe.errors import OptionError
from edge_moe.formats import BF16, F16, F32, Q8_0, BlockFormat
from edge_moe.safetensors import open_safetensors, read_json
from edge_moe_export.gguf import write_gguf
from edge_moe_export.hyperparameters import read_hyperparameters
from edge_moe_export.llama_vocabulary import llama_vocabulary_metadata
from edge_moe_export.model_card import describe_model
from edge_moe_export.plans import DeepseekPlan, EncodeParts, LlamaPlan
from edge_moe_export.vocabularies import deepseek_vocabulary_metadata

OUTPUT_TYPES: dict[str, tuple[BlockFormat, int]] = {  # and the number that `general.file_type` has for it
    "f32": (F32, 0),
    "f16": (F16, 1),
    "bf16": (BF16, 32),
    "q8_0": (Q8_0, 7),
}
_BY_ARCHITECTURE = {  # which tensors there are, and how the vocabulary is kept
    "deepseek2": (DeepseekPlan, deepseek_vocabulary_metadata),
    "llama": (LlamaPlan, llama_vocabulary_metadata),
}


@dataclass(frozen=True)
class Conversion:
    """What was written: the file's size, its tensors, and remarks for the user, one line each."""

    size_bytes: int
    n_tensors: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Encoding:
    """Other formats than those of OUTPUT_TYPES, and who makes them."""

    file_type: int  # of the key general.file_type
    choose: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, object]], Mapping[str, BlockFormat]]  # by name
    encode: EncodeParts


def convert(
    folder: Path,
    out: Path,
    output_type: str | Encoding = "bf16",
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Conversion:
    """Convert the checkpoint in `folder` to the GGUF file `out`; matrices become f32, f16, bf16, q8_0, or as encoded.

    Norms, router and biases stay F32; rows that are not whole blocks of Q8_0 become F16.
    Raises OptionError (paths, options, no space), FormatError (damaged, or tensors missing), UnsupportedError (other
    architectures, tokenizers or tensors).
    """
    if isinstance(output_type, str) and output_type not in OUTPUT_TYPES:
        raise OptionError(f"type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}")
    if not folder.is_dir():
        raise OptionError(f"{folder}: is no folder; name the folder of a Hugging Face checkpoint")
    encoding = None if isinstance(output_type, str) else output_type
    fmt, file_type = OUTPUT_TYPES[output_type] if isinstance(output_type, str) else (F32, output_type.file_type)
    params = read_hyperparameters(read_json(folder / "config.json"), folder / "config.json")
    architecture = {"general.architecture": params.gguf_architecture, **params.metadata()}
    make_plan, read_vocabulary = _BY_ARCHITECTURE[params.gguf_architecture]
    vocabulary = read_vocabulary(folder, params)
    model = open_safetensors(folder, scale_block=params.scale_block)
    plan = make_plan(model, params, fmt)
    tensors = plan.tensors()
    notes = plan.check_rest()
    if encoding is not None:
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        formats = encoding.choose(shapes, architecture)
        tensors = make_plan(model, params, fmt, formats, encoding.encode).tensors()
    metadata = {
        "general.architecture": params.gguf_architecture,
        "general.type": "model",
        **describe_model(folder, {tensor.name: tensor.shape for tensor in tensors}, params.values),
        **architecture,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        **vocabulary,
    }
    size_bytes = write_gguf(out, metadata, tensors, progress=progress)
    return Conversion(size_bytes, len(tensors), notes)
