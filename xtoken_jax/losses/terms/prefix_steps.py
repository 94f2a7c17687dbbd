"""The steps of prefix KL: what is compared where, and the events after each token inside a chunk."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.math.chunks import chunks_of_positions, valid_chunks
from xtoken_jax.projection.events import Continuations, PrefixTables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Steps:
    """After each token of the side with several: which run of the other side's tokens is still possible.

    Attributes:
        start: int32 [B T], the position, in the flattened batch of the other side, that predicts the
            chunk's one token there.
        chunks: int32 [B, T], the chunk within its row, C for none.
        begin, size: int32 [B T], the run of `Continuations.order`; size 0 where nothing is to be told.
        depth: int32 [B T], d, pieces so far.
        chunk_count: C.
    """

    start: jax.Array
    chunks: jax.Array
    begin: jax.Array
    size: jax.Array
    depth: jax.Array
    chunk_count: int = field(metadata={"static": True})

    def at(self, positions: jax.Array) -> Steps:
        """Those after some of the tokens, int32 [n]; size 0 for positions past the end."""
        start, begin, depth = (x.at[positions].get(mode="clip") for x in (self.start, self.begin, self.depth))
        size = self.size.at[positions].get(mode="fill", fill_value=0)
        return replace(self, start=start, begin=begin, size=size, depth=depth)

    def by_chunk(self, values: jax.Array) -> jax.Array:
        """float [B T] -> [B, C]: the sum over each chunk's tokens."""
        values = jnp.where(self.size > 0, values, 0.0).reshape(self.chunks.shape)
        summed = jax.vmap(lambda v, c: jax.ops.segment_sum(v, c, self.chunk_count + 1))(values, self.chunks)
        return summed[:, : self.chunk_count]


class PrefixPlan(NamedTuple):
    """What is compared where.

    Attributes:
        counted: bool [B, C], chunks that have a value.
        student_start, teacher_start: int32 [B C], positions that predict their first tokens.
        student_number, teacher_number: int32 [B, C], how many tokens they have.
        by_teacher: steps along the teacher's tokens of chunks with one student token.
        by_student: steps along the student's tokens of chunks with one teacher token.
    """

    counted: jax.Array
    student_start: jax.Array
    teacher_start: jax.Array
    student_number: jax.Array
    teacher_number: jax.Array
    by_teacher: Steps
    by_student: Steps

    @classmethod
    def of(
        cls, alignment: Alignment, tables: PrefixTables, student_ids: jax.Array, teacher_ids: jax.Array
    ) -> PrefixPlan:
        """From the ids of both sides, int32 [B, T_s] and [B, T_t]."""
        count = alignment.valid.shape[1]
        student = _Tokens.of(alignment.student_chunks, student_ids, count)
        teacher = _Tokens.of(alignment.teacher_chunks, teacher_ids, count)
        # The first token of a row is predicted by nothing.
        counted = valid_chunks(alignment) & (student.first > 0) & (teacher.first > 0)
        return cls(
            counted,
            student.start().reshape(-1),
            teacher.start().reshape(-1),
            student.number,
            teacher.number,
            _steps(student, teacher, tables.student_pieces, counted),
            _steps(teacher, student, tables.teacher_pieces, counted),
        )

    def faulty(self, alignment: Alignment, student: jax.Array, teacher: jax.Array) -> jax.Array:
        """bool [B, C]: counted chunks with a position that is not finite, of bool [B T_s] and [B T_t].

        A token without an event would otherwise hide that its logit is NaN.
        """
        count = self.counted.shape[1]
        faulty = chunks_of_positions(student, alignment.student_chunks, count)
        faulty = faulty | chunks_of_positions(teacher, alignment.teacher_chunks, count)
        for steps, flags in ((self.by_student, student), (self.by_teacher, teacher)):
            faulty = faulty | (steps.by_chunk(flags.astype(jnp.float32)) > 0)
        return self.counted & faulty


class _Tokens(NamedTuple):
    ids: jax.Array  # [B, T]
    chunks: jax.Array  # [B, T], C for none
    first: jax.Array  # [B, C], the place of the first token; T for an empty chunk
    number: jax.Array  # [B, C]

    @classmethod
    def of(cls, chunks: jax.Array | np.ndarray, ids: jax.Array, count: int) -> _Tokens:
        chunks = jnp.asarray(chunks)
        chunks = jnp.where((chunks >= 0) & (chunks < count), chunks, count)
        places = jax.lax.broadcasted_iota(jnp.int32, chunks.shape, 1)
        first = jax.vmap(lambda p, c: jax.ops.segment_min(p, c, count + 1))(places, chunks)[:, :count]
        number = jax.vmap(lambda c: jnp.zeros(count + 1, jnp.int32).at[c].add(1))(chunks)[:, :count]
        return cls(jnp.asarray(ids), chunks, jnp.minimum(first, chunks.shape[1]), number)

    def start(self) -> jax.Array:
        """int32 [B, C]: the position in the flattened batch before the first token."""
        rows, length = self.ids.shape
        return jnp.clip(self.first - 1, 0, length - 1) + length * jnp.arange(rows, dtype=jnp.int32)[:, None]


def _steps(one: _Tokens, several: _Tokens, pieces: Continuations, counted: jax.Array) -> Steps:
    """Along the tokens of `several` in chunks that are one token of the side `one`."""
    length = several.ids.shape[1]

    def at_chunk(values: jax.Array, fill: int) -> jax.Array:
        padded = jnp.pad(values, ((0, 0), (0, 1)), constant_values=fill)
        return jnp.take_along_axis(padded, several.chunks, axis=1)

    place = jnp.clip(one.first, 0, one.ids.shape[1] - 1)
    token = at_chunk(jnp.take_along_axis(one.ids, place, axis=1), 0)
    begin_of_chunk = at_chunk(several.first, 0)
    depth = jax.lax.broadcasted_iota(jnp.int32, several.ids.shape, 1) - begin_of_chunk + 1
    wanted = at_chunk((counted & (one.number == 1)).astype(jnp.int32), 0) > 0
    token = jnp.clip(token, 0, pieces.pieces.shape[0] - 1)
    deepest = pieces.begin.shape[1]
    inside = jnp.clip(depth, 1, deepest) - 1
    expected = jnp.asarray(pieces.pieces)[token, inside]
    # A prefix counts when none of its tokens is another than the piece there.
    other = jnp.cumsum((several.ids != expected) | (depth > deepest), axis=1, dtype=jnp.int32)
    before = jnp.pad(other, ((0, 0), (1, 0)))[:, :-1]
    matches = other == jnp.take_along_axis(before, jnp.clip(begin_of_chunk, 0, length - 1), axis=1)
    size = jnp.where(wanted & matches, jnp.asarray(pieces.size)[token, inside], 0)
    return Steps(
        at_chunk(one.start(), 0).reshape(-1),
        several.chunks,
        jnp.asarray(pieces.begin)[token, inside].reshape(-1),
        size.reshape(-1),
        depth.reshape(-1),
        counted.shape[1],
    )


class Slots(NamedTuple):
    """The events after each of N tokens: one for each token of the run, of which the first of a group counts.

    Attributes:
        tokens: int32 [N, L], of the side with one token.
        pieces: int32 [N, L], of the side with several, the next one; -1 for the end.
        inside: bool [N, L], slots of the run.
        leads: bool [N, L], the first of its group.
    """

    tokens: jax.Array
    pieces: jax.Array
    inside: jax.Array
    leads: jax.Array

    @classmethod
    def of(cls, steps: Steps, table: Continuations) -> Slots:
        """Of the runs of `steps`."""
        places = jnp.arange(table.longest, dtype=jnp.int32)[None]
        inside = places < steps.size[:, None]
        order = jnp.asarray(table.order)
        tokens = order.at[steps.begin[:, None] + places].get(mode="clip")
        pieces = jnp.asarray(table.following).at[tokens, steps.depth[:, None]].get(mode="clip")
        pieces = jnp.where(inside, pieces, -1)
        other = pieces[:, 1:] != pieces[:, :-1]
        leads = inside & jnp.concatenate([jnp.ones_like(inside[:, :1]), other], axis=1)
        return cls(tokens, pieces, inside, leads)

    def within(self, logits: jax.Array, start: jax.Array) -> jax.Array:
        """The side with one token: logarithms of the masses of the groups.

        Args:
            logits: float32 [N_1, V_1], of that side.
            start: int32 [N], which of them.

        Returns:
            float32 [N, L], -inf but for the first of a group.
        """
        values = jnp.where(self.inside, logits[start[:, None], self.tokens], -jnp.inf)
        return jnp.where(self.leads, _group_sums(values, self.leads), -jnp.inf)

    def after(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The side with several tokens: logarithms of the masses of the next piece, or of any other token.

        Args:
            logits: float32 [N, V_2], of that side, after the prefix.

        Returns:
            float32 [N, L], -inf but for the first of a group; and the logits [N, V_2] with -inf for the
            pieces, which are what is left when the token has ended.
        """
        rows = jnp.arange(len(logits), dtype=jnp.int32)[:, None]
        values = logits.at[rows, self._columns(logits)].get(mode="fill", fill_value=-jnp.inf)
        rest = self.rest(logits)
        end = self.leads & (self.pieces < 0)
        return jnp.where(end, log_sum(rest)[:, None], values), rest

    def rest(self, logits: jax.Array) -> jax.Array:
        """The second result of `after` alone."""
        rows = jnp.arange(len(logits), dtype=jnp.int32)[:, None]
        return logits.at[rows, self._columns(logits)].set(-jnp.inf, mode="drop")

    def _columns(self, logits: jax.Array) -> jax.Array:
        return jnp.where(self.leads & (self.pieces >= 0), self.pieces, logits.shape[1])


def log_sum(values: jax.Array) -> jax.Array:
    """log sum exp along the last axis, with gradients of 0 where all is -inf."""
    highest = jax.lax.stop_gradient(values.max(axis=-1, keepdims=True))
    highest = jnp.where(highest == -jnp.inf, 0.0, highest)
    total = jnp.exp(values - highest).sum(-1)
    found = total != 0
    return jnp.where(found, jnp.log(jnp.where(found, total, 1.0)) + highest[..., 0], -jnp.inf)


@jax.custom_vjp
def _group_sums(values: jax.Array, leads: jax.Array) -> jax.Array:
    """log sum exp of each group, at its first slot: [N, L] -> [N, L], of no meaning at the others."""
    return _group_sums_forward(values, leads)[0]


def _group_sums_forward(values: jax.Array, leads: jax.Array) -> tuple[jax.Array, tuple]:
    # Groups are runs. From the right, a sum starts again behind the first slot of the group before.
    last = jnp.concatenate([leads[:, 1:], jnp.ones_like(leads[:, :1])], axis=1)

    def join(right: tuple, left: tuple) -> tuple:
        return jnp.where(left[1], left[0], jnp.logaddexp(right[0], left[0])), left[1] | right[1]

    sums, _ = jax.lax.associative_scan(join, (values, last), reverse=True, axis=1)
    return sums, (values, leads, sums)


def _group_sums_backward(residuals: tuple, gradient: jax.Array) -> tuple:
    values, leads, sums = residuals
    places = jax.lax.broadcasted_iota(jnp.int32, leads.shape, 1)
    first = jax.lax.cummax(jnp.where(leads, places, 0), axis=1)
    gradient, sums = (jnp.take_along_axis(x, first, axis=1) for x in (jnp.where(leads, gradient, 0.0), sums))
    share = jnp.where((values != -jnp.inf) & (gradient != 0), values - sums, -jnp.inf)
    return gradient * jnp.exp(share), None


_group_sums.defvjp(_group_sums_forward, _group_sums_backward)
