"""The gradient of a batch, at once or by micro-batches; the objective is the same in both.

The gradients of micro-batches do not add up to that of the batch: the factor of dynamic scaling follows
from CE and KD of the whole batch, and P-KL chooses its columns by all of it. So the hidden states of all
micro-batches are made first, the loss is that of the whole batch, and its slope by the hidden states goes
back through the student one micro-batch at a time (gradient caching, Gao et al., arXiv 2101.06983).

It costs one more forward pass of the student. Held for the whole batch are the hidden states [B, T, D] of
student and teachers and the slope by the student's, for one micro-batch the activations of the layers;
there is no second copy of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import TokenRows
from xtoken_jax.data.batches import Batch
from xtoken_jax.losses.objective import LossTables
from xtoken_jax.mesh import constrain
from xtoken_jax.models.decoder import Params
from xtoken_jax.models.lora import join_lora
from xtoken_jax.train.objective import Metrics, Objective

# (trained, frozen, teacher_params, tables, batch) -> ((loss, metrics), gradient by trained)
GradientOf = Callable[
    [Params, Params | None, dict[str, Params], dict[str, LossTables], Batch],
    tuple[tuple[jax.Array, Metrics], Params],
]
_Parts = tuple[jax.Array, jax.Array | None]  # ids and segments [M, B / M, T], or one of the M


def gradient_of(objective: Objective, micro_batches: int = 1) -> GradientOf:
    """Loss, metrics and gradient of a batch, whose activations are those of a part of it.

    Args:
        objective: of the whole batch.
        micro_batches: parts, of which B is a multiple on every device of the mesh's batch axes.
    """
    if micro_batches == 1:
        return _at_once(objective)
    student, teachers = objective.student, objective.teachers

    def by_parts(
        trained: Params,
        frozen: Params | None,
        teacher_params: dict[str, Params],
        tables: dict[str, LossTables],
        batch: Batch,
    ) -> tuple[tuple[jax.Array, Metrics], Params]:
        def parts(rows: TokenRows) -> _Parts:
            segments = objective.segments(rows)
            return split(rows.ids, micro_batches), segments if segments is None else split(
                segments, micro_batches
            )

        def hidden_of(trained: Params, part: _Parts) -> jax.Array:
            return student(join_lora(trained, frozen), part[0], segments=part[1])[0]

        def forward(_: None, part: Any) -> tuple[None, Any]:
            own, others = part
            read = {
                name: teacher.model(teacher_params[name], others[name][0], segments=others[name][1])[0]
                for name, teacher in teachers.items()
            }
            return None, (hidden_of(trained, own), read)

        own = parts(batch.student)
        others = {name: parts(batch.teachers[name].rows) for name in teachers}
        _, (hidden, read) = jax.lax.scan(forward, None, (own, others))
        # What is asked for is the unembedding alone; the compiler drops the rest.
        of_teachers = {
            name: (join(read[name]), teacher.model(teacher_params[name], others[name][0][0])[1])
            for name, teacher in teachers.items()
        }
        unembedding, pull_unembedding = jax.vjp(
            lambda trained: student(join_lora(trained, frozen), own[0][0])[1], trained
        )

        def loss_of(hidden: jax.Array, unembedding: jax.Array) -> tuple[jax.Array, Metrics]:
            means = objective.means((hidden, unembedding), of_teachers, tables, batch)
            return objective.join(means, batch)

        slopes = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        value, (by_hidden, by_unembedding) = slopes(join(hidden), unembedding)

        def backward(gradient: Params, part: tuple[_Parts, jax.Array]) -> tuple[Params, None]:
            own, slope = part
            _, pull = jax.vjp(lambda trained: hidden_of(trained, own), trained)
            return jax.tree.map(jnp.add, gradient, pull(slope)[0]), None

        start = pull_unembedding(by_unembedding)[0]
        gradient, _ = jax.lax.scan(backward, start, (own, split(by_hidden, micro_batches)))
        return value, gradient

    return by_parts


def _at_once(objective: Objective) -> GradientOf:
    def loss_of(
        trained: Params,
        frozen: Params | None,
        teacher_params: dict[str, Params],
        tables: dict[str, LossTables],
        batch: Batch,
    ) -> tuple[jax.Array, Metrics]:
        own, others = batch.student, {name: batch.teachers[name].rows for name in objective.teachers}
        of_student = objective.student(join_lora(trained, frozen), own.ids, segments=objective.segments(own))
        of_teachers = {
            name: objective.teachers[name].model(
                teacher_params[name], rows.ids, segments=objective.segments(rows)
            )
            for name, rows in others.items()
        }
        return objective.join(objective.means(of_student, of_teachers, tables, batch), batch)

    return jax.value_and_grad(loss_of, has_aux=True)


def split(rows: jax.Array, parts: int) -> jax.Array:
    """[B, T] or [B, T, D] -> [M, B / M, ...]; part m has rows m, M + m, ...: devices split their own rows."""
    found = jnp.moveaxis(rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]), 1, 0)
    return constrain(found, "M B T" if rows.ndim == 2 else "M B T D")


def join(parts: jax.Array) -> jax.Array:
    """[M, B / M, T, D] -> [B, T, D], the inverse of `split`."""
    parts = constrain(parts, "M B T D")
    return constrain(jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:]), "B T D")
