"""The next token from its logits: the likeliest, or drawn, from all or from the nucleus.

Shape letters: B row of a batch, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class Sampling(NamedTuple):
    """What is compiled in; hashable.

    Attributes:
        size: ids from here on are never chosen.
        drawn: by chance, not the likeliest.
        cut: to the nucleus.
    """

    size: int
    drawn: bool
    cut: bool


class Random(NamedTuple):
    """What chance needs: a key, and the scalars temperature and top_p, float32 above 0."""

    key: jax.Array
    temperature: jax.Array
    top_p: jax.Array


def choose(
    scores: jax.Array, place: jax.Array, number: jax.Array, random: Random, sampling: Sampling
) -> jax.Array:
    """A token for each row.

    Args:
        scores: logits float32 [B, V].
        place, number: int32 [B]; rows of the same two draw with the same random numbers.
        random: not read where nothing is drawn.
        sampling: how.

    Returns:
        int32 [B].
    """
    scores = jnp.where(jnp.arange(scores.shape[-1])[None, :] < sampling.size, scores, -jnp.inf)
    if not sampling.drawn:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    # the largest becomes 0 before the division, which a low temperature makes large
    scores = (scores - jnp.max(scores, axis=-1, keepdims=True)) / random.temperature
    if sampling.cut:
        scores = nucleus(scores, random.top_p)

    def draw(place: jax.Array, number: jax.Array, scores: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(random.key, place), number)
        return jax.random.categorical(key, scores)

    return jax.vmap(draw)(place, number, scores).astype(jnp.int32)


def nucleus(scores: jax.Array, top_p: ArrayLike) -> jax.Array:
    """Scores with -inf outside the smallest set of likeliest tokens that has probability `top_p`.

    Args:
        scores: [B, V] float32, logits at the temperature that is sampled at; -inf for excluded tokens.
        top_p: above 0. Tokens as likely as the last one that is needed stay too.

    Returns:
        [B, V] float32.
    """
    falling = -jnp.sort(-scores, axis=-1)
    shares = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    # the likeliest token is needed even where float32 has no number as small as top_p
    needed = (before < top_p).at[:, 0].set(True)
    last = jnp.min(jnp.where(needed, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores >= last, scores, -jnp.inf)
