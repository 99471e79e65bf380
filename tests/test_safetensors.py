"""Safetensors files: each dtype is decoded, and a header that does not fit its file is refused in one line."""

import json
import struct

import numpy as np
import pytest
from hf_checkpoints import write_safetensors

from edge_moe.errors import EdgeMoeError, FormatError, UnsupportedError
from edge_moe.safetensors import open_safetensors

VALUES = np.array([[0.0, -0.0, 1.5, -2.0], [1e-5, 65504.0, np.inf, 0.1]], np.float32)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_floats(dtype, tmp_path):
    if dtype == "BF16":
        raw = (VALUES.view(np.uint32) >> 16).astype(np.uint16)
        expected = (raw.astype(np.uint32) << 16).view(np.float32)
    else:
        raw = VALUES.astype({"F32": "<f4", "F16": "<f2"}[dtype])
        expected = raw.astype(np.float32)
    # an odd number of bytes before it: the format aligns nothing
    write_safetensors(tmp_path / "model.safetensors", {"pad": ("U8", np.zeros(3, np.uint8)), "x": (dtype, raw)})
    model = open_safetensors(tmp_path)
    entry = model.entries["x"]
    assert (entry.dtype, entry.shape) == (dtype, (2, 4))
    np.testing.assert_array_equal(model.decode("x"), expected)
    np.testing.assert_array_equal(model.decode("x", 1, 2), expected[1:])
    assert model.decode("x", 2, 2).shape == (0, 4)
    with pytest.raises(UnsupportedError, match="pad is U8"):
        model.decode("pad")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"x": ("F32", VALUES)})
    model = open_safetensors(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FormatError, match="ends early"):
        model.decode("x")
    path.unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        model.decode("x")


def row(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


WRONG = {
    "another size": {"x": row(shape=(3,))},
    "a hole": {"x": row(), "y": row(offsets=(12, 20))},
    "an overlap": {"x": row(), "y": row(offsets=(4, 12))},
    "more than the file": {"x": row(), "y": row(offsets=(8, 16)), "z": row(offsets=(16, 24))},
    "less than the file": {"x": row()},
    "an unknown dtype": {"x": row("F33")},
    "a negative size": {"x": row(shape=(-2,), offsets=(0, -8))},
    "a huge size": {"x": row(shape=(1 << 60, 0), offsets=(0, 0))},
    "a size that is no number": {"x": row(shape=("2",))},
    "one offset": {"x": row(offsets=(0,))},
    "no row": {"x": 3},
    "a list": [],
}


@pytest.mark.parametrize("name", WRONG)
def test_headers_that_do_not_fit(name, tmp_path):
    header = json.dumps(WRONG[name]).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(FormatError) as caught:
        open_safetensors(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 7, b"\xff" * 8, struct.pack("<Q", 9) + b"{}", struct.pack("<Q", 2) + b"{{"]
)
def test_files_that_are_none(data, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="damaged or incomplete"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"w": ("F8_E4M3", np.zeros((4, 4), np.uint8))},  # no scale
        {"w_scale_inv": ("F32", np.ones((1, 1), np.float32))},  # no weight
        {"w": ("F8_E4M3", np.zeros((4, 4), np.uint8)), "w_scale_inv": ("F32", np.ones((2, 1), np.float32))},
    ],
)
def test_fp8_without_its_scales(tensors, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(EdgeMoeError, match="w_scale_inv"):
        open_safetensors(tmp_path).decode("w")
