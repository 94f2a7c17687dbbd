"""Logits made ready for softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
    return logits - jnp.where(highest > -jnp.inf, highest, 0.0)
