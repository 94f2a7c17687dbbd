"""Which distillation term, and its total with cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.errors import UserError
from xtoken_jax.losses.hybrid_kl import hybrid_kl
from xtoken_jax.losses.projection_kl import projection_kl
from xtoken_jax.projection.matrix import Partition, Projection, SplitProjection


class LossKind(Enum):
    """The distillation term; "auto" leaves the choice to the audit, "none" trains without a teacher."""

    auto = "auto"
    p_kl = "p_kl"
    h_kl = "h_kl"
    gold = "gold"
    none = "none"


class Direction(Enum):
    """Of the KL: weighed by the teacher (forward) or by the student (reverse)."""

    forward = "forward"
    reverse = "reverse"


class Merge(Enum):
    """How a chunk's positions become one distribution under P-KL."""

    mean = "mean"
    mean_normalized = "mean_normalized"


@dataclass
class LossConfig:
    """The objective.

    Attributes:
        kind: auto, p_kl, h_kl, gold or none.
        temperature: tau > 0, on both sides; the term is multiplied by tau^2.
        top_k: teacher columns that P-KL compares.
        uncommon_top_k: sorted entries that GOLD and H-KL compare.
        direction: forward or reverse KL.
        merge: mean or mean_normalized, for P-KL.
        dynamic_scaling: scale the term to the size of cross-entropy; else the two weights hold.
        max_scale: highest dynamic factor; null for the official, unbounded one.
        kd_weight, ce_weight: without dynamic scaling.
    """

    kind: LossKind = LossKind.auto
    temperature: float = 1.0
    top_k: int = 8192
    uncommon_top_k: int = 8192
    direction: Direction = Direction.forward
    merge: Merge = Merge.mean
    dynamic_scaling: bool = True
    max_scale: float | None = 10.0
    kd_weight: float = 1.0
    ce_weight: float = 0.1

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        if not self.temperature > 0:
            raise UserError(f"loss.temperature={self.temperature}: must be above 0")
        for name in ("top_k", "uncommon_top_k"):
            if getattr(self, name) < 1:
                raise UserError(f"loss.{name}={getattr(self, name)}: must be at least 1")
        if self.max_scale is not None and not self.max_scale > 0:
            raise UserError(f"loss.max_scale={self.max_scale}: must be above 0, or null for no bound")
        if self.kd_weight < 0 or self.ce_weight < 0:
            raise UserError(f"loss weights must not be negative: {self.kd_weight}, {self.ce_weight}")


# What the distillation term reads beside logits: W, or the partition made from it.
LossTables = SplitProjection | Partition
DistillationLoss = Callable[[jax.Array, jax.Array, Alignment, LossTables, jax.Array], jax.Array]


def distillation_loss(config: LossConfig) -> DistillationLoss:
    """The chosen term: (student_logits, teacher_logits, alignment, tables, teacher_mask) -> [B, C].

    Raises:
        ValueError: "auto" or "none", which name no term.
    """
    direction = config.direction.value
    if config.kind is LossKind.p_kl:
        merge = config.merge.value
        term = partial(
            projection_kl,
            temperature=config.temperature,
            top_k=config.top_k,
            direction=direction,
            merge=merge,
        )
        return lambda s, t, alignment, tables, mask: term(
            s, t, alignment, cast(SplitProjection, tables), teacher_mask=mask
        )
    if config.kind in (LossKind.gold, LossKind.h_kl):
        hybrid = partial(
            hybrid_kl,
            temperature=config.temperature,
            uncommon_top_k=config.uncommon_top_k,
            direction=direction,
        )
        return lambda s, t, alignment, tables, mask: hybrid(s, t, alignment, cast(Partition, tables))
    raise ValueError(f"{config.kind} is not a distillation term")


def loss_tables(kind: LossKind, projection: Projection) -> LossTables:
    """What `distillation_loss` of this kind reads: W split for speed, or a partition (host)."""
    if kind is LossKind.p_kl:
        return projection.split()
    return Partition.strict(projection) if kind is LossKind.gold else Partition.relaxed(projection)


def dynamic_scale(ce: jax.Array, kd: jax.Array, max_scale: float | None = None) -> jax.Array:
    """The factor that makes the distillation term as large as cross-entropy (no gradient).

    CE / KD, and 1 where KD is 0 (X-Token, section 4).

    Args:
        ce, kd: float scalars.
        max_scale: highest factor. It also stands where KD is negative, which "mean"-merged
            P-KL can be: the bare ratio would then turn the gradient around. None: the bare
            ratio, as in the official implementation.

    Returns:
        float32 scalar.
    """
    ce, kd = jax.lax.stop_gradient(ce), jax.lax.stop_gradient(kd)
    ratio = jnp.where(kd == 0, 1.0, ce / jnp.where(kd == 0, 1.0, kd))
    if max_scale is None:
        return ratio
    return jnp.where(kd == 0, 1.0, jnp.where(kd < ce / max_scale, max_scale, ratio))


def total_loss(
    ce: jax.Array,
    kd: jax.Array,
    *,
    dynamic_scaling: bool = True,
    max_scale: float | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """sg(CE / KD) KD + CE, or kd_weight KD + ce_weight CE.

    Args:
        ce: scalar, mean next-token cross-entropy.
        kd: scalar, mean distillation term.
        dynamic_scaling: the first form; the weights then do not enter.
        max_scale: see `dynamic_scale`.

    Returns:
        The loss and the factor that KD got, float32 scalars.
    """
    if not dynamic_scaling:
        return kd_weight * kd + ce_weight * ce, jnp.float32(kd_weight)
    scale = dynamic_scale(ce, kd, max_scale)
    return scale * kd + ce, scale
