"""Likelihoods of given continuations: equal to the full forward pass, whatever is shared, sorted or padded."""

import jax
import numpy as np
import pytest
import scipy.special

from almost_jax.core.llama import LlamaConfig, init_params
from almost_jax.core.rotary import RopeConfig
from almost_jax.sampling import likelihood
from almost_jax.sampling.likelihood import continuation_likelihoods

CONFIG = LlamaConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-3,
    rope=RopeConfig(1234.0, "llama3", 3.0, 1.5, 5.0, 61),
    initializer_range=0.4,
)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(7))


def alone(full_logits, params, context, continuation):
    """Log-probs of the continuation and the likeliest tokens at its places, from the whole row's logits."""
    everything = scipy.special.log_softmax(full_logits(params, CONFIG, [*context, *continuation]), axis=-1)
    places = len(context) - 1 + np.arange(len(continuation))
    return everything[places, np.asarray(continuation, int)], everything[places].argmax(-1)


@pytest.mark.parametrize("shared", [0, 3, 21])
def test_04_equal_to_the_full_pass_in_the_order_given(params, full_logits, shared: int):
    rng = np.random.default_rng(shared)
    start = rng.integers(0, 29, shared).tolist()
    contexts = [[*start, *rng.integers(0, 29, size).tolist()] for size in (5, 1, 9, 2, 5)]
    continuations = [rng.integers(0, 29, size).tolist() for size in (4, 1, 0, 11, 3)]
    # A greedy one, and one that is greedy but for its last token.
    for index in (1, 4):
        continuations[index] = []
        for _ in range(3):
            last = full_logits(params, CONFIG, [*contexts[index], *continuations[index]])[-1]
            continuations[index].append(int(last.argmax()))
    continuations[4][-1] = (continuations[4][-1] + 1) % 29
    found = continuation_likelihoods(params, CONFIG, contexts, continuations, batch_size=2, multiple=4)
    assert [one.greedy for one in found] == [False, True, True, False, False]
    for one, context, continuation in zip(found, contexts, continuations, strict=True):
        expected, _ = alone(full_logits, params, context, continuation)
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-5)
        assert one.total == pytest.approx(float(expected.sum()), abs=1e-4)


def test_endings_of_one_row_are_computed_together(params, full_logits, monkeypatch: pytest.MonkeyPatch):
    contexts = [[3, 4], [3, 4], [5], [3, 4], [3]]
    continuations = [[7, 8], [7, 11], [8], [7, 2], [4, 7, 8]]
    best = int(full_logits(params, CONFIG, [3, 4, 7])[-1].argmax())
    continuations[3] = [7, best]
    sizes = []
    real = likelihood._score
    monkeypatch.setattr(likelihood, "_score", lambda *given: sizes.append(given[6].shape) or real(*given))
    found = continuation_likelihoods(params, CONFIG, contexts, continuations, batch_size=4, multiple=4)
    # Rows [5], [3, 4, 7] behind two tokens and behind one.
    assert sizes == [(4, 3)]
    for one, context, continuation in zip(found, contexts, continuations, strict=True):
        expected, likeliest = alone(full_logits, params, context, continuation)
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-5)
        assert one.greedy == (likeliest.tolist() == continuation)


def test_what_all_contexts_begin_with_is_computed_once(params, monkeypatch: pytest.MonkeyPatch):
    seen = []
    real = likelihood._prefill
    monkeypatch.setattr(likelihood, "_prefill", lambda *given: seen.append(given[2].shape) or real(*given))
    start = list(range(20))
    continuation_likelihoods(params, CONFIG, [start, [*start, 3]], [[1], [2]], batch_size=2, multiple=4)
    assert seen == [(19,)], "each context keeps a token of its own"
    continuation_likelihoods(params, CONFIG, [start[:9], start[:10]], [[1], [2]], batch_size=2, multiple=4)
    assert len(seen) == 1, "a few tokens aren't worth a program"


def test_an_empty_context_is_refused(params):
    with pytest.raises(ValueError, match="context 1 is empty"):
        continuation_likelihoods(params, CONFIG, [[1], []], [[1], [1]], batch_size=2, multiple=4)


def test_sizes_grow_by_a_quarter_at_most():
    sizes = sorted({likelihood._bucket(length, 4) for length in range(1, 400)})
    assert sizes[:10] == [4, 8, 12, 16, 20, 24, 28, 32, 40, 48]
    assert all(likelihood._bucket(length, 4) >= length for length in range(1, 400))
