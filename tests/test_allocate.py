"""Types by sensitivity: the best under a budget, what is measured, the command."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from edge_moe_quant.allocate import Choice, allocate, measured_choices, probed_windows
from edge_moe_quant.recipe import Rule
from edge_moe_quant.store import EncodedStore
from gguf_files import write_tiny_deepseek2
from test_calibrate import GOLDEN, some_windows

from edge_moe.cli import main
from edge_moe.errors import FormatError, OptionError
from edge_moe.formats import BF16, F32, Q4_0, Q5_0, Q8_0
from edge_moe.gguf import open_gguf


def some_choices(rng, n):
    """Sizes and divergences as real formats have: each bit more costs the same and quarters the error."""
    choices = {}
    for i in range(n):
        size, sensitivity = int(rng.integers(100, 1000)), float(rng.lognormal(0, 2))
        choices[str(i)] = [
            Choice(fmt, size * bits, sensitivity / 4**bits) for fmt, bits in ((Q4_0, 4), (Q5_0, 5), (Q8_0, 8))
        ]
    return choices


@pytest.mark.parametrize("seed", range(4))
def test_nearly_the_best_of_all_under_the_budget(seed):
    rng = np.random.default_rng(seed)
    choices = some_choices(rng, 7)
    least, most = (sum(each[i].n_bytes for each in choices.values()) for i in (0, 2))
    budget = int(least + 0.4 * (most - least))
    chosen = allocate(choices, budget)

    def cost(picks):
        return sum(each.n_bytes for each in picks), sum(each.divergence for each in picks)

    n_bytes, divergence = cost([next(c for c in choices[name] if c.format is fmt) for name, fmt in chosen.items()])
    assert n_bytes <= budget
    best = min(d for b, d in map(cost, itertools.product(*choices.values())) if b <= budget)
    assert divergence <= 1.35 * best
    uniform = sum(each[0].divergence for each in choices.values())
    assert divergence < 0.5 * uniform


def test_ends_of_the_budget():
    choices = some_choices(np.random.default_rng(5), 5)
    least = sum(each[0].n_bytes for each in choices.values())
    assert set(allocate(choices, least).values()) == {Q4_0}
    assert set(allocate(choices, 10 * least).values()) == {Q8_0}
    with pytest.raises(OptionError, match="allow more"):
        allocate(choices, least - 1)


def test_a_larger_type_that_is_no_better_is_never_taken():
    assert allocate({"a": [Choice(Q4_0, 10, 1.0), Choice(Q5_0, 12, 1.0)]}, 100) == {"a": Q4_0}


def test_what_is_measured():
    source = open_gguf(GOLDEN)
    rules = [Rule("attn_output", Q8_0)]
    choices = measured_choices(source, some_windows(source, 2, 32), rules, n_threads=2)
    assert list(choices) == list(source.tensors)
    assert [c.format for c in choices["blk.1.ffn_gate_inp.weight"]] == [F32]
    assert [c.format for c in choices["output_norm.weight"]] == [F32]
    assert [c.format for c in choices["blk.0.attn_output.weight"]] == [Q8_0]
    experts = choices["blk.1.ffn_down_exps.weight"]
    assert len(experts) > 1
    by_size = sorted(experts, key=lambda each: each.n_bytes)
    assert by_size[0].divergence > 10 * by_size[-1].divergence > 0
    n_weights = np.prod(source.tensors["blk.1.ffn_down_exps.weight"].shape)
    assert all(c.n_bytes == n_weights // c.format.block_size * c.format.block_bytes for c in experts)


def test_windows_from_all_over_the_text():
    windows = np.arange(10)[:, None] + np.zeros((1, 512), int)
    assert probed_windows(windows, 8000)[:, 0].tolist() == [0, 2, 5, 7]
    assert probed_windows(windows, 102_400)[:, 0].tolist() == [0, 5]
    assert probed_windows(windows, 10**7)[:, 0].tolist() == [0]
    assert probed_windows(windows[:2], 8000)[:, 0].tolist() == [0, 1]


def test_what_was_measured_is_not_measured_again(tmp_path):
    source = open_gguf(GOLDEN)
    windows = some_windows(source, 1, 16)
    store, name = EncodedStore(tmp_path / "store", "job"), "blk.0.attn_output.weight"
    rules = [Rule(f"^(?!{name})", Q8_0)]
    first = measured_choices(source, windows, rules, n_threads=1, store=store)
    assert name in store
    assert measured_choices(source, windows, rules, n_threads=1, store=store) == first
    store.put(name, np.array([0.125]).view(np.uint8))
    kept = {
        choice.format.name: choice.divergence
        for choice in measured_choices(source, windows, rules, n_threads=1, store=store)[name]
    }
    assert kept["Q3_K" if "Q3_K" in kept else "Q4_0"] == 0.125


def test_a_printed_recipe_gives_the_same_types(tmp_path, capsys):
    source, text, recipe = str(tmp_path / "tiny.gguf"), tmp_path / "text.txt", tmp_path / "recipe.txt"
    write_tiny_deepseek2(Path(source), weight_type="BF16")
    text.write_text("hello world, how are you. " * 3000)
    command = ["quantize", source, "--type", "auto", "--bpw", "7", "--calibrate", str(text), "--print-recipe"]
    assert main(command) == 0
    recipe.write_text(capsys.readouterr().out)
    assert main([*command, "--json"]) == 0
    types = json.loads(capsys.readouterr().out)["tensors"]
    assert len(set(types.values())) > 2
    assert main(["quantize", source, str(tmp_path / "o.gguf"), "--recipe", str(recipe)]) == 0
    assert {name: entry.format.name for name, entry in open_gguf(tmp_path / "o.gguf").tensors.items()} == types


def test_the_command(tmp_path, capsys):
    source, text, out = str(tmp_path / "tiny.gguf"), tmp_path / "text.txt", tmp_path / "o.gguf"
    write_tiny_deepseek2(Path(source), weight_type="BF16")
    text.write_text("hello world, how are you. " * 3000)
    command = ["quantize", source, str(out), "--type", "auto"]
    for more, message in (
        ([], "--bpw 4.5"),
        (["--bpw", "6"], "--calibrate FILE"),
        (["--bpw", "1", "--calibrate", str(text)], "allow more"),
        (["--size", "nine", "--calibrate", str(text)], "a size like 9G"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["quantize", source, str(out), "--type", "Q4_0", "--bpw", "4"]) == 2
    assert "--type auto" in capsys.readouterr().err
    bits = 9.5
    assert main([*command, "--bpw", str(bits), "--calibrate", str(text), "--chunks", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert bits - 1.5 < report["bits_per_weight"] <= bits
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.gguf", "text.txt", "tiny.gguf"]
    size = out.stat().st_size
    assert main([*command, "--size", str(size), "--calibrate", str(text), "--chunks", "2"]) == 0
    assert out.stat().st_size <= size


def test_a_quantized_source_is_refused(tmp_path):
    write_tiny_deepseek2(tmp_path / "q.gguf", weight_type="Q8_0")
    source = open_gguf(tmp_path / "q.gguf")
    if all(entry.format in (F32, BF16) for entry in source.tensors.values()):
        pytest.fail("the file holds no quantized tensor")
    with pytest.raises(FormatError, match="start from"):
        measured_choices(source, some_windows(source, 1, 16), n_threads=1)
