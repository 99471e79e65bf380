"""The vulkan backend gives the CPU's answers, within the memory and the number of submissions that it says."""

import gc
from pathlib import Path

import numpy as np
import pytest
from device_answers import MOST_KLD, TEXT, assert_same_text, forward, greedy_ids, mean_kld
from gguf_files import rewrite, write_tiny_deepseek2
from shapes import write_v2_lite
from vulkan_device import adapter_or_skip

import edge_moe
from edge_moe.api import embedded_model_path
from edge_moe.backends.vulkan.backend import VulkanBackend
from edge_moe.backends.vulkan.device import Device
from edge_moe.checkpoint import open_checkpoint
from edge_moe.cli import main
from edge_moe.errors import DeviceError, OptionError
from edge_moe.models.architectures import load_pass
from edge_moe.sampling import SamplingOptions

TESTS = Path(__file__).parent
GOLDENS = sorted([*(TESTS / "golden").glob("*.gguf"), *(TESTS / "golden_llama").glob("*.gguf")])


@pytest.fixture(scope="module")
def adapter():
    return adapter_or_skip()


@pytest.fixture(scope="module")
def reference():
    return edge_moe.load()


@pytest.fixture(scope="module")
def model(adapter):
    """The reference model, all of it on the device."""
    return edge_moe.load(backend="vulkan", context_length=128)


@pytest.mark.parametrize("kv", ["bf16", "f32"])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_tiny_models(adapter, path, kv):
    with np.load(path.with_suffix(".npz")) as saved:
        ids = saved["ids"]
    checkpoint = open_checkpoint(path)
    model = load_pass(checkpoint, VulkanBackend(adapter))
    cpu = edge_moe.load(path, kv=kv)
    for sizes in ([32], [5, 1, 9, 2, 15]):
        expected = forward(cpu._pass, ids, sizes, kv)
        found = forward(model, ids, sizes, kv)
        assert found.dtype == np.float32
        assert mean_kld(expected, found) < MOST_KLD
        # neither rounds activations of float weights: what differs is a bf16 number of the cache rounded the other way
        assert np.abs(found - expected).max() < (2e-3 if kv == "bf16" else 1e-5) * np.ptp(expected)


@pytest.mark.parametrize("name", ["v2_lite", "v3"])
def test_text_of_tiny_models(adapter, name):
    path = TESTS / "golden" / f"{name}.gguf"
    assert_same_text(edge_moe.load(path)._pass, load_pass(open_checkpoint(path), VulkanBackend(adapter)), [5, 6, 7, 8])


def test_the_reference_model(model, reference):
    """On a text longer than a chunk, with an odd end; and what it writes."""
    assert model.backend == "vulkan"
    ids = reference.tokenizer.encode(TEXT)
    assert len(ids) > model._pass.backend.chunk_tokens
    logits = model.logits(ids)
    assert mean_kld(reference.logits(ids), logits) < MOST_KLD
    last = model.forward(np.array(ids), model.new_cache())
    np.testing.assert_allclose(last, logits[-1:], atol=1e-4 * np.ptp(logits))
    assert_same_text(reference, model, ids[:9])


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q5_0", "Q6_K", "Q4_K_M", "Q2_K", "IQ4_XS"])
def test_the_reference_model_in_other_formats(adapter, kind, tmp_path):
    path = tmp_path / "model.gguf"
    assert main(["quantize", str(embedded_model_path()), str(path), "--type", kind, "--allow-requantize"]) == 0
    cpu, model = edge_moe.load(path), edge_moe.load(path, backend="vulkan")
    ids = cpu.tokenizer.encode(TEXT)
    assert mean_kld(cpu.logits(ids), model.logits(ids)) < MOST_KLD


def test_a_session_goes_back(model, reference):
    """A cache cut to a shorter text and gone on from there, and generation by the public interface."""
    options = SamplingOptions(temperature=0)
    session = model.new_session(64)
    for prompt in ("It is a truth", "It is a lie"):
        text = "".join(model.generate(prompt, max_new_tokens=8, options=options, session=session))
        assert text == "".join(reference.generate(prompt, max_new_tokens=8, options=options))
    assert model.last_stats.reused_tokens > 2


# ---- memory, submissions and bytes


def test_all_on_the_device_is_one_submission_a_token(model):
    cache, stats = model.new_cache(), model.device_stats
    assert stats.uploaded_bytes > 0.95 * sum(each.data.size for each in model.checkpoint.tensors.values())
    model.forward(np.array([5]), cache)
    for token in (6, 7, 8):
        before = stats.submissions, stats.uploaded_bytes
        model.forward(np.array([token]), cache)
        assert stats.submissions - before[0] == 1
        # the token's id, the cache's length, and the rotations of 16 pairs
        assert stats.uploaded_bytes - before[1] == 4 + 16 + 2 * 4 * 16


def least_vram(context_length):
    """What the error of too small a budget says is needed."""
    with pytest.raises(OptionError, match=r"--vram: 4096 bytes are too little .* expected at least \d+") as error:
        edge_moe.load(backend="vulkan", context_length=context_length, vram_bytes=4096)
    return int(str(error.value).split("at least ")[1].split(":")[0])


def test_a_quarter_of_the_experts(model):
    """In slots, those used last: the same text to the bit, no more memory than allowed, only misses sent."""
    whole, config = model, model.config
    expert_bytes = 3 * 256 * 256 * 34 // 32
    vram_bytes = least_vram(64) + (config.num_hidden_layers - 1) * 2 * expert_bytes + 200_000
    model = edge_moe.load(backend="vulkan", context_length=64, vram_bytes=vram_bytes)
    backend = model._pass.backend
    assert backend.slots.n_slots == config.n_routed_experts // 4
    prompt = model.tokenizer.encode("It is a truth universally acknowledged")
    texts = [greedy_ids(each, prompt, 30) for each in (whole, model)]
    assert texts[0][0] == texts[1][0]
    np.testing.assert_array_equal(texts[0][1][-1], texts[1][1][-1])
    stats, slots = model.device_stats, backend.slots
    assert stats.peak_bytes <= vram_bytes
    cache = model.new_cache(64)
    model.forward(np.array([5]), cache)
    for token in (6, 7):
        before = stats.submissions, stats.uploaded_bytes, slots.misses
        model.forward(np.array([token]), cache)
        n_layers = config.num_hidden_layers - 1  # with experts
        assert stats.submissions - before[0] == n_layers + 1
        sent, misses = stats.uploaded_bytes - before[1], slots.misses - before[2]
        tables = sent - misses * expert_bytes - 148
        assert 0 <= tables <= n_layers * 4 * config.n_routed_experts
        assert tables % (4 * config.n_routed_experts) == 0
    assert slots.hits and slots.misses
    # the same token again: all of its experts are there
    cache.truncate(cache.length - 1)
    before = slots.misses
    model.forward(np.array([7]), cache)
    assert slots.misses == before


def test_the_least_budget_works_and_less_does_not(adapter):
    least = least_vram(32)
    with pytest.raises(OptionError, match="expected at least"):
        edge_moe.load(backend="vulkan", context_length=32, vram_bytes=least - 1)
    model = edge_moe.load(backend="vulkan", context_length=32, vram_bytes=least)
    assert model._pass.backend.chunk_tokens == 1
    logits = model.logits(list(range(5, 25)))
    assert logits.shape == (20, 8192)
    assert model.device_stats.peak_bytes <= least


def test_memory_of_a_cache_is_given_back(adapter):
    model = edge_moe.load(TESTS / "golden" / "v2_lite.gguf", backend="vulkan")
    sizes = []
    for _ in range(3):
        model.logits(list(range(3, 30)))
        gc.collect()
        sizes.append(model.device_stats.allocated_bytes)
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_cache_that_does_not_fit(adapter):
    least = least_vram(16)
    model = edge_moe.load(backend="vulkan", context_length=16, vram_bytes=least)
    with pytest.raises(DeviceError, match="--vram"):
        model.forward(np.array([5]), model.new_cache(2048))


def test_a_longer_cache_needs_more_scratch(adapter, tmp_path):
    """What was taken for one context is taken anew for a longer one, tables of slots included."""
    path = tmp_path / "model.gguf"
    write_tiny_deepseek2(path, max_position_embeddings=4096, n_routed_experts=8)
    backend = VulkanBackend(adapter)
    model = load_pass(open_checkpoint(path), backend)
    model.prepare(4)
    before = backend.stats.allocated_bytes
    cache = model.new_cache(4096)
    logits = [model.forward(np.array([token]), cache)[0] for token in (5, 6, 7)]
    assert backend.stats.allocated_bytes > before
    cpu = edge_moe.load(path)
    expected = cpu.logits([5, 6, 7])
    assert mean_kld(expected, np.array(logits)) < MOST_KLD


def test_a_lost_device_is_an_error_in_one_line(adapter):
    model = edge_moe.load(TESTS / "golden" / "v2_lite.gguf", backend="vulkan")
    model.logits([5, 6, 7])
    model._pass.backend.device._device.destroy()
    with pytest.raises(DeviceError, match=r"lost.*; --backend cpu needs no device$"):
        model.logits([5, 6, 7])


@pytest.mark.parametrize("kind", ["GPUOutOfMemoryError", "GPUValidationError"])  # the library has said it either way
def test_no_memory_left_on_the_device(adapter, kind, monkeypatch):
    import wgpu

    device, n_buffers = Device(adapter), []

    def create_buffer(**_):
        n_buffers.append(1)
        raise getattr(wgpu, kind)("Not enough memory left.")

    monkeypatch.setattr(device._device, "create_buffer", create_buffer)
    before = device.stats.allocated_bytes
    with pytest.raises(DeviceError, match="Not enough memory left; --vram SIZE keeps fewer experts there"):
        device.create(1 << 20)
    assert (len(n_buffers), device.stats.allocated_bytes) == (1, before)
    monkeypatch.setattr("edge_moe.backends.vulkan.backend.Device", lambda *_: device)
    lines = []
    monkeypatch.setattr("edge_moe.api.choose_backend", lambda word: ("vulkan", adapter.name))
    path = TESTS / "golden" / "v2_lite.gguf"
    assert edge_moe.load(path, backend="auto", on_backend=lines.append).logits([5, 6]).shape[0] == 2
    assert lines[0].startswith("backend cpu: ") and "Not enough memory left" in lines[0]


def test_an_interrupt_leaves_the_books_right(adapter, monkeypatch):
    """Ctrl-C amid sending an expert, or while results are awaited: the next run is right all the same."""
    least = least_vram(32)
    model = edge_moe.load(backend="vulkan", context_length=32, vram_bytes=least)
    expected = model.logits([5, 6, 7, 8])
    device = model._pass.backend.device
    for name in ("write", "run"):
        whole, calls = getattr(device, name), []

        def interrupted(*arguments, whole=whole, calls=calls):
            calls.append(1)
            if len(calls) == 9:
                raise KeyboardInterrupt
            return whole(*arguments)

        monkeypatch.setattr(device, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.logits([9, 10, 11, 12])
        monkeypatch.setattr(device, name, whole)
        np.testing.assert_array_equal(model.logits([5, 6, 7, 8]), expected)


def test_a_model_of_v2_lites_shape(adapter, tmp_path):
    """Two layers of DeepSeek-V2-Lite in Q4_K_M, with fewer words."""
    path = tmp_path / "model.gguf"
    write_v2_lite(path, num_hidden_layers=2, vocab_size=2048)
    cpu, model = edge_moe.load(path), edge_moe.load(path, backend="vulkan", context_length=128)
    ids = list(range(3, 19))
    expected, found = cpu.logits(ids), model.logits(ids)
    # what the CPU's 8-bit activations cost on random weights, as in test_make_shape
    assert np.sqrt(np.mean((found - expected) ** 2)) < 6e-3 * np.ptp(expected)


def test_kinds_of_cache_that_are_the_cpus(adapter):
    for kv in ("int8", "int4"):
        with pytest.raises(OptionError, match=f"--kv {kv}: the vulkan backend keeps one of bf16, f32"):
            edge_moe.load(backend="vulkan", kv=kv)


def test_all_matrices_in_floats(adapter, tmp_path):
    """Rows that do not end at whole units, in 16 bits: odd places in words."""
    import gguf

    path = rewrite(TESTS / "golden" / "v2_lite.gguf", tmp_path / "m.gguf", matrices=gguf.GGMLQuantizationType.F16)
    ids = list(range(3, 35))
    assert mean_kld(edge_moe.load(path).logits(ids), edge_moe.load(path, backend="vulkan").logits(ids)) < 1e-6
