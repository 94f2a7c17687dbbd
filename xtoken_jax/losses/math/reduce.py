"""From values per chunk or position to one number, over the global batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.losses.checks import check_array, check_count


def masked_mean(values: jax.Array, mask: jax.Array, count: jax.Array | float | None = None) -> jax.Array:
    """sum(values[mask]) / count, 0 if nothing counts.

    Under `jax.jit` over sharded arrays the sum and the count are those of the global batch,
    so the result does not depend on how many devices share it. With the count of all micro-batches
    given, their results and gradients add up to those of the whole batch.

    Args:
        values: float [...]; what is masked may be anything, NaN included.
        mask: bool [...].
        count: scalar, how many values count in the global batch. None: as many as in `mask`.

    Returns:
        float32 scalar.

    Example:
        >>> values, mask = jnp.array([1.0, 5.0, 9.0]), jnp.array([True, True, False])
        >>> halves = (values[:1], mask[:1]), (values[1:], mask[1:])
        >>> float(masked_mean(values, mask)), float(sum(masked_mean(*half, count=2) for half in halves))
        (3.0, 3.0)
    """
    check_array("mask", mask, "bool", *np.shape(values))
    check_count("count", count)
    total = jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32)
    if count is None:
        count = jnp.sum(mask, dtype=jnp.float32)
    return total / jnp.maximum(jnp.asarray(count, jnp.float32), 1.0)
