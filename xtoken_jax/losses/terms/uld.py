"""ULD: the two distributions compared by rank, with no relation between the vocabularies."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.checks import check_settings, check_sides, check_sizes
from xtoken_jax.losses.math.chunks import Merging, counted_positions, valid_chunks
from xtoken_jax.losses.math.softmax import flat_logits, merged_log_softmax
from xtoken_jax.losses.math.sorting import largest, largest_with_places
from xtoken_jax.projection.matrix import Array


def rank_l1(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    *,
    temperature: float = 1.0,
    student_size: int | None = None,
    teacher_size: int | None = None,
) -> jax.Array:
    """Sorted L1 of every chunk (Universal Logit Distillation, arXiv 2402.12030, section 3).

    With p and q = exp of the chunk means of log_softmax(z / tau), each sorted descending and the
    shorter filled up with zeros, the value is tau^2 sum_k |p_k - q_k|.

    Args:
        student_logits: float [B, T_s, >= V_s].
        teacher_logits: float [B, T_t, >= V_t]; gets no gradient.
        alignment: chunk ids of tokens, [B, T_s] and [B, T_t], and `valid` [B, C].
        temperature: tau > 0.
        student_size, teacher_size: V_s and V_t of the tokenizers; columns from there on do not
            count. None: all columns do.

    Returns:
        float32 [B, C], times tau^2; 0 for chunks outside `valid_chunks(alignment)`.

    Example:
        >>> import numpy as np
        >>> chunks = np.array([[-1, 0]], np.int32)  # one chunk, which position 0 predicts
        >>> alignment = Alignment(chunks, chunks, np.array([[True]]))
        >>> student = jnp.log(jnp.array([[[0.2, 0.8]] * 2]))
        >>> teacher = jnp.log(jnp.array([[[0.5, 0.1, 0.4]] * 2]))
        >>> round(float(rank_l1(student, teacher, alignment)[0, 0]), 4)  # |.8 - .5| + |.2 - .4| + |0 - .1|
        0.6
    """
    check_sizes(student_size=student_size, teacher_size=teacher_size)
    check_settings(temperature=temperature)
    sizes = student_size, teacher_size
    check_sides(student_logits, teacher_logits, alignment, sizes, "student_size or teacher_size")
    count = alignment.valid.shape[1]

    counted = counted_positions(alignment)

    def probabilities(logits: jax.Array, size: int | None, chunks: Array, counted: jax.Array) -> jax.Array:
        flat = flat_logits(logits, size, counted) / temperature
        return jnp.exp(merged_log_softmax(flat, None, Merging.of(chunks, count, "mean")))

    student = probabilities(student_logits, student_size, alignment.student_chunks, counted[0])
    teacher = probabilities(teacher_logits, teacher_size, alignment.teacher_chunks, counted[1])
    values = sorted_l1(student, jax.lax.stop_gradient(teacher)) * temperature**2
    return jnp.where(valid_chunks(alignment), values.reshape(alignment.valid.shape), 0.0)


@jax.custom_vjp
def sorted_l1(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """float32 [K] of non-negative [K, V_s] and [K, V_t]."""
    return jnp.abs(_difference(*(largest(side, side.shape[-1]) for side in (student, teacher)))).sum(-1)


def _forward(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    # |p_k - q_k| has the slope sign(p_k - q_k), which belongs to the token of rank k.
    ordered, places = largest_with_places(student, student.shape[-1])
    difference = _difference(ordered, largest(teacher, teacher.shape[-1]))
    sign = jnp.sign(difference[..., : student.shape[-1]])
    slope = jnp.put_along_axis(jnp.zeros_like(student), places, sign, axis=-1, inplace=False)
    return jnp.abs(difference).sum(-1), slope


def _backward(slope: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return cotangent[..., None] * slope, None


sorted_l1.defvjp(_forward, _backward)


def _difference(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """By rank, the shorter filled up with zeros."""
    width = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (
        jnp.pad(side, [(0, 0)] * (side.ndim - 1) + [(0, width - side.shape[-1])])
        for side in (student, teacher)
    )
    return student - teacher
