"""ULD: the two distributions compared by rank, with no relation between the vocabularies."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.chunks import mean_by_chunk, valid_chunks
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
    count = alignment.valid.shape[1]

    def probabilities(logits: jax.Array, size: int | None, chunks: Array) -> jax.Array:
        logits = jnp.asarray(logits[..., :size], jnp.float32) / temperature
        return jnp.exp(mean_by_chunk(jax.nn.log_softmax(logits, axis=-1), jnp.asarray(chunks), count))

    student = probabilities(student_logits, student_size, alignment.student_chunks)
    teacher = probabilities(teacher_logits, teacher_size, alignment.teacher_chunks)
    values = _sorted_l1(student, jax.lax.stop_gradient(teacher)) * temperature**2
    return jnp.where(valid_chunks(alignment), values, 0.0)


@jax.custom_vjp
def _sorted_l1(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """float32 [B, C] of non-negative [B, C, V_s] and [B, C, V_t]."""
    return jnp.abs(_difference(jnp.sort(_bits(student)), jnp.sort(_bits(teacher)))).sum(-1)


def _forward(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    # |p_k - q_k| has the slope sign(p_k - q_k), which belongs to the token of rank k.
    ids = jax.lax.broadcasted_iota(jnp.int32, student.shape, student.ndim - 1)
    ordered, order = jax.lax.sort((_bits(student), ids), num_keys=1)
    difference = _difference(ordered, jnp.sort(_bits(teacher)))
    sign = jnp.sign(difference[..., difference.shape[-1] - student.shape[-1] :])
    slope = jnp.put_along_axis(jnp.zeros_like(student), order, sign, axis=-1, inplace=False)
    return jnp.abs(difference).sum(-1), slope


def _backward(slope: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return cotangent[..., None] * slope, None


_sorted_l1.defvjp(_forward, _backward)


def _bits(values: jax.Array) -> jax.Array:
    """Non-negative float32 as int32 of the same order, which XLA sorts several times as fast on a CPU."""
    return jax.lax.bitcast_convert_type(values, jnp.int32)


def _difference(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """student - teacher of ascending bits; equal ranks meet at the end, so zeros are put in front."""
    width = max(student.shape[-1], teacher.shape[-1])
    sides = []
    for side in (student, teacher):
        padding = [(0, 0)] * (side.ndim - 1) + [(width - side.shape[-1], 0)]
        sides.append(jax.lax.bitcast_convert_type(jnp.pad(side, padding), jnp.float32))
    return sides[0] - sides[1]
