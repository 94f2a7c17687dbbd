"""Divergences between log-probabilities, term by term, defined at 0 and -inf."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

_LEAST = math.log(jnp.finfo(jnp.float32).tiny)  # below it a device may take exp for 0


def kl_terms(
    teacher: jax.Array, student: jax.Array, direction: str = "forward", *, beta: float = 0.5
) -> jax.Array:
    """exp(t) (t - s), or exp(s) (s - t) for "reverse"; 0 where the leading probability is 0.

    "jsd" is the generalized Jensen-Shannon divergence (GKD, arXiv 2306.13649, eq. 1),
    beta exp(t) (t - m) + (1 - beta) exp(s) (s - m), with exp(m) = beta exp(t) + (1 - beta) exp(s).
    Its terms are finite and at least 0 whatever t and s sum to, which those of a KL are not. They
    vanish as beta goes to 0 or 1: divided by beta they then sum to the forward KL, divided by
    1 - beta to the reverse one (of distributions). Those two are what 0 and 1 stand for, as in TRL.

    Args:
        teacher, student: float log-probabilities of one shape; they need not sum to 1.
        direction: "forward" weighs by the teacher, "reverse" by the student, "jsd" by both.
        beta: the teacher's share of the mixture, between 0 and 1, for "jsd".

    Returns:
        float terms of the same shape. The gradient is finite wherever the value is. NaN on either side
        gives NaN, except where the leading probability is 0.

    Raises:
        ValueError: another direction, or beta outside its range.

    Example:
        >>> t, s = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))
        >>> [round(float(kl_terms(t, s, way).sum()), 4) for way in ("forward", "reverse", "jsd")]
        [inf, 0.6931, 0.2158]
    """
    if direction not in ("forward", "reverse", "jsd"):
        raise ValueError(f"direction={direction!r}: choose 'forward', 'reverse' or 'jsd'")
    if direction == "jsd":
        if not 0 <= beta <= 1:
            raise ValueError(f"beta={beta}: must be between 0 and 1")
        if 0 < beta < 1:
            return _jsd_terms(teacher, student, float(beta))
        direction = "reverse" if beta else "forward"
    lead, other = (teacher, student) if direction == "forward" else (student, teacher)
    # What underflows is absent too: 0 times an infinite difference would make NaN. A NaN is not absent.
    present = ~(lead <= _LEAST)
    # Both branches of a `where` are differentiated, so the absent ones are made harmless first.
    lead = jnp.where(present, lead, 0.0)
    other = jnp.where(present, other, 0.0)
    return jnp.where(present, jnp.exp(lead) * (lead - other), 0.0)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _jsd_terms(teacher: jax.Array, student: jax.Array, beta: float) -> jax.Array:
    of_teacher, of_student = _jsd_parts(teacher, student, beta)
    return of_teacher + of_student


@_jsd_terms.defjvp
def _jsd_terms_jvp(
    beta: float, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # The mixture's own derivatives cancel, so that each part is also the slope by its logarithm.
    # Autodiff would find them one by one, as differences of numbers much larger than the result.
    of_teacher, of_student = _jsd_parts(*primals, beta)
    return of_teacher + of_student, of_teacher * tangents[0] + of_student * tangents[1]


def _jsd_parts(teacher: jax.Array, student: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """beta exp(t) (t - m) and (1 - beta) exp(s) (s - m)."""
    ratio = jnp.where((teacher == -jnp.inf) & (student == -jnp.inf), 0.0, teacher - student)
    # m - max(t, s), in which the exponent never overflows and a small ratio keeps all its digits.
    share = jnp.where(ratio > 0, 1 - beta, beta)
    above = jnp.log1p(share * jnp.expm1(-jnp.abs(ratio)))

    def part(weight: float, value: jax.Array, below: jax.Array) -> jax.Array:
        present = value != -jnp.inf
        excess = jnp.where(present, -above - below, 0.0)
        return weight * jnp.where(present, jnp.exp(value) * excess, 0.0)

    return (
        part(beta, teacher, jnp.maximum(-ratio, 0.0)),
        part(1 - beta, student, jnp.maximum(ratio, 0.0)),
    )
