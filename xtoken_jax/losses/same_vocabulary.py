"""Losses over one vocabulary: next-token cross-entropy."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def next_token_cross_entropy(
    logits: jax.Array, token_ids: jax.Array, token_mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(z_p)[x_{p+1}] of every position p that has a next token.

    Args:
        logits: float [B, T, V].
        token_ids: int32 [B, T].
        token_mask: bool [B, T], tokens that count as labels.

    Returns:
        values float32 [B, T - 1] in nats, and the bool [B, T - 1] mask of those that count.
    """
    logits = jnp.asarray(logits[:, :-1], jnp.float32)
    labels = token_ids[:, 1:, None]
    chosen = jnp.take_along_axis(logits, labels, axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.asarray(token_mask[:, 1:], bool)
