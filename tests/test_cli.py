"""The command line: one clear line for every bad input, JSON documents, statistics, interruption and closed pipes."""

import contextlib
import io
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import edge_moe
from edge_moe import plan
from edge_moe.api import embedded_model_path
from edge_moe.cli import main, report
from edge_moe.cli.answer import stream
from edge_moe.cli.chat import without_leading_space
from edge_moe.cli.report import Display
from edge_moe.latent_cache import LatentCache

GOLDEN = Path(__file__).parent / "golden"
MODEL = str(GOLDEN / "v2_lite.gguf")  # random weights, 256 tokens of context, 112 tokens of vocabulary
TOO_LONG = "hello " * 300


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "good.txt"
    path.write_text("Some text. " * 50)
    return str(path)


@pytest.mark.parametrize(
    "argv", [[], ["--help"], ["-h"], *([name, "--help"] for name in ("run", "chat", "info", "bench", "eval"))]
)
def test_help(capsys, argv):
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: edge-moe")
    assert "examples:" in out
    assert err == ""
    assert max(len(line) for line in out.splitlines()) <= 120


def test_help_and_errors_import_nothing_heavy():
    for argv in (["--help"], ["run", "missing.gguf", "x"], ["eval", "--json"], ["bench", "--help"]):
        code = (
            "import sys; from edge_moe.cli import main; main(sys.argv[1:]);"
            "heavy = {'numpy', 'numba', 'tokenizers', 'rich', 'jinja2', 'psutil'} & set(sys.modules);"
            "sys.exit(sorted(heavy) and f'imported {heavy}' or 0)"
        )
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


# ---- run ----


def run_json(capsys, *argv):
    assert main(["run", MODEL, *argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "error" not in err
    return json.loads(out)  # one document and nothing else


def test_run_json(capsys):
    document = run_json(capsys, "hello there", "-n", "12", "--ignore-eos", "--seed", "3")
    assert list(document) == [
        "text",
        "prompt_tokens",
        "completion_tokens",
        "first_token_s",
        "prefill_tok_per_s",
        "decode_tok_per_s",
        "peak_rss_bytes",
    ]
    model = edge_moe.load(MODEL)
    assert document["prompt_tokens"] == len(model.tokenizer.encode("hello there"))
    assert document["completion_tokens"] == 12
    assert document["text"]
    for key in ("first_token_s", "prefill_tok_per_s", "decode_tok_per_s"):
        assert document[key] > 0
    assert 20e6 < document["peak_rss_bytes"] < 5e9


def test_run_is_the_model_s_own_continuation(capsys):
    """Greedy text equals taking the likeliest token of the plain forward pass, one at a time."""
    model = edge_moe.load(MODEL)
    ids = model.tokenizer.encode("hello")
    for _ in range(10):
        ids.append(int(model.logits(ids)[-1].argmax()))
    document = run_json(capsys, "hello", "-n", "10", "--temp", "0", "--ignore-eos")
    assert document["text"] == model.tokenizer.decode(ids[-10:])


def test_run_streams_text_and_tells_statistics(capsys):
    assert main(["run", MODEL, "hello", "-n", "8", "--temp", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.rstrip("\n") == run_json(capsys, "hello", "-n", "8", "--temp", "0")["text"].rstrip("\n")
    assert out.endswith("\n")
    assert re.fullmatch(
        r"prompt \d+ tokens, [\d.]+ tok/s · first token [\d.]+ m?s · "
        r"generated \d+ tokens, [\d.]+ tok/s · peak \d+ MB\n",
        err,
    )
    assert main(["run", MODEL, "hello", "-n", "2", "--no-stats"]) == 0
    assert capsys.readouterr().err == ""


def test_same_seed_same_text_whatever_the_threads(capsys):
    argv = ["hello", "-n", "40", "--ignore-eos", "--temp", "1.5", "--top-k", "0", "--top-p", "1", "--min-p", "0"]
    texts = [run_json(capsys, *argv, "--seed", "11", "-t", str(threads))["text"] for threads in (1, 2, 1, 2)]
    assert len(set(texts)) == 1
    assert run_json(capsys, *argv, "--seed", "12")["text"] != texts[0]
    assert run_json(capsys, *argv)["text"] != run_json(capsys, *argv)["text"]


def test_stop_strings(capsys):
    argv = ["hello", "-n", "60", "--ignore-eos", "--seed", "5"]
    text = run_json(capsys, *argv)["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = run_json(capsys, *argv, "--stop", "never\x07comes", "--stop", stop)
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["completion_tokens"] < 60


def test_sampling_options_reach_the_sampler(capsys):
    greedy = run_json(capsys, "hello", "-n", "20", "--temp", "0", "--ignore-eos")["text"]
    for option in (["--top-k", "1"], ["--top-p", "1e-9"], ["--min-p", "1"]):
        assert run_json(capsys, "hello", "-n", "20", "--temp", "2", "--ignore-eos", *option)["text"] == greedy
    penalized = run_json(capsys, "hello", "-n", "20", "--temp", "0", "--ignore-eos", "--repeat-penalty", "50")["text"]
    assert penalized != greedy


def test_the_prompt_may_come_from_standard_input(capsys, monkeypatch):
    expected = run_json(capsys, "hello, wörld", "-n", "4", "--temp", "0")
    for argv in ([MODEL], [MODEL, "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("hello, wörld\n".encode())))
        assert main(["run", *argv, "-n", "4", "--temp", "0", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["text"], document["prompt_tokens"]) == (expected["text"], expected["prompt_tokens"])


def test_options_may_stand_anywhere(capsys):
    expected = run_json(capsys, "hello", "-n", "4", "--temp", "0")["text"]
    for argv in (["-n", "4", MODEL, "--temp", "0", "hello"], [MODEL, "-n4", "--temp=0", "--", "hello"]):
        assert main(["run", "--json", *argv]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == expected
    assert main(["run", MODEL, "-n", "4", "--json", "--", "--temp"]) == 0  # a prompt that looks like an option
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] >= 3


# ---- the embedded model ----


def test_without_a_model_the_embedded_one_answers(capsys, monkeypatch):
    argv = ["-n", "12", "--temp", "0", "--json"]
    assert main(["run", "Once upon a time", *argv]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["completion_tokens"] == 12
    assert document["text"].strip()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once upon a time\n")))
    assert main(["run", "-", *argv]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == document["text"]
    assert main(["run", str(edge_moe.api.embedded_model_path()), "Once upon a time", *argv]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == document["text"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX accounting of children")
@pytest.mark.slow
def test_a_warm_run_takes_little_time_to_the_first_token():
    """Processor time, in which importing numba takes a third of it: nothing is compiled, nothing heavy is imported."""
    import resource

    def processor_s(*argv):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *argv], check=True, capture_output=True, timeout=500)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)

    run = ["-m", "edge_moe", "run", "Once upon a time", "-n", "1", "--no-stats"]
    processor_s(*run)  # compiles, if that was not done
    ratios = [processor_s(*run) / processor_s("-c", "import numba") for _ in range(3)]
    assert statistics.median(ratios) < 4.5, ratios


# ---- chat ----


def chat(monkeypatch, capsys, text, *argv):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    status = main(["chat", MODEL, "-n", "8", "--temp", "0", *argv])
    out, err = capsys.readouterr()
    return status, out, err


_FREED = """
import resource
import numpy as np
from edge_moe.__main__ import keep_freed_memory
keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        np.empty(40 << 18, np.float32)[:] = 1
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have their own ways")
def test_freed_memory_is_kept():
    """Buffers of 40 MB are not given back to the system: it would clear them anew for each layer of a prompt."""
    done = subprocess.run([sys.executable, "-c", _FREED], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert second < first / 4


def test_chat_keeps_the_conversation_in_the_cache(monkeypatch, capsys):
    sessions = []
    new_session = edge_moe.Model.new_session
    monkeypatch.setattr(
        edge_moe.Model, "new_session", lambda *args: sessions.append(new_session(*args)) or sessions[-1]
    )
    status, out, err = chat(monkeypatch, capsys, "hello\nand more\n", "--ignore-eos")
    assert status == 0
    assert "plain User/Assistant" in err
    assert len(sessions) == 1
    stats = sessions[0].stats
    first_turn = edge_moe.load(MODEL).tokenizer.encode("User: hello\n\nAssistant:")
    assert stats.reused_tokens >= len(first_turn)  # with BOS, and perhaps some of the answer
    assert stats.prompt_tokens > stats.reused_tokens
    assert len(err.splitlines()) == 2 + 2  # greeting, template, a line of statistics per turn
    assert len(out) > 4


def test_chat_commands(monkeypatch, capsys):
    status, out, err = chat(monkeypatch, capsys, "/help\n\n/reset\n/what\n/exit\nnever read\n")
    assert (status, out) == (0, "")
    assert err.count("/reset forgets") == 3
    assert "the conversation is forgotten" in err


def test_chat_goes_on_after_an_error(monkeypatch, capsys):
    status, out, err = chat(monkeypatch, capsys, f"{TOO_LONG}\nhello\n", "--no-stats", "--system", "Be short.")
    assert status == 0
    assert len(re.findall(r"^edge-moe: error: the prompt has .*$", err, re.M)) == 1
    assert out.strip()


def test_run_with_the_chat_template(capsys):
    assert main(["run", MODEL, "--chat", "hello", "-n", "3", "--json"]) == 0
    plain = edge_moe.load(MODEL).tokenizer.encode("User: hello\n\nAssistant:")
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(plain)


@pytest.mark.parametrize("kv", ["bf16", "int8", "int4", "f32"])
def test_every_command_takes_the_kind_of_cache(monkeypatch, capsys, text_file, kv):
    kinds = []

    def new_cache(config, context_length, kind, gains):
        kinds.append(kind)
        assert (gains is not None) == (kind == "int4")  # in 4 bits it is rotated
        return LatentCache(config, context_length, kind, gains)

    monkeypatch.setattr("edge_moe.backends.cpu.LatentCache", new_cache)
    commands = ["run", MODEL, "hi", "-n", "2"], ["bench", MODEL, "-p4"], ["eval", MODEL, "-c16", "--text", text_file]
    for command in commands:
        assert main([*command, "--kv", kv, "--json"]) == 0
    assert chat(monkeypatch, capsys, "hello\n", "--kv", kv)[0] == 0
    assert len(kinds) >= 4
    assert set(kinds) == {kv}


def test_a_wrong_kind_of_cache(capsys):
    assert main(["run", MODEL, "hello", "--kv", "q4"]) == 2
    assert "--kv" in capsys.readouterr().err
    with pytest.raises(edge_moe.OptionError, match="--kv q4: expected one of bf16, int8, int4, f32"):
        edge_moe.load(MODEL, kv="q4")


def test_answers_begin_with_a_word():
    assert list(without_leading_space([" ", "\n Hel", "lo", " ", "you"])) == ["Hel", "lo", " ", "you"]


# ---- info ----


def test_info_json(capsys):
    assert main(["info", MODEL, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["architecture"] == "deepseek2"
    assert document["config"]["kv_lora_rank"] == 32
    assert document["file_bytes"] == Path(MODEL).stat().st_size
    assert [part["part"] for part in document["parts"]] == [
        "embeddings",
        "norms",
        "attention",
        "dense layers",
        "router",
        "routed experts",
        "shared experts",
        "output head",
    ]
    assert sum(part["bytes"] for part in document["parts"]) == sum(document["formats"].values())
    # two layers, 256 positions, 32 + 8 values, filled up to 48 in bf16; as bytes, with a scale and 8 in bf16 in int8
    assert document["memory"][0]["cache_bytes"] == 2 * 256 * 48 * 2
    by_kind = {"bf16": 2 * 256 * 48 * 2, "int8": 2 * 256 * (32 + 2 * 8 + 8), "f32": 2 * 256 * 48 * 4}
    by_kind["int4"] = 2 * 256 * (16 + 2 * 8 + 12 + 4)  # three scales, and a step and a middle up to 64 bytes a block
    assert document["memory"][0]["cache_bytes_by_kind"] == by_kind
    assert document["tokenizer"] == {
        "kind": "gpt2",
        "pre_tokenizer": "gpt-2",
        "vocab_size": 112,
        "chat_template": False,
    }


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.gguf")), ids=lambda path: path.stem)
def test_info_counts_every_tensor_of_the_file(capsys, path):
    import gguf

    reader = gguf.GGUFReader(path)
    assert main(["info", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    n_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    n_bytes = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert document["weights"] + document["unused_weights"] == n_weights
    assert document["weight_bytes"] + 4 * document["unused_weights"] == n_bytes  # these files are all F32
    speculation = f"blk.{document['config']['num_hidden_layers']}."
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    idle = 1 - document["config"]["num_experts_per_tok"] / document["config"]["n_routed_experts"]
    active = sum(
        int(tensor.n_elements) * (1 - idle * ("_exps" in tensor.name))
        for tensor in reader.tensors
        if (tied or tensor.name != "token_embd.weight") and not tensor.name.startswith(speculation)
    )
    assert document["active_weights_per_token"] == pytest.approx(active)


def test_info_table(capsys):
    assert main(["info", MODEL, "-c", "100"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("8 routed, 3 used by a token, 2 shared", "yarn, factor 40", "routed experts", "F32"):
        assert words in out
    assert out.splitlines()[-1].split()[0] == "100"


@pytest.mark.parametrize("name", ["v2_lite", "v3", "v2_no_dense_layer"])
def test_stated_scratch_is_what_a_pass_takes(name):
    model = edge_moe.load(GOLDEN / f"{name}.gguf")
    n_tokens = 240
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, n_tokens)
    cache = model.new_cache(n_tokens)
    model.forward(ids, cache)  # compiled before it is measured
    cache.truncate(0)
    tracemalloc.start()
    try:
        model.forward(ids, cache)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    stated_bytes = plan.scratch_bytes(model.config, n_tokens)
    assert 0.75 * stated_bytes < peak_bytes < stated_bytes


# ---- bench and eval ----


def test_bench_json(capsys):
    assert main(["bench", MODEL, "-p", "16", "-n", "3", "-d", "0,32", "-r", "3", "--json"]) == 0
    tests = json.loads(capsys.readouterr().out)
    assert [test["test"] for test in tests] == ["pp16", "tg3", "pp16@d32", "tg3@d32"]
    for test in tests:
        assert len(test["runs"]) == 3
        assert min(test["runs"]) > 0
        assert test["tok_per_s"] == statistics.median(test["runs"])
        assert ("first_token_s" in test) == test["test"].startswith("pp")


def test_bench_table_and_single_tests(capsys):
    assert main(["bench", MODEL, "-p", "0", "-n", "2", "-r", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("v2_lite.gguf")
    assert [line.split()[0] for line in lines[1:]] == ["test", "tg2"]


def test_eval_json(capsys, text_file):
    argv = ["eval", MODEL, "--text", text_file, "-c", "64", "--json"]
    assert main(argv) == 0
    alone = json.loads(capsys.readouterr().out)
    assert main([*argv, "--reference", MODEL]) == 0
    same = json.loads(capsys.readouterr().out)
    assert {"tokens", "ppl", "bits_per_byte", "kld_mean", "kld_p99", "kld_p999", "top1_agreement"} <= set(alone)
    assert (alone["kld_mean"], alone["top1_agreement"]) == (None, None)
    assert same["ppl"] == alone["ppl"] > 1
    assert same["kld_p999"] == 0
    assert same["top1_agreement"] == 1


def test_eval_scores_the_model_s_own_logits(capsys, text_file):
    model = edge_moe.load(MODEL)
    ids = model.tokenizer.encode(Path(text_file).read_text())
    surprises = []
    for start in range(0, len(ids) - 63, 64):
        window = [model.tokenizer.bos_id, *ids[start + 1 : start + 64]]
        logits = model.logits(window).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        surprises += [-log_probs[position, window[position + 1]] for position in range(32, 63)]
    assert main(["eval", MODEL, "--text", text_file, "-c", "64", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tokens"] == len(surprises)
    assert document["ppl"] == pytest.approx(np.exp(np.mean(surprises)), rel=1e-5)


def test_eval_text_report(capsys, text_file):
    argv = ["eval", MODEL, "--text", text_file, "-c", "64", "--stride", "8"]
    assert main([*argv, "--reference", str(GOLDEN / "v3_lite.gguf")]) == 0
    out = capsys.readouterr().out
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert names == [
        "tokens scored",
        "surprise",
        "perplexity",
        "bits per byte",
        "perplexity of the reference",
        "ratio of the perplexities",
        "KL divergence, mean",
        "KL divergence, median",
        "KL divergence, 99 %",
        "KL divergence, 99.9 %",
        "KL divergence, maximum",
        "same likeliest token",
        "change of probability, RMS",
        "change of probability, mean",
    ]


def test_eval_against_saved_logits(capsys, text_file, tmp_path):
    saved = str(tmp_path / "base.kld")
    other = str(GOLDEN / "v3_lite.gguf")
    assert main(["eval", other, "--text", text_file, "-c", "64", "--save-logits", saved]) == 0
    capsys.readouterr()
    reports = []
    for reference in (["--reference", other, "-c", "64"], ["--reference-logits", saved]):
        assert main(["eval", MODEL, "--text", text_file, *reference, "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    live, from_file = reports
    assert (from_file["context_length"], from_file["stride"]) == (64, None)
    assert from_file["nats"] == live["nats"]
    assert from_file["nats"] / np.log(2) / from_file["scored_bytes"] == pytest.approx(from_file["bits_per_byte"])
    assert from_file["kld_mean"] == pytest.approx(live["kld_mean"], rel=1e-3)
    assert from_file["kld_mean_stderr"] == pytest.approx(live["kld_mean_stderr"], rel=1e-2)
    chunk = ["--chunks", "1", "--reference-logits", saved, "--json"]
    assert main(["eval", MODEL, "--text", text_file, *chunk]) == 0
    assert json.loads(capsys.readouterr().out)["windows"] == 1


# ---- the process ----


def start(*argv):
    return subprocess.Popen(
        [sys.executable, "-m", "edge_moe", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        preexec_fn=None if os.name == "nt" else heed_interrupts,
    )


def heed_interrupts():
    """Undo what a shell does to its background jobs: they ignore SIGINT, and so would what the tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_ends_with_the_statistics(as_json):
    model = str(embedded_model_path())  # its 1,900 tokens take seconds, so that the signal comes before they end
    process = start("run", model, "hello", "-n", "1900", "--ignore-eos", "-t", "1", *["--json"] * as_json)
    if as_json:  # nothing tells when it begins; whenever it comes, there is one document or none
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
    else:
        assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = (data.decode() for data in process.communicate(timeout=60))
    if as_json and process.returncode == -signal.SIGINT:
        return  # it came before there was any code of ours
    assert process.returncode == 130
    assert "Traceback" not in err
    if as_json:
        assert not out or set(json.loads(out)) > {"text", "prompt_tokens"}
    else:
        assert err.splitlines()[-1].startswith("prompt ")


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_closed_pipe_ends_quietly():
    with start("run", MODEL, "hello", "-n", "200", "--ignore-eos", "-t", "1") as process:
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 141
    assert "Traceback" not in err
    assert "rror" not in err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"edge-moe {edge_moe.__version__}\n"


# ---- what is shown ----


def test_json_has_no_infinities(capsys):
    report.write_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": "ü\ud800"})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": "ü\ud800"}


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (46_200_000, "46.20 MB"), (10_360_000_000, "10.36 GB")],
)
def test_bytes_in_decimal_units(n, text):
    assert report.format_bytes(n) == text


class FakeTerminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_text_cannot_command_the_terminal(monkeypatch, capsys):
    pieces = ["a\x1b[2Jb", "\x9bc\t\n"]
    with report.Display() as display:
        assert stream(iter(pieces), display, echo=True) == ("".join(pieces), False)
        assert capsys.readouterr().out == "".join(pieces)  # a pipe gets what the model wrote
        monkeypatch.setattr(sys, "stdout", FakeTerminal())
        monkeypatch.setenv("TERM", "xterm")
        assert stream(iter(pieces), display, echo=True) == ("".join(pieces), False)
    assert sys.stdout.getvalue() == "a\ufffd[2Jb\ufffdc\t\n"


def test_progress_appears_after_a_while_and_is_cleared(monkeypatch):
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with report.Display() as display:
        display.show("reading", 1, 10)
        assert terminal.getvalue() == ""  # too early
        display.show("reading", 5, 10, delay_s=0)
        assert "reading" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is erased


@pytest.mark.slow
def test_compilation_is_told(monkeypatch, tmp_path):
    """With an empty kernel cache the first use says what takes so long, on standard error only."""
    done = subprocess.run(
        [sys.executable, "-m", "edge_moe", "run", MODEL, "hello", "-n", "1", "--json"],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "EDGE_MOE_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)
    assert done.stderr == "compiling kernels for this CPU (first use only)\n"
    assert any(tmp_path.rglob("*.nbi"))


class Dying:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interruptible():
    """Ctrl-C raises: a shell that starts a job in the background lets it ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_as_an_object_dies_ends_the_text():
    def pieces():
        for i in range(1000):
            if i == 3:
                Dying()
            yield "x"

    with Display() as display:
        assert stream(pieces(), display, echo=False) == ("xxx", True)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_that_c_code_swallows_still_ends_the_text():
    def pieces():
        for i in range(1000):
            if i == 3:
                with contextlib.suppress(KeyboardInterrupt):  # as ctypes does with what a callback raises
                    signal.raise_signal(signal.SIGINT)
            yield "x"

    with Display() as display:
        text, interrupted = stream(pieces(), display, echo=False)
    assert (text, interrupted) == ("xxx", True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
