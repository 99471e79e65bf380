"""Loads models for the commands, the cheap checks first."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_moe.cli.report import Display, print_dim

if TYPE_CHECKING:
    from edge_moe.api import Model


def load_model(path: Path | None, display: Display, **settings: Any) -> "Model":
    """Load a model (None: the embedded one) with the settings of edge_moe.load.

    Raises the errors of edge_moe.load, those of the file before the second that numba takes to import.
    """
    checkpoint = None
    if path is not None:
        from edge_moe.checkpoint import open_checkpoint
        from edge_moe.onnx_folder import OnnxFolder

        checkpoint = OnnxFolder(path) if path.is_dir() else open_checkpoint(path)
    from edge_moe.api import load

    display.watch_compilation()
    model = load(checkpoint, **settings, on_plan=lambda plan: print_dim(plan.line()), on_backend=print_dim)
    display.check_interrupt()
    return model


def keep_routes(model: "Model", path: str | None) -> None:
    """Remember every token's experts, if they are to be saved."""
    if path is not None and model.expert_store is not None:
        model.expert_store.keep_routes()


def save_kept_routes(model: "Model", path: str | None) -> None:
    """Save what was remembered."""
    store = model.expert_store
    if path is None:
        return
    if store is None:
        print_dim("--save-routes: the model fits into memory; `edge-moe experts` records the routes of a text")
        return
    from edge_moe.routes import save_routes

    save_routes(Path(path), store.kept_routes(), store.n_experts)
