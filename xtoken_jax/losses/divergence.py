"""Divergences between log-probabilities, term by term, defined at 0 and -inf."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def kl_terms(teacher: jax.Array, student: jax.Array, direction: str = "forward") -> jax.Array:
    """exp(t) (t - s), or exp(s) (s - t) for "reverse"; 0 where the leading probability is 0.

    Args:
        teacher, student: float log-probabilities of one shape; they need not sum to 1.
        direction: "forward" weighs by the teacher, "reverse" by the student.

    Returns:
        float terms of the same shape. The gradient is finite wherever the value is.

    Raises:
        ValueError: another direction.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction={direction!r}: choose 'forward' or 'reverse'")
    lead, other = (teacher, student) if direction == "forward" else (student, teacher)
    present = lead > -jnp.inf
    # Both branches of a `where` are differentiated, so the absent ones are made harmless first.
    lead = jnp.where(present, lead, 0.0)
    other = jnp.where(present, other, 0.0)
    return jnp.where(present, jnp.exp(lead) * (lead - other), 0.0)
