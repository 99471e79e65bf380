"""Exports a model to a folder for ONNX Runtime: the graph with its weights, the tokenizer and the settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto

from edge_moe import __version__
from edge_moe.checkpoint import Checkpoint
from edge_moe.errors import OptionError, UnsupportedError
from edge_moe.files import new_folder
from edge_moe.models.deepseek2 import config_of, load_weights
from edge_moe.onnx_folder import GRAPH_FILE, SETTINGS_FILE
from edge_moe.weights import Weight
from edge_moe_export.gguf import write_gguf
from edge_moe_export.onnx_builder import Builder, TensorFile
from edge_moe_export.onnx_graph import CACHE_TYPES, build_decoder
from edge_moe_export.onnx_settings import settings_metadata, write_settings
from edge_moe_export.onnx_storage import FLOAT_BITS, Storage
from edge_moe_export.onnx_weights import LOSSLESS_BLOCK

BITS = (4, 8, FLOAT_BITS)
BLOCKS = (16, 32, 64, 128)
TENSOR_FILE = f"{GRAPH_FILE}.data"


@dataclass(frozen=True)
class Export:
    """What was written: the folder's files with their bytes, and remarks for the user, one line each."""

    file_bytes: dict[str, int]
    notes: tuple[str, ...]
    requantized: dict[str, float]  # relative error (RMS) of weights that were rounded anew, by `format to bits`


def export_onnx(
    checkpoint: Checkpoint,
    out: Path,
    *,
    bits: int = 4,
    block: int = LOSSLESS_BLOCK,
    kv: str = "fp32",
    optimized: bool = False,
    importance: Callable[[str, tuple[int, ...]], np.ndarray | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Export:
    """Write the model as an ONNX folder `out`, which appears when it is whole.

    `bits` 4 or 8 of the routed experts' weights, each `block` of them with a scale of its own, or 32: f32 and standard
    operators only. `kv`: the latent cache is fp32, fp16 or int8. `optimized`: as onnxruntime packs it for this CPU, for
    which it takes the model's size in memory. `importance(tensor_name, shape)` says for tensors of the file how much
    errors in their columns count where they are rounded anew, f32[matrices, C]. `progress(done, total)` counts layers.
    Raises OptionError (options, paths, no space), FormatError (tensors missing), UnsupportedError (odd latent sizes).
    """
    if bits not in BITS:
        raise OptionError(f"--bits {bits}: expected one of {', '.join(map(str, BITS))}")
    if block not in BLOCKS:
        raise OptionError(f"--block {block}: expected one of {', '.join(map(str, BLOCKS))}")
    if kv not in CACHE_TYPES:
        raise OptionError(f"--kv {kv}: expected one of {', '.join(CACHE_TYPES)}")
    config = config_of(checkpoint)
    if config.latent_dim % 2:
        raise UnsupportedError(
            f"{checkpoint.path}: its latent cache is {config.latent_dim} numbers wide, expected an even number, "
            "since it is exported in two halves"
        )
    weights = load_weights(checkpoint)
    steps = 0

    def columns(weight: Weight) -> np.ndarray | None:
        return importance(checkpoint.tensor_name(weight.name), weight.shape) if importance else None

    def count() -> None:
        nonlocal steps
        steps += 1
        if progress:
            progress(steps, config.num_hidden_layers + 1)

    with new_folder(out, checkpoint.size_bytes) as folder:
        write_gguf(folder / SETTINGS_FILE, settings_metadata(checkpoint), ())
        notes = write_settings(folder, checkpoint, kv)  # first, since a damaged vocabulary should not cost an hour
        with (folder / TENSOR_FILE).open("xb", buffering=1 << 20) as file:
            g = Builder(TensorFile(file, TENSOR_FILE))
            storage = Storage(g, bits, block, columns)
            build_decoder(g, config, weights, storage, kv=kv, done=count)
        _write_graph(g.model(__version__), folder / GRAPH_FILE)
        saved = _optimize(folder) if optimized else ()
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Export(
        sizes,
        (*_notes(storage), *notes, *saved),
        {kind: storage.loss.relative_error(kind) for kind in storage.loss.n_weights},
    )


def _write_graph(model: ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString())


def _optimize(folder: Path) -> tuple[str, ...]:
    """Replace graph and tensors by what onnxruntime makes of them on this CPU: fused, and packed for its kernels.

    Returns remarks on what that saves: packed weights are mapped from the file instead of made in memory.
    """
    try:
        import onnxruntime
    except ImportError:
        raise OptionError("--optimized needs onnxruntime; install it by `pip install 'edge-moe[onnx]'`") from None
    fresh = folder / "optimized"
    fresh.mkdir()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(fresh / GRAPH_FILE)
    for key, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", TENSOR_FILE),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
    ):
        options.add_session_config_entry(key, value)
    try:
        onnxruntime.InferenceSession(str(folder / GRAPH_FILE), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors have no common type
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise OptionError(f"--optimized: onnxruntime cannot pack the graph: {reason}; export without it") from None
    packed_bytes = (fresh / TENSOR_FILE).stat().st_size - (folder / TENSOR_FILE).stat().st_size
    for path in fresh.iterdir():
        path.replace(folder / path.name)
    fresh.rmdir()
    return (f"{packed_bytes / 1e6:.1f} MB of packed weights in the file, which each start would else make in memory",)


def _notes(storage: Storage) -> Sequence[str]:
    """What became of the weights, one line for each way."""
    notes = [f"{storage.n_lossless / 1e6:.1f} M weights repacked without loss"] if storage.n_lossless else []
    for kind, n_weights in storage.loss.n_weights.items():
        error = 100 * storage.loss.relative_error(kind)
        notes.append(f"{n_weights / 1e6:.1f} M weights rounded from {kind}, relative error {error:.2f} %")
    notes += [f"{n_weights / 1e6:.1f} M weights kept as f32: {why}" for why, n_weights in storage.n_float.items()]
    return notes
