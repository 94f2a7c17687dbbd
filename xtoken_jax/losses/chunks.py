"""Merge the positions of a chunk into one distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment, next_token_chunks


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
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    # One list of segments for the whole batch; the last collects positions without a chunk.
    inside = (position_chunks >= 0) & (position_chunks < count)
    segment = jnp.where(inside, rows * count + position_chunks, batch * count)
    total = jax.ops.segment_sum(values.reshape(-1, width), segment.reshape(-1), batch * count + 1)
    return total[: batch * count].reshape(batch, count, width)
