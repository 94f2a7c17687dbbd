"""One training step: (state, teachers, tables, batch, frozen) -> (state, metrics), pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from xtoken_jax.data.batches import Batch
from xtoken_jax.distributed.mesh import replicated
from xtoken_jax.losses import LossConfig, TeachersConfig
from xtoken_jax.losses.total import LossTables
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.lora import split_lora
from xtoken_jax.train.batch_loss import Metrics, Objective, Teacher
from xtoken_jax.train.gradient import gradient_of
from xtoken_jax.train.trained_projection import Learnt, learn, moved


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes and a checkpoint holds.

    Attributes:
        step: int32 scalar array, steps taken.
        params: those of the student's parameters that train: the adapters where it has such, else all.
        opt_state: the optimizer's state, laid out as they are.
        projections: by teacher whose W trains.
    """

    step: Any
    params: Params
    opt_state: Any
    projections: dict[str, Learnt] = field(default_factory=dict)


class Step(Protocol):
    """What `make_step` returns."""

    def __call__(
        self,
        state: TrainState,
        teacher_params: dict[str, Params],
        tables: dict[str, LossTables],
        batch: Batch,
        frozen: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        """One step; parameters and tables by teacher, `frozen` as `split_lora` returns it."""


def abstract_state(
    student: Model,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    projections: Mapping[str, Learnt] | None = None,
) -> TrainState:
    """The state's shapes and shardings, for `jax.jit` and for restoring a checkpoint."""
    params = split_lora(student.abstract(mesh))[0]
    opt_state = jax.eval_shape(optimizer.init, params)
    # Moments mirror the parameters, so they take the parameters' layout; counters are everywhere.
    opt_state = optax.tree_map_params(
        optimizer,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        opt_state,
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    learnt = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), dict(projections or {})
    )
    return TrainState(step, params, opt_state, learnt)


def init_state(
    student: Model,
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    projections: Mapping[str, Learnt] | None = None,
) -> TrainState:
    """The state before the first step; those of `params` that train, and `projections`, are taken over."""
    params = split_lora(params)[0]
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(student, optimizer, mesh))
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(
        jax.device_put(jnp.int32(0), shardings.step), params, opt_state, dict(projections or {})
    )


def make_step(
    student: Model,
    teachers: Mapping[str, Teacher],
    loss: LossConfig,
    optimizer: optax.GradientTransformation,
    *,
    student_size: int,
    micro_batches: int = 1,
    packed: bool = True,
    combine: TeachersConfig | None = None,
    schedule: optax.Schedule | None = None,
    projection_optimizer: optax.GradientTransformation | None = None,
    logged: Callable[[jax.Array], jax.Array] | None = None,
) -> Step:
    """The step of one objective; jit it with the state donated.

    Args:
        student: the model that trains.
        teachers: by name; none means next-token cross-entropy alone.
        loss: scaling, weights and block of the objective; the teachers have terms of their own.
        optimizer: what `make_optimizer` returned.
        student_size: V_s of the tokenizer; logits past it do not enter the loss.
        micro_batches: parts of a batch that go through the student one by one, for less memory; see
            `accumulate`.
        packed: whether rows hold several documents; see `Objective`.
        combine: how several teachers make one term; None for their sum by weight.
        schedule: the optimizer's learning rate, to report; it follows the updates made.
        logged: step, from 1 -> whether its metrics are looked at; those that cost much are left out else.
        projection_optimizer: of each W in the state; its gradient has no part in the student's clipping.

    Returns:
        step(state, teacher_params, tables, batch, frozen) -> (state, metrics), where `frozen` is what
        `split_lora` leaves beside the parameters of the state; without adapters there is none. A step whose
        loss or gradient is not finite leaves parameters and moments as they were; `finite` says so.
    """
    objective = Objective(student, teachers, loss, student_size, packed, combine or TeachersConfig())
    gradient_by = gradient_of(objective, micro_batches)

    def step(
        state: TrainState,
        teacher_params: dict[str, Params],
        tables: dict[str, LossTables],
        batch: Batch,
        frozen: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        logits = {name: learnt.logits for name, learnt in state.projections.items()}
        (value, metrics), (gradient, by_projection) = gradient_by(
            state.params, frozen, teacher_params, tables, batch, logits,
            True if logged is None else logged(state.step + 1),
        )  # fmt: skip
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        projections: dict[str, Learnt] = {}
        if projection_optimizer is not None:
            finite &= jnp.isfinite(optax.tree.norm(by_projection))
            projections = learn(projection_optimizer, state.projections, by_projection)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state, projections = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, projections),
            (state.params, state.opt_state, state.projections),
        )
        for name, learnt in projections.items():
            metrics[f"projection_moved/{name}"] = moved(tables[name], learnt)
        # A step that is not finite changed nothing.
        update_norm = jnp.where(finite, optax.tree.norm(updates), 0.0)
        metrics = {**metrics, "gradient_norm": norm, "update_norm": update_norm, "finite": finite}
        if schedule is not None:
            # The schedule's own counter, which such a step leaves where it was.
            counts = optax.tree.get_all_with_path(state.opt_state, "count")
            metrics["learning_rate"] = jnp.asarray(schedule(counts[-1][1]), jnp.float32)
        return TrainState(state.step + 1, params, opt_state, projections), metrics

    return step
