"""Meshes: sizes that fit the devices, and layouts that fit the shapes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from xtoken_jax.distributed.mesh import (
    PARTITION_SPECS,
    MeshConfig,
    batch_sharding,
    constrain,
    fetch_rows,
    make_mesh,
    named_sharding,
    own_rows,
    place,
    place_rows,
    replicated,
    rows_here,
    single_device_mesh,
)
from xtoken_jax.errors import UserError


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=-1), (2, 2, 2)),
        (MeshConfig(data=2, fsdp=4, tensor=1), (2, 4, 1)),
    ],
)
def test_the_remaining_devices_fill_the_open_axis(config, shape):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            MeshConfig(data=3),
            "tensor=1 do not multiply to the device count 8; sizes that can are 1, 2, 4, 8,",
        ),
        (MeshConfig(data=-1, fsdp=3), "data=-1, fsdp=3, tensor=1 do not multiply to the device count 8"),
        (MeshConfig(data=16), "device count 8"),
        (MeshConfig(data=-1, fsdp=16), "device count 8"),
        (MeshConfig(data=-1, fsdp=-1), "at most one"),
        (MeshConfig(data=0), "must be positive"),
        (MeshConfig(data=-2), "must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(config, words):
    with pytest.raises(UserError, match=words):
        make_mesh(config)


def test_one_device_has_a_mesh_too():
    assert tuple(single_device_mesh().shape.values()) == (1, 1, 1)


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert PARTITION_SPECS["B T"] == P(("data", "fsdp"), None)
    batch = jax.device_put(jnp.zeros((8, 3)), batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    whole = jax.device_put(jnp.zeros((8, 3)), replicated(mesh))
    assert {shard.data.shape for shard in whole.addressable_shards} == {(8, 3)}


def test_an_axis_that_does_not_divide_is_dropped():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    assert named_sharding(mesh, "V D", (64, 32)).spec == P("tensor", "fsdp")
    assert named_sharding(mesh, "V D", (63, 32)).spec == P(None, "fsdp")
    assert named_sharding(mesh, "L D G H", (2, 32, 2, 8)).spec == P(None, "fsdp", None, None)
    assert named_sharding(mesh, "B T", (3, 4)).spec == P(None, None)


def test_constrain_pins_under_a_mesh_and_is_nothing_without_one():
    x = jnp.zeros((4, 2, 6))
    assert constrain(x, "B T D") is x
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: constrain(x, "B T D"))(x)
    assert pinned.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"))), 3)


def test_rows_of_one_process_are_all_and_are_placed_as_they_are():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert rows_here(mesh, 8) == list(range(8))
    rows = {"ids": np.arange(16).reshape(8, 2)}
    placed = place_rows(rows, mesh)["ids"]
    assert placed.sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(placed, rows["ids"])
    np.testing.assert_array_equal(fetch_rows(placed), rows["ids"])
    assert own_rows(mesh, 8) == list(range(8))
    np.testing.assert_array_equal(place(rows, replicated(mesh))["ids"], rows["ids"])


@pytest.mark.parametrize(("tensor", "own"), [(1, [2, 2, 2, 2]), (2, [2, 2, 2, 2]), (4, [4, 0, 4, 0])])
def test_a_row_is_of_the_first_process_that_holds_it(tensor, own, monkeypatch):
    """Four processes of two devices each, 8 rows; with `tensor` over two processes both hold the same."""

    class Device:
        def __init__(self, number):
            self.process_index = number // 2

    held = {Device(n): (slice(n // tensor * tensor, (n // tensor + 1) * tensor),) for n in range(8)}
    sharding = SimpleNamespace(devices_indices_map=lambda shape: held)
    monkeypatch.setattr("xtoken_jax.distributed.mesh.batch_sharding", lambda mesh: sharding)
    found = []
    for process in range(4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(own_rows(None, 8))
    assert sorted(row for rows in found for row in rows) == list(range(8))
    assert [len(rows) for rows in found] == own
