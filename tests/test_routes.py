"""Routes are those of the reference, and a replay counts what a store of that size would find."""

import json

import numpy as np
import pytest
from test_expert_store import IDS, Bounded
from test_goldens import GOLDEN

from edge_moe.checkpoint import open_checkpoint
from edge_moe.cli import main
from edge_moe.errors import FormatError
from edge_moe.eviction import AgedFrequency, FrequencyAndRecency, LeastRecent
from edge_moe.routes import Farthest, load_routes, record_routes, replay, save_routes, shares

RULES = [LeastRecent, AgedFrequency, FrequencyAndRecency]


def some_routes(n_tokens=200, n_layers=3, n_experts=8, k=2, seed=0):
    """Routes with favourites."""
    random = np.random.default_rng(seed)
    weights = random.dirichlet(np.full(n_experts, 0.5), n_layers)
    tokens = range(n_tokens)
    return np.array(
        [[random.choice(n_experts, k, replace=False, p=0.9 * w + 0.1 / n_experts) for w in weights] for _ in tokens],
        np.int16,
    )


def lru_twin(routes, n_slots):
    """One list of experts, the oldest first; age counted in visits of the layer, the layer just passed the older."""
    n_tokens, n_layers, _ = routes.shape
    last, hits = {}, 0
    for token in range(n_tokens):
        for layer in range(n_layers):
            wanted = [(layer, int(expert)) for expert in routes[token, layer]]
            hits += sum(key in last for key in wanted)

            n_new = sum(key not in last for key in wanted)
            for _ in range(len(last) + n_new - n_slots):
                ages = {
                    key: (token + (key[0] <= layer)) - when + ((key[0] - layer - 1) % n_layers) / n_layers
                    for key, when in last.items()
                    if key not in wanted
                }
                del last[max(ages, key=ages.__getitem__)]
            last |= dict.fromkeys(wanted, token + 1)
    return hits / routes.size


@pytest.mark.parametrize("n_slots", [2, 5, 9, 20])
def test_lru_is_what_a_list_does(n_slots):
    routes = some_routes(60, k=1)  # two of one token would be equally old
    assert replay(routes, 8, n_slots, LeastRecent(3, 8)) == pytest.approx(lru_twin(routes, n_slots))


@pytest.mark.parametrize("n_slots", [3, 8, 16])
def test_nothing_beats_the_optimum(n_slots):
    routes = some_routes()
    best = replay(routes, 8, n_slots, Farthest(routes, 8))
    for rule in RULES:
        assert replay(routes, 8, n_slots, rule(3, 8)) <= best


@pytest.mark.parametrize("rule", RULES)
def test_with_room_for_all_only_first_uses_miss(rule):
    routes = some_routes()
    n_different = sum(len(np.unique(routes[:, layer])) for layer in range(3))
    assert replay(routes, 8, 24, rule(3, 8)) == pytest.approx(1 - n_different / routes.size)


def test_many_tokens_at_once_age_like_one_by_one_on_average():
    rule, at_once = AgedFrequency(1, 4, 8), AgedFrequency(1, 4, 8)
    ids = np.tile([[0, 1], [0, 2]], (50, 1))
    for each in ids:
        rule.used(0, each[None])
    at_once.used(0, ids)
    assert np.allclose(rule.values(0), at_once.values(0), rtol=0.1, atol=1e-5)


def test_a_store_asks_for_the_recorded_routes():
    path = GOLDEN / "v2_no_dense_layer.gguf"
    routes = record_routes(open_checkpoint(path), IDS[:40].tolist(), 2)
    assert routes.shape == (40, 2, 2)
    bounded = Bounded(path, predict=False)
    bounded.logits(IDS[:40], 0)
    expected = replay(routes, 6, bounded.store.n_slots, AgedFrequency(2, 6))
    assert bounded.store.stats.report()["expert_hit_rate"] == pytest.approx(expected)


def test_routes_are_kept_in_a_file(tmp_path):
    routes = some_routes(10)
    save_routes(tmp_path / "r.npz", routes, 8)
    loaded, n_experts = load_routes(tmp_path / "r.npz")
    assert n_experts == 8
    assert np.array_equal(loaded, routes)
    assert shares(loaded, 8).sum() == pytest.approx(3 * 2)
    (tmp_path / "bad.npz").write_bytes(b"no")
    with pytest.raises(FormatError, match="no file of routes"):
        load_routes(tmp_path / "bad.npz")
    save_routes(tmp_path / "r.npz", routes, 3)
    with pytest.raises(FormatError, match="holds routes"):
        load_routes(tmp_path / "r.npz")


def test_the_command(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged, that a single man must be in want of a wife. " * 5)
    model = str(GOLDEN.parent.parent / "edge_moe" / "data" / "reference.gguf")
    options = ["--text", str(text), "--plot", str(tmp_path / "e.png"), "--save-routes", str(tmp_path / "r.npz")]
    assert main(["experts", model, *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rates = [each["expert_hit_rate"] for each in document["budgets"]]
    assert rates == sorted(rates)
    assert 0 < rates[0] < rates[-1] < 1
    assert (tmp_path / "e.png").stat().st_size > 10_000
    assert len(load_routes(tmp_path / "r.npz")[0]) == document["tokens"]
    assert main(["experts", model, "--text", str(text)]) == 0
    assert "found in memory" in capsys.readouterr().out
