"""Quantizing files: what is written, runs that are cut short and go on, importance matrices, bad input."""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from edge_moe_quant import quantize as module
from edge_moe_quant.encode import encode_rows
from edge_moe_quant.importance import read_importance
from edge_moe_quant.quantize import quantize
from gguf_files import write_tiny_deepseek2
from reference import read_gguf

import edge_moe
from edge_moe.cli import main
from edge_moe.errors import FormatError, OptionError
from edge_moe.formats import F16, F32, Q8_0
from edge_moe.gguf import open_gguf

GOLDEN = Path(__file__).parent / "golden" / "v2_lite.gguf"


@pytest.fixture
def source():
    return open_gguf(GOLDEN)


def formats_of(source, fmt=Q8_0):
    """fmt for all matrices that fit, but the router."""
    return {
        name: fmt if len(entry.shape) > 1 and "gate_inp" not in name and entry.shape[-1] % fmt.block_size == 0 else F32
        for name, entry in source.tensors.items()
    }


def write_imatrix(path, sums, counts):
    writer = gguf.GGUFWriter(path, "none")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["some.txt"])
    writer.add_uint32("imatrix.chunk_count", 5)
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", np.asarray(values, np.float32))
        writer.add_tensor(f"{name}.counts", np.asarray(counts[name], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tensors_metadata_and_answers(source, tmp_path):
    out = tmp_path / "out.gguf"
    formats = formats_of(source)
    done = quantize(source, out, formats, file_type=7)
    written = open_gguf(out)
    assert done.size_bytes == out.stat().st_size
    assert sum(done.n_tensors.values()) == len(source.tensors) == len(written.tensors)
    for name, entry in source.tensors.items():
        new = written.tensors[name]
        assert (new.shape, new.format) == (entry.shape, formats[name])
        values = entry.format.decode(entry.data).reshape(entry.shape)
        back = new.format.decode(new.data).reshape(entry.shape)
        if new.format is F32:
            np.testing.assert_array_equal(back, values)
        else:
            assert np.abs(back - values).max() <= np.abs(values).max() / 200
    ours, theirs = gguf.GGUFReader(out).fields, gguf.GGUFReader(GOLDEN).fields
    changed = {"general.file_type", "general.quantization_version"}
    for key, field in theirs.items():
        if not key.startswith("GGUF.") and key not in changed:
            assert (ours[key].types, ours[key].contents()) == (field.types, field.contents()), key
    assert (ours["general.file_type"].contents(), ours["general.quantization_version"].contents()) == (7, 2)
    ids = list(range(10, 40))
    expected, found = edge_moe.load(GOLDEN).logits(ids), edge_moe.load(out).logits(ids)
    assert np.abs(found - expected).max() < 0.1 * np.ptp(expected)


def test_slices_and_threads_change_nothing(source, tmp_path, monkeypatch):
    formats = formats_of(source)
    quantize(source, tmp_path / "a.gguf", formats, file_type=7, n_threads=1)
    monkeypatch.setattr(module, "_SLICE_VALUES", 200)
    steps = []
    quantize(source, tmp_path / "b.gguf", formats, file_type=7, n_threads=3, progress=lambda *s: steps.append(s))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert len(steps) > 3 * len(formats)
    assert [step[0] for step in steps] == sorted(step[0] for step in steps)


def test_parts_of_a_split_model_become_one_file(tmp_path):
    write_tiny_deepseek2(tmp_path / "m.gguf", weight_type="F16", tensors_per_part=7)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    source = open_gguf(parts[0])
    quantize(source, tmp_path / "out.gguf", formats_of(source), file_type=7)
    out = open_gguf(tmp_path / "out.gguf")
    assert out.tensors.keys() == source.tensors.keys()
    assert not [key for key in out.metadata if key.startswith("split.")]


# ---- cut short ------------------------------------------------------------------------------------------------------


class CutShortError(Exception):
    pass


def test_a_run_that_is_cut_short_goes_on(source, tmp_path, monkeypatch):
    formats, out, part = formats_of(source), tmp_path / "out.gguf", tmp_path / ".out.gguf.part"
    quantize(source, tmp_path / "whole.gguf", formats, file_type=7)
    expected = (tmp_path / "whole.gguf").read_bytes()
    written = []

    def stop_at(n_tensors):
        def progress(done, total, name):
            written.append(name)
            if list(formats).index(name) == n_tensors:
                raise CutShortError

        return progress

    for n_tensors in (3, 9, 20):
        with pytest.raises(CutShortError):
            quantize(source, out, formats, file_type=7, progress=stop_at(n_tensors))
        assert part.exists()
        assert not out.exists()
    assert len(set(written)) == 21
    assert len(written) < 21 + 3 * 2, "finished tensors were written again"
    data, label = part.read_bytes(), tmp_path / ".out.gguf.part.key"
    key = label.read_text()
    for size in (0, 5, len(data) // 2, len(data) - 1, len(data)):  # as if killed there
        part.write_bytes(data[:size])
        label.write_text(key)
        quantize(source, out, formats, file_type=7)
        assert out.read_bytes() == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]
        out.unlink()


def test_another_job_starts_anew(source, tmp_path):
    out = tmp_path / "out.gguf"

    def stop(done, total, name):
        raise CutShortError

    with pytest.raises(CutShortError):
        quantize(source, out, formats_of(source), file_type=7, progress=stop)
    quantize(source, out, formats_of(source, F16), file_type=1)
    quantize(source, tmp_path / "fresh.gguf", formats_of(source, F16), file_type=1)
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_quantize import formats_of
from edge_moe.gguf import open_gguf
from edge_moe_quant.quantize import quantize
source = open_gguf(sys.argv[1])
calls = []
def progress(done, total, name):
    calls.append(name)
    if len(calls) == 15:
        os.kill(os.getpid(), signal.SIGKILL)
quantize(source, Path(sys.argv[2]), formats_of(source), file_type=7, progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_sigkill(source, tmp_path):
    out = tmp_path / "out.gguf"
    argv = [sys.executable, "-c", KILLED, str(GOLDEN), str(out), str(Path(__file__).parent)]
    assert subprocess.run(argv, env=os.environ, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".gguf"] == []
    quantize(source, out, formats_of(source), file_type=7)
    quantize(source, tmp_path / "whole.gguf", formats_of(source), file_type=7)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_at_random_moments(tmp_path):
    """Twenty times; each run goes on from what the one before left, and the bytes are those of a run left alone."""
    source, whole, out = tmp_path / "bf16.gguf", tmp_path / "whole.gguf", tmp_path / "out.gguf"
    checkpoint = Path(__file__).parents[1] / "tools" / "reference_model" / "checkpoint"
    assert main(["convert", str(checkpoint), str(source), "--type", "bf16"]) == 0
    command = [sys.executable, "-m", "edge_moe", "quantize", str(source)]
    subprocess.run([*command, str(whole), "--type", "Q4_K_M"], check=True, capture_output=True)
    expected, rng, n_killed, n_parts = whole.read_bytes(), np.random.default_rng(0), 0, 0
    start = time.monotonic()
    subprocess.run([*command, str(out), "--type", "Q4_K_M"], check=True, capture_output=True)
    longest_s = time.monotonic() - start
    out.unlink()
    status = None
    while n_killed < 20 or status != 0:  # the last one is left to finish
        with subprocess.Popen([*command, str(out), "--type", "Q4_K_M"], stderr=subprocess.DEVNULL) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, longest_s) if n_killed < 20 else None)
            process.kill()
        status = process.returncode
        n_killed += status != 0
        n_parts += (tmp_path / ".out.gguf.part").exists()
        if out.exists():  # perhaps killed when all was done
            assert out.read_bytes() == expected
            if n_killed < 20:
                out.unlink()
    assert n_parts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16.gguf", "out.gguf", "whole.gguf"]


def test_two_runs_do_not_write_the_same_file(source, tmp_path):
    pytest.importorskip("fcntl")

    def second_run(done, total, name):
        quantize(source, tmp_path / "out.gguf", formats_of(source), file_type=7)

    with pytest.raises(OptionError, match="another run is writing it"):
        quantize(source, tmp_path / "out.gguf", formats_of(source), file_type=7, progress=second_run)


def test_no_room(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OptionError, match="only 1000 are free"):
        quantize(source, tmp_path / "out.gguf", formats_of(source), file_type=7)
    assert not (tmp_path / "out.gguf").exists()


def test_the_disk_is_full_midway(source, tmp_path):
    resource = pytest.importorskip("resource")
    before, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))
        with pytest.raises(OptionError, match="the same command goes on from there"):
            quantize(source, tmp_path / "out.gguf", formats_of(source), file_type=7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert not (tmp_path / "out.gguf").exists()
    quantize(source, tmp_path / "out.gguf", formats_of(source), file_type=7)
    assert open_gguf(tmp_path / "out.gguf").tensors.keys() == source.tensors.keys()


# ---- importance -----------------------------------------------------------------------------------------------------


def test_an_experts_importance_is_drawn_to_its_layers(tmp_path):
    rng = np.random.default_rng(0)
    counts = np.array([[1000.0], [3.0], [0.0]])
    sums = rng.gamma(1, 1, (3, 32)) * counts
    path = write_imatrix(tmp_path / "i.gguf", {"a": sums, "b": np.ones((1, 32))}, {"a": counts, "b": [[4.0]]})
    read = read_importance(path)
    assert (read.n_chunks, read.datasets) == (5, ("some.txt",))
    common = sums.sum(0) / counts.sum()
    for found, own, n in zip(read.of("a", (3, 7, 32)), sums, counts[:, 0], strict=True):
        expected = common if n == 0 else (n * (own / n) + 64 * common) / (n + 64)
        np.testing.assert_allclose(found, expected / expected.mean(), rtol=2e-5, atol=1.1e-3)
    np.testing.assert_array_equal(read.of("b", (5, 32)), np.ones((1, 32)))
    assert read.of("b", (2, 5, 32)).shape == (2, 32)
    assert read.of("c", (5, 32)) is None
    with pytest.raises(FormatError, match="96 values for a, expected 32 or 64"):
        read.of("a", (2, 7, 32))


def test_the_older_file(tmp_path):
    values = np.linspace(1, 2, 64, dtype=np.float32)
    data = struct.pack("<i", 1) + struct.pack("<i", 5) + b"blk.0" + struct.pack("<ii", 2, 64) + values.tobytes()
    path = tmp_path / "old.dat"
    for tail in (b"", struct.pack("<ii", 7, 3) + b"txt"):
        path.write_bytes(data + tail)
        read = read_importance(path)
        np.testing.assert_allclose(read.of("blk.0", (2, 3, 32)), (values / values.mean()).reshape(2, 32), rtol=1e-6)
    assert (read.n_chunks, read.datasets) == (7, ("txt",))
    for size in (0, 3, 8, 12, 60, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match=r"importance matrix|cut short"):
            read_importance(path)


@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_damaged_importance(bad, tmp_path):
    sums = np.ones((1, 32))
    sums[0, 5] = bad
    with pytest.raises(FormatError, match="not finite or below zero"):
        read_importance(write_imatrix(tmp_path / "i.gguf", {"a": sums}, {"a": [[1.0]]}))
    with pytest.raises(FormatError, match="holds no importance matrix"):
        read_importance(GOLDEN)


def test_each_expert_is_encoded_by_its_own_importance(tmp_path):
    write_tiny_deepseek2(tmp_path / "m.gguf", weight_type="F32")
    source = open_gguf(tmp_path / "m.gguf")
    name = "blk.1.ffn_up_exps.weight"
    entry = source.tensors[name]
    n_experts, _, n_cols = entry.shape
    sums = np.random.default_rng(1).gamma(0.5, 1, (n_experts, n_cols)) * 1e6
    path = write_imatrix(tmp_path / "i.gguf", {name: sums}, {name: np.full((n_experts, 1), 1e6)})
    read = read_importance(path)
    quantize(source, tmp_path / "out.gguf", formats_of(source), file_type=7, importance=read)
    values = entry.format.decode(entry.data).reshape(entry.shape)
    expected = [encode_rows(v, Q8_0, w) for v, w in zip(values, read.of(name, entry.shape), strict=True)]
    written = open_gguf(tmp_path / "out.gguf")
    np.testing.assert_array_equal(written.tensors[name].data, np.concatenate(expected).reshape(-1))
    assert written.metadata["quantize.imatrix.file"] == "i.gguf"
    assert written.metadata["quantize.imatrix.entries_count"] == 1
    with pytest.raises(FormatError, match=r"values for blk.1.ffn_up_exps.weight, expected"):
        wrong = write_imatrix(tmp_path / "w.gguf", {name: sums[:, :-1]}, {name: np.full((n_experts, 1), 1e6)})
        quantize(source, tmp_path / "no.gguf", formats_of(source), file_type=7, importance=read_importance(wrong))


# ---- the command, and bad input -------------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    out = tmp_path / "out.gguf"
    assert (
        main(["quantize", str(GOLDEN), str(out), "--type", "q8_0", "--tensor-type", "attn_output=F16", "--json"]) == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"] == out.stat().st_size
    _, tensors = read_gguf(out)
    assert sum(document["tensors"].values()) == len(tensors)
    assert open_gguf(out).tensors["blk.0.attn_output.weight"].format is F16
    assert main(["quantize", str(GOLDEN), "--type", "Q8_0", "--print-recipe"]) == 0
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(capsys.readouterr().out + "attn_output F16\n")
    again = tmp_path / "again.gguf"
    assert main(["quantize", str(GOLDEN), str(again), "--recipe", str(recipe)]) == 0
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("SRC OUT", "--type Q4_K_M"),
        ("SRC --type Q8_0", "name the file to write"),
        ("SRC OUT --type Q9_0", "expected one of Q8_0"),
        ("SRC OUT --type Q8_0 --tensor-type attn", "expected PATTERN=TYPE, found 'attn'"),
        ("SRC OUT --type Q8_0 --tensor-type nothing=Q8_0", "'nothing' fits no tensor"),
        ("SRC OUT --type Q8_0 --imatrix missing.gguf", "missing.gguf: cannot read the importance matrix"),
        ("SRC OUT --type Q8_0 --recipe missing.txt", "missing.txt: cannot read"),
        ("SRC SRC --type Q8_0", "is the source itself"),
        ("missing.gguf OUT --type Q8_0", "missing.gguf: cannot open"),
        ("SRC missing/out.gguf --type Q8_0", "cannot be written"),
        ("SRC . --type Q8_0", "is a folder"),
    ],
)
def test_bad_commands(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", *words.replace("SRC", str(GOLDEN)).replace("OUT", "out.gguf").split()]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_quantized_already(source, tmp_path):
    quantize(source, tmp_path / "q8.gguf", formats_of(source), file_type=7)
    again = open_gguf(tmp_path / "q8.gguf")
    quantize(again, tmp_path / "copy.gguf", formats_of(source), file_type=7)
    assert (tmp_path / "copy.gguf").read_bytes() == (tmp_path / "q8.gguf").read_bytes()
    with pytest.raises(OptionError, match="is Q8_0 already and would become F16; start from"):
        quantize(again, tmp_path / "no.gguf", formats_of(source, F16), file_type=1)
    quantize(again, tmp_path / "f16.gguf", formats_of(source, F16), file_type=1, allow_requantize=True)


def test_weights_that_are_no_numbers(tmp_path):
    path = tmp_path / "m.gguf"
    write_tiny_deepseek2(path, weight_type="F32")
    entry = open_gguf(path).tensors["blk.1.ffn_up_exps.weight"]
    data = path.read_bytes()
    at = data.index(bytes(entry.data[4000:4064]))
    path.write_bytes(data[:at] + struct.pack("<f", np.nan) + data[at + 4 :])
    source = open_gguf(path)
    with pytest.raises(FormatError, match=r"tensor blk.1.ffn_up_exps.weight holds weights that are infinite or not a"):
        quantize(source, tmp_path / "out.gguf", formats_of(source), file_type=7)
    assert not (tmp_path / "out.gguf").exists()
