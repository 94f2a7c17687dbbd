"""GOLD and H-KL: one loss, over two partitions of the vocabularies."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.checks import check_choice, check_settings, check_sides, check_tables
from xtoken_jax.losses.math.chunks import Merging, counted_positions, next_tokens, valid_chunks
from xtoken_jax.losses.math.divergence import kl_terms
from xtoken_jax.losses.math.softmax import flat_logits, merged_log_softmax
from xtoken_jax.losses.math.sorting import largest, largest_with_places
from xtoken_jax.projection.matrix import Partition

MERGES = ("mean", "first", "last")


class HybridTerms(NamedTuple):
    """The two parts of the loss, float32 [B, C] each, times tau^2."""

    common: jax.Array
    uncommon: jax.Array


def hybrid_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    partition: Partition,
    *,
    temperature: float = 1.0,
    uncommon_top_k: int = 8192,
    direction: str = "forward",
    beta: float = 0.5,
    merge: str = "mean",
    student_ids: jax.Array | None = None,
    teacher_ids: jax.Array | None = None,
    common_weight: float | None = 1.0,
    uncommon_weight: float | None = 1.0,
) -> jax.Array:
    """GOLD with `Partition.strict`, H-KL with `Partition.relaxed`, for every chunk.

    The weighted sum of `hybrid_terms`; see there for arguments and formula. A weight of None is
    TRL's: the matched share of the teacher's vocabulary for the common part, the rest of it for
    the uncommon one.

    Returns:
        float32 [B, C], times tau^2; 0 for chunks outside `valid_chunks(alignment)`.

    Example:
        >>> import numpy as np
        >>> partition = Partition(*np.array([[0], [1], [1], [0]], np.int32))  # 0 is the teacher's 1
        >>> ids = jnp.array([[-1, 0]])  # the second token of each side makes chunk 0
        >>> alignment = Alignment(ids, ids, jnp.ones((1, 1), bool))
        >>> student, teacher = jnp.log(jnp.array([[[[0.5, 0.5]] * 2], [[[0.25, 0.75]] * 2]]))
        >>> print(hybrid_kl(student, teacher, alignment, partition).round(4))  # 0.3041 + 0.25
        [[0.5541]]
        >>> trl = {"direction": "jsd", "common_weight": None, "uncommon_weight": None}
        >>> print(hybrid_kl(student, teacher, alignment, partition, **trl).round(4))
        [[0.1313]]
    """
    terms = hybrid_terms(
        student_logits,
        teacher_logits,
        alignment,
        partition,
        temperature=temperature,
        uncommon_top_k=uncommon_top_k,
        direction=direction,
        beta=beta,
        merge=merge,
        student_ids=student_ids,
        teacher_ids=teacher_ids,
    )
    check_settings(common_weight=common_weight, uncommon_weight=uncommon_weight)
    weighed = weighed_terms(terms, partition, common_weight, uncommon_weight)
    return weighed.common + weighed.uncommon


def weighed_terms(
    terms: HybridTerms, partition: Partition, common_weight: float | None, uncommon_weight: float | None
) -> HybridTerms:
    """The two parts times their weights, which are those of `hybrid_kl`."""
    matched = partition.common_teacher.shape[0] / partition.teacher_size
    common_weight = matched if common_weight is None else common_weight
    uncommon_weight = 1 - matched if uncommon_weight is None else uncommon_weight
    return HybridTerms(common_weight * terms.common, uncommon_weight * terms.uncommon)


def hybrid_terms(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    partition: Partition,
    *,
    temperature: float = 1.0,
    uncommon_top_k: int = 8192,
    direction: str = "forward",
    beta: float = 0.5,
    merge: str = "mean",
    student_ids: jax.Array | None = None,
    teacher_ids: jax.Array | None = None,
) -> HybridTerms:
    """KL on common pairs and sorted L1 on the rest (GOLD; X-Token, section 4).

    s and t are the chunk means of log_softmax(z / tau) over the full vocabularies.
    common = sum over pairs of exp(t) (t - s), not re-normalized; uncommon = sum of
    |difference| of the u largest uncommon probabilities of each side, sorted,
    u = min(|U_s|, |U_t|, uncommon_top_k).

    Args:
        student_logits: float [B, T_s, >= V_s]; columns past the partition's ids do not count.
        teacher_logits: float [B, T_t, >= V_t]. They get no gradient.
        alignment: chunk ids of tokens and `valid` [B, C].
        partition: common pairs and the rest, which together are all ids of both tokenizers.
        temperature: tau > 0.
        uncommon_top_k: entries of the sorted comparison at most.
        direction: of the common part: "forward", "reverse" or "jsd" (TRL; `kl_terms`).
        beta: of "jsd".
        merge: "mean"; "first" or "last" (TRL, the paper's text): the distribution at the chunk's
            first (last) position times the probabilities of the actual tokens at its others.
        student_ids, teacher_ids: int32 [B, T_s], [B, T_t], for "first" and "last".

    Returns:
        HybridTerms.

    Raises:
        ValueError: another merge or direction, or "first" or "last" without the ids.

    Example:
        >>> import numpy as np
        >>> partition = Partition(*np.array([[0], [1], [1], [0]], np.int32))  # 0 is the teacher's 1
        >>> ids = jnp.array([[-1, 0]])  # the second token of each side makes chunk 0
        >>> alignment = Alignment(ids, ids, jnp.ones((1, 1), bool))
        >>> student, teacher = jnp.log(jnp.array([[[[0.5, 0.5]] * 2], [[[0.25, 0.75]] * 2]]))
        >>> terms = hybrid_terms(student, teacher, alignment, partition)
        >>> [round(part.item(), 4) for part in terms]
        [0.3041, 0.25]
    """
    check_hybrid(
        student_logits, teacher_logits, alignment, partition, temperature=temperature, merge=merge,
        uncommon_top_k=uncommon_top_k, direction=direction, beta=beta, student_ids=student_ids,
        teacher_ids=teacher_ids,
    )  # fmt: skip
    count = alignment.valid.shape[1]
    counted, _ = counted_positions(alignment)
    student = flat_logits(student_logits, partition.student_size, counted) / temperature
    teacher = flat_logits(teacher_logits, partition.teacher_size) / temperature
    student_next, teacher_next = (
        None if merge == "mean" or ids is None else next_tokens(ids) for ids in (student_ids, teacher_ids)
    )
    student_merging, teacher_merging = (
        Merging.of(chunks, count, merge) for chunks in (alignment.student_chunks, alignment.teacher_chunks)
    )
    wanted = merged_log_softmax(jax.lax.stop_gradient(teacher), teacher_next, teacher_merging)
    target = target_of_merged(wanted, partition, uncommon_top_k)
    merged = merged_log_softmax(student, student_next, student_merging)
    parts = hybrid_values(merged, target, direction, beta)
    valid = valid_chunks(alignment)
    return HybridTerms(*(jnp.where(valid, part.reshape(valid.shape) * temperature**2, 0.0) for part in parts))


def check_hybrid(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    partition: Partition,
    *,
    merge: str,
    student_ids: jax.Array | None,
    teacher_ids: jax.Array | None,
    **settings: Any,
) -> None:
    """Raise ValueError for the first argument of `hybrid_terms` that does not fit."""
    sizes = check_tables("partition", partition, [Partition])
    check_sides(
        student_logits, teacher_logits, alignment, sizes, "partition", student_ids=student_ids,
        teacher_ids=teacher_ids,
    )  # fmt: skip
    check_settings(**settings)
    check_choice("merge", merge, MERGES)
    if merge != "mean" and (student_ids is None or teacher_ids is None):
        raise ValueError(f"merge={merge!r} needs student_ids and teacher_ids")


class HybridTarget(NamedTuple):
    """What the student's chunks are compared with.

    Attributes:
        common: float32 [K, V_s], the teacher's log-probability of each student token's partner, -inf
            for a token without one.
        largest: float32 [K, u], the teacher's u largest uncommon probabilities, falling.
        paired: bool [V_s], the tokens that have a partner.
        uncommon: int32 [|U_s|], the student's other tokens.
    """

    common: jax.Array
    largest: jax.Array
    paired: jax.Array
    uncommon: jax.Array


def target_of_merged(merged: jax.Array, partition: Partition, uncommon_top_k: int) -> HybridTarget:
    """From the teacher's log-probabilities of chunks, float32 [K, V_t]."""
    size = partition.student_size
    partner = (
        jnp.full(size, merged.shape[-1], jnp.int32)
        .at[jnp.asarray(partition.common_student)]
        .set(jnp.asarray(partition.common_teacher))
    )
    common = merged.at[:, partner].get(mode="fill", fill_value=-jnp.inf)
    entries = min(partition.uncommon_student.shape[0], partition.uncommon_teacher.shape[0], uncommon_top_k)
    top = largest(jnp.exp(merged[:, jnp.asarray(partition.uncommon_teacher)]), entries)
    # A gather inside of a fused sum of exponentials would be computed entry by entry.
    common, top = jax.lax.optimization_barrier((common, top))
    return HybridTarget(common, top, partner < merged.shape[-1], jnp.asarray(partition.uncommon_student))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def hybrid_values(
    merged: jax.Array, target: HybridTarget, direction: str, beta: float
) -> tuple[jax.Array, jax.Array]:
    """The common and the uncommon part, float32 [K], of the student's log-probabilities [K, V_s]."""
    return terms_of_merged(merged, target, direction, beta)[0]


def _forward(
    merged: jax.Array, target: HybridTarget, direction: str, beta: float
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    terms, ranks = terms_of_merged(merged, target, direction, beta)
    return terms, (merged, target, ranks)


def _backward(direction: str, beta: float, residuals: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    merged, target, ranks = residuals
    return slope_of_merged(merged, target, ranks, gradients, direction, beta), None


hybrid_values.defvjp(_forward, _backward)


def terms_of_merged(
    merged: jax.Array, target: HybridTarget, direction: str, beta: float
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The two parts, float32 [K], of the student's log-probabilities of chunks, float32 [K, V_s].

    Also what `slope_of_merged` needs: by rank, the differences of the uncommon probabilities [K, u],
    and which of `target.uncommon` has that rank, int32 [K, u].
    """
    common = _common_terms(merged, target, direction, beta).sum(-1)
    own = jnp.exp(merged[:, target.uncommon])
    entries = target.largest.shape[-1]
    top, places = largest_with_places(own, entries)
    difference = top - target.largest
    return (common, jnp.abs(difference).sum(-1)), (difference, places)


def slope_of_merged(
    merged: jax.Array,
    target: HybridTarget,
    ranks: tuple[jax.Array, jax.Array],
    gradients: tuple[jax.Array, jax.Array],
    direction: str,
    beta: float,
) -> jax.Array:
    """The gradient of `terms_of_merged` by `merged`, float32 [K, V_s], from that of its parts, [K] each."""
    difference, places = ranks
    by_common, by_uncommon = (g[:, None] for g in gradients)
    _, pull = jax.vjp(lambda s: _common_terms(s, target, direction, beta), merged)
    (slope,) = pull(jnp.broadcast_to(by_common, merged.shape))
    # d |a - b| / d log a = sign(a - b) a, at the rank of a.
    top = target.largest + difference
    rows = jnp.arange(len(merged), dtype=jnp.int32)[:, None]
    return slope.at[rows, target.uncommon[places]].set(by_uncommon * jnp.sign(difference) * top)


def _common_terms(merged: jax.Array, target: HybridTarget, direction: str, beta: float) -> jax.Array:
    # A token without a partner is absent on both sides.
    own = jnp.where(target.paired[None, :], merged, -jnp.inf)
    return kl_terms(target.common, own, direction, beta=beta)
