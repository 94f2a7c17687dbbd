"""One training step: (state, teacher, tables, batch, frozen) -> (state, metrics), pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from xtoken_jax.data.batches import Batch
from xtoken_jax.losses import (
    LossConfig,
    LossKind,
    distillation_loss,
    kd_scale_capped,
    masked_mean,
    next_token_cross_entropy,
    total_loss,
    valid_chunks,
)
from xtoken_jax.losses.blockwise import blockwise_loss
from xtoken_jax.losses.objective import LossTables
from xtoken_jax.mesh import replicated
from xtoken_jax.models.decoder import Model, Params, logits
from xtoken_jax.models.lora import join_lora, split_lora

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes and a checkpoint holds.

    Attributes:
        step: int32 scalar array, steps taken.
        params: those of the student's parameters that train: the adapters where it has such, else all.
        opt_state: the optimizer's state, laid out as they are.
    """

    step: Any
    params: Params
    opt_state: Any


class Step(Protocol):
    """What `make_step` returns."""

    def __call__(
        self,
        state: TrainState,
        teacher_params: Params | None,
        tables: LossTables | None,
        batch: Batch,
        frozen: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        """One step; `frozen` as `split_lora` returns it."""


def abstract_state(student: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
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
    return TrainState(step, params, opt_state)


def init_state(
    student: Model, params: Params, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state before the first step; those of `params` that train are taken over, not copied."""
    params = split_lora(params)[0]
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(student, optimizer, mesh))
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(jax.device_put(jnp.int32(0), shardings.step), params, opt_state)


def make_step(
    student: Model,
    teacher: Model | None,
    loss: LossConfig,
    optimizer: optax.GradientTransformation,
    *,
    student_size: int,
) -> Step:
    """The step of one objective; jit it with the state donated.

    Args:
        student, teacher: models; no teacher means next-token cross-entropy alone.
        loss: the objective, with its kind settled (not "auto").
        optimizer: what `make_optimizer` returned.
        student_size: V_s of the tokenizer; logits past it do not enter the loss.

    Returns:
        step(state, teacher_params, tables, batch, frozen) -> (state, metrics), where `frozen` is what
        `split_lora` leaves beside the parameters of the state; without adapters there is none. A step whose
        loss or gradient is not finite leaves parameters and moments as they were; `finite` says so.
    """
    kind = LossKind.none if teacher is None else loss.kind
    softcaps = student.config.logit_softcap, None if teacher is None else teacher.config.logit_softcap

    def objective(
        trained: Params,
        frozen: Params | None,
        teacher_params: Params | None,
        tables: LossTables | None,
        batch: Batch,
    ) -> tuple[jax.Array, Metrics]:
        # Rows are padded on the right, so causality alone keeps padding out of sight.
        of_student = student(join_lora(trained, frozen), batch.student.ids)
        of_teacher: Outputs | tuple[None, None] = (None, None)
        if teacher is not None and kind is not LossKind.none:
            assert teacher_params is not None
            of_teacher = jax.lax.stop_gradient(teacher(teacher_params, batch.teacher.ids))
        means = _blockwise if loss.block else _whole
        settled = replace(loss, kind=kind)
        ce, kd, total = means(of_student, of_teacher, tables, batch, settled, student_size, softcaps)
        if kind is LossKind.none:
            return ce, {"loss": ce, "ce": ce}
        joined, scale = total_loss(
            ce,
            kd,
            dynamic_scaling=loss.dynamic_scaling,
            max_scale=loss.max_scale,
            kd_weight=loss.kd_weight,
            ce_weight=loss.ce_weight,
        )
        total = joined if total is None else total
        capped = loss.dynamic_scaling & kd_scale_capped(ce, kd, loss.max_scale)
        chunks = valid_chunks(batch.alignment).sum()
        metrics = {"loss": total, "ce": ce, "kd": kd, "kd_scale": scale, "kd_scale_capped": capped}
        return total, {**metrics, "chunks": chunks}

    def step(
        state: TrainState,
        teacher_params: Params | None,
        tables: LossTables | None,
        batch: Batch,
        frozen: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        gradient_of = jax.value_and_grad(objective, has_aux=True)
        (value, metrics), gradient = gradient_of(state.params, frozen, teacher_params, tables, batch)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        metrics = {**metrics, "gradient_norm": norm, "finite": finite}
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


Outputs = tuple[jax.Array, jax.Array]  # hidden states [B, T, D] and unembedding [V, D]
Softcaps = tuple[float | None, float | None]  # of the student's and of the teacher's logits


def _blockwise(
    student: Outputs,
    teacher: Outputs | tuple[None, None],
    tables: LossTables | None,
    batch: Batch,
    loss: LossConfig,
    student_size: int,
    softcaps: Softcaps,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """CE, KD and, with weights known beforehand, their total, without logits of more than a block."""
    (hidden, unembedding), (teacher_hidden, teacher_unembedding) = student, teacher
    known = loss.kind is not LossKind.none and not loss.dynamic_scaling
    assert loss.block is not None
    found = blockwise_loss(
        hidden,
        unembedding,
        teacher_hidden,
        teacher_unembedding,
        batch.alignment,
        tables,
        batch.student.ids,
        batch.student.targets,
        loss,
        teacher_ids=batch.teacher.ids,
        teacher_mask=batch.teacher.mask,
        student_size=student_size,
        student_softcap=softcaps[0],
        teacher_softcap=softcaps[1],
        weights=(loss.ce_weight, loss.kd_weight) if known else None,
        block=loss.block,
    )
    return found.ce, found.kd, found.total


def _whole(
    student: Outputs,
    teacher: Outputs | tuple[None, None],
    tables: LossTables | None,
    batch: Batch,
    loss: LossConfig,
    student_size: int,
    softcaps: Softcaps,
) -> tuple[jax.Array, jax.Array, None]:
    """CE and KD, from logits [B, T, V] of both sides."""
    student_logits = logits(*student, softcap=softcaps[0])[..., :student_size]
    ce = masked_mean(*next_token_cross_entropy(student_logits, batch.student.ids, batch.student.targets))
    if loss.kind is LossKind.none or tables is None:
        return ce, jnp.float32(0), None
    hidden, unembedding = teacher
    assert hidden is not None and unembedding is not None  # noqa: PT018
    values = distillation_loss(loss)(
        student_logits,
        logits(hidden, unembedding, softcap=softcaps[1]),
        batch.alignment,
        tables,
        batch.teacher.mask,
        student_ids=batch.student.ids,
        teacher_ids=batch.teacher.ids,
    )
    return ce, masked_mean(values, valid_chunks(batch.alignment)), None
