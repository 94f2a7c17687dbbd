"""A number of the bits of arrays, the same however they are laid out over devices."""

from __future__ import annotations

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksum(tree: Any) -> int:
    """Checksum of all arrays of a pytree: shapes, and every element's bits at its place.

    Each element's bits, mixed with its place, go through a bijection of 32 bits, and the results are added
    up. A single changed element therefore changes the sum, always; any other change does but once in 2^32.
    Sums of integers do not depend on their order, so neither does the number on the mesh. It is a pass over
    memory on the devices, array by array; where the compiler does not fuse (CPUs) it takes the room of one
    array besides.

    Args:
        tree: arrays of at most 4 bytes an element.

    Returns:
        An unsigned number of 32 bits.
    """
    leaves = jax.tree.leaves(tree)
    sums = np.array(jax.device_get([_mixed_sum(leaf) for leaf in leaves]), np.uint32)
    shapes = repr([jnp.shape(leaf) for leaf in leaves]).encode()
    return zlib.crc32(sums.tobytes(), zlib.crc32(shapes))


@jax.jit
def _mixed_sum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride)
    # murmur3's last steps: odd factors and shifts by half a word, each of which can be undone
    mixed = bits ^ (place * np.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)
