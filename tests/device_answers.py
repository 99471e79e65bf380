"""How answers of a device are compared with the CPU's."""

import numpy as np

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered the rightful property of "
    "some one or other of their daughters."
)
MOST_KLD, NEAR_TIE = 1e-3, 0.05


def mean_kld(reference, other):
    """Of softmax of logits [T,vocab], in nats."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (reference.astype(float), other.astype(float)))
    return (np.exp(p) * (p - q)).sum(-1).mean()


def forward(model, ids, sizes, kv="bf16"):
    """A pass's logits when tokens come in parts of these sizes."""
    cache, out, first = model.new_cache(len(ids), kv), [], 0
    for size in sizes:
        out.append(model.forward(np.asarray(ids[first : first + size], np.int64), cache, all_logits=True))
        first += size
    return np.concatenate(out)


def greedy_ids(model, prompt, n):
    """The likeliest continuation, token by token, and each step's logits."""
    cache = model.new_cache(len(prompt) + n)
    ids, logits = [], model.forward(np.asarray(prompt), cache)[-1]
    all_logits = [logits]
    for _ in range(n):
        ids.append(int(logits.argmax()))
        logits = model.forward(np.array(ids[-1:]), cache)[-1]
        all_logits.append(logits)
    return ids, all_logits


def assert_same_text(cpu, device, prompt, n=64):
    """Greedy texts are identical, or part where the CPU's two likeliest tokens are nearly equal."""
    (ours, logits), (theirs, _) = greedy_ids(cpu, prompt, n), greedy_ids(device, prompt, n)
    parted = next((i for i in range(n) if ours[i] != theirs[i]), None)
    if parted is not None:
        second, first = np.sort(logits[parted])[-2:]
        assert first - second < NEAR_TIE, f"texts part at token {parted}, {first - second} apart"
