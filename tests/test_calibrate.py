"""Calibration: what experts are sent, layers one after another, runs that are cut short, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from edge_moe_quant import calibrate as module
from edge_moe_quant import moments
from edge_moe_quant.calibrate import calibrate, text_windows
from edge_moe_quant.encode import encode_rows
from edge_moe_quant.moments import RoutedMoments
from edge_moe_quant.quantize import calibration_key, quantize
from edge_moe_quant.store import EncodedStore
from gguf_files import write_tiny_deepseek2
from reference import read_gguf

import edge_moe
from edge_moe.checkpoint import Checkpoint
from edge_moe.cli import main
from edge_moe.errors import OptionError
from edge_moe.formats import F32, Q4_0
from edge_moe.gguf import open_gguf
from edge_moe.models.deepseek2 import MLP, load_weights

GOLDEN = Path(__file__).parent / "golden" / "v2_lite.gguf"
LLAMAS = Path(__file__).parent / "golden_llama"


def formats_of(source, fmt=Q4_0):
    return {
        name: fmt if len(entry.shape) > 1 and "gate_inp" not in name and entry.shape[-1] % fmt.block_size == 0 else F32
        for name, entry in source.tensors.items()
    }


def some_windows(source, n=6, length=64):
    return np.random.default_rng(0).integers(0, source.tensors["token_embd.weight"].shape[0], (n, length))


def run(folder, windows, path=GOLDEN, **options):
    source = open_gguf(path)
    store = EncodedStore(folder, "job")
    return calibrate(Checkpoint(source), windows, formats_of(source), store, n_threads=2, **options), store


def stored(store):
    return {path.name: path.read_bytes() for path in store.folder.glob("*.bin")}


@pytest.mark.parametrize("is_down", [False, True])
def test_moments_of_an_expert(is_down):
    """By the plain definition, on what gguf reads: gate^2 counts, few hits are drawn to the layer's mean."""
    rng = np.random.default_rng(1)
    tensors = read_gguf(GOLDEN)[1]
    experts = next(
        w.mlp.experts for w in load_weights(Checkpoint(open_gguf(GOLDEN))).layers if not isinstance(w.mlp, MLP)
    )
    layer = experts.down_proj.name.split(".")[1]
    gate, up = (np.asarray(tensors[f"blk.{layer}.ffn_{n}_exps.weight"], np.float64) for n in ("gate", "up"))
    n_experts, width = len(gate), experts.gate_proj.shape[-1]
    x = rng.standard_normal((200, width)).astype(np.float32)
    ids = np.array([rng.choice(n_experts - 1, 2, replace=False) for _ in range(200)])  # the last expert gets none
    gates = rng.random((200, 2)).astype(np.float32)
    y = x + rng.standard_normal(x.shape).astype(np.float32)
    calls = [(x[part], ids[part], gates[part], y[part]) for part in (slice(90), slice(90, None))]
    routed = RoutedMoments(calls, experts, experts, is_down)

    def taken_in(e, row):
        before = gate[e] @ row
        return before / (1 + np.exp(-before)) * (up[e] @ row) if is_down else row

    sums, squares = [], []
    for e in range(n_experts):
        total, square = np.zeros(2), 0.0
        for t in range(200):
            for k in range(2):
                if ids[t, k] == e:
                    own, original = (taken_in(e, each[t].astype(np.float64)) for each in (x, y))
                    new = float(gates[t, k]) ** 2 * np.array([np.outer(own, own), np.outer(original, own)])
                    total = new if square == 0 else total + new
                    square += float(gates[t, k]) ** 2
        sums.append(total)
        squares.append(square)
    mean = sum(each for each in sums if each.ndim == 3) / sum(squares)
    for e in range(n_experts):
        n = int((ids == e).sum())
        assert routed.hits[e] == n
        own = sums[e] / squares[e] if n else np.zeros(mean.shape)
        expected = (n * own + 64 * mean) / (n + 64)
        for found, right in zip(routed.moments(experts.down_proj, e), expected, strict=True):
            np.testing.assert_allclose(found, right, atol=2e-4 * np.abs(mean).max())


@pytest.mark.parametrize(
    ("path", "layers_with_experts"),
    [(GOLDEN, {1}), (LLAMAS / "mixtral.gguf", {0, 1}), (LLAMAS / "llama_linear.gguf", set())],
    ids=lambda each: getattr(each, "stem", ""),
)
def test_answers_are_nearer_than_by_search(path, layers_with_experts, tmp_path):
    source = open_gguf(path)
    coverage, store = run(tmp_path / "store", some_windows(source, 24), path)
    assert coverage.n_tokens == 24 * 64
    assert coverage.hits.keys() == layers_with_experts
    n_used = source.metadata.get(f"{source.metadata['general.architecture']}.expert_used_count", 0)
    assert all(hits.sum() == 24 * 64 * n_used for hits in coverage.hits.values())
    formats = formats_of(source)
    encoded = {name for name, fmt in formats.items() if fmt is Q4_0}
    assert {path.stem for path in store.folder.glob("*.bin")} == encoded
    quantize(source, tmp_path / "search.gguf", formats, file_type=2)
    quantize(source, tmp_path / "mended.gguf", formats, file_type=2, store=store)
    ids = np.random.default_rng(9).integers(0, 100, 128).tolist()  # other tokens than those calibrated on
    right, search, mended = (
        edge_moe.load(path, kv="f32").logits(ids) for path in (path, tmp_path / "search.gguf", tmp_path / "mended.gguf")
    )
    assert np.square(mended - right).mean() < 0.9 * np.square(search - right).mean()


def test_cut_short_it_goes_on(tmp_path):
    source = open_gguf(GOLDEN)
    windows = some_windows(source)
    _, whole = run(tmp_path / "whole", windows)

    class CutShortError(Exception):
        pass

    def stop(done, total, what):
        if done == 1:
            raise CutShortError

    with pytest.raises(CutShortError):
        run(tmp_path / "cut", windows, progress=stop)
    (tmp_path / "cut" / "blk.1.attn_output.weight.part").write_bytes(b"half")
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.bin")}
    assert 0 < len(first) < len(stored(whole))
    _, cut = run(tmp_path / "cut", windows)
    assert stored(cut) == stored(whole)
    assert first.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.bin")}.items()
    EncodedStore(tmp_path / "cut", "another job")
    assert not stored(cut)


def test_what_the_key_covers():
    source = open_gguf(GOLDEN)
    windows = some_windows(source)
    keys = {
        calibration_key(source, formats_of(source), windows),
        calibration_key(source, formats_of(source), windows[:-1]),
        calibration_key(source, formats_of(source), windows.reshape(12, 32)),
        calibration_key(source, formats_of(source, F32), windows),
    }
    assert len(keys) == 4


def test_experts_seldom_hit_are_searched(tmp_path, monkeypatch):
    source = open_gguf(GOLDEN)
    coverage, _ = run(tmp_path / "store", some_windows(source, 2, 32))
    assert coverage.seldom == sum((hits < 256).sum() for hits in coverage.hits.values()) > 0
    assert coverage.least == min(hits.min() for hits in coverage.hits.values())
    seen = []
    monkeypatch.setattr(module, "encode_compensated", lambda values, fmt, factor: seen.append(values) or np.empty(0))
    known = np.eye(32), np.eye(32)
    module._encoder(known, False)(np.ones((2, 32), np.float32), Q4_0)
    module._encoder(None, True)(np.ones((2, 32), np.float32), Q4_0)
    assert not seen
    module._encoder(known, True)(np.ones((2, 32), np.float32), Q4_0)
    assert len(seen) == 1


def test_large_matrices_are_encoded_in_parts(tmp_path, monkeypatch):
    windows = some_windows(open_gguf(GOLDEN))
    _, whole = run(tmp_path / "whole", windows)
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 400)
    _, parts = run(tmp_path / "parts", windows)
    assert stored(whole).keys() == stored(parts).keys()
    for name, data in stored(whole).items():  # sums of products may be ordered otherwise for fewer rows
        assert np.mean(np.frombuffer(data, np.uint8) == np.frombuffer(stored(parts)[name], np.uint8)) > 0.98


def test_experts_a_few_at_a_time(tmp_path, monkeypatch):
    windows = some_windows(open_gguf(GOLDEN))
    _, whole = run(tmp_path / "whole", windows)
    monkeypatch.setattr(moments, "_EXPERTS_BYTES", 1)
    _, one_by_one = run(tmp_path / "one", windows)
    assert stored(whole) == stored(one_by_one)


def test_wide_matrices_keep_only_the_columns_own_moments(tmp_path, monkeypatch):
    """No pairs of columns are held then; the search takes the sums of squares for importance."""
    windows = some_windows(open_gguf(GOLDEN))
    for each in (module, moments):
        monkeypatch.setattr(each, "MOST_COLUMNS", 31)
    seen = []
    monkeypatch.setattr(module, "Factor", lambda own: seen.append(own))
    monkeypatch.setattr(module, "encode_rows", lambda values, fmt, importance=None: record(values, fmt, importance))
    importances = []

    def record(values, fmt, importance):
        importances.append(importance)
        return encode_rows(values, fmt, importance)

    run(tmp_path / "store", windows)
    assert not seen
    given = [each for each in importances if each is not None]
    assert len(given) > 10
    assert all(each.ndim == 1 and each.min() > 0 for each in given)


def test_text_windows():
    tokenizer = edge_moe.load().tokenizer
    text = "It is a truth universally acknowledged. " * 40
    windows = text_windows(tokenizer, text, 32)
    assert windows.shape == (len(tokenizer.encode(text)) // 32, 32)
    assert text_windows(tokenizer, text, 32, 2).tolist() == windows[:2].tolist()
    with pytest.raises(OptionError, match="expected at least 4000"):
        text_windows(tokenizer, text, 4000)


def test_the_command(tmp_path, capsys):
    source, text = str(tmp_path / "tiny.gguf"), tmp_path / "text.txt"
    write_tiny_deepseek2(Path(source))
    assert main(["quantize", source, str(tmp_path / "o.gguf"), "--type", "Q4_0", "--chunks", "3"]) == 2
    assert "--calibrate" in capsys.readouterr().err
    text.write_text("a")
    command = ["quantize", source, str(tmp_path / "o.gguf"), "--type", "Q4_0", "--calibrate", str(text)]
    assert main(command) == 2
    assert "longer text" in capsys.readouterr().err
    text.write_text("hello world " * 3000)
    command.append("--allow-requantize")
    assert main([*command, "--chunks", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["calibration_tokens"] > 0
    assert all(sum(hits) > 0 for hits in report["expert_hits"].values())
    assert report["tensors"]["Q4_0"] > 5
    assert main(command) == 0
    assert "calibrated on" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.gguf", "text.txt", "tiny.gguf"]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_command_on_llama(name, tmp_path, capsys):
    """With a recipe and with types by measurement; only a model with experts is told about its experts."""
    text = tmp_path / "text.txt"
    text.write_text("the and of a then " * 300)
    command = ["quantize", str(LLAMAS / f"{name}.gguf"), str(tmp_path / "o.gguf"), "--calibrate", str(text)]
    assert main([*command, "--type", "Q4_0", "--chunks", "2"]) == 0
    assert ("least used expert" in capsys.readouterr().err) == (name == "mixtral")
    assert main([*command, "--type", "auto", "--bpw", "6", "--chunks", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_weight"] <= 6
    logits = edge_moe.load(tmp_path / "o.gguf").logits([0, 5, 9])
    assert np.isfinite(logits).all()
