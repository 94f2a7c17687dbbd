"""W split by the student's tokens over one axis of a mesh, as a vocabulary-parallel model is (jax only)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xtoken_jax.projection.matrix import Array, Projection, log_weights, row_softmax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ShardedProjection:
    """W [V_s, V_t], of which each device holds some of the rows.

    Each device projects the probabilities of its own rows; one sum over the axis, of [..., n],
    makes the result. Left to the partitioner, plain `Projection.project` sums once for each of
    the K entries. Made by `shard_projection`; used inside `jax.jit`, as a `Projection` is.

    Attributes:
        projection: W with rows added at the end, empty ones, until the axis divides them.
        student_size: V_s, the rows that count.
        mesh, axis: over what the rows are split.
        logits: float32 [rows, K], log-weights that are trained in the place of the weights, on the
            entries that W has; None for a fixed W.
    """

    projection: Projection
    student_size: int = field(metadata={"static": True})
    mesh: Mesh = field(metadata={"static": True})
    axis: str = field(metadata={"static": True})
    logits: Array | None = None

    def __repr__(self) -> str:
        kind = "fixed" if self.logits is None else "learnable"
        split = f"{self.student_size:,} student tokens over {self.axis!r} of {dict(self.mesh.shape)}"
        return f"ShardedProjection({kind}, {split}\n{self.projection!r})"

    @property
    def teacher_size(self) -> int | None:
        """As in `Projection`."""
        return self.projection.teacher_size

    def learnable(self) -> ShardedProjection:
        """The same with weights that can be trained, `logits`, split likewise."""
        if self.logits is not None:
            return self
        logits, indices = log_weights(self.projection)
        return replace(self, projection=replace(self.projection, indices=indices), logits=logits)

    def current(self) -> Projection:
        """W as it now is, of all rows, with a gradient to the logits where it has such."""
        if self.logits is None:
            return self.projection
        weights = row_softmax(self.logits, self.projection.indices)
        return replace(self.projection, weights=weights)

    def project(
        self, probabilities: jax.Array, columns: jax.Array | None = None, width: int | None = None
    ) -> jax.Array:
        """As `Projection.project`.

        Args:
            probabilities: float32 [..., V_s], or [..., rows] with the added rows, as a padded
                vocabulary gives it; the last axis split over `axis`, the others as they are.
            columns, width: as in `Projection.project`.

        Returns:
            float32 [..., n], whole on every device of `axis`.
        """
        missing = self.projection.student_size - probabilities.shape[-1]
        probabilities = jnp.pad(probabilities, [(0, 0)] * (probabilities.ndim - 1) + [(0, missing)])
        last = PartitionSpec(*[None] * (probabilities.ndim - 1), self.axis)

        def local(own: Projection, block: jax.Array, columns: jax.Array | None) -> jax.Array:
            return jax.lax.psum(own.project(block, columns, width), self.axis)

        # The other axes of the mesh stay with the partitioner: the batch may be split over them.
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(PartitionSpec(self.axis), last, PartitionSpec()),
            out_specs=PartitionSpec(),
            axis_names={self.axis},
        )(self.current(), probabilities, columns)


def shard_projection(
    projection: Projection, mesh: Mesh, axis: str, *, rows: int | None = None
) -> ShardedProjection:
    """Lay W out over a mesh: each device of `axis` gets an equal run of rows.

    Args:
        projection: W.
        mesh: where to.
        axis: the name of the mesh axis that splits the student's vocabulary.
        rows: how many to have in all, empty ones at the end, such as the width of the student's
            logits. None: as few more as make it a multiple of the axis.

    Raises:
        ValueError: fewer rows than W has, or the axis does not divide them.
    """
    count, parts = projection.student_size, mesh.shape[axis]
    rows = -(-count // parts) * parts if rows is None else rows
    if rows < count or rows % parts:
        raise ValueError(f"rows={rows}: must be at least {count} and a multiple of {axis}={parts}")
    more = ((0, rows - count), (0, 0))
    padded = Projection(
        jnp.pad(jnp.asarray(projection.indices), more, constant_values=-1),
        jnp.pad(jnp.asarray(projection.weights), more),
        projection.teacher_size,
    )
    placed = jax.device_put(padded, NamedSharding(mesh, PartitionSpec(axis, None)))
    return ShardedProjection(placed, count, mesh, axis)
