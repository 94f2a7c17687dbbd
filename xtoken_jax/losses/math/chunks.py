"""Merge the positions of a chunk into one distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.alignment.batch import Alignment, next_token_chunks
from xtoken_jax.losses.checks import check_alignment

MERGES = ("mean", "mean_normalized", "first", "last")


def valid_chunks(alignment: Alignment) -> jax.Array:
    """bool [B, C]: chunks that count, with a position on both sides after the next-token shift.

    Example:
        >>> student, teacher = jnp.array([[0, 1, 2]]), jnp.array([[0, 1, 1]])
        >>> print(valid_chunks(Alignment(student, teacher, jnp.ones((1, 3), bool))))
        [[False  True False]]

        Nothing predicts the first token, and chunk 2 has no token of the teacher.
    """
    check_alignment(alignment)
    count = alignment.valid.shape[1]
    found = jnp.asarray(alignment.valid)
    for chunks in (alignment.student_chunks, alignment.teacher_chunks):
        segments = _segments(chunks, count)
        number = _by_row(jax.ops.segment_sum, jnp.ones(segments.shape, jnp.int32), segments, count)
        found = found & (number[:, :count] > 0)
    return found


def counted_positions(alignment: Alignment) -> tuple[jax.Array, jax.Array]:
    """bool [B, T_s] and [B, T_t]: positions that predict a token of a chunk that counts.

    What the logits of the other positions are never matters, not even if they are NaN.
    """
    valid = jnp.pad(valid_chunks(alignment), ((0, 0), (0, 1)))
    count = alignment.valid.shape[1]
    student, teacher = (
        jnp.take_along_axis(valid, _segments(chunks, count), axis=1)
        for chunks in (alignment.student_chunks, alignment.teacher_chunks)
    )
    return student, teacher


def chunks_of_positions(flags: jax.Array, chunks: jax.Array | np.ndarray, count: int) -> jax.Array:
    """bool [B, C]: chunks with a flagged position, from flags by position, bool [B T]."""
    segments = _segments(chunks, count)
    flags = flags.reshape(segments.shape).astype(jnp.int32)
    return _by_row(jax.ops.segment_max, flags, segments, count)[:, :count] > 0


def single_positions(alignment: Alignment) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The chunks that count and have one position on each side.

    Returns:
        int32 [B, C] twice, the position of student and teacher in the flattened batch, and bool [B, C], where
        those hold.
    """
    count = alignment.valid.shape[1]
    single = jnp.asarray(alignment.valid)
    positions = []
    for chunks in (alignment.student_chunks, alignment.teacher_chunks):
        segments = _segments(chunks, count)
        number = _by_row(jax.ops.segment_sum, jnp.ones(segments.shape, jnp.int32), segments, count)
        single = single & (number[:, :count] == 1)
        places = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1)
        first = _by_row(jax.ops.segment_min, places, segments, count)[:, :count]
        rows = jax.lax.broadcasted_iota(jnp.int32, first.shape, 0)
        positions.append(jnp.where(number[:, :count] == 1, first + rows * segments.shape[1], 0))
    return positions[0], positions[1], single


def _segments(chunks: jax.Array | np.ndarray, count: int) -> jax.Array:
    """int32 [B, T]: the chunk of the token that each position predicts, `count` for none."""
    position_chunks = next_token_chunks(jnp.asarray(chunks))
    return jnp.where((position_chunks >= 0) & (position_chunks < count), position_chunks, count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Merging:
    """How the positions of B rows make C chunks each.

    Attributes:
        segments: int32 [B, T], the chunk of each position in its row, C for none.
        weights: float32 [B, T], its share in the chunk: 1/n of n positions under "mean"; 1 for the
            chosen position and 0 for the others under "first" and "last"; 1 under "sum".
        count: C.

    Example:
        >>> ids = jnp.array([[-1, 0, 0, 1]])  # positions 0 and 1 predict chunk 0, position 2 chunk 1
        >>> values = jnp.array([[1.0], [3.0], [5.0], [7.0]])
        >>> [Merging.of(ids, 2, merge).merge(values).ravel().tolist() for merge in ("mean", "first", "last")]
        [[2.0, 5.0], [1.0, 5.0], [3.0, 5.0]]
    """

    segments: jax.Array
    weights: jax.Array
    count: int = field(metadata={"static": True})

    @classmethod
    def of(cls, chunks: jax.Array | np.ndarray, count: int, merge: str) -> Merging:
        """From chunk ids int32 [B, T] by token, after the next-token shift."""
        segments = _segments(chunks, count)
        if merge in ("mean", "mean_normalized"):
            number = _by_row(jax.ops.segment_sum, jnp.ones(segments.shape, jnp.float32), segments, count)
            weights = 1 / jnp.take_along_axis(number, segments, axis=1)
        elif merge == "sum":
            weights = jnp.ones(segments.shape, jnp.float32)
        else:
            places = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1)
            choose = jax.ops.segment_min if merge == "first" else jax.ops.segment_max
            chosen = _by_row(choose, places, segments, count)
            weights = (jnp.take_along_axis(chosen, segments, axis=1) == places).astype(jnp.float32)
        return cls(segments, jnp.where(segments < count, weights, 0.0), count)

    def merge(self, values: jax.Array) -> jax.Array:
        """float [B T, n] -> [B C, n], weighted; 0 for a chunk without positions."""
        values = values.reshape(*self.segments.shape, values.shape[-1])
        # A position of no weight may hold -inf, which 0 times would make NaN.
        weights = self.weights[..., None]
        shares = jnp.where(weights > 0, weights * values, 0.0)
        merged = _by_row(jax.ops.segment_sum, shares, self.segments, self.count)[:, : self.count]
        return merged.reshape(-1, values.shape[-1])

    def merge_wide(self, values: jax.Array) -> jax.Array:
        """`merge` for wide rows, without a derivative of its own."""
        # XLA's CPU backend is slow to add one row to another by a scatter, and most chunks have one
        # position: those rows are copied at once, the few others added one by one.
        return jax.lax.platform_dependent(values, self, cpu=_merge_rows, default=lambda x, m: m.merge(x))

    def spread(self, values: jax.Array) -> jax.Array:
        """[B C, n] -> [B T, n]: the transpose of `merge`."""
        values = values.reshape(len(self.segments), self.count, values.shape[-1])
        spread = jax.vmap(lambda v, s: v.at[s].get(mode="fill", fill_value=0.0))(values, self.segments)
        return (self.weights[..., None] * spread).reshape(-1, values.shape[-1])

    def other_tokens(self, log_probabilities: jax.Array) -> jax.Array:
        """float [B T], of each position's actual token, -> [B C]: the sum over the positions not chosen."""
        rest = jnp.where(self.weights > 0, 0.0, log_probabilities.reshape(self.weights.shape))
        return _by_row(jax.ops.segment_sum, rest, self.segments, self.count)[:, : self.count].reshape(-1)

    def spread_other(self, values: jax.Array) -> jax.Array:
        """[B C] -> [B T]: the transpose of `other_tokens`."""
        values = jnp.pad(values.reshape(-1, self.count), ((0, 0), (0, 1)))
        spread = jnp.take_along_axis(values, self.segments, axis=1)
        return jnp.where(self.weights > 0, 0.0, spread).reshape(-1)


def _by_row(
    reduce: Callable[..., jax.Array], values: jax.Array, segments: jax.Array, count: int
) -> jax.Array:
    """[B, count + 1, ...]: row by row, so that rows split over devices stay where they are."""
    return jax.vmap(lambda v, s: reduce(v, s, count + 1))(values, segments)


def _merge_rows(values: jax.Array, merging: Merging) -> jax.Array:
    rows, count = len(merging.segments), len(merging.segments) * merging.count
    first_chunk = merging.count * jnp.arange(rows, dtype=jnp.int32)[:, None]
    segments = jnp.where(merging.segments < merging.count, first_chunk + merging.segments, count).reshape(-1)
    weights = merging.weights.reshape(-1)
    places = jnp.arange(len(segments), dtype=jnp.int32)
    # The first position with a share in each chunk; N where there is none.
    sharing = jnp.where(weights > 0, segments, count)
    first = jax.ops.segment_min(places, sharing, count + 1)[:count]
    shares = weights.at[first].get(mode="fill", fill_value=0.0)[:, None]
    merged = jnp.where(shares > 0, shares * values.at[first].get(mode="clip"), 0.0)
    more = (sharing < count) & (first.at[sharing].get(mode="clip") != places)
    order = jnp.nonzero(more, size=len(places), fill_value=0)[0]

    def add(i: jax.Array, merged: jax.Array) -> jax.Array:
        place = order[i]
        row = jax.lax.dynamic_slice_in_dim(merged, segments[place], 1)
        row = row + weights[place] * jax.lax.dynamic_slice_in_dim(values, place, 1)
        return jax.lax.dynamic_update_slice_in_dim(merged, row, segments[place], 0)

    return jax.lax.fori_loop(0, more.sum(), add, merged)


def next_tokens(ids: jax.Array) -> jax.Array:
    """int32 [B * T]: the token that each position of [B, T] predicts; the last of a row, its first."""
    return jnp.roll(jnp.asarray(ids), -1, axis=1).reshape(-1)
