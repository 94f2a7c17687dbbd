"""Merge the positions of a chunk into one distribution."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment, next_token_chunks

MERGES = ("mean", "mean_normalized", "first", "last")


def positions_per_chunk(position_chunks: jax.Array, count: int) -> jax.Array:
    """int32 [B, C]: how many positions predict a token of each chunk."""
    return _sum_by_chunk(jnp.ones((*position_chunks.shape, 1), jnp.int32), position_chunks, count)[..., 0]


def valid_chunks(alignment: Alignment) -> jax.Array:
    """bool [B, C]: chunks that count, with a position on both sides after the next-token shift."""
    count = alignment.valid.shape[1]
    sides = (alignment.student_chunks, alignment.teacher_chunks)
    student, teacher = (positions_per_chunk(next_token_chunks(jnp.asarray(c)), count) > 0 for c in sides)
    return jnp.asarray(alignment.valid) & student & teacher


def mean_by_chunk(values: jax.Array, chunks: jax.Array, count: int) -> jax.Array:
    """Mean of `values` over the positions that predict a token of each chunk.

    Args:
        values: float [B, T, V].
        chunks: int32 [B, T] by token, -1 for none.
        count: C.

    Returns:
        float [B, C, V]; 0 for a chunk without positions.
    """
    position_chunks = next_token_chunks(chunks)
    number = positions_per_chunk(position_chunks, count)[..., None]
    return _sum_by_chunk(values, position_chunks, count) / jnp.maximum(number, 1).astype(values.dtype)


def _sum_by_chunk(values: jax.Array, position_chunks: jax.Array, count: int) -> jax.Array:
    batch, _, width = values.shape
    segment = _segments(position_chunks, count)
    total = jax.ops.segment_sum(values.reshape(-1, width), segment, batch * count + 1)
    return total[: batch * count].reshape(batch, count, width)


def _segments(position_chunks: jax.Array, count: int) -> jax.Array:
    """int32 [B * T]: one numbering of chunks for the whole batch; B * C for positions without a chunk."""
    batch = position_chunks.shape[0]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    inside = (position_chunks >= 0) & (position_chunks < count)
    return jnp.where(inside, rows * count + position_chunks, batch * count).reshape(-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Merging:
    """How N positions make K chunks.

    Attributes:
        segments: int32 [N], the chunk of each position, K for none.
        weights: float32 [N], its share in the chunk: 1/n of n positions under "mean"; 1 for the
            chosen position and 0 for the others under "first" and "last".
        count: K.
    """

    segments: jax.Array
    weights: jax.Array
    count: int = field(metadata={"static": True})

    @classmethod
    def of(cls, chunks: jax.Array, count: int, merge: str) -> Merging:
        """From chunk ids int32 [B, T] by token: N = B T, K = B C, after the next-token shift."""
        return cls.of_segments(_segments(next_token_chunks(jnp.asarray(chunks)), count), len(chunks) * count, merge)

    @classmethod
    def of_segments(cls, segments: jax.Array, count: int, merge: str) -> Merging:
        """From the chunk of each position, int32 [N]."""
        if merge in ("mean", "mean_normalized"):
            number = jax.ops.segment_sum(jnp.ones(segments.shape, jnp.float32), segments, count + 1)
            weights = 1 / number[segments]
        else:
            places = jnp.arange(len(segments), dtype=jnp.int32)
            choose = jax.ops.segment_min if merge == "first" else jax.ops.segment_max
            weights = (choose(places, segments, count + 1)[segments] == places).astype(jnp.float32)
        return cls(segments, jnp.where(segments < count, weights, 0.0), count)

    def merge(self, values: jax.Array) -> jax.Array:
        """float [N, n] -> [K, n], weighted; 0 for a chunk without positions."""
        # A position of no weight may hold -inf, which 0 times would make NaN.
        shares = jnp.where(self.weights[:, None] > 0, self.weights[:, None] * values, 0.0)
        return jax.ops.segment_sum(shares, self.segments, self.count + 1)[: self.count]

    def spread(self, values: jax.Array) -> jax.Array:
        """[K, n] -> [N, n]: the transpose of `merge`."""
        return self.weights[:, None] * values.at[self.segments].get(mode="fill", fill_value=0.0)

    def other_tokens(self, log_probabilities: jax.Array) -> jax.Array:
        """float [N], of each position's actual token, -> [K]: the sum over the positions not chosen."""
        rest = jnp.where(self.weights > 0, 0.0, log_probabilities)
        return jax.ops.segment_sum(rest, self.segments, self.count + 1)[: self.count]

    def spread_other(self, values: jax.Array) -> jax.Array:
        """[K] -> [N]: the transpose of `other_tokens`."""
        return jnp.where(self.weights > 0, 0.0, values.at[self.segments].get(mode="fill", fill_value=0.0))


def next_tokens(ids: jax.Array) -> jax.Array:
    """int32 [B * T]: the token that each position of [B, T] predicts; the last of a row, its first."""
    return jnp.roll(jnp.asarray(ids), -1, axis=1).reshape(-1)
