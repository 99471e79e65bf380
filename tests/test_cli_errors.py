"""Every bad command line gives one clear line on standard error and exit status 2, never a traceback."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_moe.cli import main

MODEL = str(Path(__file__).parent / "golden" / "v2_lite.gguf")  # 256 tokens of context


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with files that bad command lines name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "text.gguf").write_text("this is no model " * 10)
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "good.txt").write_text("Some text. " * 50)
    (tmp_path / "short.txt").write_text("Some text.")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "newline.txt").write_text("\n")
    (tmp_path / "latin1.txt").write_bytes("Gr\xfc\xdfe".encode("latin-1"))
    return tmp_path


# command line, and a part of the one line that must come
BAD_LINES = [
    ("frobnicate", "unknown command 'frobnicate'"),
    ("--verbose", "unknown option '--verbose'"),
    ("RUN hello", "unknown command 'RUN'"),
    ("run missing.gguf hello", "missing.gguf: cannot open the model file"),
    ("run folder.gguf hello", "folder.gguf: is not a file"),
    ("run empty.gguf hello", "empty.gguf"),
    ("run short.gguf hello", "short.gguf"),
    ("run text.gguf hello", "text.gguf"),
    ("run text.gguf hello there", "unrecognized arguments: there"),
    ("run text.gguf", "no prompt"),
    ("run", "no prompt"),
    ("run hello -n 0", "-n/--n-predict: expected a whole number from 1"),
    ("run hello -n -1", "-n/--n-predict"),
    ("run hello -n five", "found 'five'"),
    ("run hello -n 1e3", "found '1e3'"),
    ("run hello -n 99999999999999999999", "-n/--n-predict"),
    ("run hello -n", "-n/--n-predict: expected one argument"),
    ("run hello -c 0", "-c/--ctx-size"),
    ("run hello -c -4096", "-c/--ctx-size"),
    ("run hello -c 4k", "found '4k'"),
    ("run hello -t 0", "-t/--threads"),
    ("run hello -t 100000", "-t/--threads"),
    ("run hello -t two", "found 'two'"),
    ("run hello --temp -0.1", "--temp: expected a number of at least 0"),
    ("run hello --temp nan", "--temp"),
    ("run hello --temp inf", "--temp"),
    ("run hello --temp warm", "found 'warm'"),
    ("run hello --top-k -1", "--top-k"),
    ("run hello --top-k 1.5", "--top-k"),
    ("run hello --top-p 0", "--top-p: expected a number above 0 and at most 1"),
    ("run hello --top-p 1.01", "--top-p"),
    ("run hello --min-p -0.1", "--min-p"),
    ("run hello --min-p 2", "--min-p"),
    ("run hello --repeat-penalty 0", "--repeat-penalty"),
    ("run hello --repeat-penalty -1", "--repeat-penalty"),
    ("run hello --seed -1", "--seed"),
    ("run hello --seed 1.0", "--seed"),
    ("run hello --seed 9223372036854775808", "--seed"),
    ("run hello --stop", "--stop: expected one argument"),
    ("run hello --stop=", "--stop: expected some text"),
    ("run hello --ctx 5", "unrecognized arguments"),  # no abbreviations: they would break with new options
    ("run hello --json=yes", "--json"),
    ("chat missing.gguf", "missing.gguf: cannot open"),
    ("chat text.gguf -n 0", "-n/--n-predict"),
    ("chat text.gguf hello", "unrecognized arguments: hello"),
    ("info missing.gguf", "missing.gguf: cannot open"),
    ("info folder.gguf", "folder.gguf: is not a file"),
    ("info empty.gguf", "empty.gguf"),
    ("info text.gguf", "text.gguf"),
    ("info text.gguf -c 0", "-c/--ctx-size"),
    ("bench", "the following arguments are required: MODEL"),
    ("bench missing.gguf", "missing.gguf: cannot open"),
    ("bench text.gguf -p -1", "-p/--n-prompt"),
    ("bench text.gguf -n x", "-n/--n-gen"),
    ("bench text.gguf -p 0 -n 0", "nothing to measure"),
    ("bench text.gguf -d 0,,4096", "-d/--n-depth"),
    ("bench text.gguf -d 0;4096", "-d/--n-depth"),
    ("bench text.gguf -r 0", "-r/--repetitions"),
    ("eval", "required: --text"),
    ("eval text.gguf", "required: --text"),
    ("eval missing.gguf --text good.txt", "missing.gguf: cannot open"),
    ("eval text.gguf --text missing.txt", "missing.txt: cannot read the text"),
    ("eval text.gguf --text folder.gguf", "folder.gguf: cannot read the text"),
    ("eval text.gguf --text empty.txt", "empty.txt: there is no text in it"),
    ("eval text.gguf --text newline.txt", "newline.txt: there is no text in it"),
    ("eval text.gguf --text latin1.txt", "latin1.txt: byte 0xfc at offset 2 is not UTF-8"),
    ("eval text.gguf --text good.txt --reference missing.gguf", "missing.gguf: cannot open"),
    ("eval text.gguf --text good.txt -c 3", "-c/--ctx-size"),
    ("eval text.gguf --text good.txt --stride 0", "--stride"),
    ("eval text.gguf --text good.txt --chunks 0", "--chunks"),
    ("eval text.gguf --text good.txt --reference a.gguf --reference-logits b.kld", "not allowed with"),
    ("eval text.gguf --text good.txt --reference-logits missing.kld", "missing.kld: cannot read the saved logits"),
    ("eval text.gguf --text good.txt --reference-logits good.txt", "good.txt: begins with"),
    ("run MODEL hello -c 257", "takes 1 to 256 tokens"),
    ("run MODEL hello -c 3", "the context takes 3"),
    ("run MODEL -", "standard input: there is no text in it"),
    ("chat MODEL -c 257", "takes 1 to 256 tokens"),
    ("info MODEL -c 257", "the model's context is 256 tokens"),
    ("bench MODEL -p 257", "the model's context is 256"),
    ("bench MODEL -p 200 -d 100", "-d and -p or -n make 300 tokens"),
    ("bench MODEL -p 0 -n 10 -d 0,250", "make 260 tokens"),
    ("eval MODEL --text good.txt", "-c 512: the context of"),
    ("eval MODEL --text good.txt -c 64 --stride 64", "the stride must be from 1 to 63"),
    ("eval MODEL --text short.txt -c 64", "fewer than one context of 64"),
    ("eval MODEL --text good.txt -c 64 --reference text.gguf", "text.gguf"),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES, ids=[line for line, _ in BAD_LINES])
def test_bad_input_is_one_line_and_status_2(folder, capsys, monkeypatch, line, words):
    monkeypatch.setattr(sys, "stdin", Terminal())
    status = main([MODEL if word == "MODEL" else word for word in line.split(" ")])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("edge-moe: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert words in err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "no\nsuch\x1b[31m.gguf", "x"], r"no\nsuch\x1b[31m.gguf: cannot open"),
        (["run", "x" * 5000 + ".gguf", "x"], "cannot open the model file: File name too long"),
        (["run", "a\0b.gguf", "x"], "is no file name"),
        (["run", "\udcff\udcfe"], "not UTF-8"),
        (["run", "hello", "--stop", "\udcff"], "not UTF-8"),
        (["run", "hello", "--seed", "9" * 5000], "--seed"),
    ],
)
def test_strange_arguments_are_one_line_too(folder, capsys, argv, words):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert len(err) < 6000
    assert words in err


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"\xff\xfe", "byte 0xff at offset 0"), (b"", "there is no text"), (b"\r\n", "there is no text")],
)
def test_standard_input_that_is_no_prompt(capsys, monkeypatch, data, words):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["run", "-"]) == 2
    assert words in capsys.readouterr().err


def test_a_prompt_longer_than_the_context(capsys):
    assert main(["run", MODEL, "hello " * 300]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"edge-moe: error: the prompt has \d+ tokens, the context takes 256;.*\n", err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-m", "edge_moe", "info", MODEL], stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert done.returncode == 2
    assert done.stderr == b"edge-moe: error: No space left on device\n"


def test_an_unforeseen_error_is_one_line_unless_the_traceback_is_wanted(capsys, monkeypatch):
    monkeypatch.setattr("edge_moe.cli.info.describe", lambda *_: 1 // 0)
    assert main(["info", MODEL]) == 70
    err = capsys.readouterr().err
    assert err.startswith("edge-moe: error: internal error: ZeroDivisionError")
    assert err.count("\n") == 1
    monkeypatch.setenv("EDGE_MOE_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["info", MODEL])
