"""Run Mixture-of-Experts language models with latent attention on an ordinary laptop.

>>> model = edge_moe.load("model.gguf")
>>> for text in model.generate("Once upon a time"):
...     print(text, end="", flush=True)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edge_moe.errors import DeviceError, EdgeMoeError, FormatError, OptionError, ShapeError, UnsupportedError

if TYPE_CHECKING:
    from edge_moe.api import Model, load
    from edge_moe.config import ModelConfig
    from edge_moe.sampling import SamplingOptions

__version__ = "0.1.0"
__all__ = [
    "DeviceError",
    "EdgeMoeError",
    "FormatError",
    "Model",
    "ModelConfig",
    "OptionError",
    "SamplingOptions",
    "ShapeError",
    "UnsupportedError",
    "load",
]

_HOMES = {
    "Model": "edge_moe.api",
    "load": "edge_moe.api",
    "ModelConfig": "edge_moe.config",
    "SamplingOptions": "edge_moe.sampling",
}


def __getattr__(name: str) -> Any:
    # numba takes a second to import: `import edge_moe` and `edge-moe --help` do without it
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'edge_moe' has no attribute {name!r}")
