"""The largest of non-negative numbers, in order, as fast as each platform can."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Sorted = TypeVar("Sorted", jax.Array, tuple[jax.Array, jax.Array])

_PARTS = 32
_FEW = 8  # times as many numbers: the CPU's selection is faster than its sort, 30 times for 64 of 100,000

# XLA's CPU backend sorts integers five times as fast as floats, whose total order it compares one call at
# a time, and pairs slower still. The bits of floats from 0 up are integers of the same order.


def largest(values: jax.Array, count: int) -> jax.Array:
    """The `count` largest along the last axis, falling.

    Args:
        values: float32 [..., m], none below 0.
        count: at most m.

    Returns:
        float32 [..., count].
    """
    return jax.lax.platform_dependent(
        values,
        cpu=lambda x: _by_parts(
            lambda part: _from_bits(jax.lax.sort(_bits(part))[..., ::-1][..., :count]), x
        ),
        default=lambda x: jax.lax.top_k(x, count)[0],
    )


def largest_with_places(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`largest`, and where along the last axis each of them stands, int32 [..., count]."""
    if 0 < _FEW * count <= values.shape[-1]:
        top, places = jax.lax.top_k(values, count)
        return top, places
    return jax.lax.platform_dependent(
        values,
        cpu=lambda x: _by_parts(lambda part: _packed(part, count), x),
        default=lambda x: tuple(jax.lax.top_k(x, count)),
    )


def _packed(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Value and place in one 64-bit integer; equal values by falling place."""
    with jax.enable_x64(True):
        places = jax.lax.broadcasted_iota(jnp.int64, values.shape, values.ndim - 1)
        shift = jax.lax.full_like(places, 32)
        keys = jax.lax.shift_left(jax.lax.convert_element_type(_bits(values), jnp.int64), shift) | places
        keys = jax.lax.rev(jax.lax.sort(keys), (values.ndim - 1,))
        keys = jax.lax.slice_in_dim(keys, 0, count, axis=values.ndim - 1)
        bits = jax.lax.convert_element_type(jax.lax.shift_right_logical(keys, shift[..., :count]), jnp.int32)
        return _from_bits(bits), jax.lax.convert_element_type(keys, jnp.int32)


def _bits(values: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(values, jnp.int32)


def _from_bits(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _by_parts(function: Callable[[jax.Array], Sorted], values: jax.Array) -> Sorted:
    """`function` of a few rows at a time."""
    # The CPU backend sorts on one thread, but runs what does not depend on each other on all of them.
    if values.ndim == 1:
        return function(values)
    parts = jnp.array_split(values, max(1, min(_PARTS, len(values))))
    return jax.tree.map(lambda *found: jnp.concatenate(found), *map(function, parts))
