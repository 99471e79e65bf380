"""Which backend runs: what the options say, what is there, and what auto makes of it."""

import builtins
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from device_answers import MOST_KLD, TEXT, assert_same_text, forward, mean_kld

import edge_moe
from edge_moe.backends import choice
from edge_moe.backends.choice import Availability, backends, choose_backend
from edge_moe.backends.cpu import CpuBackend
from edge_moe.backends.mlx.backend import MlxBackend
from edge_moe.backends.mlx.operations import MlxOperations
from edge_moe.backends.protocol import Backend, Operations
from edge_moe.backends.recorder import Recorder
from edge_moe.backends.split import SplitBackend
from edge_moe.backends.vulkan import device
from edge_moe.backends.vulkan.backend import VulkanBackend
from edge_moe.backends.vulkan.recorder import DeviceRecorder
from edge_moe.checkpoint import open_checkpoint
from edge_moe.cli import main
from edge_moe.config import BACKENDS
from edge_moe.errors import DeviceError, OptionError
from edge_moe.models.architectures import load_pass

TESTS = Path(__file__).parent
GOLDENS = sorted([*(TESTS / "golden").glob("*.gguf"), *(TESTS / "golden_llama").glob("*.gguf")])
GOLDEN = str(Path(__file__).parent / "golden" / "v2_lite.gguf")
MODELS = Path(edge_moe.__file__).parent / "models"


def members(protocol):
    return {name for name, value in vars(protocol).items() if not name.startswith("_") and value is not None}


@pytest.mark.parametrize("operations", [CpuBackend, Recorder, DeviceRecorder, MlxOperations])
def test_operations_are_those_of_the_protocol(operations):
    names = members(Operations)
    assert len(names) == 19
    for name in names:
        assert hasattr(operations, name), name
        if callable(getattr(Operations, name)) and name != "expanded_attention":
            expected = inspect.signature(getattr(Operations, name)).parameters
            assert list(inspect.signature(getattr(operations, name)).parameters) == list(expected), name


@pytest.mark.parametrize("backend", [CpuBackend, VulkanBackend, MlxBackend, SplitBackend])
def test_backends_are_those_of_the_protocol(backend):
    for name in members(Backend):
        expected = inspect.signature(getattr(Backend, name)).parameters
        assert list(inspect.signature(getattr(backend, name)).parameters) == list(expected), name


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.py")), ids=lambda path: path.name)
def test_a_pass_does_not_know_its_backend(path):
    source = path.read_text()
    forbidden = ("CpuBackend", "Vulkan", "Mlx", "isinstance(ops", "isinstance(self.backend")
    assert not [word for word in forbidden if word in source]
    imports = [line for line in source.splitlines() if "import" in line and "backends" in line]
    assert all("edge_moe.backends.protocol" in line for line in imports)


def test_a_package_is_imported_only_when_its_backend_is_asked_for():
    code = (
        "import sys, edge_moe, numpy as np; model = edge_moe.load(sys.argv[1]); model.logits([5, 6]); "
        "print([name for name in sys.modules if name.split('.')[0] in ('wgpu', 'mlx')])"
    )
    done = subprocess.run([sys.executable, "-c", code, GOLDEN], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def without_packages(monkeypatch):
    whole = builtins.__import__

    def fail(name, *arguments, **keywords):
        if name.split(".")[0] in ("wgpu", "mlx"):
            raise ImportError(name, name=name)
        return whole(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", fail)


def test_what_is_missing_is_said(without_packages, capsys):
    cpu, mlx, vulkan = backends()
    assert not mlx.is_there and "pip install 'edge-moe[mlx]'" in mlx.detail
    assert cpu.is_there
    assert not vulkan.is_there
    assert "pip install 'edge-moe[vulkan]'" in vulkan.detail
    for name in ("mlx", "vulkan"):
        with pytest.raises(DeviceError, match=rf"edge-moe\[{name}\]"):
            edge_moe.load(GOLDEN, backend=name)
    assert main(["info", GOLDEN]) == 0
    assert "missing: wgpu is not installed" in capsys.readouterr().out
    assert main(["run", GOLDEN, "abc", "--backend", "vulkan"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def found(monkeypatch, *devices):
    monkeypatch.setattr(choice, "_DEVICES", tuple(lambda each=each: each for each in devices))


def test_auto_takes_a_device_that_is_one(monkeypatch):
    software = Availability("vulkan", "llvmpipe runs on the CPU", is_slower=True)
    found(monkeypatch, software)
    assert choose_backend("auto") == ("cpu", "vulkan: llvmpipe runs on the CPU")
    assert choose_backend("vulkan")[0] == "vulkan"
    found(monkeypatch, Availability("vulkan", "not there", is_there=False))
    assert choose_backend("auto") == ("cpu", "vulkan: not there")
    found(monkeypatch, Availability("vulkan", "Some GPU"))
    assert choose_backend("auto") == ("vulkan", "Some GPU")
    with pytest.raises(OptionError, match="--backend cuda: expected one of auto, cpu"):
        choose_backend("cuda")


def test_software_is_told_from_hardware():
    try:
        adapter = device.find_adapter()
    except DeviceError as error:
        pytest.skip(str(error))
    if "llvmpipe" in adapter.name:
        assert adapter.is_software
        assert choose_backend("auto")[0] == "cpu"


@pytest.mark.parametrize(
    "failure", [DeviceError("Some GPU: out of memory"), OptionError("--vram: too little for this model")]
)
def test_auto_falls_back_with_a_line(monkeypatch, failure, capsys):
    """A device that turns out to be no good: the CPU answers, and a line says why."""
    found(monkeypatch, Availability("vulkan", "Some GPU"))

    def fail(*_):
        raise failure

    monkeypatch.setattr("edge_moe.api.find_adapter", lambda: None)
    monkeypatch.setattr("edge_moe.api.VulkanBackend", fail)
    lines = []
    model = edge_moe.load(GOLDEN, backend="auto", on_backend=lines.append)
    assert (model.backend, lines) == ("cpu", [f"backend cpu: {failure}"])
    assert model.logits([5, 6]).shape[0] == 2
    with pytest.raises(type(failure), match=str(failure)):
        edge_moe.load(GOLDEN, backend="vulkan")
    assert main(["run", GOLDEN, "abc", "-n", "2", "--backend", "auto"]) == 0
    assert f"backend cpu: {failure}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vram_bytes": 1 << 30}, "--vram: the cpu backend has no device"),
        ({"backend": "mlx", "vram_bytes": 1 << 30}, "--vram: the mlx backend has no memory of its own"),
        ({"backend": "vulkan", "ram_bytes": 1 << 30}, "--ram is neither for the vulkan backend nor for --gpu-layers"),
        ({"gpu_layers": 2}, "--gpu-layers: the cpu backend has no device"),
        ({"backend": "mlx", "gpu_layers": 0}, "--gpu-layers 0: expected at least 1"),
        ({"backend": "opencl"}, "--backend opencl: expected one of"),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    with pytest.raises(OptionError, match=message):
        edge_moe.load(GOLDEN, **arguments)


def test_info_lists_the_backends(capsys):
    assert main(["info", "--json"]) == 0  # of the model that comes along
    listed = json.loads(capsys.readouterr().out)["backends"]
    assert [each["name"] for each in listed] == [name for name in BACKENDS if name != "auto"]
    assert all(each["detail"] for each in listed)


@pytest.mark.parametrize("command", ["run", "chat", "bench", "eval"])
def test_commands_have_the_option(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"--backend {{{','.join(BACKENDS)}}}" in out
    assert "--vram SIZE" in out
    assert "--gpu-layers N" in out


@pytest.mark.parametrize("argv", [["bench", GOLDEN, "-p", "8", "-n", "2", "-r", "1"], ["eval", GOLDEN, "--text"]])
def test_commands_run_on_a_device(argv, tmp_path, capsys):
    try:
        name = device.find_adapter().name
    except DeviceError as error:
        pytest.skip(str(error))
    text = tmp_path / "text.txt"
    text.write_text("and the other one of them. " * 20)
    argv = [*argv, str(text), "-c", "64"] if argv[0] == "eval" else argv
    assert main([*argv, "--backend", "vulkan"]) == 0
    out = capsys.readouterr().out
    assert ("perplexity" if argv[0] == "eval" else name) in out


# ---- layers here and there


@pytest.mark.parametrize("name", ["mlx", "vulkan"])
@pytest.mark.parametrize("n_layers", [1, 2, 5, 6])
def test_some_layers_on_a_device(name, n_layers, monkeypatch):
    """The reference model, its first layers by the CPU; 6 are all of it."""
    try:
        model = edge_moe.load(backend=name, gpu_layers=n_layers, context_length=64)
    except DeviceError as error:
        pytest.skip(str(error))
    cpu = edge_moe.load(context_length=64)
    backend = model._pass.backend
    assert isinstance(backend, SplitBackend) == (n_layers < 6)
    if name == "vulkan":  # weights of those layers only
        largest = 26_133_120  # all of them
        share = model.device_stats.uploaded_bytes / largest
        assert 0.08 + n_layers / 7 < share + 0.12 < 0.28 + n_layers / 6
    ids = cpu.tokenizer.encode(TEXT)[:40]
    assert mean_kld(cpu.logits(ids), model.logits(ids)) < MOST_KLD
    assert_same_text(cpu, model, ids[:9], 32)
    cache = model.new_cache()
    first = model.forward(np.array(ids), cache)
    cache.truncate(10)
    again = model.forward(np.array(ids[10:]), cache)
    np.testing.assert_allclose(again, first, atol=2e-2 * np.ptp(first))


class Direct(CpuBackend):
    """Runs operations as the pass names them, also for single tokens, whose hidden states no program takes."""

    def run(self, compute, source, cache, all_logits):
        return compute(self, source, cache, all_logits)


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_a_split_equals_the_whole(path):
    """By the CPU on both sides: only the numbers between are handed over."""
    checkpoint = open_checkpoint(path)
    with np.load(path.with_suffix(".npz")) as saved:
        ids = saved["ids"]
    whole = load_pass(checkpoint, CpuBackend(1))
    for at in range(1, checkpoint.config.num_hidden_layers):
        parts = load_pass(checkpoint, SplitBackend(CpuBackend(1), Direct(1), at, checkpoint.config))
        parts.prepare(32)
        for kv in ("bf16", "int8"):
            for sizes in ([32], [5, 1, 9, 1, 16]):
                expected, found = (forward(each, ids, sizes, kv) for each in (whole, parts))
                np.testing.assert_array_equal(found, expected)


def test_a_split_with_a_small_budget_on_the_device():
    try:
        with pytest.raises(OptionError, match="expected at least") as error:
            edge_moe.load(backend="vulkan", gpu_layers=3, vram_bytes=4096, context_length=32)
    except DeviceError as error:
        pytest.skip(str(error))
    least = int(str(error.value).split("at least ")[1].split(":")[0])
    model = edge_moe.load(backend="vulkan", gpu_layers=3, vram_bytes=least, context_length=32)
    cpu = edge_moe.load(context_length=32)
    ids = list(range(5, 25))
    assert model.device_stats.peak_bytes <= least
    assert np.abs(model.logits(ids) - cpu.logits(ids)).max() < 0.05 * np.ptp(cpu.logits(ids))
