"""Generation on a stand-in model: what is run, what is reused, where it ends."""

import dataclasses

import numpy as np
import pytest

from edge_moe.config import DeepseekV2Config
from edge_moe.errors import OptionError, ShapeError
from edge_moe.generate import PREFILL_CHUNK, Session
from edge_moe.latent_cache import LatentCache, latent_cache_bytes

CONFIG = DeepseekV2Config(
    architecture="deepseek2",
    name="counter",
    vocab_size=100,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    max_position_embeddings=2000,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    q_lora_rank=None,
    kv_lora_rank=4,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=4,
    intermediate_size=8,
    first_k_dense_replace=1,
    moe_intermediate_size=0,
    n_routed_experts=0,
    n_shared_experts=0,
    num_experts_per_tok=0,
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    n_group=1,
    topk_group=1,
)


class Counter:
    """A model that says: after token i comes i + 1. It records the chunks it was given and where they began."""

    config = CONFIG

    def __init__(self):
        self.calls = []

    def new_cache(self, context_length):
        return LatentCache(CONFIG, context_length)

    def forward(self, token_ids, cache, *, all_logits=False):
        self.calls.append((cache.length, token_ids.tolist()))
        cache.advance(len(token_ids))
        logits = np.zeros((len(token_ids), CONFIG.vocab_size), np.float32)
        logits[np.arange(len(token_ids)), (token_ids + 1) % CONFIG.vocab_size] = 1
        return logits if all_logits else logits[-1:]


class Greedy:
    def __init__(self):
        self.histories = []

    def sample(self, logits, history):
        self.histories.append(list(history))
        return int(logits.argmax())


@pytest.fixture
def session():
    return Session(Counter(), 2000)


def test_counts_on(session):
    sampler = Greedy()
    assert list(session.generate([5, 6], sampler, max_new_tokens=3)) == [7, 8, 9]
    assert sampler.histories == [[5, 6], [5, 6, 7], [5, 6, 7, 8]]
    assert session.model.calls == [(0, [5, 6]), (2, [7]), (3, [8])]
    stats = session.stats
    assert (stats.prompt_tokens, stats.completion_tokens, stats.stop_reason) == (2, 3, "length")
    assert 0 < stats.prefill_s <= stats.first_token_s


def test_ends_before_the_end_token(session):
    assert list(session.generate([5], Greedy(), max_new_tokens=50, eos_ids={9})) == [6, 7, 8]
    assert session.stats.stop_reason == "eos"


def test_ends_with_the_context():
    session = Session(Counter(), 6)
    assert list(session.generate([1, 2, 3], Greedy(), max_new_tokens=50)) == [4, 5, 6, 7]
    assert session.stats.stop_reason == "context"
    assert session.cache.free == 0


def test_long_prompts_run_in_chunks(session):
    prompt = [i % 90 for i in range(PREFILL_CHUNK + 10)]
    seen = []
    ids = list(session.generate(prompt, Greedy(), max_new_tokens=1, on_progress=lambda *at: seen.append(at)))
    assert ids == [(prompt[-1] + 1) % 100]
    assert [(start, len(chunk)) for start, chunk in session.model.calls] == [(0, PREFILL_CHUNK), (PREFILL_CHUNK, 10)]
    total = len(prompt)
    assert seen == [(0, total), (PREFILL_CHUNK, total), (total, total)]


def test_second_turn_runs_only_what_is_new(session):
    answer = list(session.generate([1, 2, 3], Greedy(), max_new_tokens=2))
    session.model.calls.clear()
    list(session.generate([1, 2, 3, *answer, 50, 51], Greedy(), max_new_tokens=1))
    assert session.model.calls == [(4, [5, 50, 51])]  # 4 was run to get 5, which itself never was
    assert session.stats.reused_tokens == 4


def test_a_changed_history_is_cut(session):
    list(session.generate([1, 2, 3, 4], Greedy(), max_new_tokens=1))
    session.model.calls.clear()
    list(session.generate([1, 2, 9], Greedy(), max_new_tokens=1))
    assert session.model.calls == [(2, [9])]
    assert session.token_ids == [1, 2, 9]


def test_the_same_prompt_again_runs_its_last_token(session):
    first = list(session.generate([1, 2, 3], Greedy(), max_new_tokens=1))
    session.model.calls.clear()
    assert list(session.generate([1, 2, 3], Greedy(), max_new_tokens=1)) == first
    assert session.model.calls == [(2, [3])]


def test_an_abandoned_generation_leaves_a_usable_session(session):
    tokens = session.generate([1, 2], Greedy(), max_new_tokens=10)
    assert next(tokens) == 3
    tokens.close()
    assert list(session.generate([1, 2], Greedy(), max_new_tokens=2)) == [3, 4]


@pytest.mark.parametrize(
    ("ids", "error"), [([], OptionError), ([100], ShapeError), ([3, -1], ShapeError), ([1] * 2001, OptionError)]
)
def test_bad_prompts(session, ids, error):
    with pytest.raises(error):
        list(session.generate(ids, Greedy(), max_new_tokens=1))


@pytest.mark.parametrize("length", [0, -1, 2001])
def test_bad_context_lengths(length):
    with pytest.raises(OptionError, match="1 to 2000"):
        Session(Counter(), length)


def test_cache_cannot_be_cut_longer(session):
    with pytest.raises(OptionError):
        session.cache.truncate(1)


def test_cache_bytes():
    """The real shape of DeepSeek-V2-Lite: 1152 bytes per token and layer."""
    config = dataclasses.replace(CONFIG, kv_lora_rank=512, qk_rope_head_dim=64, num_hidden_layers=27)
    assert latent_cache_bytes(config, 10) == 27 * 10 * 1152
    assert LatentCache(config, 10).n_bytes == 27 * 10 * 1152
