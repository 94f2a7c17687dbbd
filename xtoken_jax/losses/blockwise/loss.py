"""Losses from hidden states and unembeddings, a block of positions at a time: no [B, T, V] array exists.

Positions are put in the order of their chunks, and a block is a run of whole chunks. Its logits, the
losses' values and the slopes by its logits live only while the block is worked on; what stays is two
sums and the gradients by hidden states and unembedding. A chunk with more positions than a block goes
through twice: first its parts are added up, then each part gets its gradient.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from xtoken_jax.alignment.batch import Alignment, StoredRows
from xtoken_jax.distributed.mesh import BATCH
from xtoken_jax.losses.blockwise.checks import check_student, check_teacher
from xtoken_jax.losses.blockwise.terms import TermSetting
from xtoken_jax.losses.blockwise.walk import Inputs, Means, Setting, walk
from xtoken_jax.losses.checks import check_count, check_settings, check_width
from xtoken_jax.losses.config import LossConfig, LossKind
from xtoken_jax.losses.math.chunks import valid_chunks
from xtoken_jax.losses.total import PARTS
from xtoken_jax.projection.matrix import LearnableProjection


class BlockwiseLoss(NamedTuple):
    """float32 scalars.

    Attributes:
        ce, kd: the two means.
        ce_count, kd_count: how many positions and chunks they are over.
        total: their sum by the weights that were given, None without.
        parts: of the term by name, as in `PARTS`: means over its chunks, without a gradient.
    """

    ce: jax.Array
    kd: jax.Array
    ce_count: jax.Array
    kd_count: jax.Array
    total: jax.Array | None
    parts: dict[str, jax.Array]


def blockwise_loss(
    student_hidden: jax.Array,
    student_unembedding: jax.Array,
    teacher_hidden: jax.Array | None,
    teacher_unembedding: jax.Array | None,
    alignment: Alignment | None,
    tables: Any,
    student_ids: jax.Array,
    student_targets: jax.Array | None,
    config: LossConfig,
    *,
    teacher_stored: StoredRows | None = None,
    teacher_ids: jax.Array | None = None,
    teacher_mask: jax.Array | None = None,
    student_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    ce_count: jax.Array | float | None = None,
    kd_count: jax.Array | float | None = None,
    weights: tuple[float, float] | None = None,
    block: int = 128,
    teacher_block: int | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    data_axes: tuple[str, ...] = BATCH,
) -> BlockwiseLoss:
    """Cross-entropy and the distillation term, from hidden states.

    The same as `masked_mean` of `next_token_cross_entropy` and of `distillation_loss(config)` over the
    logits hidden @ unembedding^T, soft-capped where the models do so and cut to the tokenizers' sizes.
    `ce` and `kd` can be joined in any way, such as by `total_loss`.

    The gradient goes to student_hidden, student_unembedding and a learnable W. The backward pass computes
    a block's logits again, when the factors of the two means are known: one more product with the
    student's unembedding (for rows of V_t, also the teacher's) than the plain form has. With `weights`
    they are known beforehand, the gradient is ready when the forward pass is, and every block is
    visited once.

    Args:
        student_hidden: float32 or bfloat16 [B, T_s, D_s].
        student_unembedding: [>= V_s, D_s]; rows past the tokenizer's do not count.
        teacher_hidden, teacher_unembedding: [B, T_t, D_t] and [>= V_t, D_t]; no gradient. None with
            `LossKind.none`, as alignment and tables, and with `teacher_stored`.
        alignment: chunk ids of tokens and `valid` [B, C].
        tables: what `loss_tables` returned for this kind.
        student_ids: int32 [B, T_s].
        student_targets: bool [B, T_s], tokens that count as labels; None for no cross-entropy (0).
        config: the term and its settings; weights and scaling are not read here.
        teacher_stored: the teacher's distributions from a cache, in the place of its hidden states.
        teacher_ids: int32 [B, T_t], for merges "first" and "last", and for ALM.
        teacher_mask: bool [B, T_t], real positions; others do not choose columns. None: all do.
        student_size: V_s; None: what the tables say, or all rows of the unembedding.
        student_softcap, teacher_softcap: c > 0 of models whose logits are c tanh(hidden @ unembedding^T / c)
            (Gemma 2, arXiv 2408.00118, section 2), Python floats. None: no cap.
        ce_count, kd_count: how many positions and chunks of all micro-batches count. None: of this one.
        weights: of CE and of KD, constants: for a `total`, which then alone has a gradient.
        block: student positions at a time; memory grows with it, overhead falls.
        teacher_block: teacher positions at a time. None: as many more as its rows are longer, and 1/8.
        mesh: None: that of `jax.set_mesh`, if any.
        data_axes: mesh axes that split B; rows stay where they are. B must be divisible by them.

    Returns:
        BlockwiseLoss.

    Raises:
        ValueError: "auto", a missing argument, a mean-normalized or other merge that the kind lacks,
            a cap that is not a number above 0, stored rows of another vocabulary or temperature.
    """
    check_student(config, student_hidden, student_unembedding, student_ids, student_targets, student_size)
    if config.kind is not LossKind.none:
        check_teacher(
            config, teacher_hidden, teacher_unembedding, teacher_stored, alignment, tables, teacher_ids,
            teacher_mask, student_ids,
        )  # fmt: skip
    check_settings(block=block, **({} if teacher_block is None else {"teacher_block": teacher_block}))
    check_count("ce_count", ce_count)
    check_count("kd_count", kd_count)
    inputs, learnt = _inputs(
        teacher_hidden, teacher_unembedding, teacher_stored, alignment, tables, student_ids, student_targets,
        config, teacher_ids, teacher_mask, ce_count, kd_count,
    )  # fmt: skip
    student_size, teacher_size = _tokenizer_sizes(student_size, student_unembedding, inputs)
    # Cut here and not block by block: over a split vocabulary that is an exchange between all devices, and
    # those that split the batch go through different numbers of blocks.
    student_unembedding = student_unembedding[:student_size]
    if inputs.teacher_unembedding is not None:
        inputs = replace(inputs, teacher_unembedding=inputs.teacher_unembedding[:teacher_size])
    caps = _cap("student_softcap", student_softcap), _cap("teacher_softcap", teacher_softcap)
    setting = _setting(config, inputs, caps, (block, teacher_block), mesh, data_axes)
    arguments = student_hidden, student_unembedding, learnt, inputs
    total = None
    if weights is not None:
        total, ce, kd, parts = _weighted(setting, (float(weights[0]), float(weights[1])), *arguments)
        ce, kd = jax.lax.stop_gradient((ce, kd))
    elif setting.term is None or inputs.labelled is None:  # one mean alone: its weight is known
        both = (0.0, 1.0) if inputs.labelled is None else (1.0, 0.0)
        alone, ce, kd, parts = _weighted(setting, both, *arguments)
        ce, kd = (ce, alone) if inputs.labelled is None else (alone, kd)
    else:
        ce, kd, parts = _recomputed(setting, *arguments)
    named = dict(zip(PARTS.get(config.kind, ()), jax.lax.stop_gradient(parts), strict=True))
    return BlockwiseLoss(ce, kd, inputs.ce_count, inputs.kd_count, total, named)


def _inputs(
    teacher_hidden: jax.Array | None,
    teacher_unembedding: jax.Array | None,
    teacher_stored: StoredRows | None,
    alignment: Alignment | None,
    tables: Any,
    student_ids: jax.Array,
    student_targets: jax.Array | None,
    config: LossConfig,
    teacher_ids: jax.Array | None,
    teacher_mask: jax.Array | None,
    ce_count: jax.Array | float | None,
    kd_count: jax.Array | float | None,
) -> tuple[Inputs, jax.Array | None]:
    learnt = labelled = None
    if student_targets is not None:
        targets = jnp.asarray(student_targets, bool)
        labelled = jnp.concatenate([targets[:, 1:], jnp.zeros_like(targets[:, :1])], axis=1)
    if ce_count is None:
        ce_count = 0.0 if labelled is None else labelled.sum(dtype=jnp.float32)
    if config.kind is LossKind.none:
        teacher_hidden = teacher_unembedding = alignment = tables = teacher_ids = teacher_mask = None
        teacher_stored = None
        kd_count = 0.0 if kd_count is None else kd_count
    else:
        if not config.needs_ids:
            teacher_ids = None
        kd_count = (
            valid_chunks(cast(Alignment, alignment)).sum(dtype=jnp.float32) if kd_count is None else kd_count
        )
        if isinstance(tables, LearnableProjection):
            # The weights are made once for all blocks; from the gradient by them it goes on to the logits.
            tables = tables.split()
            learnt = tables.weights
    inputs = Inputs(
        teacher_hidden, teacher_stored, alignment, jnp.asarray(student_ids), labelled, teacher_ids,
        teacher_mask, teacher_unembedding, tables, jnp.asarray(ce_count, jnp.float32),
        jnp.asarray(kd_count, jnp.float32),
    )  # fmt: skip
    return jax.tree.map(jax.lax.stop_gradient, jax.tree.map(jnp.asarray, inputs)), learnt


def _tokenizer_sizes(given: int | None, unembedding: jax.Array, inputs: Inputs) -> tuple[int, int | None]:
    """V_s and V_t; None for all that there are, or for no teacher."""
    if inputs.tables is None:
        return unembedding.shape[0] if given is None else given, None
    size = inputs.tables.student_size
    if given not in (None, size):
        raise ValueError(f"student_size={given}, but the tables are for {size} tokens")
    check_width("student_unembedding", unembedding, len(unembedding), size, "tables")
    return size, inputs.tables.teacher_size


def _setting(
    config: LossConfig,
    inputs: Inputs,
    caps: tuple[float | None, float | None],
    blocks: tuple[int, int | None],
    mesh: Mesh | AbstractMesh | None,
    data_axes: tuple[str, ...],
) -> Setting:
    term = None
    block, teacher_block = blocks
    if inputs.alignment is not None:
        term = TermSetting(
            config.kind, config.temperature, config.top_k, config.uncommon_top_k, config.direction.value,
            config.beta, config.merge.value, config.common_weight, config.uncommon_weight,
            config.likelihood_temperature,
        )  # fmt: skip
        lengths = inputs.alignment.student_chunks.shape[1], inputs.alignment.teacher_chunks.shape[1]
        if teacher_block is None:
            teacher_block = -(-9 * block * lengths[1] // (8 * lengths[0]))
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    axes = tuple(axis for axis in data_axes if mesh.shape.get(axis, 1) > 1)
    inside = isinstance(mesh, AbstractMesh) and set(axes) <= set(mesh.manual_axes)
    return Setting(
        term,
        *caps,
        block,
        teacher_block or block,
        axes,
        mesh if axes and not inside else None,
    )


def _cap(name: str, softcap: float | None) -> float | None:
    if softcap is None:
        return None
    if not 0 < softcap < math.inf:
        raise ValueError(f"{name}={softcap} must be a number above 0, or None for no cap")
    return float(softcap)


# Two ways to a gradient: around each, a custom_vjp, so that nothing is differentiated through the walk.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(setting: Setting, *arguments: Any) -> Means:
    return walk(setting, None, *arguments)[0]


def _recomputed_forward(setting: Setting, *arguments: Any) -> tuple[Any, Any]:
    return walk(setting, None, *arguments)[0], arguments


def _recomputed_backward(setting: Setting, arguments: Any, slopes: Any) -> tuple:
    _, gradient = walk(setting, slopes[:2], *arguments)
    return *_cast(gradient, arguments), None


_recomputed.defvjp(_recomputed_forward, _recomputed_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted(setting: Setting, weights: tuple[float, float], *arguments: Any) -> tuple[jax.Array, ...]:
    return _total(weights, walk(setting, None, *arguments)[0])


def _weighted_forward(setting: Setting, weights: tuple[float, float], *arguments: Any) -> tuple[Any, Any]:
    values, gradient = walk(setting, weights, *arguments)
    return _total(weights, values), (gradient, _likes(arguments))


def _weighted_backward(setting: Setting, weights: Any, residuals: Any, slopes: Any) -> tuple:
    gradient, likes = residuals
    return *_cast(jax.tree.map(lambda g: slopes[0] * g, gradient), likes), None


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _total(weights: tuple[float, float], values: Means) -> tuple[jax.Array, ...]:
    return weights[0] * values.ce + weights[1] * values.kd, *values


def _likes(arguments: Any) -> list[jax.Array]:
    """Of the dtypes that the gradients must have."""
    return [jnp.zeros(0, x.dtype) for x in arguments[:2]]


def _cast(gradient: Any, like: Any) -> tuple:
    hidden, unembedding, learnt = gradient
    return hidden.astype(like[0].dtype), unembedding.astype(like[1].dtype), learnt
