"""ALM: how likely each model finds the text of a chunk, with no relation between the vocabularies."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.checks import check_needed, check_settings, check_sides, check_sizes
from xtoken_jax.losses.math.chunks import Merging, next_tokens, valid_chunks
from xtoken_jax.losses.math.softmax import actual_log_softmax, flat_logits
from xtoken_jax.projection.matrix import Array

# The least that is taken for 1 - p^(1/tau). What it bounds, 1 / (1 - b), is a slope that meets slopes of
# the same smallness behind it: their product is of order 1, and float32 holds both with room for weights.
FLOOR = 1e-30


def likelihood_matching(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    *,
    student_ids: jax.Array,
    teacher_ids: jax.Array,
    likelihood_temperature: float = 100.0,
    student_size: int | None = None,
    teacher_size: int | None = None,
) -> jax.Array:
    """Binary KL of every chunk (approximate likelihood matching, ALM, arXiv 2503.20083, section 3).

    With p_S and p_T the products, over the chunk's positions, of the probability of the token that
    comes, a = p_T^(1/tau) and b = p_S^(1/tau), the value is a log(a / b) + (1 - a) log((1 - a) / (1 - b)),
    the KL of whether the text goes on as it does. The root brings a and b close to 1, where certain and
    uncertain chunks weigh alike; as in the source, nothing is multiplied by tau or its square. The
    source also drops chunks whose ends bias the two likelihoods differently; here all that
    `valid_chunks` lets pass count.

    Args:
        student_logits: float [B, T_s, >= V_s].
        teacher_logits: float [B, T_t, >= V_t]; gets no gradient.
        alignment: chunk ids of tokens, [B, T_s] and [B, T_t], and `valid` [B, C].
        student_ids, teacher_ids: int32 [B, T_s] and [B, T_t].
        likelihood_temperature: tau > 0, of whole chunks; the logits have none.
        student_size, teacher_size: V_s and V_t of the tokenizers; columns from there on do not
            count. None: all columns do.

    Returns:
        float32 [B, C], >= 0; 0 for chunks outside `valid_chunks(alignment)`. Infinite where the student
        excludes a text that the teacher does not, with a finite gradient. 1 - a and 1 - b are at least
        1e-30, below which there is no gradient.

    Example:
        >>> import numpy as np
        >>> chunks = np.array([[-1, 0, 0]], np.int32)  # one chunk of two tokens on either side
        >>> alignment = Alignment(chunks, chunks, np.array([[True]]))
        >>> ids = np.zeros((1, 3), np.int32)
        >>> student = jnp.log(jnp.array([[[0.5, 0.5]] * 3]))  # 1/2 and 1/2: 1/4
        >>> teacher = jnp.log(jnp.array([[[0.8, 0.2], [0.5, 0.5], [1.0, 1.0]]]))  # 4/5 and 1/2: 2/5
        >>> options = {"student_ids": ids, "teacher_ids": ids, "likelihood_temperature": 1.0}
        >>> round(float(likelihood_matching(student, teacher, alignment, **options)[0, 0]), 4)
        0.0541

        0.4 log(0.4 / 0.25) + 0.6 log(0.6 / 0.75).
    """
    check_likelihood(
        student_logits, teacher_logits, alignment, student_ids, teacher_ids, likelihood_temperature,
        (student_size, teacher_size),
    )  # fmt: skip
    student = actual_log_softmax(flat_logits(student_logits, student_size), next_tokens(student_ids))
    teacher = actual_log_softmax(flat_logits(teacher_logits, teacher_size), next_tokens(teacher_ids))
    return matched_chunks(student, jax.lax.stop_gradient(teacher), alignment, likelihood_temperature)


def check_likelihood(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    student_ids: jax.Array,
    teacher_ids: jax.Array,
    likelihood_temperature: float,
    sizes: tuple[int | None, int | None],
) -> None:
    """Raise ValueError for the first argument of `likelihood_matching` that does not fit."""
    check_sizes(student_size=sizes[0], teacher_size=sizes[1])
    check_settings(likelihood_temperature=likelihood_temperature)
    check_needed("likelihood_matching", student_ids=student_ids, teacher_ids=teacher_ids)
    check_sides(
        student_logits, teacher_logits, alignment, sizes, "student_size or teacher_size",
        student_ids=student_ids, teacher_ids=teacher_ids,
    )  # fmt: skip


def matched_chunks(
    student: jax.Array, teacher: jax.Array, alignment: Alignment, likelihood_temperature: float
) -> jax.Array:
    """float32 [B, C] of the log-probabilities of the tokens that come, [B T_s] and [B T_t]."""
    count = alignment.valid.shape[1]

    def summed(log_p: jax.Array, chunks: Array) -> jax.Array:
        return Merging.of(chunks, count, "sum").merge(log_p[:, None])[:, 0]

    sums = summed(student, alignment.student_chunks), summed(teacher, alignment.teacher_chunks)
    values = likelihood_kl(*sums, likelihood_temperature)
    return jnp.where(valid_chunks(alignment), values.reshape(alignment.valid.shape), 0.0)


@jax.custom_vjp
def likelihood_kl(student: jax.Array, teacher: jax.Array, likelihood_temperature: float) -> jax.Array:
    """float32 [K]: the value from log p_S and log p_T [K], which are <= 0 and may be -inf."""
    return _forward(student, teacher, likelihood_temperature)[0]


def _forward(student: jax.Array, teacher: jax.Array, tau: float) -> tuple[jax.Array, jax.Array]:
    """The values, and their slope by log p_S."""
    highest = -FLOOR * tau
    counts = ~(student >= highest)  # a NaN counts
    student, teacher = jnp.minimum(student, highest), jnp.minimum(teacher, highest)
    a, b = jnp.exp(teacher / tau), jnp.exp(student / tau)
    other_a, other_b = -jnp.expm1(teacher / tau), -jnp.expm1(student / tau)  # 1 - a, with all its digits
    ratio = (student - teacher) / tau
    difference = jnp.where(jnp.abs(ratio) < 1, a * jnp.expm1(ratio), b - a)
    slope = difference / other_b  # also (1 - a) / (1 - b) - 1
    other_ratio = jnp.where(jnp.abs(slope) < 0.5, -jnp.log1p(slope), jnp.log(other_b) - jnp.log(other_a))
    values = _excess(a, b, ratio) + _excess(other_a, other_b, other_ratio)
    return values, jnp.where(counts, slope / tau, 0.0)


def _backward(slope: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    return jnp.where(cotangent != 0, cotangent * slope, 0.0), None, None


likelihood_kl.defvjp(_forward, _backward)


def _excess(p: jax.Array, q: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """p log(p / q) - p + q, from log(q / p) as well.

    Over events whose p and q each sum to 1, these add up to the KL; none is negative, so that the sum
    keeps its digits where the two terms of the KL itself would cancel.
    """
    near = p * _expm1_less_x(log_ratio)
    far = q - p - jnp.where(p > 0, p * log_ratio, 0.0)
    return jnp.where(jnp.abs(log_ratio) < 1, near, far)


def _expm1_less_x(x: jax.Array) -> jax.Array:
    """exp(x) - 1 - x, which is x^2 / 2 near 0."""
    series = jnp.float32(1)
    for n in range(8, 2, -1):
        series = 1 + series * x / n
    return jnp.where(jnp.abs(x) < 0.3, x * x / 2 * series, jnp.expm1(x) - x)
