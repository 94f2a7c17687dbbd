"""Meshes, and how an array is laid out on one: a PartitionSpec for each shape-letter name.

Three axes. `data` holds copies of the parameters, `fsdp` splits both the batch and the parameters,
`tensor` splits heads, feed-forward columns and the vocabulary. On one device the mesh is 1x1x1, so
there is a single code path.

Shape letters: B batch, T position, S cached position, C chunk, V vocabulary, D width, L layer, N query head,
G key/value head, H head width, F feed-forward width, R rank of an adapter, M micro-batch.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xtoken_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

PARTITION_SPECS: dict[str, PartitionSpec] = {
    # activations and batches
    "B": PartitionSpec(BATCH),
    "B T": PartitionSpec(BATCH, None),
    "B C": PartitionSpec(BATCH, None),
    "B T D": PartitionSpec(BATCH, None, None),
    "B T V": PartitionSpec(BATCH, None, "tensor"),
    "M B T": PartitionSpec(None, BATCH, None),
    "M B T D": PartitionSpec(None, BATCH, None, None),
    "L B S G H": PartitionSpec(None, BATCH, None, "tensor", None),
    "B T N H": PartitionSpec(BATCH, None, "tensor", None),
    "B T G H": PartitionSpec(BATCH, None, "tensor", None),
    # parameters; the widths that `tensor` does not split are split over `fsdp`
    "D": PartitionSpec(None),
    "V D": PartitionSpec("tensor", "fsdp"),
    "L D": PartitionSpec(None, None),
    "L D N H": PartitionSpec(None, "fsdp", "tensor", None),
    "L D G H": PartitionSpec(None, "fsdp", "tensor", None),
    "L N H D": PartitionSpec(None, "tensor", None, "fsdp"),
    "L D F": PartitionSpec(None, "fsdp", "tensor"),
    "L F D": PartitionSpec(None, "tensor", "fsdp"),
    "L N H": PartitionSpec(None, "tensor", None),
    "L G H": PartitionSpec(None, "tensor", None),
    "L F": PartitionSpec(None, "tensor"),
    "L H": PartitionSpec(None, None),
    "L D R": PartitionSpec(None, "fsdp", None),
    "L N H R": PartitionSpec(None, "tensor", None, None),
    "L F R": PartitionSpec(None, "tensor", None),
    "L R N H": PartitionSpec(None, None, "tensor", None),
    "L R G H": PartitionSpec(None, None, "tensor", None),
    "L R F": PartitionSpec(None, None, "tensor"),
    "L R D": PartitionSpec(None, None, "fsdp"),
}


@dataclasses.dataclass
class MeshConfig:
    """Sizes of the three mesh axes; -1 (at most once) means the remaining devices.

    Attributes:
        data: devices with a whole copy of the parameters each; the batch is split over them.
        fsdp: devices that split the parameters, the optimizer state and the batch.
        tensor: devices that split heads, feed-forward columns and the vocabulary; not the batch.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig | None = None, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with Auto axes ("data", "fsdp", "tensor").

    Args:
        config: axis sizes; by default all devices on `data`.
        devices: the devices to use, by default every device of every process.

    Raises:
        UserError: an axis size is not -1 or positive, two are -1, or they do not multiply to the
            number of devices.
    """
    config = config or MeshConfig()
    count = len(devices) if devices is not None else jax.device_count()
    sizes = [config.data, config.fsdp, config.tensor]
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size != -1 and size < 1 for size in sizes):
        raise UserError(f"mesh sizes must be positive, or -1 for the remaining devices: {named}")
    if sizes.count(-1) > 1:
        raise UserError(f"at most one mesh size may be -1: {named}")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        sizes_that_fit = ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
        raise UserError(
            f"mesh sizes {named} do not multiply to the device count {count}; sizes that can are "
            f"{sizes_that_fit}, and one of the three may be -1 for the remaining devices"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def single_device_mesh() -> Mesh:
    """The 1x1x1 mesh on this process's first device."""
    return make_mesh(MeshConfig(data=1), devices=jax.local_devices()[:1])


def named_sharding(mesh: Mesh, letters: str, shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array by its shape letters.

    An axis is dropped where it does not divide the dimension: 3 key/value heads over tensor=2 stay whole.
    """
    return NamedSharding(mesh, _fitted(letters, shape, dict(mesh.shape)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a [B, ...] batch: rows over data and fsdp, any further dimension whole."""
    return NamedSharding(mesh, PARTITION_SPECS["B"])


def check_batch_size(mesh: Mesh, batch_size: int, parts: int = 1) -> None:
    """Refuse rows that the devices, each in so many parts, cannot share evenly.

    Raises:
        UserError: names the key of the batch size.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (devices * parts):
        by = f", each in train.accumulate={parts} parts" if parts > 1 else ""
        unit = devices * parts
        below = batch_size // unit * unit
        sizes = " or ".join(str(size) for size in (below, below + unit) if size > 0)
        rows = batch_size // devices if batch_size % devices == 0 else 0
        others = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise UserError(
            f"data.batch_size={batch_size}: not a multiple of the {devices} devices of the mesh's data and "
            f"fsdp axes{by}; take data.batch_size={sizes}"
            + (f", or train.accumulate={others}" if others else "")
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process holds whole, and alike, laid out over the devices: each fills its own."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    # `device_put` would send all of it between the hosts, to see that it is alike

    def filled(x: Any) -> jax.Array:
        content = np.asarray(x)
        return jax.make_array_from_callback(content.shape, sharding, lambda index: content[index])

    return jax.tree.map(filled, tree)


def rows_here(mesh: Mesh, count: int) -> list[int]:
    """Which of the `count` rows of a batch this process's devices hold, in rising order."""
    held = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    return sorted({row for index in held if index is not None for row in range(count)[index[0]]})


def own_rows(mesh: Mesh, count: int) -> list[int]:
    """Those of `rows_here` that no process before this one holds: each row is one process's own."""
    owners: dict[int, int] = {}
    for device, index in batch_sharding(mesh).devices_indices_map((count,)).items():
        for row in range(count)[index[0]] if index is not None else ():
            process: int = device.process_index  # type: ignore[attr-defined]
            owners[row] = min(owners.get(row, process), process)
    return sorted(row for row, owner in owners.items() if owner == jax.process_index())


def fetch_rows(tree: Any) -> Any:
    """The inverse of `place_rows`: of arrays split by their first axis alone, what this process holds."""

    def fetched(x: jax.Array) -> np.ndarray:
        held = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        parts = [np.asarray(held[start]) for start in sorted(held)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return jax.tree.map(fetched, tree)


def place_rows(batch: Any, mesh: Mesh) -> Any:
    """The global batch, of arrays [rows_here, ...] that each process has made for its own devices."""
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    return jax.make_array_from_process_local_data(sharding, batch)


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Pin an intermediate value to its layout under `jax.set_mesh`; without a mesh, `x` itself.

    Propagation alone may carry a parameter's split width into the activations, where the batch
    already uses that axis.
    """
    specs = context_specs({letters: x.shape})
    return x if specs is None else jax.lax.with_sharding_constraint(x, specs[letters])


def whole(x: jax.Array) -> jax.Array:
    """`x` in one piece along every axis, on each device; inside of a `jax.shard_map` on each of its parts.

    For what would be exchanged piece by piece, such as in sorting a split vocabulary.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if mesh.auto_axes else x


def context_specs(shapes: Mapping[str, Sequence[int]]) -> dict[str, PartitionSpec] | None:
    """The spec of each of several arrays, by their shape letters, on the mesh of `jax.set_mesh`.

    None without such a mesh, and inside of a `jax.shard_map` over it. Axes that do not divide are dropped.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.auto_axes):
        return None
    return {letters: _fitted(letters, shape, dict(mesh.shape)) for letters, shape in shapes.items()}


def _fitted(letters: str, shape: Sequence[int], sizes: dict[str, int]) -> PartitionSpec:
    """The spec of `letters`, less the axes that do not divide their dimension."""
    fitted = []
    for entry, dimension in zip(PARTITION_SPECS[letters], shape, strict=True):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        parts = math.prod(sizes[axis] for axis in axes)
        fitted.append(entry if dimension % parts == 0 else None)
    return PartitionSpec(*fitted)
