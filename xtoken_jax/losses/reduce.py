"""From values per chunk or position to one number, over the global batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """sum(values[mask]) / count(mask), 0 if nothing counts.

    Under `jax.jit` over sharded arrays the sum and the count are those of the global batch,
    so the result does not depend on how many devices share it.

    Args:
        values: float [...]; what is masked may be anything, NaN included.
        mask: bool [...].

    Returns:
        float32 scalar.
    """
    total = jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
