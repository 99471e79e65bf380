"""Loads models for the commands, the cheap checks first."""

from pathlib import Path
from typing import TYPE_CHECKING

from edge_moe.cli.report import Display, print_dim
from edge_moe.config import KV_KINDS

if TYPE_CHECKING:
    from edge_moe.api import Model


def load_model(
    path: Path | None,
    display: Display,
    *,
    threads: int | None,
    context_length: int | None = None,
    kv: str = KV_KINDS[0],
    ram_bytes: int | None = None,
) -> "Model":
    """Load a model (None: the embedded one).

    Raises the errors of edge_moe.load, those of the file before the second that numba takes to import.
    """
    checkpoint = None
    if path is not None:
        from edge_moe.checkpoint import open_checkpoint
        from edge_moe.onnx_folder import OnnxFolder

        checkpoint = OnnxFolder(path) if path.is_dir() else open_checkpoint(path)
    from edge_moe.api import load

    display.watch_compilation()
    model = load(checkpoint, threads=threads, context_length=context_length, kv=kv, ram_bytes=ram_bytes)
    display.check_interrupt()
    if model.memory_plan is not None:
        print_dim(model.memory_plan.line())
    return model
