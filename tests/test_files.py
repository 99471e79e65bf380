"""Outputs appear when they are whole; what a killed process leaves is removed by the next, and never a living one's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hf_checkpoints import write_hf_checkpoint

from edge_moe.cli import main
from edge_moe.errors import OptionError
from edge_moe.files import new_folder, replacing

GOLDEN = Path(__file__).parent / "golden"
unix_only = pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def killed(code, *arguments):
    """Run Python code in a process that sends itself SIGKILL in the midst of writing."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


KILLED_IN = """
import os, signal, sys
from pathlib import Path
from edge_moe.files import {function}

with {function}(Path(sys.argv[1]), 100) as made:
    {write}
    os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED_CONVERSION = """
import os, signal, sys
from pathlib import Path
from edge_moe_export.convert import convert

def kill(done_bytes, total_bytes, name):
    if done_bytes * 2 > total_bytes:
        os.kill(os.getpid(), signal.SIGKILL)

convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=kill)
"""
KILLED_EXPORT = """
import os, signal, sys
from pathlib import Path
from edge_moe.checkpoint import open_checkpoint
from edge_moe_export.onnx import export_onnx

export_onnx(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), bits=32,
            progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))
"""


@unix_only
def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    out = tmp_path / "model.gguf"
    killed(KILLED_IN.format(function="replacing", write='made.write(b"half"); made.flush()'), out)
    (left,) = names(tmp_path)
    assert left.startswith(".model.gguf.")
    assert left.endswith(".part")
    with replacing(out, 5) as file:
        assert len(names(tmp_path)) == 1
        assert left not in names(tmp_path)
        file.write(b"whole")
    assert names(tmp_path) == ["model.gguf"]
    assert out.read_bytes() == b"whole"


@unix_only
def test_a_killed_conversion(tmp_path):
    write_hf_checkpoint(tmp_path / "hf", "v3")
    (tmp_path / "out").mkdir()
    killed(KILLED_CONVERSION, tmp_path / "hf", tmp_path / "out" / "model.gguf")
    assert len(names(tmp_path / "out")) == 1
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out" / "model.gguf")]) == 0
    assert names(tmp_path / "out") == ["model.gguf"]


@unix_only
def test_a_killed_export(tmp_path):
    pytest.importorskip("onnx")
    (tmp_path / "out").mkdir()
    killed(KILLED_EXPORT, GOLDEN / "v2_tied.gguf", tmp_path / "out" / "folder")
    (left,) = names(tmp_path / "out")
    assert names(tmp_path / "out" / left)
    assert main(["export", "onnx", str(GOLDEN / "v2_tied.gguf"), str(tmp_path / "out" / "folder"), "--bits", "32"]) == 0
    assert names(tmp_path / "out") == ["folder"]


def test_what_is_still_being_written_stays(tmp_path):
    """Two runs may write the same output; the one that ends last is the one that stays."""
    out = tmp_path / "out"
    with replacing(out, 1) as first:
        first.write(b"1")
        with replacing(out, 1) as second:
            assert len(names(tmp_path)) == 2
            second.write(b"2")
        assert out.read_bytes() == b"2"
    assert out.read_bytes() == b"1"
    assert names(tmp_path) == ["out"]


def test_a_folder_that_is_still_being_written_stays(tmp_path):
    with new_folder(tmp_path / "out", 1) as first:
        (first / "file").write_bytes(b"1")
        with pytest.raises(RuntimeError, match="stop"), new_folder(tmp_path / "out", 1):
            assert len(names(tmp_path)) == 2
            raise RuntimeError("stop")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_bytes() == b"1"


def test_nothing_else_is_taken_for_a_part(tmp_path):
    """Files of other outputs, of interrupted runs that go on, links, and names that only look alike."""
    kept = [
        ".out.part", ".out.part.key", ".out.0123456.part", ".out.0123456z.part", ".out2.01234567.part",
        "out.01234567.part", ".other.01234567.part", ".out.01234567.part.key",
    ]  # fmt: skip
    for name in kept:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".out.01234567.part").write_bytes(b"")
    (tmp_path / ".out.89abcdef.part").mkdir()
    (tmp_path / ".out.89abcdef.part" / "model.onnx").write_bytes(b"")
    if sys.platform != "win32":
        (tmp_path / ".out.aaaaaaaa.part").symlink_to(tmp_path / "out.01234567.part")
        os.mkfifo(tmp_path / ".out.bbbbbbbb.part")
        kept.append(".out.aaaaaaaa.part")
    with replacing(tmp_path / "out", 0):
        pass
    assert names(tmp_path) == sorted([*kept, "out"])


def test_errors_are_of_one_line(tmp_path):
    for function in (replacing, new_folder):
        with pytest.raises(OptionError, match="cannot be written"), function(tmp_path / "none" / "out", 1):
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(OptionError, match="is a folder"), replacing(tmp_path / "folder", 1):
        pass
    (tmp_path / "folder" / "file").write_bytes(b"")
    with pytest.raises(OptionError, match="exists already"), new_folder(tmp_path / "folder", 1):
        pass
    assert names(tmp_path) == ["folder"]
