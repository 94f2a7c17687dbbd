"""The total: distillation beside cross-entropy."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dynamic_scale(ce: jax.Array, kd: jax.Array, max_scale: float | None = None) -> jax.Array:
    """The factor that makes the distillation term as large as cross-entropy (no gradient).

    CE / KD, and 1 where KD is 0 (X-Token, section 4).

    Args:
        ce, kd: float scalars.
        max_scale: highest factor. It also stands where KD is negative, which "mean"-merged
            P-KL can be: the bare ratio would then turn the gradient around. None: the bare
            ratio, as in the official implementation.

    Returns:
        float32 scalar.
    """
    ce, kd = jax.lax.stop_gradient(ce), jax.lax.stop_gradient(kd)
    ratio = jnp.where(kd == 0, 1.0, ce / jnp.where(kd == 0, 1.0, kd))
    if max_scale is None:
        return ratio
    return jnp.where(kd == 0, 1.0, jnp.where(kd < ce / max_scale, max_scale, ratio))


def total_loss(
    ce: jax.Array,
    kd: jax.Array,
    *,
    dynamic_scaling: bool = True,
    max_scale: float | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """sg(CE / KD) KD + CE, or kd_weight KD + ce_weight CE.

    Args:
        ce: scalar, mean next-token cross-entropy.
        kd: scalar, mean distillation term.
        dynamic_scaling: the first form; the weights then do not enter.
        max_scale: see `dynamic_scale`.

    Returns:
        The loss and the factor that KD got, float32 scalars.
    """
    if not dynamic_scaling:
        return kd_weight * kd + ce_weight * ce, jnp.float32(kd_weight)
    scale = dynamic_scale(ce, kd, max_scale)
    return scale * kd + ce, scale
