"""The engine computes what llama.cpp computes, on the embedded model in three formats and on the tiny golden models."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import rewrite
from llama_models import open_llama
from reference import ReferenceModel

import edge_moe
from edge_moe.api import embedded_model_path
from edge_moe.weights import Weight

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is the reference; install the test extra")

GOLDEN = Path(__file__).parent / "golden"

TEXT = """\
In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was \
upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be light: \
and there was light. And God saw the light, that it was good: and God divided the light from the darkness.

A package manager keeps track of which files belong to which package, so that a package can be removed or upgraded \
without leaving anything behind. To install a package from the archive, run the following command as root:

    apt-get install python3

The configuration file is read when the service starts; changes take effect after it has been restarted. If the file \
does not exist, the default values are used, and a warning is written to the system log.

class Stack:
    \"\"\"A last-in, first-out container.\"\"\"

    def __init__(self, items=()):
        self._items = list(items)

    def push(self, item):
        self._items.append(item)

    def pop(self):
        if not self._items:
            raise IndexError("pop from an empty stack")
        return self._items.pop()

>>> stack = Stack([1, 2])
>>> stack.push(3)
>>> stack.pop()
3

The number of seconds in a day is 24 * 60 * 60 = 86400. Its square root is about 293.94, and its largest prime factor \
is 5. For more information, see the documentation of the module, or write to the mailing list of its maintainers.
"""


def llama_logits(path, ids):
    """Logits after every token, by llama.cpp -> f32[T,vocab]."""
    model = open_llama(path, logits_all=True, n_ctx=len(ids), n_batch=len(ids), n_threads=2)
    try:
        model.eval([int(i) for i in ids])
        return np.array(model.scores[: len(ids)], np.float32)
    finally:
        model.close()


def llama_quantize(source, target, file_type):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = 2
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert status == 0
    return target


def log_probabilities(logits):
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The embedded model in the formats that are compared, made by llama.cpp's own quantizer."""
    folder = tmp_path_factory.mktemp("parity")
    f16 = rewrite(embedded_model_path(), folder / "f16.gguf", matrices=gguf.GGMLQuantizationType.F16)
    return {
        "F16": f16,
        "Q8_0": llama_quantize(f16, folder / "q8_0.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0),
        "Q4_K_M": llama_quantize(f16, folder / "q4_k_m.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M),
    }


@pytest.fixture(scope="module", params=["F16", "Q8_0", "Q4_K_M"])
def measured(request, models):
    """-> the file; token ids; log probabilities f64[T,vocab] of the engine, of llama.cpp and of the exact twin."""
    path = models[request.param]
    model = edge_moe.load(path)
    ids = model.tokenizer.encode(TEXT)
    assert 256 <= len(ids) <= 1024
    logits = model.logits(ids), llama_logits(path, ids), ReferenceModel.from_gguf(path).logits(ids)
    return path, ids, *map(log_probabilities, logits)


def mean_divergence(of, to):
    """Mean KL divergence in nats between log probabilities f64[T,vocab]."""
    divergences = np.sum(np.exp(of) * (of - to), axis=-1)
    assert divergences.min() > -1e-9
    return divergences.mean()


def test_embedded_model(measured, monkeypatch):
    path, ids, _, theirs, exact = measured
    # Without our fine products: llama.cpp rounds each input once.
    monkeypatch.setattr(Weight, "has_8_bits", False)
    ours = log_probabilities(edge_moe.load(path).logits(ids))
    # llama.cpp rounds other sums on each kind of CPU, and is itself up to 9e-4 from exact arithmetic: where it is off
    # by more than usual, so is what separates the two. How far ours may be off is the next test.
    assert mean_divergence(theirs, ours) < max(1e-3, 1.5 * mean_divergence(exact, theirs))
    following = np.arange(len(ids) - 1), ids[1:]
    perplexity_ours, perplexity_theirs = (np.exp(-log_p[following].mean()) for log_p in (ours, theirs))
    assert perplexity_ours == pytest.approx(perplexity_theirs, rel=0.005)


def test_embedded_model_is_as_exact_as_in_llama(measured):
    """What separates the two is the rounding of activations to 8 bits, which costs both alike, and of the cache.

    Ours is bf16 and llama.cpp's f16: now and then a router near a tie goes the other way, the 1e-5 that is added. With
    weights of 8 bits our products are fine, and so the answers must be nearer to exact ones.
    """
    path, _, ours, theirs, exact = measured
    most = 1 if path.stem == "q8_0" else 2
    assert mean_divergence(exact, ours) < most * mean_divergence(exact, theirs) + 1e-5


# Left out: v2_groups, since llama.cpp scores a group by its best two experts for every model, where DeepSeek-V2's own
# code takes the best one; v3_no_norm, since it puts YaRN's temperature into both cos and sin and the softmax scale.
@pytest.mark.parametrize(
    "name", ["v2_lite", "v2_legacy_kv_b", "v2_no_dense_layer", "v2_tied", "v3", "v3_lite", "v3_fused_gate_up"]
)
def test_golden(name, tmp_path):
    ids = np.load(GOLDEN / f"{name}.npz")["ids"]
    path = GOLDEN / f"{name}.gguf"
    if "lite" in name or name in ("v2_legacy_kv_b", "v2_tied"):
        # llama.cpp wants the key of every model that is not 26, 27 or 48 layers deep; 0 means the same as its absence.
        none = {"deepseek2.attention.q_lora_rank": (0, gguf.GGUFValueType.UINT32)}
        path = rewrite(path, tmp_path / "model.gguf", keys=none)
    ours, theirs = edge_moe.load(path).logits(ids.tolist()), llama_logits(path, ids)
    assert np.abs(ours - theirs).max() < 1e-3 * np.ptp(theirs)
