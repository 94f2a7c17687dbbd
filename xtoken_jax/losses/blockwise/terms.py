"""The distillation terms in pieces that fit blocks: what positions add to a chunk, and what that is worth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.distributed.mesh import whole
from xtoken_jax.losses.blockwise.plan import Block
from xtoken_jax.losses.blockwise.prefix import PrefixBatch
from xtoken_jax.losses.blockwise.teacher import TeacherRows
from xtoken_jax.losses.config import LossKind
from xtoken_jax.losses.math.chunks import Merging
from xtoken_jax.losses.math.divergence import kl_terms
from xtoken_jax.losses.math.softmax import (
    actual_log_softmax,
    centred,
    log_softmax_within,
    merged_log_softmax,
    not_finite,
)
from xtoken_jax.losses.terms.alm import likelihood_kl
from xtoken_jax.losses.terms.hybrid_kl import (
    HybridTarget,
    hybrid_values,
    target_of_merged,
)
from xtoken_jax.losses.terms.prefix_kl import divergence
from xtoken_jax.losses.terms.projection_kl import (
    chunk_values,
    highest,
    learnt_softmax,
    lost_mass,
    projected_softmax,
)
from xtoken_jax.losses.terms.uld import sorted_l1
from xtoken_jax.projection.events import PrefixTables
from xtoken_jax.projection.matrix import Partition


class TermSetting(NamedTuple):
    """The fields of `LossConfig` that a term reads; hashable."""

    kind: LossKind
    temperature: float
    top_k: int | None
    uncommon_top_k: int
    direction: str
    beta: float
    merge: str
    common_weight: float | None
    uncommon_weight: float | None
    likelihood_temperature: float


@dataclass(frozen=True)
class Term:
    """A distillation term.

    Both sides are merged as sums over positions, so that a chunk may be cut: its parts are added up.

    Attributes:
        teacher: of a block, what its positions add to the teacher's side of each chunk, float32 [K, m_t].
        target: of the complete sum, what the student's chunks are compared with.
        student: (logits float32 [n, V_s] over tau, next ids [n], the block, W's learnt weights or None) ->
            float32 [K, m_s].
        values: (the complete sum, target) -> float32 [K], times tau^2; and its `PARTS`, float32 [P, K]. What
            positions are worth by themselves falls to the last of them.
        whole_rows: whether `teacher` computes rows of V_t, so that groups must be small on its side too.
        at_positions: (logits over tau, positions) -> float32 [n], what positions are worth by themselves,
            times tau^2; None for nothing.
        positions: bool [N_s], those that have such a value.
    """

    teacher: Callable[[Block], jax.Array]
    target: Callable[[jax.Array], Any]
    student: Callable[[jax.Array, jax.Array, Block, jax.Array | None], jax.Array]
    values: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]
    whole_rows: bool
    at_positions: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    positions: jax.Array | None = None


def merges_of(setting: TermSetting) -> str:
    """How positions weigh in their chunk: same-vocabulary distillation compares the first ones, ALM sums."""
    own = {LossKind.same_vocabulary: "first", LossKind.prefix_kl: "first", LossKind.alm: "sum"}
    return own.get(setting.kind, setting.merge)


def temperature_of(setting: TermSetting) -> float:
    """Of the logits on both sides; ALM has one of chunks instead."""
    return 1.0 if setting.kind is LossKind.alm else setting.temperature


def make_term(
    setting: TermSetting,
    tables: Any,
    teacher: TeacherRows,
    alignment: Alignment,
    student_ids: jax.Array,
    teacher_ids: jax.Array | None,
) -> Term:
    """The term of one batch.

    P-KL looks at all of the teacher's positions to choose columns, prefix KL at those within chunks.
    """
    if setting.kind is LossKind.prefix_kl:
        return _prefix(setting, tables, teacher, alignment, student_ids, cast(jax.Array, teacher_ids))
    if setting.kind is LossKind.p_kl:
        return _p_kl(setting, tables, teacher)
    if setting.kind in (LossKind.gold, LossKind.h_kl):
        return _hybrid(setting, tables, teacher)
    if setting.kind is LossKind.uld:
        return _uld(setting, teacher)
    if setting.kind is LossKind.alm:
        return _alm(setting, teacher)
    return _same_vocabulary(setting, teacher)


def _p_kl(setting: TermSetting, projection: Any, teacher: TeacherRows) -> Term:
    tau, merge = setting.temperature, setting.merge
    chosen = _choose(teacher, tau, sys.maxsize if setting.top_k is None else setting.top_k)
    columns = jnp.arange(teacher.size, dtype=jnp.int32) if chosen.columns is None else chosen.columns

    def of_teacher(block: Block) -> jax.Array:
        logits = chosen.logits(block.positions)
        merged = block.merging.merge(log_softmax_within(logits))
        if merge not in ("first", "last"):
            return merged
        actual = chosen.actual(block.positions, logits)
        return merged + block.merging.other_tokens(actual)[:, None]

    def of_student(
        logits: jax.Array, next_ids: jax.Array, block: Block, learnt: jax.Array | None
    ) -> jax.Array:
        if learnt is None:
            return block.merging.merge(projected_softmax(logits, projection, columns, teacher.size))
        return block.merging.merge(learnt_softmax(logits, learnt, projection, columns, teacher.size))

    return Term(
        teacher=of_teacher,
        target=log_softmax_within if merge == "mean_normalized" else lambda merged: merged,
        student=of_student,
        values=lambda m, t: (
            chunk_values(m, t, setting.direction, setting.beta) * tau**2,
            lost_mass(m)[None],
        ),
        whole_rows=chosen.columns is None,
    )


def _hybrid(setting: TermSetting, partition: Partition, teacher: TeacherRows) -> Term:
    tau, by_token = setting.temperature, setting.merge != "mean"
    matched = partition.common_teacher.shape[0] / teacher.size
    common_weight = matched if setting.common_weight is None else setting.common_weight
    uncommon_weight = 1 - matched if setting.uncommon_weight is None else setting.uncommon_weight

    def values(merged: jax.Array, target: HybridTarget) -> tuple[jax.Array, jax.Array]:
        common, uncommon = hybrid_values(merged, target, setting.direction, setting.beta)
        parts = jnp.stack([common_weight * common * tau**2, uncommon_weight * uncommon * tau**2])
        return (common_weight * common + uncommon_weight * uncommon) * tau**2, parts

    return Term(
        teacher=lambda block: _merged(teacher, block, tau, by_token),
        target=lambda merged: target_of_merged(merged, partition, setting.uncommon_top_k),
        student=lambda z, ids, block, _: merged_log_softmax(z, ids if by_token else None, block.merging),
        values=values,
        whole_rows=True,
    )


def _uld(setting: TermSetting, teacher: TeacherRows) -> Term:
    tau = setting.temperature
    return Term(
        teacher=lambda block: _merged(teacher, block, tau, False),
        target=jnp.exp,
        student=lambda z, ids, block, _: merged_log_softmax(z, None, block.merging),
        values=lambda merged, target: _alone(sorted_l1(whole(jnp.exp(merged)), whole(target)) * tau**2),
        whole_rows=True,
    )


def _alm(setting: TermSetting, teacher: TeacherRows) -> Term:
    """One number a chunk on each side, so that no row of a vocabulary is merged."""
    tau = temperature_of(setting)

    def summed(logits: jax.Array, next_ids: jax.Array, merging: Merging) -> jax.Array:
        return merging.merge(actual_log_softmax(logits, next_ids)[:, None])

    def of_teacher(block: Block) -> jax.Array:
        next_ids = cast(jax.Array, teacher.next(block.positions))
        return summed(teacher.logits(block.positions, tau), next_ids, block.merging)

    return Term(
        teacher=of_teacher,
        target=lambda merged: merged,
        student=lambda z, ids, block, _: summed(z, ids, block.merging),
        values=lambda m, t: _alone(likelihood_kl(m[:, 0], t[:, 0], setting.likelihood_temperature)),
        whole_rows=True,
    )


def _prefix(
    setting: TermSetting,
    tables: PrefixTables,
    teacher: TeacherRows,
    alignment: Alignment,
    student_ids: jax.Array,
    teacher_ids: jax.Array,
) -> Term:
    tau, direction, beta = setting.temperature, setting.direction, setting.beta

    def rows(positions: jax.Array) -> jax.Array:
        return _all_or_nothing(centred(teacher.logits(positions, tau)))

    batch = PrefixBatch.of(alignment, tables, student_ids, teacher_ids, rows, teacher.block)

    def of_teacher(block: Block) -> jax.Array:
        logits = rows(block.positions)
        return block.merging.merge(batch.teacher_events(logits, block.positions))

    def values(merged: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = divergence(target, merged, direction, beta) * tau**2
        return start, jnp.stack([start, jnp.zeros_like(start)])

    return Term(
        teacher=of_teacher,
        target=lambda merged: merged,
        student=lambda z, _, block, __: block.merging.merge(
            batch.student_events(_all_or_nothing(centred(z)), block.positions)
        ),
        values=values,
        whole_rows=True,
        at_positions=lambda z, positions: (
            batch.steps(_all_or_nothing(centred(z)), positions, direction, beta) * tau**2
        ),
        positions=batch.by_student.size > 0,
    )


def _same_vocabulary(setting: TermSetting, teacher: TeacherRows) -> Term:
    tau = setting.temperature
    chosen = _choose(teacher, tau, sys.maxsize if setting.top_k is None else setting.top_k)

    def of_student(
        logits: jax.Array, next_ids: jax.Array, block: Block, learnt: jax.Array | None
    ) -> jax.Array:
        if chosen.columns is not None:
            logits = jnp.where(not_finite(logits)[:, None], jnp.nan, logits[:, chosen.columns])
        return merged_log_softmax(logits, None, block.merging)

    return Term(
        teacher=lambda block: block.merging.merge_wide(log_softmax_within(chosen.logits(block.positions))),
        target=lambda merged: merged,
        student=of_student,
        values=lambda m, t: _alone(kl_terms(t, m, setting.direction, beta=setting.beta).sum(-1) * tau**2),
        whole_rows=chosen.columns is None,
    )


def _alone(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A term without parts."""
    return values, jnp.zeros((0, len(values)), jnp.float32)


def _merged(teacher: TeacherRows, block: Block, tau: float, by_token: bool) -> jax.Array:
    next_ids = teacher.next(block.positions) if by_token else None
    return merged_log_softmax(teacher.logits(block.positions, tau), next_ids, block.merging)


@dataclass(frozen=True)
class _Chosen:
    """The teacher at the compared columns only, so that its rows are short.

    Attributes:
        columns: int32 [k], None for all.
        rows: what the columns' logits are made from.
        temperature: tau.
        log_actual: float32 [N_t], the log-probability of the token that comes, or None.
        faulty: bool [N_t], positions with a NaN or +inf in any column; None without columns.
    """

    columns: jax.Array | None
    rows: TeacherRows
    temperature: float
    log_actual: jax.Array | None
    faulty: jax.Array | None = None

    def logits(self, positions: jax.Array) -> jax.Array:
        """float32 [n, k]."""
        logits = self.rows.logits(positions, self.temperature)
        if self.faulty is None:
            return logits
        return jnp.where(self.faulty.at[positions].get(mode="clip")[:, None], jnp.nan, logits)

    def actual(self, positions: jax.Array, logits: jax.Array) -> jax.Array:
        """float32 [n]: log-probabilities of the tokens that come, over the full vocabulary."""
        if self.log_actual is not None:
            return self.log_actual.at[positions].get(mode="clip")
        return _log_actual(logits, cast(jax.Array, self.rows.next(positions)))


def _all_or_nothing(logits: jax.Array) -> jax.Array:
    """Logits [n, V] in which a row that is not finite is NaN in every column: no event can hide it."""
    return jnp.where(not_finite(logits)[:, None], jnp.nan, logits)


def _log_actual(logits: jax.Array, next_ids: jax.Array) -> jax.Array:
    logits = centred(logits)
    own = jnp.take_along_axis(logits, next_ids[:, None], axis=-1)[:, 0]
    return own - jax.nn.logsumexp(logits, axis=-1)


def _choose(teacher: TeacherRows, tau: float, top_k: int) -> _Chosen:
    """One pass over the teacher's positions, which keeps the maximum of each column."""
    if top_k >= teacher.size:
        return _Chosen(None, teacher, tau, None)
    length, block = teacher.length, teacher.block
    real = jnp.ones(length, bool) if teacher.real is None else teacher.real
    everywhere = teacher.next_ids is not None or teacher.real is None
    wanted = jnp.ones(length, bool) if everywhere else real
    (order,) = jnp.nonzero(wanted, size=length, fill_value=length)
    order = order.astype(jnp.int32)

    def more(carry: tuple) -> jax.Array:
        return carry[0] < wanted.sum()

    def look(carry: tuple) -> tuple:
        place, top, log_actual, faulty = carry
        places = place + jnp.arange(block, dtype=jnp.int32)
        positions = order.at[places].get(mode="fill", fill_value=length)
        logits = teacher.logits(positions, tau)
        if log_actual is not None:
            actual = _log_actual(logits, cast(jax.Array, teacher.next(positions)))
            log_actual = log_actual.at[positions].set(actual, mode="drop")
        votes = real.at[positions].get(mode="fill", fill_value=False)
        logits = logits + teacher.offsets(positions, tau)[:, None]
        bad = not_finite(logits)
        top = jnp.maximum(top, highest(jnp.where((votes & ~bad)[:, None], logits, -jnp.inf)))
        return place + block, top, log_actual, faulty.at[positions].set(bad, mode="drop")

    log_actual = None if teacher.next_ids is None else jnp.zeros(length, jnp.float32)
    none = jnp.zeros(length, bool)
    start = (jnp.int32(0), jnp.full(teacher.size, -jnp.inf, jnp.float32), log_actual, none)
    _, top, log_actual, faulty = jax.lax.while_loop(more, look, start)
    if teacher.axes:
        top = jax.lax.pmax(top, teacher.axes)
    columns = jax.lax.top_k(top, top_k)[1].astype(jnp.int32)
    return _Chosen(columns, teacher.at_columns(columns), tau, log_actual, faulty)
