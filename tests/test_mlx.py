"""The MLX backend: its form of each block format, its operations, and the CPU's answers."""

from pathlib import Path

import numpy as np
import pytest
from block_rows import random_rows
from device_answers import MOST_KLD, TEXT, assert_same_text, forward, greedy_ids, mean_kld
from shapes import write_v2_lite
from vulkan_device import weight_of

import edge_moe
from edge_moe.api import embedded_model_path
from edge_moe.backends.mlx.backend import MlxBackend, import_mlx
from edge_moe.backends.mlx.forms import affine, form_bytes, is_float, is_lossless
from edge_moe.backends.mlx.weights import MlxWeights
from edge_moe.checkpoint import open_checkpoint
from edge_moe.cli import main
from edge_moe.errors import DeviceError, OptionError
from edge_moe.formats import FORMATS, Q6_K
from edge_moe.models.architectures import load_pass

TESTS = Path(__file__).parent
GOLDENS = sorted([*(TESTS / "golden").glob("*.gguf"), *(TESTS / "golden_llama").glob("*.gguf")])
BLOCKS = [fmt for fmt in FORMATS if not is_float(fmt)]


@pytest.fixture(scope="module")
def mx():
    try:
        return import_mlx()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def reference():
    return edge_moe.load()


@pytest.fixture(scope="module")
def model(mx):
    return edge_moe.load(backend="mlx", context_length=128)


# ---- forms


@pytest.mark.parametrize("fmt", BLOCKS, ids=str)
def test_forms(mx, rng, fmt):
    """MLX reads of the packed form what the blocks mean: the same, or of 16-groups what is nearest in 8 bits."""
    data = random_rows(fmt, 6, 768, rng)
    expected = fmt.decode(data).astype(np.float64).reshape(6, -1, 32)
    form = affine(fmt, data)
    assert form.q.dtype == np.uint8
    assert form.q.max() < 1 << form.bits
    packed, scales, biases = (mx.array(each) for each in (form.packed(), form.scales, form.biases))
    found = np.array(mx.dequantize(packed, scales, biases, group_size=32, bits=form.bits)).reshape(6, -1, 32)
    largest = np.abs(expected).max(-1, keepdims=True)
    if is_lossless(fmt):
        assert (np.abs(found - expected) <= 3e-7 * np.maximum(largest, np.abs(form.biases)[..., None])).all()
    else:
        step = np.ptp(expected, axis=-1, keepdims=True) / 255
        assert (np.abs(found - expected) <= 0.5001 * step + 1e-6 * largest).all()
    n_bytes = packed.nbytes + scales.nbytes + biases.nbytes
    assert n_bytes == form_bytes(fmt, 6 * 768)


def test_which_forms_lose_nothing():
    assert {fmt.name for fmt in FORMATS if not is_lossless(fmt)} == {"Q2_K", "Q3_K", "Q6_K"}
    bits = {fmt.name: 8 * form_bytes(fmt, 256) / 256 for fmt in FORMATS}
    assert bits["Q4_K"] == bits["Q4_0"] == 6
    assert bits["Q8_0"] == bits["Q6_K"] == 10
    assert (bits["F16"], bits["F32"]) == (16, 32)


def test_a_row_of_zeros_and_of_one_value():
    zeros = np.zeros((1, 210), np.uint8)
    form = affine(Q6_K, zeros)
    assert not form.scales.any() and not form.biases.any()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_products(mx, rng, fmt):
    """Whole matrices, parts of stacks, transposed ones, rows, and those that ids choose."""
    n_cols = 256 if fmt.block_size > 1 else 75
    data = random_rows(fmt, 4 * 20, n_cols, rng)
    weights, values = MlxWeights(mx), None
    matrix, stack = weight_of(fmt, data, 80, n_cols), weight_of(fmt, data, 4, 20, n_cols)
    values = np.array(weights.rows(matrix, mx.arange(80)))
    if is_lossless(fmt):
        np.testing.assert_allclose(values, fmt.decode(data), rtol=0, atol=1e-6 * np.abs(values).max())

    def close(found, expected):
        np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    x = rng.standard_normal((3, n_cols)).astype(np.float32)
    close(weights.product(mx.array(x), matrix), x @ values.T)
    upper, lower = stack.split_rows(7, 13)
    stacked = values.reshape(4, 20, n_cols)
    x = rng.standard_normal((4, 3, n_cols)).astype(np.float32)
    close(weights.product(mx.array(x), lower), np.einsum("htc,hrc->htr", x, stacked[:, 7:]))
    close(
        weights.product(mx.array(x[..., :7]), upper, transpose=False),
        np.einsum("htr,hrc->htc", x[..., :7], stacked[:, :7]),
    )
    ids = np.array([[3, 0], [1, 1], [2, 3]])
    for shape in ((3, 1, 1, n_cols), (3, 2, 1, n_cols)):
        x = rng.standard_normal(shape).astype(np.float32)
        found = weights.gathered(mx.array(x), lower, mx.array(ids.astype(np.uint32)))
        inputs = np.broadcast_to(x, (3, 2, 1, n_cols))
        close(found, np.einsum("tkoc,tkrc->tkor", inputs, stacked[:, 7:][ids]))


# ---- models


@pytest.mark.parametrize("kv", ["bf16", "f32"])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_tiny_models(mx, path, kv):
    with np.load(path.with_suffix(".npz")) as saved:
        ids = saved["ids"]
    model, cpu = load_pass(open_checkpoint(path), MlxBackend(1)), edge_moe.load(path, kv=kv)._pass
    for sizes in ([32], [5, 1, 9, 2, 15]):
        expected, found = (forward(each, ids, sizes, kv) for each in (cpu, model))
        assert found.dtype == np.float32
        assert mean_kld(expected, found) < MOST_KLD
        assert np.abs(found - expected).max() < (2e-3 if kv == "bf16" else 1e-5) * np.ptp(expected)


@pytest.mark.parametrize("name", ["v2_lite", "v3"])
def test_text_of_tiny_models(mx, name):
    path = TESTS / "golden" / f"{name}.gguf"
    assert_same_text(edge_moe.load(path)._pass, load_pass(open_checkpoint(path), MlxBackend(1)), [5, 6, 7, 8])


def test_the_reference_model(model, reference):
    assert model.backend == "mlx"
    ids = reference.tokenizer.encode(TEXT)
    assert mean_kld(reference.logits(ids), model.logits(ids)) < MOST_KLD
    assert_same_text(reference, model, ids[:9])


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q5_1", "Q6_K", "Q4_K_M", "Q3_K_M", "IQ4_XS"])
def test_the_reference_model_in_other_formats(mx, kind, tmp_path):
    path = tmp_path / "model.gguf"
    assert main(["quantize", str(embedded_model_path()), str(path), "--type", kind, "--allow-requantize"]) == 0
    lines = []
    cpu, model = edge_moe.load(path), edge_moe.load(path, backend="mlx", on_backend=lines.append)
    formats = {each.format.name for each in model.checkpoint.tensors.values()} & {"Q2_K", "Q3_K", "Q6_K"}
    assert len(lines) == bool(formats)
    assert all(name in lines[0] for name in formats)
    ids = cpu.tokenizer.encode(TEXT)
    # of Q3_K_M the CPU's 8-bit activations alone are 0.00098 away from what the weights say
    assert mean_kld(cpu.logits(ids), model.logits(ids)) < (1.1e-3 if kind == "Q3_K_M" else MOST_KLD)


def test_a_model_of_v2_lites_shape(mx, tmp_path):
    """Two layers of DeepSeek-V2-Lite in Q4_K_M, with fewer words."""
    path = tmp_path / "model.gguf"
    write_v2_lite(path, num_hidden_layers=2, vocab_size=2048)
    cpu, model = edge_moe.load(path), edge_moe.load(path, backend="mlx", context_length=128)
    ids = list(range(3, 19))
    expected, found = cpu.logits(ids), model.logits(ids)
    # what the CPU's 8-bit activations cost on random weights, as in test_make_shape
    assert np.sqrt(np.mean((found - expected) ** 2)) < 6e-3 * np.ptp(expected)


def test_a_token_is_computed_once(model):
    operations, cache = model._pass.backend.operations, model.new_cache()
    for n_tokens in (7, 1, 1):
        before = operations.n_evaluations
        model.forward(np.arange(5, 5 + n_tokens), cache)
        assert operations.n_evaluations == before + 1


def test_a_prompt_of_several_chunks(mx, reference):
    model = edge_moe.load(backend="mlx", context_length=150)
    ids = np.random.default_rng(0).integers(3, 8000, 140)
    whole, parts = model.new_cache(), model.new_cache()
    model.forward(ids[:-1], whole)
    for first in range(0, 139, 50):
        model.forward(ids[first : min(first + 50, 139)], parts)
    found = [model.forward(ids[-1:], cache) for cache in (whole, parts)]
    np.testing.assert_allclose(found[0], found[1], atol=2e-2 * np.ptp(found[0]))
    whole.truncate(100)
    again = model.forward(ids[100:], whole)
    np.testing.assert_allclose(again, found[0], atol=2e-2 * np.ptp(found[0]))


# ---- a budget of memory


def bounded(**options):
    """The reference model in as little memory as its experts can be held in."""
    with pytest.MonkeyPatch.context() as patch:
        # more than this process has, whatever other tests left in it: so that it counts the same both times
        patch.setattr("edge_moe.memory_plan.PROCESS_BYTES", 8 << 30)
        patch.setattr("edge_moe.memory_plan._SLACK", 0.0)
        with pytest.raises(OptionError, match="expected at least") as error:
            edge_moe.load(backend="mlx", context_length=64, ram_bytes=1 << 20, **options)
        least = float(str(error.value).split("expected at least ")[1].split("G")[0])
        return edge_moe.load(backend="mlx", context_length=64, ram_bytes=int((least + 0.002) * (1 << 30)), **options)


def test_experts_in_a_bounded_store(model):
    """The store that the CPU has: experts read when they are chosen, and never more of them than fit."""
    small = bounded()
    store = small.expert_store
    assert store is not None
    assert store.n_slots < 5 * 16
    prompt = model.tokenizer.encode("It is a truth universally acknowledged")
    (ours, logits), (theirs, others) = (greedy_ids(each, prompt, 24) for each in (model, small))
    assert store.stats.misses > 0
    assert mean_kld(np.array(logits[:1]), np.array(others[:1])) < MOST_KLD
    parted = next((i for i in range(24) if ours[i] != theirs[i]), None)
    assert parted is None or np.diff(np.sort(logits[parted])[-2:]) < 0.05
    operations = small._pass.backend.operations
    before = operations.n_evaluations
    small.forward(np.array([5]), small.new_cache())
    assert operations.n_evaluations == before + 1 + 2 * 5  # the router's choice and the experts' input of each layer


def test_a_slack_of_the_router(mx):
    """Experts in memory are favoured, for single tokens."""
    exact, slack = bounded(), bounded(route_slack=0.5)
    for each in (exact, slack):
        cache = each.new_cache()
        for token in range(5, 25):
            each.forward(np.array([token]), cache)
    assert slack.expert_store.stats.misses < exact.expert_store.stats.misses


def test_kinds_of_cache_that_are_the_cpus(mx):
    with pytest.raises(OptionError, match="--kv int8: the mlx backend keeps one of bf16, f32"):
        edge_moe.load(backend="mlx", kv="int8")
