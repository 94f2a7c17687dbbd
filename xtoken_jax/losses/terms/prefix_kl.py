"""Prefix KL: both models' probabilities of the same events, by the chain rule inside chunks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.checks import check_needed, check_settings, check_sides, check_tables
from xtoken_jax.losses.math.chunks import counted_positions
from xtoken_jax.losses.math.divergence import kl_terms
from xtoken_jax.losses.math.softmax import centred, flat_logits, not_finite
from xtoken_jax.losses.terms.prefix_steps import PrefixPlan, Slots, log_sum
from xtoken_jax.projection.events import PrefixTables, log_masses


def prefix_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    tables: PrefixTables,
    *,
    student_ids: jax.Array,
    teacher_ids: jax.Array,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
) -> jax.Array:
    """Prefix KL of every chunk.

    The sum of three kinds of KL, each between probabilities of the same events on both sides:

    1. Where the chunk begins, which event comes: those of `tables.student` and `tables.teacher`,
       a model's probability of one being the sum over its tokens. Tokens that would have continued
       the chunk before, by 2 or 3, are out: that it has ended is known here.
    2. If the chunk is one student token s, after each of its teacher tokens t_1 .. t_d that are the
       first pieces of s: how does the text go on? Of the student's tokens whose pieces begin with
       t_1 .. t_d, the next piece, or the end of the token; against the teacher's next token, where any
       that goes on with none of them is the end. A piece that the student could also write behind the
       ended token counts as the end on both sides.
    3. If the chunk is one teacher token, the same with the sides changed.

    All are normalized over the events that both sides can price (an event that is -inf on one is left
    out), so that the value is finite and at least 0, and 0 where both models agree on them. A chunk
    whose first token nothing predicts is worth 0. On one tokenizer there is but the first kind, which
    is then the ordinary KL.

    Args:
        student_logits: float [B, T_s, >= V_s]; columns past the tables' do not count.
        teacher_logits: float [B, T_t, >= V_t]. They get no gradient.
        alignment: chunk ids of tokens, [B, T_s] and [B, T_t], and `valid` [B, C].
        tables: of `projection.prefixes.prefix_tables`.
        student_ids, teacher_ids: int32 [B, T_s], [B, T_t].
        temperature: tau > 0.
        direction: "forward" or "reverse" KL, or "jsd" (`kl_terms`).
        beta: of "jsd".

    Returns:
        float32 [B, C], times tau^2; 0 for chunks outside `valid_chunks(alignment)`.

    Raises:
        ValueError: another direction.

    Example:
        The student writes "a", "b" and "ab", the teacher "a" and "b" alone.

        >>> import numpy as np
        >>> from xtoken_jax.projection.events import Components, Continuations
        >>> ints = lambda *rows: np.array(rows, np.int32)
        >>> events = Components(ints(1), ints(0, 2), ints(0, 0), ints(1, 0, 1), 2)
        >>> of_teacher = Components(ints(1), ints(0), ints(0), ints(1, 0), 2)
        >>> rho, sigma = ints([0, -1], [1, -1], [0, 1]), ints([0, -1], [1, -1])
        >>> pieces = Continuations(ints(0, 2, 1), rho, rho, ints([0], [2], [0]), ints([2], [0], [2]), 2)
        >>> nothing = Continuations(ints(0, 1), sigma, sigma, ints([0], [0]), ints([0], [0]), 1)
        >>> tables = PrefixTables(events, of_teacher, pieces, nothing)
        >>> student = jnp.log(jnp.array([[[0.4, 0.2, 0.4], [1.0, 1.0, 1.0]]]))
        >>> teacher = jnp.log(jnp.array([[[0.8, 0.2], [0.5, 0.5], [0.9, 0.1]]]))
        >>> ids = ints([-1, 0]), ints([-1, 0, 0])  # the second token "ab" is the teacher's "a", "b"
        >>> alignment = Alignment(*ids, jnp.ones((1, 1), bool))
        >>> tokens = dict(student_ids=ints([1, 2]), teacher_ids=ints([1, 0, 1]))
        >>> print(prefix_kl(student, teacher, alignment, tables, **tokens).round(6))
        [[0.]]

        Both say "a..." with 0.8, and then "b" with a half.
    """
    parts = prefix_parts(
        student_logits, teacher_logits, alignment, tables, student_ids=student_ids, teacher_ids=teacher_ids,
        temperature=temperature, direction=direction, beta=beta,
    )  # fmt: skip
    return parts[0] + parts[1]


def prefix_parts(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    tables: PrefixTables,
    *,
    student_ids: jax.Array,
    teacher_ids: jax.Array,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
    """The terms of `prefix_kl` where chunks begin (1), and those inside of them (2 and 3); float32 [B, C]."""
    check_prefix(
        student_logits, teacher_logits, alignment, tables, student_ids, teacher_ids,
        temperature=temperature, direction=direction, beta=beta,
    )  # fmt: skip
    plan = PrefixPlan.of(alignment, tables, student_ids, teacher_ids)
    counted = counted_positions(alignment)[0]
    # The logits after a chunk's last token are read too, where a step compares the end there.
    counted = counted | (plan.by_student.size > 0).reshape(counted.shape)
    student = flat_logits(student_logits, tables.student_size, counted) / temperature
    teacher = jax.lax.stop_gradient(flat_logits(teacher_logits, tables.teacher_size)) / temperature
    faulty = plan.faulty(alignment, not_finite(student), not_finite(teacher))
    student, teacher = centred(student), centred(teacher)

    def compare(of_teacher: jax.Array, of_student: jax.Array) -> jax.Array:
        return divergence(of_teacher, of_student, direction, beta)

    after_teacher = Slots.of(plan.by_teacher, tables.student_pieces)
    after_student = Slots.of(plan.by_student, tables.teacher_pieces)
    steps_teacher, rest_teacher = after_teacher.after(teacher)
    steps_student, rest_student = after_student.after(student)

    wanted = log_masses(rest_teacher[plan.teacher_start], tables.teacher)
    own = log_masses(rest_student[plan.student_start], tables.student)
    start = compare(wanted, own).reshape(plan.counted.shape)
    value = compare(steps_teacher, after_teacher.within(student, plan.by_teacher.start))
    inside = plan.by_teacher.by_chunk(value)
    value = compare(after_student.within(teacher, plan.by_student.start), steps_student)
    inside = inside + plan.by_student.by_chunk(value)
    factor = jnp.where(faulty, jnp.nan, temperature**2)
    start, inside = (jnp.where(plan.counted, part * factor, 0.0) for part in (start, inside))
    return start, inside


def check_prefix(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    tables: PrefixTables,
    student_ids: jax.Array,
    teacher_ids: jax.Array,
    **settings: Any,
) -> None:
    """Raise ValueError for the first argument of `prefix_kl` that does not fit."""
    sizes = check_tables("tables", tables, [PrefixTables])
    check_needed("prefix_kl", student_ids=student_ids, teacher_ids=teacher_ids)
    check_settings(**settings)
    check_sides(
        student_logits, teacher_logits, alignment, sizes, "tables", student_ids=student_ids,
        teacher_ids=teacher_ids,
    )  # fmt: skip


def divergence(teacher: jax.Array, student: jax.Array, direction: str, beta: float) -> jax.Array:
    """float32 [N], of logarithms of masses [N, C] that need not sum to 1.

    Both are normalized over the events that neither side excludes (-inf).
    """
    both = (teacher != -jnp.inf) & (student != -jnp.inf)
    teacher, student = (_normalized(masses, both) for masses in (teacher, student))
    return kl_terms(teacher, student, direction, beta=beta).sum(-1)


def _normalized(values: jax.Array, both: jax.Array) -> jax.Array:
    values = jnp.where(both, values, -jnp.inf)
    total = log_sum(values)[:, None]
    return jnp.where(both, values - jnp.where(total == -jnp.inf, 0.0, total), -jnp.inf)
