"""Which positions a block takes, and products with an unembedding that never hold its float32 copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.math.chunks import Merging, valid_chunks

_SLICE = 2**24  # entries of a slice of an unembedding: 64 MiB of float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Side:
    """The positions of one side, N = B T of them, in the order of their chunks.

    Attributes:
        order: int32 [N], places in the flattened batch: first those that predict a token of a chunk
            that counts, row by row and chunk by chunk; then the other wanted ones; then the rest.
        chunks: int32 [N], the number of each ordered position's chunk, chunks that count numbered
            from 0; B C for none.
        weights: float32 [N], its share in the chunk (`Merging`).
        ends: int32 [B C], one past the last ordered position of each numbered chunk.
        wanted: int32 scalar, how many positions are wanted at all.
    """

    order: jax.Array
    chunks: jax.Array
    weights: jax.Array
    ends: jax.Array
    wanted: jax.Array

    @classmethod
    def of(cls, chunks: jax.Array, counted: jax.Array, also: jax.Array | None, merge: str) -> Side:
        """From chunk ids int32 [B, T] by token, `counted` [B, C] chunks and other wanted positions."""
        rows, count = counted.shape
        total = rows * count
        merging = Merging.of(chunks, count, merge)
        first = count * jnp.arange(rows, dtype=jnp.int32)[:, None]
        place = jnp.where(merging.segments < count, first + merging.segments, total).reshape(-1)
        number = jnp.cumsum(counted.reshape(-1), dtype=jnp.int32) - 1
        number = jnp.where(counted.reshape(-1), number, total).at[place].get(mode="fill", fill_value=total)
        key = number if also is None else number + ((number == total) & ~also.reshape(-1))
        order = jnp.argsort(key, stable=True).astype(jnp.int32)
        chunks = number[order]
        sizes = jax.ops.segment_sum(jnp.ones_like(number), number, total + 1)[:total]
        ends = jnp.cumsum(sizes, dtype=jnp.int32)
        # Positions keep their order within a chunk, and with it their shares.
        weights = jnp.where(chunks < total, merging.weights.reshape(-1)[order], 0.0)
        wanted = jnp.sum(key <= total if also is not None else key < total, dtype=jnp.int32)
        return cls(order, chunks, weights, ends, wanted)

    def begin(self, chunk: jax.Array) -> jax.Array:
        """The first ordered position of a numbered chunk."""
        return jnp.where(chunk > 0, self.ends[chunk - 1], 0)

    def last(self, chunk: jax.Array, size: int) -> jax.Array:
        """One past the last chunk that ends within `size` positions from where `chunk` begins."""
        return jnp.searchsorted(self.ends, self.begin(chunk) + size, side="right").astype(jnp.int32)

    def block(self, begin: jax.Array, end: jax.Array, size: int, chunk: jax.Array, count: int) -> Block:
        """`size` positions from `begin`, those from `end` on left empty; local chunks from `chunk` on."""
        places = begin + jnp.arange(size, dtype=jnp.int32)
        inside = places < end
        where = jnp.where(inside, self.order.at[places].get(mode="clip"), len(self.order))
        local = self.chunks.at[places].get(mode="clip") - chunk
        local = jnp.where(inside & (local < count), local, count)
        weights = jnp.where(local < count, self.weights.at[places].get(mode="clip"), 0.0)
        return Block(where, inside, Merging(local[None], weights[None], count))


class Block(NamedTuple):
    """Positions of one block: int32 [n] in the flattened batch (N where empty), bool [n], how they merge."""

    positions: jax.Array
    inside: jax.Array
    merging: Merging


class Groups(NamedTuple):
    """Both sides of a batch, cut into whole chunks.

    Attributes:
        student, teacher: as ordered.
        number: int32 scalar, chunks that count.
    """

    student: Side
    teacher: Side
    number: jax.Array

    @classmethod
    def of(
        cls, alignment: Alignment, labelled: jax.Array | None, student_merge: str, teacher_merge: str
    ) -> Groups:
        """`labelled`: bool [B, T_s], positions that cross-entropy wants too."""
        counted = valid_chunks(alignment)
        student = Side.of(jnp.asarray(alignment.student_chunks), counted, labelled, student_merge)
        teacher = Side.of(jnp.asarray(alignment.teacher_chunks), counted, None, teacher_merge)
        return cls(student, teacher, jnp.sum(counted, dtype=jnp.int32))


def logits_of(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
    """float32 [n, V] of hidden [n, D] and unembedding [V, D]."""
    if hidden.dtype == jnp.float32:
        return _product(hidden, unembedding, 1, 1)
    # XLA's CPU backend multiplies in float32, and would convert all of the unembedding first.
    return jax.lax.platform_dependent(
        hidden, unembedding, cpu=_logits_by_slices, default=lambda h, u: _product(h, u, 1, 1)
    )


def _logits_by_slices(hidden: jax.Array, unembedding: jax.Array) -> jax.Array:
    def add(logits: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
        rows = _rows(unembedding, start, size, hidden)
        return jax.lax.dynamic_update_slice_in_dim(logits, _product(hidden, rows, 1, 1), start, 1)

    return _by_slices(add, jnp.zeros((len(hidden), len(unembedding)), jnp.float32), unembedding.shape)


def pull_to_hidden(slope: jax.Array, unembedding: jax.Array) -> jax.Array:
    """float32 [n, D]: slope [n, V] times unembedding [V, D]."""
    if unembedding.dtype == jnp.float32:
        return _product(slope, unembedding, 1, 0)

    # The slope stays in float32, so each slice of the unembedding is converted on its own.
    def add(total: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
        rows = _rows(unembedding, start, size, slope)
        return total + _product(jax.lax.dynamic_slice_in_dim(slope, start, size, 1), rows, 1, 0)

    return _by_slices(add, jnp.zeros((len(slope), unembedding.shape[1]), jnp.float32), unembedding.shape)


def add_outer(total: jax.Array, slope: jax.Array, hidden: jax.Array) -> jax.Array:
    """total [V, D] + slope^T [V, n] hidden [n, D], in float32; a slice at a time, to be done in place."""

    def add(total: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
        product = _product(jax.lax.dynamic_slice_in_dim(slope, start, size, 1), hidden, 0, 0)
        rows = jax.lax.dynamic_slice_in_dim(total, start, size) + product
        return jax.lax.dynamic_update_slice_in_dim(total, rows, start, 0)

    return _by_slices(add, total, total.shape)


def _by_slices(
    add: Callable[[jax.Array, jax.Array | int, int], jax.Array], total: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """total after `add(total, start, size)` for every run of the V rows of [V, D]."""
    rows, size = shape[0], max(1, min(shape[0], _SLICE // shape[1]))
    total = jax.lax.fori_loop(0, rows // size, lambda i, t: add(t, i * size, size), total)
    return add(total, rows // size * size, rows % size) if rows % size else total


def rows_at(matrix: jax.Array, places: jax.Array) -> jax.Array:
    """matrix[places], rows of 0 for places past the end."""

    def take(matrix: jax.Array) -> jax.Array:
        return matrix.at[places].get(mode="fill", fill_value=0)

    if matrix.dtype != jnp.bfloat16:
        return take(matrix)

    def bits(matrix: jax.Array) -> jax.Array:  # as in `_rows`
        return jax.lax.bitcast_convert_type(
            take(jax.lax.bitcast_convert_type(matrix, jnp.uint16)), jnp.bfloat16
        )

    return jax.lax.platform_dependent(matrix, cpu=bits, default=take)


def _rows(unembedding: jax.Array, start: jax.Array | int, size: int, of_block: jax.Array) -> jax.Array:
    """float32 [size, D] of a bfloat16 unembedding."""

    # XLA's CPU backend slices bfloat16 as float32, of which it makes a whole copy: as integers it does not.
    def bits(unembedding: jax.Array) -> jax.Array:
        unembedding, _ = jax.lax.optimization_barrier((unembedding, (of_block, start)))
        whole = jax.lax.bitcast_convert_type(unembedding, jnp.uint16)
        rows = jax.lax.dynamic_slice_in_dim(whole, start, size).astype(jnp.uint32)
        return jax.lax.bitcast_convert_type(rows << 16, jnp.float32)

    return jax.lax.platform_dependent(
        unembedding,
        cpu=bits,
        default=lambda u: jax.lax.dynamic_slice_in_dim(u, start, size).astype(jnp.float32),
    )


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    if a.dtype != b.dtype:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)
