"""The table of quantized files: what it measures, what it keeps, and the texts it refuses."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
from gguf_files import rewrite, write_tiny_deepseek2

TOOLS = Path(__file__).parent.parent / "tools"
TEXT = "".join(f"line {i} of {i * i % 97} words, and {i % 7} more of them\n" for i in range(40))

# As llama-perplexity of llama.cpp 0c1e570 prints it, cut to the lines that begin a group.
STATISTICS = """\
====== Perplexity statistics ======
Mean PPL(Q)                   : 102.161507 ±   3.879803
Mean PPL(base)                : 101.996722 ±   3.878220
Cor(ln(PPL(Q)), ln(PPL(base))):  99.94%
Mean ln(PPL(Q)/PPL(base))     :   0.001614 ±   0.001293
Mean PPL(Q)/PPL(base)         :   1.001616 ±   0.001295
====== KL divergence statistics ======
Mean    KLD:   0.004318 ±   0.000077
Maximum KLD:   0.078134
99.9%   KLD:   0.064479
99.0%   KLD:   0.026434
Median  KLD:   0.002680
====== Token probability statistics ======
Mean    Δp: -0.071 ± 0.014 %
RMS Δp    :  0.976 ± 0.047 %
Same top p: 94.804 ± 0.311 %
"""


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import quality_table

    return quality_table


@pytest.fixture
def files(tmp_path):
    write_tiny_deepseek2(tmp_path / "f32.gguf", weight_type="F32")
    for name, kind in (("q8", gguf.GGMLQuantizationType.Q8_0), ("q4", gguf.GGMLQuantizationType.Q4_0)):
        rewrite(tmp_path / "f32.gguf", tmp_path / f"{name}.gguf", matrices=kind)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def arguments(files, *more):
    base = [files / "f32.gguf", "--text", files / "text.txt", "--work", files / "work", "-c", "64", "-t", "1", *more]
    return [str(word) for word in base]


def test_files_are_judged_once_and_paired_by_name(table, files, capsys, monkeypatch):
    ours, theirs = f"X={files / 'q8.gguf'}", f"X={files / 'q4.gguf'}"
    argv = arguments(files, "--ours", ours, "--theirs", theirs, "--theirs", files / "q8.gguf", "--json")
    assert table.main([*argv, "--plot", str(files / "plot.png")]) == 0
    document = json.loads(capsys.readouterr().out)
    by_name = {(row["maker"], row["type"]): row for row in document["rows"]}
    assert set(by_name) == {("edge_moe", "X"), ("llama.cpp", "X"), ("llama.cpp", "q8")}
    ours, theirs = by_name["edge_moe", "X"], by_name["llama.cpp", "X"]
    assert 0 < ours["figures"]["kld_mean"] < theirs["figures"]["kld_mean"] / 10  # four bits more
    assert ours["figures"] == by_name["llama.cpp", "q8"]["figures"]
    assert ours["kld_ratio"] == ours["figures"]["kld_mean"] / theirs["figures"]["kld_mean"]
    assert ours["bytes"] == (files / "q8.gguf").stat().st_size > theirs["bytes"]
    assert 8.5 < ours["bits_per_weight"] < 9.5
    assert (files / "plot.png").read_bytes().startswith(b"\x89PNG")

    def evaluate(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr("edge_moe.evaluate.evaluate", evaluate)
    log = files / "work" / "results.jsonl"
    log.write_text(log.read_text() + '{"key": "cut of')
    assert table.main(argv) == 0
    assert json.loads(capsys.readouterr().out) == document
    assert table.main(argv[:-1]) == 0
    out = capsys.readouterr().out
    assert out.count("llama.cpp") == 2
    assert "tokens of text.txt in chunks of 64" in out


def test_another_state_of_a_file_is_measured_anew(table, files, capsys):
    argv = arguments(files, "--ours", files / "q8.gguf", "--json")
    assert table.main(argv) == 0
    before = json.loads(capsys.readouterr().out)["rows"][0]["figures"]
    shutil.copy(files / "q4.gguf", files / "q8.gguf")
    assert table.main(argv) == 0
    after = json.loads(capsys.readouterr().out)["rows"][0]["figures"]
    assert after["kld_mean"] > 10 * before["kld_mean"]


def test_the_calibration_text_is_refused(table, files, capsys):
    calibration = files / "calibration.txt"
    argv = arguments(files, "--ours", files / "q8.gguf", "--calibration", calibration)
    long_line = "a line of text that is long enough to be no coincidence at all\n"
    (files / "text.txt").write_text(TEXT + long_line)
    for shared in (TEXT + long_line, "something else\n" + long_line):
        calibration.write_text(shared)
        assert table.main(argv) == 2
        assert "shares" in capsys.readouterr().err
    assert not (files / "work").exists()
    assert table.main(arguments(files, "--ours", files / "q8.gguf", "--calibration", files / "text.txt")) == 2
    calibration.write_text("other text altogether\n" * 50)
    table.check_texts(files / "text.txt", TEXT, calibration)


def test_bad_input_is_one_line(table, files, capsys):
    for argv, words in [
        (arguments(files), "nothing to compare"),
        (arguments(files, "--ours", files / "no.gguf"), "no.gguf"),
        (arguments(files, "--make-theirs", "Q8_0", "--llama", files), "llama-quantize is not in"),
        (arguments(files, "--text", files / "no.txt", "--ours", files / "q8.gguf"), "no.txt: cannot read"),
        (arguments(files, "--make-ours", "Q9_9"), "expected one of Q8_0"),
    ]:
        assert table.main(argv) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1


def test_statistics_of_llama_perplexity(table):
    from llama_tools import ToolError, parse_statistics

    found = parse_statistics(STATISTICS)
    assert found["kld_mean"] == 0.004318
    assert found["kld_median"] == 0.00268
    assert found["ppl_ratio"] == 1.001616
    assert found["top1_agreement"] == pytest.approx(0.94804)
    assert found["delta_p_rms"] == pytest.approx(0.00976)
    with pytest.raises(ToolError, match="printed no kld_mean"):
        parse_statistics(STATISTICS.replace("Mean    KLD", "Mean divergence"))


def test_types_and_bits(table):
    assert table.type_options("Q4_K_M") == ["--type", "Q4_K_M"]
    assert table.type_options("auto-4.25") == ["--type", "auto", "--bpw", "4.25"]
