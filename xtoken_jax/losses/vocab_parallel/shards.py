"""A vocabulary split over a mesh axis: which device has what, and the collectives that losses need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.math.chunks import Merging
from xtoken_jax.losses.math.softmax import centred


@dataclass(frozen=True)
class Layout:
    """What is split over which axes of a mesh, and the collectives over the vocabulary's."""

    mesh: Mesh
    axis: str
    data: tuple[str, ...]

    @property
    def parts(self) -> int:
        return self.mesh.shape[self.axis]

    @property
    def by_row(self) -> PartitionSpec:
        return PartitionSpec(self.data or None)

    @property
    def of_vocabulary(self) -> PartitionSpec:
        return PartitionSpec(self.axis)

    @property
    def of_logits(self) -> PartitionSpec:
        return PartitionSpec(self.data or None, None, self.axis)

    @property
    def of_chunks(self) -> PartitionSpec:
        """[N, V], flat rows."""
        return PartitionSpec(self.data or None, self.axis)

    def block(self, size: int, chunks: int) -> int:
        """How many of a device's chunks are exchanged at once: a multiple of n, not many more than there are.

        Args:
            size: as many as are asked for.
            chunks: of all B rows.
        """
        own = max(chunks // self._row_parts, 1)
        return -(-min(size, own) // self.parts) * self.parts

    @property
    def _row_parts(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self.data)

    def padded(self, logits: jax.Array) -> jax.Array:
        """[B, T, V] with columns added until the axis divides them."""
        if logits.shape[0] % self._row_parts:
            names = "*".join(self.data)
            raise ValueError(f"{logits.shape[0]} rows do not divide over {names}={self._row_parts}")
        missing = -logits.shape[-1] % self.parts
        return jnp.pad(logits, ((0, 0), (0, 0), (0, missing))) if missing else jnp.asarray(logits)

    def run(self, local: Callable, inputs: tuple, outputs: Any) -> Callable:
        return jax.shard_map(local, mesh=self.mesh, in_specs=inputs, out_specs=outputs)

    def sum(self, values: jax.Array) -> jax.Array:
        return jax.lax.psum(values, self.axis)

    def sum_scatter(self, values: jax.Array) -> jax.Array:
        """[K, m] -> [K, m / n]: the sum, of which each device gets its columns."""
        return jax.lax.psum_scatter(values, self.axis, scatter_dimension=1, tiled=True)

    def to_rows(self, values: jax.Array) -> jax.Array:
        """[K, v] -> [K / n, n v]: all columns, of a device's share of the rows."""
        return jax.lax.all_to_all(values, self.axis, split_axis=0, concat_axis=1, tiled=True)

    def to_columns(self, values: jax.Array) -> jax.Array:
        """[K / n, n v] -> [K, v]: the way back."""
        return jax.lax.all_to_all(values, self.axis, split_axis=1, concat_axis=0, tiled=True)

    def in_its_place(self, values: jax.Array) -> jax.Array:
        """[K / n, ...] -> [K, ...], 0 but for a device's own rows: a sum over devices has them all."""
        rows = len(values)
        everywhere = jnp.zeros((rows * self.parts, *values.shape[1:]), values.dtype)
        return jax.lax.dynamic_update_slice_in_dim(everywhere, values, self.start(rows), 0)

    def start(self, width: int) -> jax.Array:
        """The global id of the first of a device's `width` columns."""
        return jax.lax.axis_index(self.axis) * width

    def places(self, ids: jax.Array, width: int) -> jax.Array:
        """Where ids stand in a device's `width` columns; `width` for those of other devices."""
        places = ids - self.start(width)
        return jnp.where((places >= 0) & (places < width), places, width)

    def highest(self, logits: jax.Array) -> jax.Array:
        """[N, v] -> [N]: the highest of the whole row, NaN where the row has a NaN or +inf on any device."""
        own = logits.max(-1)
        # A maximum over devices may drop a NaN, but not +inf.
        top = jax.lax.pmax(jnp.where(own < jnp.inf, own, jnp.inf), self.axis)
        return jnp.where(top < jnp.inf, top, jnp.nan)

    def centred(self, logits: jax.Array) -> jax.Array:
        """[N, v] less the highest of the whole row; a row that is not finite on any device is NaN on all."""
        return centred(logits, self.highest(logits))

    def flat(self, logits: jax.Array, size: int, temperature: float = 1.0) -> jax.Array:
        """float32 [b T, v] of a device, over the temperature; -inf past the tokenizer's size."""
        logits = jnp.asarray(logits, jnp.float32).reshape(-1, logits.shape[-1]) / temperature
        ids = self.start(logits.shape[-1]) + jnp.arange(logits.shape[-1], dtype=jnp.int32)
        return jnp.where(ids[None, :] < size, logits, -jnp.inf)

    def log_normalizer(self, logits: jax.Array) -> jax.Array:
        """[N, v] -> [N]: logsumexp over the whole vocabulary."""
        top = self.highest(logits)
        top = jnp.where(top == -jnp.inf, 0.0, top)
        return jnp.log(self.sum(jnp.exp(logits - top[:, None]).sum(-1))) + top

    def at(self, logits: jax.Array, ids: jax.Array) -> jax.Array:
        """[N, v] at one id a row [N]: only its device reads it."""
        places = self.places(ids, logits.shape[-1])[:, None]
        own = jnp.take_along_axis(logits, places, axis=-1, mode="fill", fill_value=0.0)
        return self.sum(own[:, 0])


@dataclass(frozen=True)
class Setting:
    """All that is static: C chunks a row, the merge and so on, and how many chunks are exchanged at once."""

    layout: Layout
    count: int
    merge: str
    direction: str
    beta: float
    temperature: float
    student_size: int
    teacher_size: int
    block: int

    def merging(self, chunks: jax.Array) -> Merging:
        return Merging.of(chunks, self.count, self.merge)


class Rows(NamedTuple):
    """int32 or bool [B, T] each, or None."""

    student_chunks: jax.Array
    teacher_chunks: jax.Array
    student_ids: jax.Array | None = None
    teacher_ids: jax.Array | None = None
    teacher_mask: jax.Array | None = None

    @classmethod
    def of(
        cls,
        alignment: Alignment,
        student_ids: jax.Array | None = None,
        teacher_ids: jax.Array | None = None,
        teacher_mask: jax.Array | None = None,
    ) -> Rows:
        chunks = (jnp.asarray(alignment.student_chunks), jnp.asarray(alignment.teacher_chunks))
        return cls(*chunks, student_ids, teacher_ids, teacher_mask)


def scaled(slope: jax.Array, gradient: jax.Array) -> jax.Array:
    """What does not count has no gradient, whatever its slope."""
    return jnp.where(gradient != 0, slope * gradient, 0.0)


def counted_positions(counted: jax.Array, merging: Merging, *, others: bool = False) -> jax.Array:
    """bool [N, 1]: positions that a chunk of bool [K] reads; with `others` also those that it did not choose.

    The logits of other positions may be anything, NaN included, and have a gradient of 0.
    """
    flags = counted.astype(jnp.float32)
    read = merging.spread(flags[:, None])[:, 0] != 0
    return (read | (merging.spread_other(flags) != 0) if others else read)[:, None]


def by_blocks(step: Callable, size: int, *arrays: jax.Array, total: Any = None) -> Any:
    """step(*rows) -> (results, addend) over blocks of rows.

    Args:
        step: of `size` rows of each array, those past the end being 0.
        arrays: [rows, ...] each.
        total: what the addends are added to; None for none.

    Returns:
        The results [rows, ...] in one, and the total.
    """
    count = len(arrays[0])
    number = -(-count // size)
    blocks = [
        jnp.pad(a, ((0, number * size - count), *[(0, 0)] * (a.ndim - 1))).reshape(number, size, *a.shape[1:])
        for a in arrays
    ]

    def add(total: Any, block: list[jax.Array]) -> tuple[Any, Any]:
        results, addend = step(*block)
        return jax.tree.map(jnp.add, total, addend), results

    total, results = jax.lax.scan(add, total, blocks)
    return jax.tree.map(lambda a: a.reshape(number * size, *a.shape[2:])[:count], results), total
