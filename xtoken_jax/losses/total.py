"""Which distillation term, and its total with cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.errors import UserError
from xtoken_jax.losses.checks import (
    PROJECTIONS,
    check_config,
    check_scalar,
    check_settings,
    check_sides,
    check_tables,
    check_word,
)
from xtoken_jax.losses.config import Direction, LossConfig, LossKind, Merge
from xtoken_jax.losses.terms.alm import likelihood_matching
from xtoken_jax.losses.terms.hybrid_kl import hybrid_terms, weighed_terms
from xtoken_jax.losses.terms.prefix_kl import prefix_parts
from xtoken_jax.losses.terms.projection_kl import projection_parts
from xtoken_jax.losses.terms.same_vocabulary import same_vocabulary_kl_by_chunk
from xtoken_jax.losses.terms.uld import rank_l1
from xtoken_jax.projection.events import PrefixTables
from xtoken_jax.projection.matrix import LearnableProjection, Partition, Projection, SplitProjection

__all__ = [
    "PARTS",
    "Direction",
    "DistillationLoss",
    "DistillationParts",
    "LossConfig",
    "LossKind",
    "LossTables",
    "Merge",
    "VocabularySizes",
    "distillation_loss",
    "distillation_parts",
    "dynamic_scale",
    "kd_scale_capped",
    "loss_tables",
    "total_loss",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VocabularySizes:
    """V_s and V_t of the tokenizers, all that ULD, ALM and same-vocabulary distillation need to know."""

    student: int = field(metadata={"static": True})
    teacher: int | None = field(metadata={"static": True})

    @property
    def student_size(self) -> int:
        """V_s, by the name that all tables have for it."""
        return self.student

    @property
    def teacher_size(self) -> int | None:
        """V_t."""
        return self.teacher


# What the distillation term reads beside logits: W, the partition made from it, events, or sizes.
LossTables = SplitProjection | LearnableProjection | Partition | PrefixTables | VocabularySizes


# What the term of each kind reads.
TABLES: dict[LossKind, tuple[type, ...]] = {
    LossKind.p_kl: PROJECTIONS,
    LossKind.gold: (Partition,),
    LossKind.h_kl: (Partition,),
    LossKind.prefix_kl: (PrefixTables,),
    LossKind.uld: (VocabularySizes,),
    LossKind.alm: (VocabularySizes,),
    LossKind.same_vocabulary: (VocabularySizes,),
}

# What a term is reported in beside its sum; all means over chunks. P-KL's is no part of it: the share of the
# student's mass that W sends to no column compared.
PARTS = {
    LossKind.p_kl: ("lost_mass",),
    LossKind.h_kl: ("common", "uncommon"),
    LossKind.gold: ("common", "uncommon"),
    LossKind.prefix_kl: ("start", "inside"),
}


class DistillationLoss(Protocol):
    """A term of one teacher, float32 [B, C]."""

    def __call__(
        self,
        student_logits: jax.Array,
        teacher_logits: jax.Array,
        alignment: Alignment,
        tables: LossTables,
        teacher_mask: jax.Array | None,
        *,
        student_ids: jax.Array | None = None,
        teacher_ids: jax.Array | None = None,
    ) -> jax.Array: ...


class DistillationParts(Protocol):
    """A term of one teacher, float32 [B, C], and its `PARTS`, each as large."""

    def __call__(
        self,
        student_logits: jax.Array,
        teacher_logits: jax.Array,
        alignment: Alignment,
        tables: LossTables,
        teacher_mask: jax.Array | None,
        *,
        student_ids: jax.Array | None = None,
        teacher_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]: ...


def distillation_loss(config: LossConfig) -> DistillationLoss:
    """The chosen term: (student_logits, teacher_logits, alignment, tables, teacher_mask) -> [B, C].

    Merges "first" and "last", ALM and prefix KL also read student_ids [B, T_s] and teacher_ids [B, T_t].

    Raises:
        UserError: settings that the kind does not go with.
        ValueError: "auto" or "none", which name no term.
    """
    parts = distillation_parts(config)
    return lambda *args, **ids: parts(*args, **ids)[0]


def distillation_parts(config: LossConfig) -> DistillationParts:
    """`distillation_loss` with the `PARTS` of its kind.

    Raises:
        UserError: settings that the kind does not go with.
        ValueError: "auto" or "none", which name no term.
    """
    check_config(config)
    kind, tau, beta = config.kind, config.temperature, config.beta
    direction, merge = config.direction.value, config.merge.value
    if kind in (LossKind.auto, LossKind.none):
        raise ValueError(f"{kind} is not a distillation term")
    config.validate_merge()

    def term(
        student_logits: jax.Array,
        teacher_logits: jax.Array,
        alignment: Alignment,
        tables: LossTables,
        teacher_mask: jax.Array | None,
        *,
        student_ids: jax.Array | None = None,
        teacher_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        of_tables = check_tables("tables", tables, TABLES[kind])
        check_sides(
            student_logits, teacher_logits, alignment, of_tables, "tables", student_ids=student_ids,
            teacher_ids=teacher_ids, teacher_mask=teacher_mask,
        )  # fmt: skip
        logits = (student_logits, teacher_logits)
        if kind is LossKind.p_kl:
            value, lost = projection_parts(
                *logits,
                alignment,
                cast(SplitProjection | LearnableProjection, tables),
                temperature=tau,
                top_k=config.top_k,
                direction=direction,
                beta=beta,
                merge=merge,
                teacher_ids=teacher_ids,
                teacher_mask=teacher_mask,
            )
            return value, (lost,)
        if kind in (LossKind.gold, LossKind.h_kl):
            partition = cast(Partition, tables)
            terms = hybrid_terms(
                *logits,
                alignment,
                partition,
                temperature=tau,
                uncommon_top_k=config.uncommon_top_k,
                direction=direction,
                beta=beta,
                merge=merge,
                student_ids=student_ids,
                teacher_ids=teacher_ids,
            )
            parts = weighed_terms(terms, partition, config.common_weight, config.uncommon_weight)
            return parts.common + parts.uncommon, tuple(parts)
        if kind is LossKind.prefix_kl:
            if student_ids is None or teacher_ids is None:
                raise ValueError("prefix_kl needs student_ids and teacher_ids")
            start, inside = prefix_parts(
                *logits,
                alignment,
                cast(PrefixTables, tables),
                student_ids=student_ids,
                teacher_ids=teacher_ids,
                temperature=tau,
                direction=direction,
                beta=beta,
            )
            return start + inside, (start, inside)
        sizes = cast(VocabularySizes, tables)
        if kind is LossKind.uld:
            value = rank_l1(
                *logits, alignment, temperature=tau, student_size=sizes.student, teacher_size=sizes.teacher
            )
            return value, ()
        if kind is LossKind.alm:
            if student_ids is None or teacher_ids is None:
                raise ValueError("alm needs student_ids and teacher_ids")
            value = likelihood_matching(
                *logits,
                alignment,
                student_ids=student_ids,
                teacher_ids=teacher_ids,
                likelihood_temperature=config.likelihood_temperature,
                student_size=sizes.student,
                teacher_size=sizes.teacher,
            )
            return value, ()
        value = same_vocabulary_kl_by_chunk(
            *logits,
            alignment,
            temperature=tau,
            top_k=config.top_k,
            direction=direction,
            beta=beta,
            size=sizes.student,
            teacher_mask=teacher_mask,
        )
        return value, ()

    return term


def loss_tables(kind: LossKind, projection: Projection | LearnableProjection) -> LossTables:
    """What `distillation_loss` of this kind reads (host): W split for speed, a partition, or sizes.

    Not for prefix_kl, whose tables are made of the tokenizers: `projection.prefixes.prefix_tables`.

    Raises:
        ValueError: prefix_kl, and kinds that name no term.
        UserError: a learnable W for another kind than P-KL, or a teacher of another tokenizer for
            same_vocabulary.
    """
    check_word("kind", kind, LossKind)
    check_tables("projection", projection, [Projection, LearnableProjection])
    if kind in (LossKind.auto, LossKind.none):
        raise ValueError(f"kind={kind}: names no distillation term")
    if kind is LossKind.prefix_kl:
        raise ValueError("prefix_kl reads the tables of projection.prefixes.prefix_tables(pair), not W")
    if isinstance(projection, LearnableProjection):
        if kind is not LossKind.p_kl:
            raise UserError(
                f"loss.kind={kind.value}: a learnable W gets no gradient from it; only p_kl trains W"
            )
        return projection
    if kind is LossKind.p_kl:
        return projection.split()
    if kind is LossKind.same_vocabulary:
        _check_same_vocabulary(projection)
    if kind in (LossKind.uld, LossKind.alm, LossKind.same_vocabulary):
        return VocabularySizes(projection.student_size, projection.teacher_size)
    return Partition.strict(projection) if kind is LossKind.gold else Partition.relaxed(projection)


def _check_same_vocabulary(projection: Projection) -> None:
    """W of one tokenizer with itself sends a token to itself, or to the lowest id of the same text."""
    size = projection.student_size
    indices, weights = np.asarray(projection.indices), np.asarray(projection.weights)
    reason = ""
    if projection.teacher_size not in (None, size):
        reason = f"the student's tokenizer has {size} tokens and the teacher's {projection.teacher_size}"
    else:
        first = indices[:, 0]
        exact = (first >= 0) & (first <= np.arange(size)) & (weights[:, 0] == 1.0)
        exact[exact] = first[first[exact]] == first[exact]
        other = np.flatnonzero((first >= 0) & ~exact)
        if len(other):
            reason = f"{len(other)} student tokens, the first of them {other[0]}, are not the teacher's"
    if reason:
        raise UserError(f"loss.kind=same_vocabulary: {reason}; use auto, p_kl or h_kl")


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
    _check_means(ce, kd, max_scale)
    ce, kd = jax.lax.stop_gradient(ce), jax.lax.stop_gradient(kd)
    ratio = jnp.where(kd == 0, 1.0, ce / jnp.where(kd == 0, 1.0, kd))
    if max_scale is None:
        return ratio
    return jnp.where(kd == 0, 1.0, jnp.where(kd < ce / max_scale, max_scale, ratio))


def kd_scale_capped(ce: jax.Array, kd: jax.Array, max_scale: float | None = None) -> jax.Array:
    """Whether KD is too near 0, or below it, for `dynamic_scale` to make it as large as cross-entropy.

    A run in which this stays True says little by its loss: `max_scale` then stands for the factor or,
    without one, a negative factor turns the gradient around.

    Args:
        ce, kd, max_scale: as in `dynamic_scale`.

    Returns:
        bool scalar.
    """
    _check_means(ce, kd, max_scale)
    return (kd != 0) & ((kd < 0) if max_scale is None else (kd < ce / max_scale))


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
        max_scale: see `dynamic_scale`; `kd_scale_capped` says whether it was needed.

    Returns:
        The loss and the factor that KD got, float32 scalars.
    """
    _check_means(ce, kd, max_scale)
    check_settings(kd_weight=kd_weight, ce_weight=ce_weight)
    if not dynamic_scaling:
        return kd_weight * kd + ce_weight * ce, jnp.float32(kd_weight)
    scale = dynamic_scale(ce, kd, max_scale)
    return scale * kd + ce, scale


def _check_means(ce: jax.Array, kd: jax.Array, max_scale: float | None) -> None:
    check_scalar("ce", ce)
    check_scalar("kd", kd)
    check_settings(max_scale=max_scale)
