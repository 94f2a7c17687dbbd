"""Prefix KL in blocks of positions: first the teacher's side of its steps, then blocks of the student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.terms.prefix_kl import divergence
from xtoken_jax.losses.terms.prefix_steps import PrefixPlan, Slots, Steps
from xtoken_jax.projection.events import PrefixTables, log_masses


@dataclass(frozen=True)
class PrefixBatch:
    """A batch's steps with the teacher's side of them, which is all that blocks of the student need.

    Attributes:
        tables: of the tokenizer pair.
        by_teacher, by_student: the steps, as in `PrefixPlan`.
        starts: bool [B T_t], teacher positions that predict the first token of a chunk with a value.
        along: float32 [B T_t, L_s], the teacher's events after each of its tokens.
        within: float32 [B T_s, L_t], the teacher's events after each of the student's tokens.
        first: int32 [B T_s], for a student position that predicts a chunk's only token: where the
            chunk's first teacher token is.
        number: int32 [B T_s], how many teacher tokens that chunk has; 0 for other positions.
    """

    tables: PrefixTables
    by_teacher: Steps
    by_student: Steps
    starts: jax.Array
    along: jax.Array
    within: jax.Array
    first: jax.Array
    number: jax.Array

    @classmethod
    def of(
        cls,
        alignment: Alignment,
        tables: PrefixTables,
        student_ids: jax.Array,
        teacher_ids: jax.Array,
        teacher: Callable[[jax.Array], jax.Array],
        block: int,
    ) -> PrefixBatch:
        """One pass over the teacher's positions that have steps, `block` of them at a time.

        `teacher` gives the logits float32 [n, V_t] over tau of positions int32 [n].
        """
        plan = PrefixPlan.of(alignment, tables, student_ids, teacher_ids)

        def after(positions: jax.Array) -> jax.Array:
            slots = Slots.of(plan.by_teacher.at(positions), tables.student_pieces)
            return slots.after(teacher(positions))[0]

        def within(positions: jax.Array) -> jax.Array:
            steps = plan.by_student.at(positions)
            slots = Slots.of(steps, tables.teacher_pieces)
            rows = jnp.arange(len(positions), dtype=jnp.int32)
            return slots.within(teacher(steps.start), rows)

        place = jnp.where(plan.counted.reshape(-1), plan.teacher_start, teacher_ids.size)
        starts = jnp.zeros(teacher_ids.size, bool).at[place].set(True, mode="drop")
        alone = (plan.counted & (plan.student_number == 1)).reshape(-1)
        place = jnp.where(alone, plan.student_start, student_ids.size)
        none = jnp.zeros(student_ids.size, jnp.int32)
        return cls(
            tables,
            plan.by_teacher,
            plan.by_student,
            starts,
            _at_steps(after, plan.by_teacher.size > 0, tables.student_pieces.longest, block),
            _at_steps(within, plan.by_student.size > 0, tables.teacher_pieces.longest, block),
            none.at[place].set(plan.teacher_start + 1, mode="drop"),
            none.at[place].set(plan.teacher_number.reshape(-1), mode="drop"),
        )

    def teacher_events(self, logits: jax.Array, positions: jax.Array) -> jax.Array:
        """float32 [n, C]: log-masses of events from the teacher's logits; all -inf where no chunk begins."""
        slots = Slots.of(self.by_teacher.at(positions), self.tables.student_pieces)
        masses = log_masses(slots.rest(logits), self.tables.teacher)
        starts = self.starts.at[positions].get(mode="fill", fill_value=False)
        return jnp.where(starts[:, None], masses, -jnp.inf)

    def student_events(self, logits: jax.Array, positions: jax.Array) -> jax.Array:
        """float32 [n, C], the student's."""
        slots = Slots.of(self.by_student.at(positions), self.tables.teacher_pieces)
        return log_masses(slots.rest(logits), self.tables.student)

    def steps(self, logits: jax.Array, positions: jax.Array, direction: str, beta: float) -> jax.Array:
        """float32 [n]: the value of all steps that read the student's logits [n, V_s] at these positions."""
        steps = self.by_student.at(positions)

        def own(logits: jax.Array) -> jax.Array:
            of_student = Slots.of(steps, self.tables.teacher_pieces).after(logits)[0]
            within = self.within.at[positions].get(mode="clip")
            return _counted(steps, divergence(within, of_student, direction, beta))

        values = _if_any(steps.size > 0, own, logits)
        number = self.number.at[positions].get(mode="fill", fill_value=0)
        rows = jnp.arange(len(positions), dtype=jnp.int32)

        def add(values: jax.Array, d: jax.Array) -> tuple[jax.Array, None]:
            places = self.first.at[positions].get(mode="clip") + d
            places = jnp.where(d < number, places, len(self.starts))
            following = self.by_teacher.at(places)

            def along(logits: jax.Array) -> jax.Array:
                of_student = Slots.of(following, self.tables.student_pieces).within(logits, rows)
                of_teacher = self.along.at[places].get(mode="clip")
                return _counted(following, divergence(of_teacher, of_student, direction, beta))

            return values + _if_any(following.size > 0, along, logits), None

        depths = jnp.arange(self.tables.student_pieces.begin.shape[1], dtype=jnp.int32)
        return jax.lax.scan(add, values, depths)[0]


def _counted(steps: Steps, values: jax.Array) -> jax.Array:
    return jnp.where(steps.size > 0, values, 0.0)


def _if_any(wanted: jax.Array, function: Callable[[jax.Array], jax.Array], logits: jax.Array) -> jax.Array:
    """function(logits), which is not computed where none is wanted and all would be 0."""
    return jax.lax.cond(wanted.any(), function, lambda z: jnp.zeros(len(z), jnp.float32), logits)


def _at_steps(
    function: Callable[[jax.Array], jax.Array], wanted: jax.Array, width: int, block: int
) -> jax.Array:
    """float32 [N, width]: function(positions [block]) at the wanted of N positions, 0 at the others."""
    length = len(wanted)
    (order,) = jnp.nonzero(wanted, size=length, fill_value=length)
    order = order.astype(jnp.int32)

    def more(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        place, found = carry
        places = place + jnp.arange(block, dtype=jnp.int32)
        positions = order.at[places].get(mode="fill", fill_value=length)
        return place + block, found.at[positions].set(function(positions), mode="drop")

    start = jnp.int32(0), jnp.zeros((length, width), jnp.float32)
    return jax.lax.while_loop(lambda carry: carry[0] < wanted.sum(), more, start)[1]
