"""The comparison with llama.cpp: order of the runs, the log after a cut, the bound, what is read of both programs."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from edge_moe.api import embedded_model_path
from edge_moe.checkpoint import open_checkpoint

TOOLS = Path(__file__).parent.parent / "tools"
GOLDEN = Path(__file__).parent / "golden"
LLAMAS = Path(__file__).parent / "golden_llama"
SETUP = {"model": "m.gguf", "threads": 2}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_peers

    return bench_peers


class Engines:
    """Speeds that grow with each call, and a record of who was called."""

    def __init__(self, bench, stop_after=10**9):
        self.calls, self.stop_after = [], stop_after
        self.speeds = {bench.OURS: self.caller(bench.OURS), bench.THEIRS: self.caller(bench.THEIRS)}

    def caller(self, who):
        def speed(test):
            if len(self.calls) == self.stop_after:
                raise KeyboardInterrupt
            self.calls.append((who, test.name))
            return float(len(self.calls))

        return speed

    def pace(self, test):
        self.calls.append(("pace", test.name))
        return {"tok_per_s": 1.0, "reads": {"memory": 1e10}, "shares": {"memory": 0.5}}


def test_both_take_turns(bench, tmp_path):
    tests = [bench.Test("tg", 8, 256), bench.Test("pp", 32)]
    log, engines = bench.Log(tmp_path / "log.jsonl", SETUP), Engines(bench)
    steps = []
    bench.measure(log, tests, 2, engines.speeds, engines.pace, lambda *step: steps.append(step[:2]))
    ours, theirs, pace = (bench.OURS, "tg8@d256"), (bench.THEIRS, "tg8@d256"), ("pace", "tg8@d256")
    first = [ours, theirs, pace, (bench.OURS, "pp32"), (bench.THEIRS, "pp32")]
    second = [theirs, ours, pace, (bench.THEIRS, "pp32"), (bench.OURS, "pp32")]
    assert engines.calls == first + second
    assert steps == [(i, 10) for i in range(10)]
    without = Engines(bench)
    bench.measure(bench.Log(tmp_path / "without.jsonl", SETUP), tests, 2, without.speeds, None)
    assert without.calls == [call for call in engines.calls if call != pace]


@pytest.mark.parametrize("torn", ["", '{"round": 2, "who": "edge', '{"round": 2}'])
def test_a_cut_run_goes_on_where_it_stopped(bench, tmp_path, torn):
    tests = [bench.Test("tg", 8), bench.Test("pp", 32)]
    path = tmp_path / "log.jsonl"
    stopped = Engines(bench, stop_after=8)
    with pytest.raises(KeyboardInterrupt):
        bench.measure(bench.Log(path, SETUP), tests, 3, stopped.speeds, stopped.pace)
    path.write_text(path.read_text() + torn)
    rest = Engines(bench)
    log = bench.Log(path, SETUP)
    bench.measure(log, tests, 3, rest.speeds, rest.pace)
    whole = Engines(bench)
    bench.measure(bench.Log(tmp_path / "whole.jsonl", SETUP), tests, 3, whole.speeds, whole.pace)
    assert stopped.calls + rest.calls == whole.calls
    again = Engines(bench, stop_after=0)
    bench.measure(bench.Log(path, SETUP), tests, 3, again.speeds, again.pace)  # nothing is left to do
    assert bench.Log(path, SETUP).entries == log.entries
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_log_of_another_setup_is_refused(bench, tmp_path):
    bench.Log(tmp_path / "log.jsonl", SETUP)
    with pytest.raises(bench.ToolError, match=r"log\.jsonl: is of another setup \(threads differ\)"):
        bench.Log(tmp_path / "log.jsonl", SETUP | {"threads": 4})


def test_medians_ratios_and_bounds(bench, tmp_path, capsys):
    log, test = bench.Log(tmp_path / "log.jsonl", SETUP), bench.Test("tg", 11, 100)
    for number, (ours, theirs, read, share) in enumerate(
        [(10, 5, 21300, 0.75), (12, 8, 14200, 0.5), (20, 4, 42600, 0.8)], start=1
    ):
        reads = {bench.MEMORY: read, bench.PLAIN: read * 0.75, bench.PAGES: read / 2}
        shares = {bench.MEMORY: share, bench.PLAIN: share * 1.25, bench.PAGES: 2 * share}
        paced = {"tok_per_s": 11.0, "reads": reads, "shares": shares}
        for who, name, value in (
            (bench.OURS, test.name, ours),
            (bench.THEIRS, test.name, theirs),
            (bench.PACE, test.name, paced),
        ):
            log.add({"round": number, "who": who, "test": name, "value": value})
    found = bench.report(log, [test], bench.Traffic(weights_bytes=1000, cache_bytes_per_position=4.0))
    (row,) = found["tests"]
    assert (row["ours_tok_per_s"], row["llama_tok_per_s"], row["ratio"]) == (12, 5, 2)
    assert (row["ratio_min"], row["ratio_max"]) == (1.5, 5)
    assert row["bytes_per_token"] == 1000 + 4 * (100 + 5)  # halfway through the 11 tokens
    assert (row["bound_tok_per_s"], row["bound_share"], row["bound_shares"]) == (15, 0.75, [0.75, 0.5, 0.8])
    assert (row["plain_tok_per_s"], row["plain_share"], row["plain_shares"]) == (11.25, 0.9375, [0.9375, 0.625, 1.0])
    assert (row["pages_tok_per_s"], row["pages_share"], row["pages_shares"]) == (7.5, 1.5, [1.5, 1.0, 1.6])
    assert (found["read_bytes_per_s"], found["read_runs"]) == (21300, [21300, 14200, 42600])
    assert (found["pages_bytes_per_s"], len(found["pages_runs"])) == (10650, 3)
    bench.print_report("title", found)
    printed = capsys.readouterr().out
    assert "93.8 % (62.5 to 100.0)" in printed and "150.0 % (100.0 to 160.0)" in printed
    unpaced = bench.Log(tmp_path / "unpaced.jsonl", SETUP)
    unpaced.entries = [entry for entry in log.entries if entry["who"] != bench.PACE]
    without = bench.report(unpaced, [test], bench.Traffic(weights_bytes=1000, cache_bytes_per_position=4.0))
    assert not {"bound_share", "plain_share", "pages_share"} & set(without["tests"][0])
    bench.print_report("title", without)
    bench.plot(tmp_path / "plot.png", "title", without)
    bench.plot(tmp_path / "plot.svg", "title", found)
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_bytes_of_a_token_are_those_of_the_file(bench):
    """Counted by the gguf package: all tensors but the embeddings, of the routed experts 4 out of 16."""
    path = embedded_model_path()
    reader = gguf.GGUFReader(path)
    used = reader.fields["deepseek2.expert_used_count"].contents()
    count = reader.fields["deepseek2.expert_count"].contents()
    latent = 0
    expected = 0
    for tensor in reader.tensors:
        share = used / count if "_exps" in tensor.name else 1
        tied = all(each.name != "output.weight" for each in reader.tensors)
        expected += tensor.n_bytes * share if tied or tensor.name != "token_embd.weight" else 0
        latent += tensor.shape[1] if "attn_kv_a_mqa" in tensor.name else 0
    traffic = bench.traffic_of(open_checkpoint(path), "bf16")
    assert traffic.weights_bytes == pytest.approx(expected, rel=1e-9)
    assert traffic.cache_bytes_per_position == pytest.approx(2 * latent, rel=0.01)
    assert traffic.bytes_at(10) == traffic.weights_bytes + 10 * traffic.cache_bytes_per_position


@pytest.mark.parametrize(("kv", "head_bytes"), [("bf16", 2 * 2 * 16), ("int8", 2 * 16 + 8), ("f32", 2 * 4 * 16)])
def test_bytes_of_keys_and_values(bench, kv, head_bytes):
    """Mixtral's golden: 2 layers of 2 heads of keys of 8 numbers, each filled up to 16."""
    checkpoint = open_checkpoint(LLAMAS / "mixtral.gguf")
    traffic = bench.traffic_of(checkpoint, kv)
    assert traffic.cache_bytes_per_position == 2 * 2 * head_bytes
    assert traffic.has_values
    with pytest.raises(bench.ToolError, match=r"--kv int4: the cache of mixtral\.gguf is one of bf16, int8, f32"):
        bench.traffic_of(checkpoint, "int4")


def test_the_memory_is_really_read(bench):
    import memory_bound

    words = np.arange(100_003, dtype=np.uint32)
    for n_parts in (1, 2, 3):
        for asks in (True, False):
            assert memory_bound.sum_words(words, n_parts, asks) == 100_002 * 100_003 // 2 % 2**32
    assert all(1e8 < speed < 1e13 for speed in memory_bound.Reads(1, (), 1 << 24).speeds().values())


def test_pieces_of_files_are_read_one_after_the_other(bench):
    """Of all parts of a split model; what a file has beyond whole pieces is left out, a short file is one piece."""
    import memory_bound

    words = np.arange(1300, dtype=np.uint32)
    maps = [words[:1000].view(np.uint8), words[1000:1200].view(np.uint8), words[1000:].view(np.uint8)]
    reads = memory_bound.Reads(1, maps, 1200)
    for _ in range(6):
        assert set(reads.speeds()) == {memory_bound.MEMORY, memory_bound.PLAIN, memory_bound.PAGES}
    starts = [(0, 300), (300, 600), (600, 900), (1000, 1200), (1000, 1300)]
    assert reads.totals == {-1: 300} | {i: words[first:last].sum() for i, (first, last) in enumerate(starts)}
    words[0] = 5
    reads.n_read = 0
    with pytest.raises(RuntimeError, match="they changed"):
        reads.speeds()


def test_tokens_and_reads_take_turns(bench, monkeypatch):
    """Each part's tokens are compared with the mean of the reads around it."""
    import memory_bound

    clock, speeds, calls = [0.0], iter([10, 20, 40, 60]), []

    def token(i):
        calls.append(i)
        clock[0] += 1.0 + i

    def read():
        calls.append("read")
        clock[0] += 100.0
        return {"memory": next(speeds)}

    monkeypatch.setattr(memory_bound.time, "perf_counter", lambda: clock[0])
    seconds, reads = memory_bound.in_turn(token, 5, 2, read)
    assert calls == ["read", 0, 1, "read", 2, 3, "read", 4, "read"]
    assert (seconds, reads) == ([1.5, 3.5, 5.0], {"memory": [15, 30, 50]})


@pytest.mark.parametrize("large", [False, True])
def test_a_model_in_turn_with_the_memory(bench, monkeypatch, large):
    """A share is the speed at which tokens took their bytes by that of reading; a small model is not interrupted."""
    import memory_bound

    monkeypatch.setattr(memory_bound, "is_large", lambda n_bytes: large)
    monkeypatch.setattr(memory_bound, "READ_BYTES", 1 << 20)
    at_once, in_turn = [], memory_bound.in_turn
    monkeypatch.setattr(
        memory_bound, "in_turn", lambda token, n, size, read: at_once.append((n, size)) or in_turn(token, n, size, read)
    )
    checkpoint = open_checkpoint(GOLDEN / "v2_lite.gguf")
    pacer = bench.Pacer(checkpoint, "int8", 1, bench.traffic_of(checkpoint, "int8"))
    for depth in (0, 8, 8):
        found = pacer(6, depth)
        assert found["tok_per_s"] > 0
        kinds = {bench.MEMORY, bench.PLAIN} | ({bench.PAGES} if large else set())
        assert set(found["shares"]) == set(found["reads"]) == kinds
        assert all(0 < share < 10 for share in found["shares"].values())
    assert at_once == [(6, 4 if large else 6)] * 3
    assert [(key, cache.length) for key, cache in pacer.caches.items()] == [((6, 0), 0), ((6, 8), 8)]


def options(bench, *words):
    return bench.parse_arguments([str(GOLDEN / "v2_lite.gguf"), *words])


def test_our_own_speed(bench):
    assert bench.our_speed(options(bench, "-t", "1"), bench.Test("tg", 3, 8)) > 0


LLAMA_ENTRY = {"n_prompt": 0, "n_gen": 8, "n_depth": 256, "avg_ts": 6.0, "samples_ts": [5.0, 4.0, 9.0]}


def test_llama_bench_is_asked_and_read(bench, monkeypatch):
    asked = []

    def run(command):
        asked.append([str(word) for word in command])
        return "warning: a debug build\n" + json.dumps([LLAMA_ENTRY], indent=2) + "\n"

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench, "find_tool", lambda name, folder: Path(name))
    args = options(bench, "-t", "2", "--kv", "int8", "-r", "3")
    for args.has_values, args.llama_kv, cache in (
        (False, None, "-ctk q8_0"),
        (True, None, "-ctk q8_0 -ctv q8_0"),
        (False, "f16", "-ctk f16"),
    ):
        assert bench.llama_speed(args, bench.Test("tg", 8, 256)) == 5.0
        assert " ".join(asked.pop()).endswith(f"-p 0 -n 8 -d 256 -r 3 -o json -t 2 -fa 1 {cache}")
    with pytest.raises(bench.ToolError, match=r"measured \[\(0, 8, 256\)\], expected pp8"):
        bench.llama_speed(args, bench.Test("pp", 8))
    monkeypatch.setattr(bench, "run", lambda command: "segmentation fault")
    with pytest.raises(bench.ToolError, match="llama-bench printed no JSON"):
        bench.llama_speed(args, bench.Test("tg", 8, 256))


def test_bad_input_is_one_line(bench, tmp_path, capsys):
    model = str(GOLDEN / "v2_lite.gguf")
    for argv, words in [
        ([str(tmp_path / "no.gguf")], "no.gguf"),
        ([model, "--llama", str(tmp_path)], "llama-bench is not in"),
    ]:
        assert bench.main(argv) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("llama-bench") is None, reason="llama-bench is not on PATH")
def test_a_round_with_llama_bench(bench, tmp_path, capsys):
    words = ["--rounds", "1", "--contexts", "0", "--prompts", "16", "-n", "4", "--log", str(tmp_path / "x.jsonl")]
    assert bench.main([str(embedded_model_path()), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["test"] for row in found["tests"]] == ["tg4", "pp16"]
    assert all(row["ratio"] > 0 for row in found["tests"])
