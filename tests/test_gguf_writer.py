"""The GGUF writer: what it writes, two readers read back; what it cannot finish, it leaves no trace of."""

import errno
import shutil

import gguf
import numpy as np
import pytest
from edge_moe_export.encode import encode
from edge_moe_export.gguf import NewTensor, write_gguf

from edge_moe.errors import EdgeMoeError, OptionError, ShapeError
from edge_moe.formats import BF16, F16, F32, FORMATS, Q8_0
from edge_moe.gguf import open_gguf

METADATA = {
    "general.architecture": "deepseek2",
    "a.text": "Grüße 🚀\n",
    "a.empty": "",
    "a.flag": True,
    "a.count": 7,
    "a.below": -7,
    "a.ratio": 0.1,
    **{f"a.{t.__name__}": t(5) for t in (np.uint8, np.int8, np.uint16, np.int16, np.uint64, np.int64, np.float64)},
    "a.words": ["x", "", "ü"],
    "a.no_words": [],
    "a.numbers": np.array([1, -2, 3], np.int32),
    "a.ratios": np.array([0.5, np.inf], np.float32),
    "a.flags": np.array([True, False]),
}
KINDS = {
    "a.text": "STRING", "a.flag": "BOOL", "a.count": "UINT32", "a.below": "INT32", "a.ratio": "FLOAT32",
    "a.uint8": "UINT8", "a.int8": "INT8", "a.uint16": "UINT16", "a.int16": "INT16", "a.uint64": "UINT64",
    "a.int64": "INT64", "a.float64": "FLOAT64",
}  # fmt: skip


def random_tensors(rng):
    """One tensor in each format, of 1 to 4 dimensions, their bytes random -> [NewTensor], {name: bytes}."""
    tensors, contents = [], {}
    for i, fmt in enumerate(FORMATS):
        shape = ((3, 2, 5)[: i % 4] if i % 4 else ()) + (fmt.block_size * (1 + i % 3),)
        data = rng.integers(0, 256, int(np.prod(shape[:-1])) * fmt.row_bytes(shape[-1]), dtype=np.uint8)
        halves = np.array_split(data, 3)
        tensors.append(NewTensor(f"t.{fmt.name}", fmt, shape, lambda halves=halves: iter(halves)))
        contents[f"t.{fmt.name}"] = data
    return tensors, contents


def test_both_readers_read_it_back(tmp_path):
    tensors, contents = random_tensors(np.random.default_rng(0))
    path = tmp_path / "model.gguf"
    steps = []
    size = write_gguf(path, METADATA, tensors, progress=lambda *step: steps.append(step))
    assert size == path.stat().st_size == steps[-1][1] >= steps[-1][0]
    assert [step[0] for step in steps] == sorted(step[0] for step in steps)

    ours = open_gguf(path)
    assert (ours.version, ours.alignment) == (3, 32)
    theirs = gguf.GGUFReader(path)
    assert set(ours.metadata) == set(METADATA) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    for key, value in METADATA.items():
        expected = np.float32(value) if type(value) is float else value
        read_by_us = ours.metadata[key]
        assert list(read_by_us) == list(expected) if isinstance(value, list | np.ndarray) else read_by_us == expected
        if key != "a.no_words":  # that package cannot say what an empty array holds
            read_by_them = theirs.fields[key].contents()
            assert list(read_by_them) == list(expected) if isinstance(value, np.ndarray) else read_by_them == expected
    for key, kind in KINDS.items():
        assert theirs.fields[key].types == [gguf.GGUFValueType[kind]]
    by_name = {tensor.name: tensor for tensor in theirs.tensors}
    for tensor in tensors:
        entry = ours.tensors[tensor.name]
        assert (entry.format, entry.shape) == (tensor.format, tensor.shape)
        np.testing.assert_array_equal(entry.data, contents[tensor.name])
        other = by_name[tensor.name]
        assert (int(other.tensor_type), tuple(other.shape)[::-1]) == (tensor.format.ggml_type, tensor.shape)
        np.testing.assert_array_equal(other.data.view(np.uint8).reshape(-1), contents[tensor.name])


@pytest.mark.parametrize("fmt", [F32, F16, BF16, Q8_0], ids=str)
def test_encoders_equal_those_of_the_gguf_package(fmt):
    rng = np.random.default_rng(1)
    values = (rng.standard_normal((64, 96)) * 10.0 ** rng.integers(-9, 4, (64, 96))).astype(np.float32)
    values[0] = 0
    values[1, :4] = [-0.0, 1e-40, 6.5e4, 3e38]  # a subnormal; too large for f16
    values[2, :32] = np.arange(-16, 16) + 0.5  # halves, which Q8_0 rounds away from zero
    values[2, 0] = 127
    if fmt is not Q8_0:
        values[3, :3] = [np.inf, -np.inf, np.nan]
    with np.errstate(all="ignore"):
        expected = gguf.quantize(values, gguf.GGMLQuantizationType[fmt.name]).view(np.uint8).reshape(-1)
    np.testing.assert_array_equal(encode(values, fmt), expected)


def one_tensor(parts):
    return [NewTensor("first", F32, (4,), lambda: [np.zeros(16, np.uint8)]), NewTensor("second", F32, (4,), parts)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("before", [None, b"what was there"])
def test_an_interrupted_write_leaves_nothing(tmp_path, error, before):
    path = tmp_path / "model.gguf"
    if before:
        path.write_bytes(before)

    def parts():
        yield np.zeros(8, np.uint8)
        raise error

    with pytest.raises(OptionError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        write_gguf(path, {}, one_tensor(parts))
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
        assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == (["model.gguf"] if before else [])
    assert not before or path.read_bytes() == before


def test_too_little_space_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OptionError, match="only 10 are free"):
        write_gguf(tmp_path / "model.gguf", {}, one_tensor(lambda: pytest.fail("began to write")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_bytes", [0, 12, 20])
def test_parts_of_the_wrong_size(tmp_path, n_bytes):
    with pytest.raises(ShapeError, match=rf"second: its parts make {n_bytes} bytes, expected 16"):
        write_gguf(tmp_path / "model.gguf", {}, one_tensor(lambda: [np.zeros(n_bytes, np.uint8)]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        ({"a": 1 << 40}, []),
        ({"a": None}, []),
        ({"a": [1, "x"]}, []),
        ({"a": np.zeros((2, 2))}, []),
        ({"a": 1 + 2j}, []),
        ({}, [NewTensor("x" * 64, F32, (1,), list)]),
        ({}, [NewTensor("", F32, (1,), list)]),
        ({}, [NewTensor("x", F32, (), list)]),
        ({}, [NewTensor("x", F32, (0, 1), list)]),
        ({}, [NewTensor("x", F32, (1,) * 5, list)]),
        ({}, [NewTensor("x", F32, (1,), list)] * 2),
        ({}, [NewTensor("x", Q8_0, (33,), list)]),
        ({}, [NewTensor("x", F32, (1,), lambda: [np.zeros(1, np.float32)])]),
    ],
)
def test_what_a_file_cannot_hold(tmp_path, metadata, tensors):
    with pytest.raises(EdgeMoeError) as caught:
        write_gguf(tmp_path / "model.gguf", metadata, tensors)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    for path in (tmp_path, tmp_path / "no" / "model.gguf", tmp_path / ("x" * 300)):
        with pytest.raises(OptionError, match=str(tmp_path)):
            write_gguf(path, {}, [])
    assert not list(tmp_path.iterdir())
