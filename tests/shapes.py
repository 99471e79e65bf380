"""Files of random weights in the shapes of real models, by the tool that makes them."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "make_shape.py"


def write_v2_lite(path, **changes):
    """DeepSeek-V2-Lite in Q4_K_M, with other sizes where they are given."""
    spec = importlib.util.spec_from_file_location("make_shape", TOOL)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "make_shape", module)  # dataclasses look their module up by name
        spec.loader.exec_module(module)
        module.write_model(path, dataclasses.replace(module.SHAPES["v2-lite"], **changes), "Q4_K_M", seed=1)
