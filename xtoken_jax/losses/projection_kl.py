"""P-KL: the student's distribution, projected into the teacher's vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.chunks import mean_by_chunk, valid_chunks
from xtoken_jax.losses.divergence import kl_terms
from xtoken_jax.projection.matrix import Projection, SplitProjection

_EPSILON = 1e-10  # official implementation


def projection_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    projection: Projection | SplitProjection,
    *,
    temperature: float = 1.0,
    top_k: int = 8192,
    direction: str = "forward",
    merge: str = "mean",
    teacher_mask: jax.Array | None = None,
) -> jax.Array:
    """P-KL of every chunk (X-Token, arXiv 2605.21699, section 4).

    With q = softmax(z_S / tau) W averaged over the chunk's student positions, restricted to
    `top_k` teacher columns and normalized, and t the chunk's mean teacher log-probability
    within those columns, the value is tau^2 sum_v exp(t_v) (t_v - log q_v).

    Args:
        student_logits: float [B, T_s, >= V_s]; columns past W's rows do not count.
        teacher_logits: float [B, T_t, >= V_t]; columns past `projection.teacher_size` do not.
        alignment: chunk ids of tokens, [B, T_s] and [B, T_t], and `valid` [B, C].
        projection: W [V_s, V_t]; `Projection.split()` of it is faster and gives the same.
        temperature: tau > 0.
        top_k: columns compared; those with the highest teacher logit anywhere in the batch.
        direction: "forward" or "reverse" KL.
        merge: "mean", the official one, whose teacher side sums to at most 1, so that the
            value can be negative on chunks of several tokens; "mean_normalized" makes it a
            distribution again, and the value a KL.
        teacher_mask: bool [B, T_t], real teacher positions; others do not choose columns.
            None: every position does, as in the official implementation.

    Returns:
        float32 [B, C], times tau^2; 0 for chunks outside `valid_chunks(alignment)`.
    """
    if merge not in ("mean", "mean_normalized"):
        raise ValueError(f"merge={merge!r}: choose 'mean' or 'mean_normalized'")
    count = alignment.valid.shape[1]
    student_logits = jnp.asarray(student_logits[..., : projection.student_size], jnp.float32)
    teacher_logits = jnp.asarray(teacher_logits[..., : projection.teacher_size], jnp.float32)
    width = teacher_logits.shape[-1]
    columns = _top_columns(teacher_logits, teacher_mask, min(top_k, width))

    teacher = jax.nn.log_softmax(teacher_logits[..., columns] / temperature, axis=-1)
    teacher = mean_by_chunk(teacher, jnp.asarray(alignment.teacher_chunks), count)
    if merge == "mean_normalized":
        teacher = jax.nn.log_softmax(teacher, axis=-1)

    student = jax.nn.softmax(student_logits / temperature, axis=-1)
    # The projection is linear, so averaging first gives the same and projects fewer rows.
    student = mean_by_chunk(student, jnp.asarray(alignment.student_chunks), count)
    student = projection.project(student, columns, width)
    student = student / (student.sum(-1, keepdims=True) + _EPSILON)
    student = jnp.log(student + _EPSILON)

    values = kl_terms(teacher, student, direction).sum(-1) * temperature**2
    return jnp.where(valid_chunks(alignment), values, 0.0)


def _top_columns(logits: jax.Array, mask: jax.Array | None, count: int) -> jax.Array:
    """int32 [count]: the columns whose maximum over the (real) positions is highest."""
    width = logits.shape[-1]
    if count == width:
        return jnp.arange(width, dtype=jnp.int32)
    logits = jax.lax.stop_gradient(logits)
    if mask is not None:
        logits = jnp.where(mask[..., None], logits, -jnp.inf)
    return jax.lax.top_k(logits.max(axis=(0, 1)), count)[1].astype(jnp.int32)
