"""Masked reductions, token log-probabilities, cross-entropy and the pairwise ranking loss, all in float32.

Everything that feeds a gradient comes as a sum and a count (`LossTerms`), so that ragged micro-batches average right in
`almost_jax.core.train.accumulate_gradients`. Masks are bool and select with `where`: a NaN at a masked place never
reaches a sum, which it would if it were multiplied by 0.
"""

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

# Sum of losses, (how many losses it holds, {metric: (sum, count)}): what `train.LossSums` returns.
LossTerms: TypeAlias = tuple[Array, tuple[Array, dict[str, tuple[Array, Array]]]]


def length_mask(lengths: Array, size: int) -> Array:
    """True at the first `lengths` places: [B] int32 -> [B, size] bool."""
    return jnp.arange(size)[None, :] < lengths[:, None]


def window(x: Array, starts: Array, size: int) -> Array:
    """Cut `size` places out of every row, from each row's own start.

    With starts = prompt length this turns an array over prompt + response [B, T] into one over the response [B, G];
    with starts = prompt length - 1, and hidden states [B, T, D], it gives the states that predict the response.

    Args:
        x: [B, T, ...].
        starts: [B] int32.
        size: G. Places beyond T, or before 0, repeat the nearest one; they belong under a mask.

    Returns:
        [B, G, ...].
    """
    places = jnp.clip(starts[:, None] + jnp.arange(size)[None, :], 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)


def count(mask: Array) -> Array:
    """How many places a bool mask selects, float32 scalar."""
    return jnp.sum(mask, dtype=jnp.float32)


def masked_sum(x: Array, mask: Array) -> Array:
    """Sum over the places where `mask` (bool, same shape) is True, float32 scalar."""
    return jnp.sum(x.astype(jnp.float32), where=mask)


def masked_mean(x: Array, mask: Array) -> Array:
    """Mean over the places where `mask` is True, float32 scalar; 0 when there is none."""
    return masked_sum(x, mask) / jnp.maximum(count(mask), 1.0)


def masked_var(x: Array, mask: Array) -> Array:
    """Population variance (divided by n, not n - 1) over the places where `mask` is True; 0 when there is none."""
    centered = x.astype(jnp.float32) - masked_mean(x, mask)
    return masked_mean(centered * centered, mask)


def whiten(x: Array, mask: Array, shift_mean: bool) -> Array:
    """Divide by the masked standard deviation: (x - mean) / sqrt(var + 1e-8), and + mean unless `shift_mean`.

    Call it on a whole batch, before that is split into mini- and micro-batches. Advantages are whitened with
    `shift_mean`, rewards without (Huang et al., "The N Implementation Details of RLHF with PPO", 2023).

    Args:
        x: any shape.
        mask: bool, same shape.
        shift_mean: True moves the mean to 0; False keeps it.

    Returns:
        float32 of the same shape, 0 where `mask` is False.
    """
    mean = masked_mean(x, mask)
    white = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(masked_var(x, mask) + 1e-8)
    return jnp.where(mask, white if shift_mean else white + mean, 0.0)


def token_logprobs(logits: Array, tokens: Array, temperature: float) -> Array:
    """Log softmax(logits / temperature) of the given tokens, over the full vocabulary.

    Args:
        logits: [B, T, V]; `logits[:, t]` is the distribution of `tokens[:, t]`, so the caller has shifted them already.
        tokens: [B, T] int32.
        temperature: as in the sampler; 0, which is greedy, scores at temperature 1.

    Returns:
        [B, T] float32.
    """
    scaled = _tempered(logits, temperature)
    chosen = jnp.take_along_axis(scaled, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)


def next_token_logprobs(logits: Array, tokens: Array, temperature: float) -> Array:
    """Log-probability of every token given those before it in its row.

    Args:
        logits: [B, T, V], the model's output at the same places as `tokens`.
        tokens: [B, T] int32.
        temperature: see `token_logprobs`.

    Returns:
        [B, T] float32, at the token's own place; 0 at place 0, which nothing predicts.
    """
    found = token_logprobs(logits, shifted(tokens), temperature)
    return jnp.pad(found[:, :-1], ((0, 0), (1, 0)))


def entropy(logits: Array, temperature: float) -> Array:
    """Entropy of softmax(logits / temperature) in nats: [B, T, V] finite logits -> [B, T] float32."""
    scaled = _tempered(logits, temperature)
    return jax.nn.logsumexp(scaled, axis=-1) - jnp.sum(jax.nn.softmax(scaled, axis=-1) * scaled, axis=-1)


@struct.dataclass
class TokenFigures:
    """What a distribution says of given tokens, [B, T] each.

    logprobs: float32. logsumexp: float32, the log of the distribution's sum before it is normalised (z-loss squares
    it). entropy: float32, in nats; 0 where it wasn't asked for. hits: bool, the token is more likely than any other.
    """

    logprobs: Array
    logsumexp: Array
    entropy: Array
    hits: Array


def token_figures(logits: Array, tokens: Array, temperature: float, with_entropy: bool) -> TokenFigures:
    """The figures of given tokens from logits in one piece; `core.vocabulary` has them without such a piece.

    Args:
        logits: [B, T, V]; `logits[:, t]` is the distribution of `tokens[:, t]`.
        tokens: [B, T] int32.
        temperature: see `token_logprobs`.
        with_entropy: False leaves `entropy` 0.
    """
    scaled = _tempered(logits, temperature)
    chosen = jnp.take_along_axis(scaled, tokens[..., None], axis=-1)[..., 0]
    total = jax.nn.logsumexp(scaled, axis=-1)
    spread = entropy(logits, temperature) if with_entropy else jnp.zeros_like(total)
    target = jnp.arange(logits.shape[-1], dtype=tokens.dtype)[None, None, :] == tokens[..., None]
    others = jnp.max(jax.lax.stop_gradient(scaled), axis=-1, initial=-jnp.inf, where=~target)
    return TokenFigures(chosen - total, total, spread, jax.lax.stop_gradient(chosen) > others)


def shifted(x: Array) -> Array:
    """What stands one place further in each row of [B, T]; zero or False at the end."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def target_sums(figures: TokenFigures, targets: Array) -> LossTerms:
    """Next-token cross-entropy, -log p(token t | tokens before t), over the places that `targets` selects.

    Args:
        figures: [B, T], at each place those of the next token (see `shifted`). The tokens are shifted and not the
            hidden states or logits, which are larger.
        targets: [B, T] bool, shifted likewise: at which places the next token is a target.

    Returns:
        Sum of losses in nats, number of targets, and the metric `accuracy` (no token is as likely as the target).
    """
    total, number = masked_sum(-figures.logprobs, targets), count(targets)
    return total, (number, {"accuracy": (masked_sum(figures.hits, targets), number)})


def cross_entropy_sums(logits: Array, tokens: Array, mask: Array) -> LossTerms:
    """`target_sums` from logits in one piece.

    Args:
        logits: [B, T, V], the model's output at the same places as `tokens`.
        tokens: [B, T] int32.
        mask: [B, T] bool over tokens: which of them are targets. Place 0 is never one.
    """
    return target_sums(token_figures(logits, shifted(tokens), 1.0, with_entropy=False), shifted(mask))


def pairwise_ranking_loss(chosen: Array, rejected: Array, margin: float) -> Array:
    """-log sigmoid(chosen - rejected - margin), finite at any difference.

    Source: Ouyang et al. 2022, eq. 1 (one pair per query, as in Kim et al. 2023); the margin is Touvron et al. 2023
    (Llama 2), eq. 2.

    Args:
        chosen, rejected: [B] scores.
        margin: 0 is the paper's loss.

    Returns:
        [B] float32.
    """
    return jax.nn.softplus(rejected.astype(jnp.float32) - chosen.astype(jnp.float32) + margin)


def centering_penalty(chosen: Array, rejected: Array) -> Array:
    """(chosen + rejected)^2, which pulls scores towards mean 0 (Eisenstein et al. 2023, eq. 2): [B] -> [B] float32."""
    return jnp.square(chosen.astype(jnp.float32) + rejected.astype(jnp.float32))


def pairwise_accuracy(chosen: Array, rejected: Array) -> Array:
    """1 where chosen scores higher, 0.5 at a tie (a constant scorer gets chance), else 0: [B] -> [B] float32."""
    difference = chosen.astype(jnp.float32) - rejected.astype(jnp.float32)
    return 0.5 + 0.5 * jnp.sign(difference)


def pairwise_sums(
    chosen: Array, rejected: Array, margin: float, centering: float, present: Array | None = None
) -> LossTerms:
    """The reward model's loss over a batch of pairs: ranking loss + centering x centering penalty.

    Args:
        chosen, rejected: [B] scores, or of any other shape.
        margin: see `pairwise_ranking_loss`.
        centering: weight of `centering_penalty`; 0 is the paper's loss.
        present: bool of that shape, where there is a pair; None: everywhere.

    Returns:
        Sum of losses, number of pairs, and the metrics `accuracy`, `margin` (chosen - rejected) and `score` (mean of
        both).
    """
    chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
    loss = pairwise_ranking_loss(chosen, rejected, margin) + centering * centering_penalty(chosen, rejected)
    metrics = {
        "accuracy": pairwise_accuracy(chosen, rejected),
        "margin": chosen - rejected,
        "score": 0.5 * (chosen + rejected),
    }
    return pair_terms(loss, metrics, present)


def pair_terms(loss: Array, metrics: dict[str, Array], present: Array | None) -> LossTerms:
    """Sums over pairs of a loss and of metrics, all of one shape, and the number of pairs.

    Args:
        loss, metrics: float32, a value for each pair.
        present: bool of that shape, where there is a pair; None: everywhere.
    """
    pairs = jnp.float32(loss.size) if present is None else count(present)
    total = jnp.sum if present is None else functools.partial(jnp.sum, where=present)
    return total(loss), (pairs, {name: (total(values), pairs) for name, values in metrics.items()})


def _tempered(logits: Array, temperature: float) -> Array:
    return logits.astype(jnp.float32) / (temperature if temperature > 0 else 1.0)
