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

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import TokenRows
from xtoken_jax.data.batches import Batch
from xtoken_jax.distributed.mesh import constrain
from xtoken_jax.losses.total import LossTables
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.lora import join_lora
from xtoken_jax.train.batch_loss import Metrics, Objective, Outputs
from xtoken_jax.train.trained_projection import with_learnt

_Parts = tuple[jax.Array, jax.Array | None]  # ids and segments [M, B / M, T], or one of the M
Gradient = tuple[Params, dict[str, jax.Array]]  # by what trains of the student, and by log-weights of W


class GradientOf(Protocol):
    """What `gradient_of` returns."""

    def __call__(
        self,
        trained: Params,
        frozen: Params | None,
        teacher_params: dict[str, Params],
        tables: dict[str, LossTables],
        batch: Batch,
        projections: dict[str, jax.Array] | None = None,
        measure: jax.Array | bool = True,
    ) -> tuple[tuple[jax.Array, Metrics], Gradient]:
        """((loss, metrics), gradient).

        `projections` are the log-weights of each W that trains; `measure` says whether the agreement with
        teachers is wanted in the metrics.
        """


def gradient_of(objective: Objective, micro_batches: int = 1) -> GradientOf:
    """Loss, metrics and gradient of a batch, whose activations are those of a part of it.

    Args:
        objective: of the whole batch.
        micro_batches: parts, of which B is a multiple on every device of the mesh's batch axes.
    """

    def gradient(
        trained: Params,
        frozen: Params | None,
        teacher_params: dict[str, Params],
        tables: dict[str, LossTables],
        batch: Batch,
        projections: dict[str, jax.Array] | None = None,
        measure: jax.Array | bool = True,
    ) -> tuple[tuple[jax.Array, Metrics], Gradient]:
        given = _Given(objective, frozen, teacher_params, tables, batch, measure)
        if micro_batches == 1:
            return _at_once(given, trained, projections or {})
        return _by_parts(given, trained, projections or {}, micro_batches)

    return gradient


class _Given(NamedTuple):
    """What does not train."""

    objective: Objective
    frozen: Params | None
    teacher_params: dict[str, Params]
    tables: dict[str, LossTables]
    batch: Batch
    measure: jax.Array | bool

    @property
    def teachers(self) -> dict[str, Model]:
        """Those that run, by name."""
        return {name: t.model for name, t in self.objective.teachers.items() if t.model is not None}

    def loss(
        self, of_student: Outputs, of_teachers: dict[str, Outputs], projections: dict[str, jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        """From hidden states and unembeddings of the whole batch."""
        read = with_learnt(self.tables, projections)
        means = self.objective.means(of_student, of_teachers, read, self.batch)
        total, metrics = self.objective.join(means, self.batch)
        return total, metrics | self.objective.agreement(of_student, of_teachers, self.batch, self.measure)


def _at_once(
    given: _Given, trained: Params, projections: dict[str, jax.Array]
) -> tuple[tuple[jax.Array, Metrics], Gradient]:
    objective, rows = given.objective, given.batch.teachers

    def loss_of(trained: Params, projections: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        own = given.batch.student
        params = join_lora(trained, given.frozen)
        of_student = objective.student(params, own.ids, segments=objective.segments(own))
        of_teachers = {
            name: model(
                given.teacher_params[name], rows[name].rows.ids, segments=objective.segments(rows[name].rows)
            )
            for name, model in given.teachers.items()
        }
        return given.loss(of_student, of_teachers, projections)

    return jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(trained, projections)


def _by_parts(
    given: _Given, trained: Params, projections: dict[str, jax.Array], micro_batches: int
) -> tuple[tuple[jax.Array, Metrics], Gradient]:
    student, teachers = given.objective.student, given.teachers

    def parts(rows: TokenRows) -> _Parts:
        segments = given.objective.segments(rows)
        return split(rows.ids, micro_batches), segments if segments is None else split(
            segments, micro_batches
        )

    def hidden_of(trained: Params, part: _Parts) -> jax.Array:
        return student(join_lora(trained, given.frozen), part[0], segments=part[1])[0]

    def forward(_: None, part: Any) -> tuple[None, Any]:
        own, others = part
        read = {
            name: model(given.teacher_params[name], others[name][0], segments=others[name][1])[0]
            for name, model in teachers.items()
        }
        return None, (hidden_of(trained, own), read)

    own = parts(given.batch.student)
    others = {name: parts(given.batch.teachers[name].rows) for name in teachers}
    _, (hidden, read) = jax.lax.scan(forward, None, (own, others))
    # What is asked for is the unembedding alone; the compiler drops the rest.
    of_teachers = {
        name: (join(read[name]), model(given.teacher_params[name], others[name][0][0])[1])
        for name, model in teachers.items()
    }
    unembedding, pull_unembedding = jax.vjp(
        lambda trained: student(join_lora(trained, given.frozen), own[0][0])[1], trained
    )

    def loss_of(
        hidden: jax.Array, unembedding: jax.Array, projections: dict[str, jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        return given.loss((hidden, unembedding), of_teachers, projections)

    slopes = jax.value_and_grad(loss_of, argnums=(0, 1, 2), has_aux=True)
    value, found = slopes(join(hidden), unembedding, projections)
    by_hidden, by_unembedding, by_projection = found

    def backward(gradient: Params, part: tuple[_Parts, jax.Array]) -> tuple[Params, None]:
        own, slope = part
        _, pull = jax.vjp(lambda trained: hidden_of(trained, own), trained)
        return jax.tree.map(jnp.add, gradient, pull(slope)[0]), None

    start = pull_unembedding(by_unembedding)[0]
    gradient, _ = jax.lax.scan(backward, start, (own, split(by_hidden, micro_batches)))
    return value, (gradient, by_projection)


def split(rows: jax.Array, parts: int) -> jax.Array:
    """[B, T] or [B, T, D] -> [M, B / M, ...]; part m has rows m, M + m, ...: devices split their own rows."""
    found = jnp.moveaxis(rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]), 1, 0)
    return constrain(found, "M B T" if rows.ndim == 2 else "M B T D")


def join(parts: jax.Array) -> jax.Array:
    """[M, B / M, T, D] -> [B, T, D], the inverse of `split`."""
    parts = constrain(parts, "M B T D")
    return constrain(jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:]), "B T D")
