"""Log-probabilities of the tokens that come, over a split vocabulary."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from xtoken_jax.losses.math.chunks import next_tokens
from xtoken_jax.losses.vocab_parallel.shards import Layout, scaled


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def next_token_log_softmax(layout: Layout, size: int, logits: jax.Array, ids: jax.Array) -> jax.Array:
    """float32 [B, T]: `actual_log_softmax` of logits [B, T, V] cut to `size`, at ids int32 [B, T] shifted."""
    return _forward(layout, size, logits, ids)[0]


def _forward(layout: Layout, size: int, logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple]:
    def local(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        z, coming = _rows(layout, size, logits, ids)
        own = layout.at(z, next_tokens(ids))
        others = layout.log_normalizer(jnp.where(coming, -jnp.inf, z))
        return -jax.nn.softplus(others - own).reshape(ids.shape), own, others

    by_row = layout.by_row
    values, own, others = layout.run(local, (layout.of_logits, by_row), (by_row,) * 3)(logits, ids)
    return values, (logits, ids, own, others)


def _backward(layout: Layout, size: int, residuals: tuple, gradient: jax.Array) -> tuple:
    def local(
        logits: jax.Array, ids: jax.Array, own: jax.Array, others: jax.Array, gradient: jax.Array
    ) -> jax.Array:
        z, coming = _rows(layout, size, logits, ids)
        by_own = jax.nn.sigmoid(others - own)[:, None]
        slope = jnp.where(coming, by_own, -jnp.exp(z - jnp.logaddexp(others, own)[:, None]))
        return scaled(slope, gradient.reshape(-1, 1)).reshape(logits.shape).astype(logits.dtype)

    inputs = (layout.of_logits, *(layout.by_row,) * 4)
    return layout.run(local, inputs, layout.of_logits)(*residuals, gradient), None


def _rows(layout: Layout, size: int, logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Centred logits [N, v] of a device, and which of them are those of the tokens that come."""
    z = layout.centred(layout.flat(logits, size))
    places = layout.places(next_tokens(ids), z.shape[-1])[:, None]
    return z, jnp.arange(z.shape[-1], dtype=jnp.int32)[None, :] == places


next_token_log_softmax.defvjp(_forward, _backward)
