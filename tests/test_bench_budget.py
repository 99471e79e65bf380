"""The benchmark under a cap: the group it makes, what it reads of both programs, the bound."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_goldens import GOLDEN

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_budget

    return bench_budget


@pytest.mark.parametrize(("folder", "name"), [("memory", "memory.limit_in_bytes"), ("", "memory.max")])
def test_a_group_is_limited_and_removed(tool, tmp_path, folder, name, capsys):
    (tmp_path / folder).mkdir(exist_ok=True)
    with tool.memory_group(12345, tmp_path) as procs:
        assert procs.parent.parent == tmp_path / folder
        assert (procs.parent / name).read_text() == "12345"
        (procs.parent / name).unlink()  # in a real group the files vanish with it
    assert not procs.parent.exists()


def test_no_group_is_one_line(tool, tmp_path):
    with pytest.raises(tool.ToolError, match="run it as root"), tool.memory_group(1, tmp_path / "none"):
        pass


def test_the_bound_counts_reading_and_what_cannot_overlap(tool, monkeypatch):
    path = GOLDEN / "v2_no_dense_layer.gguf"
    calls = []

    def run_limited(words, procs, timeout_s):
        calls.append(words[0])
        if "edge_moe" in words:
            capped = "--ram" in words
            entry = {"test": "tg8", "tok_per_s": 4.0 if capped else 10.0, "runs": []}
            return json.dumps([entry | ({"bytes_read_per_token": 1e6, "expert_hit_rate": 0.5} if capped else {})])
        return json.dumps([{"avg_ts": 0.5}])

    class Group:
        def __enter__(self):
            return Path("procs")

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(tool, "run_limited", run_limited)
    monkeypatch.setattr(tool, "memory_group", lambda limit: Group())
    monkeypatch.setattr(tool, "find_tool", lambda name, folder: Path(name))
    monkeypatch.setattr(tool, "disk_bytes_per_s", lambda weight, seconds: 1e7)
    args = SimpleNamespace(
        model=path, caps=[4.0], rounds=2, n_gen=8, n_gen_llama=2, threads=1, timeout=1, llama=None, alone=False
    )
    (row,) = tool.measure(args)
    assert len(calls) == 5
    assert (row["ours"], row["llama.cpp"]) == (4.0, 0.5)
    # 0.1 s of reading, and of the 0.1 s of an unlimited token the part of the weights that are not experts
    experts = sum(w.n_bytes for layer in tool.expert_layers(tool.open_checkpoint(path)) for w in layer)
    always, active = path.stat().st_size - experts, experts * 2 // 6
    assert row["bound"] == pytest.approx(1 / (0.1 + 0.1 * always / (always + active)))
