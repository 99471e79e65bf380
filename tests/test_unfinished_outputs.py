"""Exporters that are stopped half-way: one line, exit 2, and nothing half-written."""

import contextlib
import sys
from pathlib import Path

import pytest
from hf_checkpoints import write_hf_checkpoint

from edge_moe.cli import main
from edge_moe.cli.report import Display

GOLDEN = Path(__file__).parent / "golden"
LIMIT_BYTES = 60_000  # less than each of the outputs' largest files
COMMANDS = {
    "convert": ["convert", "{hf}", "{out}"],
    "convert to Q4_0": ["convert", "{hf}", "{out}", "--type", "q4_0"],
    "quantize": ["quantize", "{hf}", "{out}", "--type", "Q8_0"],
    "export": ["export", "onnx", "{gguf}", "{out}", "--bits", "32"],
    "export packed": ["export", "onnx", "{gguf}", "{out}", "--bits", "8", "--block", "16", "--optimized"],
}


@pytest.fixture(params=COMMANDS)
def command(request, tmp_path):
    """Words of a command that writes something into the folder `outputs`."""
    if request.param.startswith("export"):
        pytest.importorskip("onnxruntime", reason="the export needs onnx and onnxruntime")
    write_hf_checkpoint(tmp_path / "hf", "v3")
    (tmp_path / "outputs").mkdir()
    places = {"hf": tmp_path / "hf", "out": tmp_path / "outputs" / "out", "gguf": GOLDEN / "v3.gguf"}
    return [word.format(**places) for word in COMMANDS[request.param]]


def one_line(capfd):
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("edge-moe: error: ")
    return printed.err


@contextlib.contextmanager
def full_disk():
    """No file can be longer than LIMIT_BYTES: the system refuses to write on, as on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit for the size of files")
def test_no_space_left(command, tmp_path, capfd):
    with full_disk():
        assert main(command) == 2
    assert "cannot" in one_line(capfd)
    assert not list((tmp_path / "outputs").iterdir())
    assert main(command) == 0  # with space it is written


def test_interrupted(command, tmp_path, capfd, monkeypatch):
    shown = []

    def show(self, what, done, total, rest):
        if total and 2 * done >= total:
            shown.append(what)
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "show", show)
    assert main(command) == 2
    assert shown
    assert "not written, since the run was interrupted" in one_line(capfd)
    assert not list((tmp_path / "outputs").iterdir())
