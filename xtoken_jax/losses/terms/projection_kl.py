"""P-KL: the student's distribution, projected into the teacher's vocabulary."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.checks import PROJECTIONS, check_choice, check_settings, check_sides, check_tables
from xtoken_jax.losses.math.chunks import MERGES, Merging, counted_positions, next_tokens, valid_chunks
from xtoken_jax.losses.math.divergence import kl_terms
from xtoken_jax.losses.math.softmax import centred, flat_logits, log_softmax_within, not_finite
from xtoken_jax.projection.matrix import LearnableProjection, Projection, SplitProjection
from xtoken_jax.projection.sharded import ShardedProjection

AnyProjection = Projection | SplitProjection | LearnableProjection | ShardedProjection

EPSILON = 1e-10  # official implementation


def projection_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    projection: AnyProjection,
    *,
    temperature: float = 1.0,
    top_k: int | None = 8192,
    direction: str = "forward",
    beta: float = 0.5,
    merge: str = "mean",
    student_ids: jax.Array | None = None,
    teacher_ids: jax.Array | None = None,
    teacher_mask: jax.Array | None = None,
) -> jax.Array:
    """P-KL of every chunk (X-Token, arXiv 2605.21699, section 4).

    With q = softmax(z_S / tau) W averaged over the chunk's student positions, restricted to
    `top_k` teacher columns and normalized, and t the chunk's mean teacher log-probability
    within those columns, the value is tau^2 sum_v exp(t_v) (t_v - log q_v).

    Args:
        student_logits: float [B, T_s, >= V_s]; columns past W's rows do not count.
        teacher_logits: float [B, T_t, >= V_t]; columns past `projection.teacher_size` do not. They
            get no gradient.
        alignment: chunk ids of tokens, [B, T_s] and [B, T_t], and `valid` [B, C].
        projection: W [V_s, V_t]; `Projection.split()` of it is fastest and gives the same,
            `Projection.learnable()` gets a gradient of its own.
        temperature: tau > 0.
        top_k: columns compared; those with the highest teacher logit anywhere in the batch. None: all.
        direction: "forward" or "reverse" KL, or "jsd" (`kl_terms`).
        beta: of "jsd".
        merge: "mean", the official one, whose teacher side sums to at most 1, so that the
            value can be negative on chunks of several tokens; "mean_normalized" makes it a
            distribution again, and the value a KL. "first" and "last": the distributions at the
            chunk's first (last) position, the teacher's times the probabilities that it gives
            to the actual tokens at the other positions; the student's is normalized anyhow.
        student_ids: not read; for the same call as `hybrid_kl`.
        teacher_ids: int32 [B, T_t], for "first" and "last".
        teacher_mask: bool [B, T_t], real teacher positions; others do not choose columns.
            None: every position does, as in the official implementation.

    Returns:
        float32 [B, C], times tau^2; 0 for chunks outside `valid_chunks(alignment)`.

    Raises:
        ValueError: another merge or direction, or "first" or "last" without `teacher_ids`.

    Example:
        >>> import jax.numpy as jnp
        >>> from xtoken_jax.alignment.batch import Alignment
        >>> from xtoken_jax.projection.matrix import Projection
        >>> W = Projection(jnp.array([[0], [1], [0]]), jnp.ones((3, 1)), teacher_size=2)
        >>> ids = jnp.array([[-1, 0]])  # the second token of each side makes chunk 0
        >>> alignment = Alignment(ids, ids, jnp.ones((1, 1), bool))
        >>> student, teacher = jnp.zeros((1, 2, 3)), jnp.array([[[1.0, 1.0], [0.0, 0.0]]])
        >>> print(projection_kl(student, teacher, alignment, W).round(4))
        [[0.0589]]
    """
    return projection_parts(
        student_logits, teacher_logits, alignment, projection, temperature=temperature, top_k=top_k,
        direction=direction, beta=beta, merge=merge, student_ids=student_ids, teacher_ids=teacher_ids,
        teacher_mask=teacher_mask,
    )[0]  # fmt: skip


def projection_parts(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    projection: AnyProjection,
    *,
    temperature: float = 1.0,
    top_k: int | None = 8192,
    direction: str = "forward",
    beta: float = 0.5,
    merge: str = "mean",
    student_ids: jax.Array | None = None,
    teacher_ids: jax.Array | None = None,
    teacher_mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`projection_kl`, and of each chunk the share of the student's mass that W sends to no column compared.

    Returns:
        float32 [B, C] twice; the second has no gradient.
    """
    check_projection(
        student_logits, teacher_logits, alignment, projection, merge=merge, student_ids=student_ids,
        teacher_ids=teacher_ids, teacher_mask=teacher_mask, temperature=temperature, top_k=top_k,
        direction=direction, beta=beta,
    )  # fmt: skip
    count = alignment.valid.shape[1]
    valid, (counted, _) = valid_chunks(alignment), counted_positions(alignment)
    student = flat_logits(student_logits, projection.student_size, counted) / temperature
    if not isinstance(projection, Projection | SplitProjection):
        # The gradient by W is a sum over all positions.
        student = jnp.where(counted.reshape(-1, 1), student, 0.0)
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    teacher = flat_logits(teacher_logits, projection.teacher_size) / temperature
    columns, faulty = top_columns(teacher_logits, teacher_mask, top_k, projection.teacher_size)

    merging = Merging.of(alignment.teacher_chunks, count, merge)
    chosen = jnp.where(faulty[:, None], jnp.nan, teacher[:, columns])
    target = merging.merge(log_softmax_within(chosen))
    if merge == "mean_normalized":
        target = log_softmax_within(target)
    if merge in ("first", "last") and teacher_ids is not None:
        teacher = centred(teacher)
        actual = jnp.take_along_axis(teacher, next_tokens(teacher_ids)[:, None], axis=-1)[:, 0]
        others = merging.other_tokens(actual - jax.nn.logsumexp(teacher, axis=-1))
        target = target + others[:, None]

    projected = projected_softmax(student, projection, columns, teacher.shape[-1])
    # The projection is linear: merging behind it gives the same as before it, over fewer columns.
    projected = Merging.of(alignment.student_chunks, count, merge).merge(projected)
    # What does not count must not become NaN times a gradient of 0.
    projected, target = (jnp.where(valid.reshape(-1, 1), x, 0.0) for x in (projected, target))
    values = chunk_values(projected, target, direction, beta) * temperature**2
    both = values, lost_mass(projected)
    values, lost = (jnp.where(valid, part.reshape(valid.shape), 0.0) for part in both)
    return values, lost


def check_projection(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    projection: AnyProjection,
    *,
    merge: str,
    student_ids: jax.Array | None = None,
    teacher_ids: jax.Array | None,
    teacher_mask: jax.Array | None,
    **settings: Any,
) -> None:
    """Raise ValueError for the first argument of `projection_kl` that does not fit."""
    sizes = check_tables("projection", projection, PROJECTIONS)
    check_sides(
        student_logits, teacher_logits, alignment, sizes, "projection", student_ids=student_ids,
        teacher_ids=teacher_ids, teacher_mask=teacher_mask,
    )  # fmt: skip
    check_settings(**settings)
    check_choice("merge", merge, MERGES)
    if merge in ("first", "last") and teacher_ids is None:
        raise ValueError(f"merge={merge!r} needs teacher_ids")


def lost_mass(projected: jax.Array) -> jax.Array:
    """float32 [K]: what is missing to 1 in the student's projected probabilities [K, n]; no gradient."""
    return 1 - jax.lax.stop_gradient(projected).sum(-1)


def chunk_values(projected: jax.Array, target: jax.Array, direction: str, beta: float) -> jax.Array:
    """float32 [K]: the divergence of each chunk, from the student's projected probabilities [K, n] and
    the teacher's log-probabilities [K, n]."""
    normalized = projected / (projected.sum(-1, keepdims=True) + EPSILON)
    return kl_terms(target, jnp.log(normalized + EPSILON), direction, beta=beta).sum(-1)


def projected_softmax(
    logits: jax.Array, projection: AnyProjection, columns: jax.Array, width: int
) -> jax.Array:
    """softmax(logits) W at some of the columns.

    Args:
        logits: float32 [N, V_s], divided by the temperature.
        projection: W in any form. A split or a learnable one takes the fast way, which computes of the
            softmax what the columns need and keeps nothing of its size for the gradient.
        columns: int32 [n].
        width: V_t or more, one past the highest teacher id.

    Returns:
        float32 [N, n].
    """
    if isinstance(projection, LearnableProjection):
        split = projection.split()
        return learnt_softmax(logits, jnp.asarray(split.weights), split, columns, width)
    if isinstance(projection, SplitProjection):
        return _projected(centred(logits), None, projection, columns, width)
    return projection.project(jax.nn.softmax(logits, axis=-1), columns, width)


def learnt_softmax(
    logits: jax.Array, weights: jax.Array, projection: SplitProjection, columns: jax.Array, width: int
) -> jax.Array:
    """`projected_softmax` with a gradient by the weights of W too, float32 [R, K]."""
    return _projected(centred(logits), weights, replace(projection, weights=weights), columns, width)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _projected(
    logits: jax.Array,
    weights: jax.Array | None,
    projection: SplitProjection,
    columns: jax.Array,
    width: int,
) -> jax.Array:
    """The gradient by W goes to `weights`, those of `projection`; None for a W that does not learn."""
    return _projected_forward(logits, weights, projection, columns, width)[0]


def _projected_forward(
    logits: jax.Array,
    weights: jax.Array | None,
    projection: SplitProjection,
    columns: jax.Array,
    width: int,
) -> tuple[jax.Array, tuple]:
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    projected = projection.project_softmax(logits, normalizer, columns, width)
    return projected, (logits, weights, normalizer, projected, projection, columns)


def _projected_backward(width: int, residuals: tuple, gradient: jax.Array) -> tuple:
    logits, weights, normalizer, projected, projection, columns = residuals
    by_weights = None
    if weights is not None:
        by_weights = projection.pull_to_weights(gradient, logits, normalizer, columns, width)
    # d/dz_i of sum_v g_v q_v = p_i ((W g)_i - sum_v q_v g_v).
    mean = jnp.sum(projected * gradient, axis=-1, keepdims=True)
    pulled = projection.pull_back(gradient, columns, width)
    by_logits = jnp.exp(logits - normalizer[:, None]) * (pulled - mean)
    return by_logits, by_weights, None, None


_projected.defvjp(_projected_forward, _projected_backward)


def top_columns(
    logits: jax.Array, mask: jax.Array | None, count: int | None, size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The columns whose maximum over the (real) positions is highest, and the positions that are not finite.

    Args:
        logits: float [B, T, >= size].
        mask: bool [B, T], real positions; None: all.
        count: columns wanted; all of them if there are no more, or for None.
        size: V of the tokenizer; None: the width.

    Returns:
        int32 [min(count, V)]; and bool [B T], positions with a NaN or +inf in any column, which choose no
        column. Where all columns are wanted they are in the result anyway, and none is named.
    """
    flat = flat_logits(logits, size)
    if count is None or count >= flat.shape[-1]:
        return jnp.arange(flat.shape[-1], dtype=jnp.int32), jnp.zeros(len(flat), bool)
    faulty = not_finite(flat)
    votes = ~faulty if mask is None else ~faulty & jnp.asarray(mask, bool).reshape(-1)
    best = highest(flat, votes)
    return jax.lax.top_k(best, count)[1].astype(jnp.int32), faulty


def highest(logits: jax.Array, votes: jax.Array | None = None) -> jax.Array:
    """float [V]: the maximum over positions of [N, V]; over those of bool [N] with a vote, if given."""
    # XLA's CPU backend reduces over leading axes slowly, and compares two halves fast.
    return jax.lax.platform_dependent(
        logits, votes, cpu=_by_halves, default=lambda x, v: _voting(x, v).max(axis=0)
    )


def _by_halves(logits: jax.Array, votes: jax.Array | None) -> jax.Array:
    while len(logits) > 1:
        half = (len(logits) + 1) // 2
        parts = (slice(half), slice(len(logits) - half, None))
        # Cut before the votes are applied: otherwise XLA keeps a copy of all logits for the two halves.
        first, second = (_voting(logits[part], None if votes is None else votes[part]) for part in parts)
        logits, votes = jnp.maximum(first, second), None
    return _voting(logits, votes)[0]


def _voting(logits: jax.Array, votes: jax.Array | None) -> jax.Array:
    return logits if votes is None else jnp.where(votes[:, None], logits, -jnp.inf)
