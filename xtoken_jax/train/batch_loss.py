"""The objective of a batch from hidden states: cross-entropy, a term for each teacher, and their total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.alignment.batch import Alignment, StoredRows, TokenRows
from xtoken_jax.data.batches import Batch, TeacherBatch
from xtoken_jax.losses import (
    LossConfig,
    LossKind,
    TeachersConfig,
    TeacherScores,
    TeachersMode,
    TeacherTerm,
    blockwise_teacher_scores,
    combine_teachers,
    kd_scale_capped,
    masked_mean,
    next_token_cross_entropy,
    total_loss,
    valid_chunks,
)
from xtoken_jax.losses.agreement import top_token_agreement
from xtoken_jax.losses.blockwise.loss import blockwise_loss
from xtoken_jax.losses.blockwise.teacher import stored_likeliest, stored_logits
from xtoken_jax.losses.teachers import vocabulary_factors
from xtoken_jax.losses.total import PARTS, LossTables, distillation_parts
from xtoken_jax.models.decoder import Model, logits

Metrics = dict[str, jax.Array]
Outputs = tuple[jax.Array, jax.Array]  # hidden states [B, T, D] and unembedding [V, D]


@dataclass(frozen=True)
class Teacher:
    """What is static about a teacher.

    Attributes:
        model: the network; None where its distributions come with the batch, from a cache.
        loss: its term, the kind settled (not "auto" or "none"); scaling and weights are not read here.
        weight: alpha > 0 of its term in the sum of all.
        size: V_t of its tokenizer; None where the teachers' mode does not need it.
        partners: int32 [V_t], as `top_token_agreement` reads them; None for no such figure.
    """

    model: Model | None
    loss: LossConfig
    weight: float = 1.0
    size: int | None = None
    partners: np.ndarray | None = field(default=None, compare=False)


class Means(NamedTuple):
    """float32 scalars.

    Attributes:
        ce: mean next-token cross-entropy.
        kd: by teacher, the mean of its term over its chunks.
        total: their sum by weights known beforehand; None under dynamic scaling.
        parts: by teacher, those of its term by name.
        scores: by teacher, where the weights of teachers are computed from them.
    """

    ce: jax.Array
    kd: dict[str, jax.Array]
    total: jax.Array | None
    parts: Mapping[str, Mapping[str, jax.Array]] = MappingProxyType({})
    scores: Mapping[str, TeacherScores] = MappingProxyType({})


class _Found(NamedTuple):
    ce: jax.Array
    kd: jax.Array
    total: jax.Array | None
    parts: dict[str, jax.Array]


class _Read(NamedTuple):
    """What a term reads of its teacher."""

    teacher: Teacher
    outputs: Outputs | None  # None for a cached teacher
    tables: LossTables
    batch: TeacherBatch


@dataclass(frozen=True)
class Objective:
    """CE and KD = sum_m alpha_m KD_m, joined as `total_loss` does (X-Token, section 4).

    Each teacher has its own rows, alignment, W and term; the student's hidden states are shared, and
    cross-entropy is computed once.

    Attributes:
        student: the network.
        teachers: by name; none for cross-entropy alone.
        loss: scaling, weights and block; the terms are the teachers' own.
        student_size: V_s of the tokenizer; logits past it do not enter.
        packed: whether a row may hold several documents, each read as if it were alone. Rows of one
            document, padded on the right, need no segments: causality keeps padding out of sight.
        combine: how the terms of several teachers make one.
    """

    student: Model
    teachers: Mapping[str, Teacher]
    loss: LossConfig
    student_size: int
    packed: bool = True
    combine: TeachersConfig = field(default_factory=TeachersConfig)

    def segments(self, rows: TokenRows) -> jax.Array | None:
        """What a model is told of the documents in its rows, int32 [B, T]."""
        return rows.segments if self.packed else None

    def means(
        self,
        of_student: Outputs,
        of_teachers: Mapping[str, Outputs],
        tables: Mapping[str, LossTables],
        batch: Batch,
    ) -> Means:
        """The means over a batch; teachers get no gradient, and of cached ones there are no outputs."""
        one = self._blockwise if self.loss.block else self._whole
        if not self.teachers:
            alone = one(of_student, None, batch, LossConfig(kind=LossKind.none), with_ce=True)
            return Means(alone.ce, {}, None)
        ces: list[jax.Array] = []
        kd, totals, parts = {}, [], {}
        outputs = jax.lax.stop_gradient(dict(of_teachers))
        teachers, factors = self.teachers, self._factors()
        if self.combine.mode is TeachersMode.averaged_logits:
            teachers, outputs = self._averaged(outputs)
        for name, teacher in teachers.items():
            read = _Read(teacher, outputs.get(name), tables[name], batch.teachers[name])
            # Cross-entropy is walked with the first term, whose logits it shares.
            found = one(of_student, read, batch, teacher.loss, with_ce=not ces, factor=factors[name])
            kd[name], parts[name] = found.kd, found.parts
            ces.append(found.ce)
            totals.append(found.total)
        known = [total for total in totals if total is not None]
        total = sum(known, jnp.float32(0)) if known else None
        return Means(ces[0], kd, total, parts, self._scores(of_teachers, batch))

    def _factors(self) -> dict[str, float]:
        """What each teacher's term is multiplied by for its vocabulary, 1 unless that is configured."""
        if not self.combine.scale_by_vocabulary:
            return dict.fromkeys(self.teachers, 1.0)
        sizes = [teacher.size for teacher in self.teachers.values()]
        return dict(zip(self.teachers, vocabulary_factors(sizes), strict=True))

    def _averaged(self, outputs: dict[str, Outputs]) -> tuple[dict[str, Teacher], dict[str, Outputs]]:
        """One teacher whose logits are the weighted mean of those of all.

        sum_m w_m h_m U_m' is one product of the joined widths: [w_1 h_1, w_2 h_2, ...] [U_1, U_2, ...]'.
        """
        first, total = next(iter(self.teachers)), sum(t.weight for t in self.teachers.values())
        hidden = [outputs[name][0] * (t.weight / total) for name, t in self.teachers.items()]
        unembedding = [outputs[name][1][: self.student_size] for name in self.teachers]
        joined = jnp.concatenate(hidden, axis=-1), jnp.concatenate(unembedding, axis=-1)
        return {first: self.teachers[first]}, {first: joined}

    def _scores(self, of_teachers: Mapping[str, Outputs], batch: Batch) -> dict[str, TeacherScores]:
        """Of each teacher on its own tokens, where its weight depends on them."""
        if self.combine.measured is None:
            return {}
        found = {}
        for name, teacher in self.teachers.items():
            rows, stored = batch.teachers[name].rows, batch.teachers[name].stored
            assert teacher.size is not None
            read = stored if teacher.model is None else of_teachers[name]
            assert read is not None
            found[name] = blockwise_teacher_scores(
                read, rows.ids, rows.mask, size=teacher.size, softcap=_softcap(teacher)
            )
        return found

    def join(self, means: Means, batch: Batch) -> tuple[jax.Array, Metrics]:
        """The loss, and what is reported of it."""
        ce = means.ce
        counted = {"tokens": batch.student.targets[:, 1:].sum(dtype=jnp.int32)}
        if not self.teachers:
            return ce, {"loss": ce, "ce": ce, **counted}
        loss = self.loss
        kd, alphas = self._combined(means)
        joined, scale = total_loss(
            ce,
            kd,
            dynamic_scaling=loss.dynamic_scaling,
            max_scale=loss.max_scale,
            kd_weight=loss.kd_weight,
            ce_weight=loss.ce_weight,
        )
        total = joined if means.total is None else means.total
        capped = loss.dynamic_scaling & kd_scale_capped(ce, kd, loss.max_scale)
        metrics = {"loss": total, "ce": ce, "kd": kd, "kd_scale": scale, "kd_scale_capped": capped, **counted}
        if self.combine.measured is not None:
            metrics |= {f"weight/{name}": alpha for name, alpha in zip(self.teachers, alphas, strict=True)}
        chunks = []
        for name in means.kd:
            valid = valid_chunks(batch.teachers[name].alignment)
            chunks.append(valid.sum(dtype=jnp.int32))
            metrics[f"kd/{name}"] = means.kd[name]
            for part, value in means.parts.get(name, {}).items():
                key = f"lost_mass/{name}" if part == "lost_mass" else f"kd/{name}/{part}"
                metrics[key] = value
            metrics[f"chunks/{name}"] = chunks[-1]
            metrics[f"aligned_share/{name}"] = _aligned_share(batch, name, valid)
        return total, {**metrics, "chunks": sum(chunks, jnp.int32(0))}

    def _combined(self, means: Means) -> tuple[jax.Array, jax.Array]:
        """KD of all teachers and the weight of each."""
        averaged = self.combine.mode is TeachersMode.averaged_logits
        terms = [
            TeacherTerm(kd, 1.0 if averaged else self.teachers[name].weight, means.scores.get(name),
                        self.teachers[name].size)
            for name, kd in means.kd.items()
        ]  # fmt: skip
        return combine_teachers(
            terms,
            combine="select_teacher" if self.combine.mode is TeachersMode.select else "sum",
            score=self.combine.measured,
            sharpness=self.combine.sharpness,
            scale_by_vocabulary=self.combine.scale_by_vocabulary,
        )

    def agreement(
        self, of_student: Outputs, of_teachers: Mapping[str, Outputs], batch: Batch, wanted: jax.Array | bool
    ) -> Metrics:
        """`top_token_agreement` with each teacher; NaN, and no work, where it is not wanted.

        It takes both unembeddings over all positions once more, with a cached teacher the student's alone,
        which is too much for every step.
        """
        found = {}
        for name, teacher in self.teachers.items():
            if teacher.partners is not None:
                read = batch.teachers[name]
                theirs = read.stored if teacher.model is None else of_teachers[name]
                arguments = *of_student, theirs, read.alignment, teacher.partners
                found[f"agreement/{name}"] = jax.lax.cond(
                    wanted,
                    self._agreement,
                    lambda *_: jnp.float32(jnp.nan),
                    *jax.lax.stop_gradient(arguments),
                )
        return found

    def _agreement(
        self,
        hidden: jax.Array,
        unembedding: jax.Array,
        theirs: Outputs | StoredRows,
        alignment: Alignment,
        partners: jax.Array,
    ) -> jax.Array:
        """With one teacher, of whose outputs or stored rows."""
        known = stored_likeliest(theirs) if isinstance(theirs, StoredRows) else theirs
        return top_token_agreement(
            hidden, unembedding, known, alignment, partners, student_size=self.student_size
        )

    def _weights(self, teacher: Teacher, with_ce: bool, factor: float) -> tuple[float, float] | None:
        """Of CE and of one teacher's KD, where they are known beforehand."""
        if self.loss.dynamic_scaling or self.combine.measured is not None:
            return None
        weight = 1.0 if self.combine.mode is TeachersMode.averaged_logits else teacher.weight
        return self.loss.ce_weight * with_ce, self.loss.kd_weight * weight * factor

    def _blockwise(
        self,
        of_student: Outputs,
        read: _Read | None,
        batch: Batch,
        loss: LossConfig,
        *,
        with_ce: bool,
        factor: float = 1.0,
    ) -> _Found:
        """CE and one teacher's KD and, with weights known beforehand, their total, a block at a time."""
        assert self.loss.block is not None
        common: dict[str, Any] = {
            "student_size": self.student_size,
            "student_softcap": self.student.config.logit_softcap,
            "block": self.loss.block,
        }
        targets = batch.student.targets if with_ce else None
        if read is None:
            nothing = (None, None, None, None)
            found = blockwise_loss(*of_student, *nothing, batch.student.ids, targets, loss, **common)
        else:
            hidden, unembedding = (None, None) if read.outputs is None else read.outputs
            found = blockwise_loss(
                *of_student,
                hidden,
                unembedding,
                read.batch.alignment,
                read.tables,
                batch.student.ids,
                targets,
                loss,
                teacher_stored=read.batch.stored if read.outputs is None else None,
                teacher_ids=read.batch.rows.ids,
                teacher_mask=read.batch.rows.mask,
                teacher_softcap=_softcap(read.teacher),
                weights=self._weights(read.teacher, with_ce, factor),
                **common,
            )
        return _Found(found.ce, found.kd, found.total, found.parts)

    def _whole(
        self,
        of_student: Outputs,
        read: _Read | None,
        batch: Batch,
        loss: LossConfig,
        *,
        with_ce: bool,
        factor: float = 1.0,
    ) -> _Found:
        """The same from logits [B, T, V] of both sides."""
        student_logits = logits(*of_student, softcap=self.student.config.logit_softcap)
        student_logits = student_logits[..., : self.student_size]
        ce = kd = jnp.float32(0)
        if with_ce:
            values = next_token_cross_entropy(student_logits, batch.student.ids, batch.student.targets)
            ce = masked_mean(*values)
        if read is None:
            return _Found(ce, kd, None, {})
        by_chunk, parts = distillation_parts(loss)(
            student_logits,
            _logits(read, loss),
            read.batch.alignment,
            read.tables,
            read.batch.rows.mask,
            student_ids=batch.student.ids,
            teacher_ids=read.batch.rows.ids,
        )
        valid = valid_chunks(read.batch.alignment)
        kd = masked_mean(by_chunk, valid)
        named = {
            name: jax.lax.stop_gradient(masked_mean(part, valid))
            for name, part in zip(PARTS.get(loss.kind, ()), parts, strict=True)
        }
        weights = self._weights(read.teacher, with_ce, factor)
        return _Found(ce, kd, None if weights is None else weights[0] * ce + weights[1] * kd, named)


def _softcap(teacher: Teacher) -> float | None:
    """Of its logits; stored ones have theirs."""
    return None if teacher.model is None else teacher.model.config.logit_softcap


def _logits(read: _Read, loss: LossConfig) -> jax.Array:
    """float32 [B, T, >= V_t] of a teacher."""
    if read.outputs is not None:
        return logits(*read.outputs, softcap=_softcap(read.teacher))
    assert read.batch.stored is not None
    return stored_logits(read.batch.stored, loss.logit_temperature)


def _aligned_share(batch: Batch, teacher: str, valid: jax.Array) -> jax.Array:
    """The share of the student's tokens that are in a chunk that counts."""
    ids, mask = jnp.asarray(batch.teachers[teacher].alignment.student_chunks), batch.student.mask
    inside = jnp.take_along_axis(valid, jnp.maximum(ids, 0), axis=1) & (ids >= 0)
    return inside.sum(dtype=jnp.float32) / jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)
