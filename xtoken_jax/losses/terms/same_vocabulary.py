"""Losses over one vocabulary: next-token cross-entropy, and a teacher with the student's tokenizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.checks import (
    check_array,
    check_ids,
    check_logits,
    check_rows,
    check_settings,
    check_sides,
    check_sizes,
)
from xtoken_jax.losses.math.chunks import Merging, counted_positions, valid_chunks
from xtoken_jax.losses.math.divergence import kl_terms
from xtoken_jax.losses.math.softmax import (
    centred,
    flat_logits,
    gradient_at,
    log_softmax_within,
    merged_log_softmax,
    not_finite,
)
from xtoken_jax.losses.terms.projection_kl import top_columns
from xtoken_jax.projection.readable import described


def next_token_cross_entropy(
    logits: jax.Array, token_ids: jax.Array, token_mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(z_p)[x_{p+1}] of every position p that has a next token.

    Args:
        logits: float [B, T, V].
        token_ids: int32 [B, T].
        token_mask: bool [B, T], tokens that count as labels.

    Returns:
        values float32 [B, T - 1] in nats, and the bool [B, T - 1] mask of those that count. A position that
        does not count may be NaN, with a gradient of 0.
    """
    check_labels(logits, token_ids, token_mask, None)
    # The last position is left out of the values, not of the logits: that would copy them.
    logits = jnp.asarray(logits, jnp.float32)
    mask = jnp.asarray(token_mask[:, 1:], bool)
    counted = jnp.pad(mask, ((0, 0), (0, 1)))
    highest = jax.lax.stop_gradient(logits).max(axis=-1)
    logits = centred(gradient_at(logits, counted | (highest < jnp.inf)), highest)
    labels = jnp.roll(token_ids, -1, axis=1)[..., None]
    chosen = jnp.take_along_axis(logits, labels, axis=-1)[..., 0]
    values = jax.nn.logsumexp(logits, axis=-1) - chosen
    return values[:, :-1], mask


def check_labels(logits: jax.Array, token_ids: jax.Array, token_mask: jax.Array, size: int | None) -> None:
    """Raise ValueError unless logits [B, T, V], ids and mask [B, T] belong together."""
    check_sizes(size=size)
    check_logits("logits", logits, ("B", "T"), size, "size")
    check_ids("token_ids", token_ids, ("B", "T"), logits.shape[-1] if size is None else size)
    check_rows("logits", logits, "token_ids", token_ids)
    check_array("token_mask", token_mask, "bool", *token_ids.shape)


def same_vocabulary_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    token_mask: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    size: int | None = None,
    teacher_mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Distillation from a teacher that shares the student's tokenizer (Hinton et al., arXiv 1503.02531).

    With s and t = log_softmax(z / tau) within the columns, tau^2 sum_v exp(t_v) (t_v - s_v) of every
    position that has a next token: `projection_kl` under W = 1 and one chunk a token, up to the
    1e-10 that P-KL adds to the student's probabilities.

    Args:
        student_logits: float [B, T, >= V].
        teacher_logits: float [B, T, >= V], of the same tokens; gets no gradient.
        token_mask: bool [B, T], tokens that count as labels.
        temperature: tau > 0.
        top_k: columns compared; those with the highest teacher logit anywhere in the batch. None: all.
        direction: "forward" or "reverse" KL, or "jsd" (`kl_terms`).
        beta: of "jsd".
        size: V of the tokenizer, past which lm_heads may be padded, each in its own way. None: both
            logits have its width.
        teacher_mask: bool [B, T], real positions; others do not choose columns. None: every one does.

    Returns:
        values float32 [B, T - 1], times tau^2, 0 where masked, and the bool [B, T - 1] mask.

    Raises:
        ValueError: logits of different shapes, once cut to `size`.

    Example:
        >>> student, teacher = jnp.zeros((1, 2, 3)), jnp.array([[[1.0, 1.0, 9.0], [0.0, 0.0, 9.0]]])
        >>> values, mask = same_vocabulary_kl(student, teacher, jnp.ones((1, 2), bool), size=2)
        >>> values.tolist(), mask.tolist()
        ([[0.0]], [[True]])
    """
    check_sizes(size=size)
    check_settings(temperature=temperature, top_k=top_k, direction=direction, beta=beta)
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        check_logits(name, logits, ("B", "T"), size, "size")
    student = jnp.asarray(student_logits[..., :size], jnp.float32)
    teacher = jax.lax.stop_gradient(jnp.asarray(teacher_logits[..., :size], jnp.float32))
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_logits: {described(student_logits)} and teacher_logits: {described(teacher_logits)} "
            "differ in shape; with one tokenizer, give its size to cut padded columns off"
        )
    check_array("token_mask", token_mask, "bool", *student.shape[:2])
    if teacher_mask is not None:
        check_array("teacher_mask", teacher_mask, "bool", *student.shape[:2])
    mask = jnp.asarray(token_mask[:, 1:], bool)
    s, t = _compared(student, teacher, teacher_mask, top_k)
    s, t = (log_softmax_within(jnp.where(mask[..., None], z[:, :-1], 0.0) / temperature) for z in (s, t))
    values = kl_terms(t, s, direction, beta=beta).sum(-1) * temperature**2
    return jnp.where(mask, values, 0.0), mask


def same_vocabulary_kl_by_chunk(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    size: int | None = None,
    teacher_mask: jax.Array | None = None,
) -> jax.Array:
    """`same_vocabulary_kl` in a batch that comes with an alignment, whose chunks are single tokens.

    Rows then need neither the same length nor the same beginning on both sides, such as the chat
    templates of a base model and of an instructed one.

    Args:
        student_logits: float [B, T_s, >= V].
        teacher_logits: float [B, T_t, >= V]; gets no gradient.
        alignment: chunk ids of tokens and `valid` [B, C]. Of a chunk of several tokens, the first
            that has a position on each side is compared.
        temperature, top_k, direction, beta, size: as in `same_vocabulary_kl`.
        teacher_mask: bool [B, T_t], likewise.

    Returns:
        float32 [B, C], times tau^2; 0 for chunks outside `valid_chunks(alignment)`.
    """
    check_sizes(size=size)
    check_settings(temperature=temperature, top_k=top_k, direction=direction, beta=beta)
    check_sides(student_logits, teacher_logits, alignment, (size, size), "size", teacher_mask=teacher_mask)
    if size is None and student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError(
            f"student_logits: {described(student_logits)} and teacher_logits: {described(teacher_logits)} "
            "differ in width; with one tokenizer, give its size to cut padded columns off"
        )
    count, valid = alignment.valid.shape[1], valid_chunks(alignment)
    student = gradient_at(
        jnp.asarray(student_logits[..., :size], jnp.float32), counted_positions(alignment)[0]
    )
    teacher = jax.lax.stop_gradient(jnp.asarray(teacher_logits[..., :size], jnp.float32))
    student, teacher = _compared(student, teacher, teacher_mask, top_k)
    t = Merging.of(alignment.teacher_chunks, count, "first").merge_wide(
        log_softmax_within(flat_logits(teacher, None) / temperature)
    )
    s = merged_log_softmax(
        flat_logits(student, None) / temperature, None, Merging.of(alignment.student_chunks, count, "first")
    )
    values = kl_terms(t, s, direction, beta=beta).sum(-1) * temperature**2
    return jnp.where(valid, values.reshape(alignment.valid.shape), 0.0)


def _compared(
    student: jax.Array, teacher: jax.Array, mask: jax.Array | None, top_k: int | None
) -> tuple[jax.Array, jax.Array]:
    """Both logits [B, T, V] at the compared columns; a row that is not finite elsewhere is NaN in all."""
    if top_k is None or top_k >= teacher.shape[-1]:
        return student, teacher
    columns, faulty = top_columns(teacher, mask, top_k)
    faulty = faulty.reshape(*teacher.shape[:2], 1)
    return (
        jnp.where(not_finite(student)[..., None], jnp.nan, student[..., columns]),
        jnp.where(faulty, jnp.nan, teacher[..., columns]),
    )
