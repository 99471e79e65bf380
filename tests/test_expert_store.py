"""Experts that are read when they are used give what experts in memory give, whatever goes wrong on the way."""

import gc
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_goldens import GOLDEN, NAMES

import edge_moe
from edge_moe import memory_plan
from edge_moe.backends.cpu import CpuBackend
from edge_moe.checkpoint import open_checkpoint
from edge_moe.cli import main
from edge_moe.direct_io import ALIGNMENT, DirectFile, aligned_bytes, aligned_memory
from edge_moe.errors import OptionError, ReadError
from edge_moe.expert_store import ExpertStore, least_bytes
from edge_moe.memory_plan import expert_layers, free_memory_bytes, hold_in_memory, process_memory_bytes
from edge_moe.models.architectures import load_pass
from edge_moe.routes import record_routes, shares

GOLDEN_LLAMA = Path(__file__).parent / "golden_llama"
FILES = [GOLDEN / f"{name}.gguf" for name in NAMES] + [GOLDEN_LLAMA / "mixtral.gguf"]
IDS = np.random.default_rng(5).integers(0, 64, 96)


class Bounded:
    """A model with no more slots than a token needs, and some."""

    def __init__(self, path, extra_bytes=0, **settings):
        checkpoint = open_checkpoint(path)
        layers, top_k = expert_layers(checkpoint), checkpoint.config.num_experts_per_tok
        self.store = ExpertStore(layers, least_bytes(layers, top_k) + extra_bytes, top_k, **settings)
        self.backend = CpuBackend(2, self.store)
        self.model = load_pass(hold_in_memory(checkpoint), self.backend)

    def logits(self, ids, prompt=40):
        cache = self.model.new_cache(len(ids))
        parts = [self.model.forward(ids[:prompt], cache, all_logits=True)] if prompt else []
        parts += [self.model.forward(ids[i : i + 1], cache) for i in range(prompt, len(ids))]
        return np.concatenate(parts)


def unbounded(path, ids, prompt=40):
    model = edge_moe.load(path, threads=2)
    cache = model.new_cache(len(ids))
    parts = [model.forward(ids[:prompt], cache, all_logits=True)] if prompt else []
    return np.concatenate([*parts, *(model.forward(ids[i : i + 1], cache) for i in range(prompt, len(ids)))])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logits_do_not_depend_on_the_budget(path):
    ids = IDS[:60]
    bounded = Bounded(path)
    total = bounded.store.n_experts * len(expert_layers(open_checkpoint(path)))
    assert np.array_equal(bounded.logits(ids), unbounded(path, ids))
    stats = bounded.store.stats
    if bounded.store.n_slots < total:
        assert stats.misses > 0
        assert stats.bytes_read > 0
    assert stats.tokens == 20
    assert 0 <= stats.report()["expert_hit_rate"] <= 1


def test_a_prompt_reads_each_expert_once():
    bounded = Bounded(GOLDEN / "v3_lite.gguf", predict=False)
    bounded.logits(IDS[:40])
    sizes = sum(w.n_bytes for layer in expert_layers(open_checkpoint(GOLDEN / "v3_lite.gguf")) for w in layer)
    assert bounded.store.stats.bytes_read <= sizes


def test_with_room_for_all_each_expert_is_read_once():
    path = GOLDEN / "v3_lite.gguf"
    bounded = Bounded(path, 1 << 30)
    bounded.logits(IDS)
    once = bounded.store.stats.bytes_read
    assert once <= sum(w.n_bytes for layer in expert_layers(open_checkpoint(path)) for w in layer)
    bounded.logits(IDS)
    assert bounded.store.stats.bytes_read - once <= once
    bounded.logits(IDS)
    assert bounded.store.stats.report()["expert_hit_rate"] > 0.5


def test_predictions_are_counted_and_often_right():
    bounded = Bounded(GOLDEN / "v2_no_dense_layer.gguf")
    bounded.logits(IDS)
    accuracy = bounded.store.stats.report()["prediction_accuracy"]
    assert accuracy is not None
    assert 0.2 < accuracy <= 1
    assert list(bounded.store.stats.report()["prediction_accuracy_by_layer"]) == [1]  # nothing foretells the first


def test_too_few_slots_are_refused():
    layers = expert_layers(open_checkpoint(GOLDEN / "v3_lite.gguf"))
    with pytest.raises(OptionError, match="expected at least"):
        ExpertStore(layers, least_bytes(layers, 2) - 1, 2)


def test_a_budget_that_cannot_work_says_what_can():
    with pytest.raises(OptionError, match=r"--ram 0\.010G: too little .* expected at least \d\.\d+G"):
        edge_moe.load(GOLDEN / "v3_lite.gguf", ram_bytes=10 << 20)


def test_a_dense_model_under_a_budget_says_so():
    with pytest.raises(OptionError, match="no experts to leave on the disk"):
        edge_moe.load(GOLDEN_LLAMA / "llama.gguf", ram_bytes=10 << 20)


# ---- faults


@pytest.mark.parametrize("predict", [False, True])
def test_an_error_at_each_read_in_turn_leaves_the_model_usable(monkeypatch, predict):
    path, ids = GOLDEN / ("v2_no_dense_layer.gguf" if predict else "v2_groups.gguf"), IDS[:60]
    expected = unbounded(path, ids, 10)
    bounded = Bounded(path, predict=predict)
    read, calls, lock = DirectFile.read, [0, -1], threading.Lock()

    def failing(self, *arguments):
        with lock:
            calls[0] += 1
            fails = calls[0] == calls[1]
        if fails:
            raise ReadError("injected")
        return read(self, *arguments)

    monkeypatch.setattr(DirectFile, "read", failing)
    n_failed = 0
    for place in range(1, 201):
        bounded.store.begin(1)  # what was cut is forgotten: no read is left to count
        calls[:] = 0, place
        while calls[0] < place:  # a run has some hundred reads
            try:
                assert np.array_equal(bounded.logits(ids, 10), expected)
            except ReadError as error:
                assert str(error) == "injected"
                n_failed += 1
        if place % 20 == 0:
            assert np.array_equal(bounded.logits(ids, 10), expected)
    assert n_failed > 20 if predict else n_failed == 200  # the others hit a guess that nobody needed


def test_a_file_cut_while_in_use_ends_in_an_error(tmp_path):
    path = shutil.copy(GOLDEN / "v3_lite.gguf", tmp_path / "model.gguf")
    bounded = Bounded(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ReadError, match=r"cut while in use|changed while in use"):
        for _ in range(3):
            bounded.logits(IDS)


@pytest.mark.parametrize("delay_s", [0.0, 0.003, 0.01, 0.03])
def test_a_file_cut_in_the_middle_of_a_run_gives_no_wrong_token(tmp_path, delay_s):
    path = shutil.copy(GOLDEN / "v2_no_dense_layer.gguf", tmp_path / "model.gguf")
    expected = unbounded(GOLDEN / "v2_no_dense_layer.gguf", IDS, 10)
    bounded = Bounded(path)
    timer = threading.Timer(delay_s, os.truncate, (path, 3 * path.stat().st_size // 4))
    timer.start()
    with pytest.raises(ReadError, match=r"cut while in use|changed while in use"):
        while True:
            assert np.array_equal(bounded.logits(IDS, 10), expected)
    timer.join()


def test_a_file_changed_while_in_use_ends_in_an_error(tmp_path):
    path = shutil.copy(GOLDEN / "v3_lite.gguf", tmp_path / "model.gguf")
    bounded = Bounded(path)
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"other")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ReadError, match="changed while in use"):
        bounded.logits(IDS)


@pytest.fixture
def interruptible():
    """Let SIGINT raise, as in a user's process.

    A shell's background job ignores the signal. A callback of the garbage collector, as hypothesis
    sets one in other tests, would lose the exception.
    """
    before, callbacks = signal.signal(signal.SIGINT, signal.default_int_handler), gc.callbacks[:]
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = callbacks
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_at_any_moment_leaves_the_model_usable():
    path, ids = GOLDEN / "v3_lite.gguf", IDS[:40]
    expected = unbounded(path, ids, 10)
    bounded = Bounded(path)
    bounded.logits(ids, 10)  # compiled
    started = time.perf_counter()
    assert np.array_equal(bounded.logits(ids, 10), expected)
    lasts_s = time.perf_counter() - started
    random, n_cut = np.random.default_rng(0), 0
    for _ in range(100):
        timer = threading.Timer(random.uniform(0, lasts_s), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            bounded.logits(ids, 10)
            timer.join()
        except KeyboardInterrupt:
            n_cut += 1
        timer.join()
        assert np.array_equal(bounded.logits(ids, 10), expected)
    assert n_cut > 20


def test_a_store_that_is_forgotten_ends_its_threads_and_closes_its_files():
    before = set(threading.enumerate())
    bounded = Bounded(GOLDEN / "v3_lite.gguf")
    bounded.logits(IDS[:5])
    readers = set(threading.enumerate()) - before
    assert readers
    handles = [handle for file in bounded.store._reader._files.values() for handle in file._handles]
    del bounded
    gc.collect()
    for thread in readers:
        thread.join(10)
        assert not thread.is_alive()
    assert all(handle.closed for handle in handles)


# ---- reading


def test_direct_file_reads_any_slice(tmp_path):
    content = np.random.default_rng(1).integers(0, 256, 50_000, np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    file = DirectFile(tmp_path / "file", 2)
    for offset, size in [(0, 1), (0, 50_000), (4095, 2), (4096, 4096), (49_999, 1), (12_345, 30_000)]:
        memory = aligned_memory(aligned_bytes(size))
        assert memory.ctypes.data % ALIGNMENT == 0
        lead = file.read(1, offset, size, memory)
        assert np.array_equal(memory[lead : lead + size], content[offset : offset + size])
    with pytest.raises(ReadError, match="ends at byte"):
        file.read(0, 49_999, 2, aligned_memory(aligned_bytes(2)))
    file.close()


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ReadError, match="cannot be opened"):
        DirectFile(tmp_path / "none")


def test_the_limit_of_a_control_group_counts(tmp_path):
    group = tmp_path / "cgroup"
    group.write_text("3:memory:/some\n0::/other\n")
    (tmp_path / "memory" / "some").mkdir(parents=True)
    (tmp_path / "memory" / "some" / "memory.limit_in_bytes").write_text("1000000000000000000\n")
    free = free_memory_bytes(tmp_path, group)
    assert free > 1 << 28
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "memory.max").write_text("1000\n")
    assert free_memory_bytes(tmp_path, group) == 0
    (tmp_path / "other" / "memory.max").write_text("max\n")
    assert free_memory_bytes(tmp_path, group) > 1 << 28


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells mapped pages from others")
def test_pages_of_mapped_files_are_not_counted_as_taken(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (1 << 18))
    mapped = np.memmap(path, np.uint8, "r")
    resident, taken = psutil.Process().memory_info().rss, process_memory_bytes()
    assert mapped.sum() > 0
    assert psutil.Process().memory_info().rss > resident + (60 << 20)
    assert process_memory_bytes() < taken + (30 << 20)
    memory = aligned_memory(64 << 20)
    memory[:] = 1
    assert process_memory_bytes() > taken + (60 << 20)
    assert process_memory_bytes(tmp_path / "none") > resident  # where the system says no more than that


# ---- slack, and what one session leaves to the next


def test_slack_takes_what_is_there_and_costs_something():
    path = GOLDEN / "v2_no_dense_layer.gguf"
    exact, loose = Bounded(path, predict=False), Bounded(path, predict=False, route_slack=1.0)
    expected, found = exact.logits(IDS, 0), loose.logits(IDS, 0)
    assert loose.store.stats.report()["expert_hit_rate"] > 0.9  # a slack of 1 always finds one, but for the first
    assert exact.store.stats.report()["expert_hit_rate"] < 0.8
    assert not np.array_equal(found, expected)


def test_a_slack_of_nothing_changes_nothing():
    path = GOLDEN / "v2_no_dense_layer.gguf"
    assert np.array_equal(Bounded(path, route_slack=1e-30).logits(IDS, 0), Bounded(path).logits(IDS, 0))


def test_kept_routes_seed_the_next_session():
    path = GOLDEN / "v2_no_dense_layer.gguf"
    first = Bounded(path, predict=False)
    first.store.keep_routes()
    first.logits(IDS, 10)
    routes = first.store.kept_routes()
    assert np.array_equal(routes, record_routes(open_checkpoint(path), IDS.tolist(), 2))
    second = Bounded(path, predict=False)
    second.store.seed(shares(routes, 6))
    assert np.array_equal(second.logits(IDS[:1], 0), unbounded(path, IDS[:1], 0))
    assert second.store.stats.hits > 0  # from the first token on
    with pytest.raises(OptionError, match="give those of this model"):
        second.store.seed(shares(routes[:, :1], 6))


def test_the_commands_take_a_budget(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory_plan, "PROCESS_BYTES", 8 << 30)  # the same at each load, whatever the tests before took
    monkeypatch.setattr(memory_plan, "_SLACK", 0)
    model = str(GOLDEN.parent.parent / "edge_moe" / "data" / "reference.gguf")
    options = ["-n", "12", "--temp", "0", "--json", "-c", "256"]
    assert main(["run", model, "It is a truth", *options]) == 0
    expected = json.loads(capsys.readouterr().out)
    refused = error_of(capsys, ["run", model, "It", "--ram", "1M", "-c", "256"])
    least = re.search(r"at least (\d+\.\d+)G", refused).group(1)
    ram = ["--ram", f"{float(least) + 0.003:.3f}G"]
    routes = str(tmp_path / "r.npz")
    assert main(["run", model, "It is a truth", *options, *ram, "--save-routes", routes]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["text"] == expected["text"]
    assert 0 <= found["expert_hit_rate"] < 1
    assert found["bytes_read_per_token"] > 0
    assert "expert cache" in err
    assert main(["run", model, "It is a truth", *options, *ram, "--routes", routes]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected["text"]
    text = tmp_path / "t.txt"
    text.write_text("It is a truth universally acknowledged, that a single man must be in want of a wife. " * 3)
    slack = ["--text", str(text), "-c", "32", "--chunks", "1", "--reference", model, "--json"]
    assert main(["eval", model, *slack, *ram, "--route-slack", "0.2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kld_mean"] > 0
    assert document["route_slack"] == 0.2


def error_of(capsys, argv):
    assert main(argv) == 2
    return capsys.readouterr().err
