"""Softmax of wide rows: logits made ready for it, log-probabilities of whole chunks, and of single tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xtoken_jax.losses.math.chunks import Merging


def flat_logits(logits: jax.Array, size: int | None, counted: jax.Array | None = None) -> jax.Array:
    """float32 [B T, size] of [B, T, >= size]: positions in one row, without columns past the tokenizer's.

    Args:
        logits: float [B, T, >= size].
        size: V of the tokenizer; None: all columns.
        counted: bool [B, T]; the other positions get a gradient of 0, see `gradient_at`. None: all.
    """
    logits = jnp.asarray(logits[..., :size], jnp.float32)
    if counted is not None:
        logits = gradient_at(logits, counted)
    return logits.reshape(-1, logits.shape[-1])


@jax.custom_jvp
def gradient_at(logits: jax.Array, counted: jax.Array) -> jax.Array:
    """The same logits, whose gradient is 0 outside the counted positions, also where they are NaN.

    A position outside every chunk takes no part in a loss, but its gradient is 0 times the slope of a
    softmax, which is NaN if its logits are not finite.

    Args:
        logits: float [..., V].
        counted: bool [...].
    """
    return logits


@gradient_at.defjvp
def _gradient_at_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    logits, counted = primals
    return logits, jnp.where(counted[..., None], tangents[0], 0.0)


def not_finite(logits: jax.Array) -> jax.Array:
    """bool [...]: rows of logits [..., V] with a NaN or +inf; -inf excludes a token and is allowed."""
    return ~(logits.max(axis=-1) < jnp.inf)


def log_softmax_within(logits: jax.Array) -> jax.Array:
    """log_softmax of some of the columns; a row of -inf alone stays one, it has no mass there."""
    logits = centred(logits)
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return logits - jnp.where(normalizer == -jnp.inf, 0.0, normalizer)


def soft_capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    """Logits that a model keeps within a bound: c tanh(logits / c), of the shape and dtype that came.

    Args:
        logits: float [..., V], hidden @ unembedding^T.
        softcap: c > 0; None leaves them as they are.

    Source: Gemma 2 (arXiv 2408.00118), section 2.
    """
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def centred(logits: jax.Array, highest: jax.Array | None = None) -> jax.Array:
    """Logits less the highest of their row: the same softmax and the same gradient.

    What the losses keep of a softmax is its log-normalizer, and logits - log-normalizer loses digits
    where the logits share a large offset.

    Args:
        logits: float [..., V].
        highest: float [...], of the whole vocabulary, where `logits` are a part of it.

    Returns:
        float [..., V]; a row of -inf stays as it is.
    """
    highest = logits.max(axis=-1) if highest is None else highest
    highest = jax.lax.stop_gradient(highest)[..., None]
    return logits - jnp.where(highest == -jnp.inf, 0.0, highest)


def merged_log_softmax(logits: jax.Array, next_ids: jax.Array | None, merging: Merging) -> jax.Array:
    """Log-probabilities of chunks: log_softmax of each position, merged.

    Args:
        logits: float32 [N, V], divided by the temperature.
        next_ids: int32 [N], the token that each position predicts, for "first" and "last"; the
            log-probabilities of the tokens at the positions not chosen are added. None for "mean".
        merging: of the N positions into K chunks.

    Returns:
        float32 [K, V]; 0 for a chunk without positions.
    """
    return _merged(centred(logits), next_ids, merging)


@jax.custom_vjp
def _merged(logits: jax.Array, next_ids: jax.Array | None, merging: Merging) -> jax.Array:
    return _forward(logits, next_ids, merging)[0]


def _forward(logits: jax.Array, next_ids: jax.Array | None, merging: Merging) -> tuple[jax.Array, tuple]:
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    offset = merging.merge(normalizer[:, None])
    if next_ids is not None:
        actual = jnp.take_along_axis(logits, next_ids[:, None], axis=-1)[:, 0] - normalizer
        offset = offset - merging.other_tokens(actual)[:, None]
    return merging.merge_wide(logits) - offset, (logits, next_ids, merging, normalizer)


def _backward(residuals: tuple, slope: jax.Array) -> tuple:
    logits, next_ids, merging, normalizer = residuals
    total = slope.sum(-1)
    softmax = jnp.exp(logits - normalizer[:, None])
    share = merging.spread(total[:, None])
    if next_ids is None:
        return merging.spread(slope) - softmax * share, None, None
    others = merging.spread_other(total)
    gradient = merging.spread(slope) - softmax * (share + others[:, None])
    positions = jnp.arange(len(logits), dtype=jnp.int32)
    return gradient.at[positions, next_ids].add(others), None, None


_merged.defvjp(_forward, _backward)


def actual_log_softmax(logits: jax.Array, next_ids: jax.Array) -> jax.Array:
    """float32 [N] of logits [N, V] and next_ids int32 [N]: log_softmax at the token that comes.

    Exact, with its gradient, also for a token that is all but certain: -log(1 + exp(x)) of x = logsumexp
    of the other tokens less the token's own logit, where log_softmax rounds what is below 1e-7 to 0.
    """
    return _actual(centred(logits), next_ids)


@jax.custom_vjp
def _actual(logits: jax.Array, next_ids: jax.Array) -> jax.Array:
    return _actual_forward(logits, next_ids)[0]


def _actual_forward(logits: jax.Array, next_ids: jax.Array) -> tuple[jax.Array, tuple]:
    own = jnp.take_along_axis(logits, next_ids[:, None], axis=-1)[:, 0]
    others = jax.nn.logsumexp(jnp.where(_is_next(logits, next_ids), -jnp.inf, logits), axis=-1)
    return -jax.nn.softplus(others - own), (logits, next_ids, own, others)


def _actual_backward(residuals: tuple, slope: jax.Array) -> tuple:
    logits, next_ids, own, others = residuals
    normalizer = jnp.logaddexp(others, own)[:, None]
    by_own = jax.nn.sigmoid(others - own)[:, None]  # 1 - p, not rounded
    by_logits = jnp.where(_is_next(logits, next_ids), by_own, -jnp.exp(logits - normalizer))
    slope = slope[:, None]
    return jnp.where(slope != 0, slope * by_logits, 0.0), None


def _is_next(logits: jax.Array, next_ids: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(next_ids.dtype, logits.shape, 1) == next_ids[:, None]


_actual.defvjp(_actual_forward, _actual_backward)
