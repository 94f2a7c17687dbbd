"""Losses over one vocabulary: next-token cross-entropy, and a teacher with the student's tokenizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.chunks import Merging, valid_chunks
from xtoken_jax.losses.divergence import kl_terms
from xtoken_jax.losses.projection_kl import top_columns
from xtoken_jax.losses.softmax import centred, flat_logits, merged_log_softmax


def next_token_cross_entropy(
    logits: jax.Array, token_ids: jax.Array, token_mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(z_p)[x_{p+1}] of every position p that has a next token.

    Args:
        logits: float [B, T, V].
        token_ids: int32 [B, T].
        token_mask: bool [B, T], tokens that count as labels.

    Returns:
        values float32 [B, T - 1] in nats, and the bool [B, T - 1] mask of those that count.
    """
    # The last position is left out of the values, not of the logits: that would copy them.
    logits = centred(jnp.asarray(logits, jnp.float32))
    labels = jnp.roll(token_ids, -1, axis=1)[..., None]
    chosen = jnp.take_along_axis(logits, labels, axis=-1)[..., 0]
    values = jax.nn.logsumexp(logits, axis=-1) - chosen
    return values[:, :-1], jnp.asarray(token_mask[:, 1:], bool)


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
    student = jnp.asarray(student_logits[..., :size], jnp.float32)
    teacher = jax.lax.stop_gradient(jnp.asarray(teacher_logits[..., :size], jnp.float32))
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {student.shape} and teacher logits {teacher.shape} differ in shape; with one "
            "tokenizer, give its size to cut padded columns off"
        )
    mask = jnp.asarray(token_mask[:, 1:], bool)
    columns = _columns(teacher, teacher_mask, top_k)
    s, t = (
        jax.nn.log_softmax(_within(z[:, :-1], columns) / temperature, axis=-1) for z in (student, teacher)
    )
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
    count = alignment.valid.shape[1]
    student, teacher = flat_logits(student_logits, size), flat_logits(teacher_logits, size)
    teacher = jax.lax.stop_gradient(teacher)
    columns = _columns(teacher, teacher_mask, top_k)
    s, t = (
        merged_log_softmax(_within(z, columns) / temperature, None, Merging.of(chunks, count, "first"))
        for z, chunks in ((student, alignment.student_chunks), (teacher, alignment.teacher_chunks))
    )
    values = kl_terms(t, s, direction, beta=beta).sum(-1) * temperature**2
    return jnp.where(valid_chunks(alignment), values.reshape(alignment.valid.shape), 0.0)


def _columns(teacher: jax.Array, mask: jax.Array | None, top_k: int | None) -> jax.Array | None:
    """int32 [top_k] of float [..., V]; None for all of them."""
    width = teacher.shape[-1]
    if top_k is None or top_k >= width:
        return None
    real = None if mask is None else jnp.asarray(mask).reshape(-1)
    return top_columns(teacher.reshape(-1, width), real, top_k)


def _within(logits: jax.Array, columns: jax.Array | None) -> jax.Array:
    return logits if columns is None else logits[..., columns]
