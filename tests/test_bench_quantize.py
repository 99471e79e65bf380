"""The bench of quantizers: what it runs, what it measures of a command, how it sums up."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location("bench_quantize", TOOLS / "bench_quantize.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_quantize"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


def python(code):
    return [sys.executable, "-c", code]


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="no wait4 here")
def test_time_memory_and_size_of_a_command(bench, tmp_path):
    out = tmp_path / "out"
    held = f"import time; a = b'1' * 200_000_000; open({str(out)!r}, 'wb').write(a[:1000]); time.sleep(0.2)"
    # Measured by a process of its own: what its parent holds when a command starts counts for the command, too.
    load = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); from pathlib import Path; from bench_quantize import timed"
    call = f"each = timed([sys.executable, '-c', {held!r}], Path({str(out)!r}))"
    words = python(f"{load}; {call}; print(each.seconds, each.peak_bytes, each.out_bytes)")
    seconds, peak_bytes, out_bytes = map(
        float, subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout.split()
    )
    assert seconds > 0.2
    assert 200_000_000 < peak_bytes < 600_000_000
    assert out_bytes == 1000
    assert not out.exists()
    with pytest.raises(bench.ToolError, match="status 3: the last word"):
        bench.timed(python("print('the last word'); raise SystemExit(3)"), out)


def test_turns_and_medians(bench, tmp_path, monkeypatch):
    ran = []
    times = iter([99, 2, 6, 9, 3, 4, 10])

    def timed(command, out):
        ran.append(command)
        return bench.Timed(next(times), 7 + len(ran), 5)

    monkeypatch.setattr(bench, "timed", timed)
    results = bench.measure({bench.OURS: "a", bench.THEIRS: "b"}, tmp_path, 3)
    assert ran == ["a", "a", "b", "b", "a", "a", "b"]
    report = bench.summary(results)
    assert report["speed_ratio"] == 3  # of 6/2, 9/3, 10/4
    assert (report[bench.OURS]["seconds"], report[bench.THEIRS]["seconds"]) == (3, 9)
    assert report[bench.OURS]["peak_bytes"] == 13


def test_bad_input_is_one_line(bench, tmp_path, capsys):
    assert bench.main([str(tmp_path / "none.gguf")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert bench.main([str(tmp_path / "a.gguf"), "--llama", str(tmp_path)]) == 2
    assert "llama-quantize is not in" in capsys.readouterr().err
