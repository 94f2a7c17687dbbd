"""Checkpoints: what is damaged is found out and passed over; what cannot be written is said."""

import dataclasses
import json
import os
import shutil
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import files_of_at_most

from xtoken_jax.distributed.checksum import checksum
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh, named_sharding
from xtoken_jax.errors import UserError
from xtoken_jax.train.checkpoint import Checkpoints, UnusableCheckpointError
from xtoken_jax.train.step import TrainState
from xtoken_jax.train.trained_projection import Learnt

RNG = np.random.default_rng(0)


def state_of(step):
    params = {"w": jnp.asarray(RNG.normal(size=(64, 32)), jnp.float32), "b": jnp.ones(7, jnp.bfloat16)}
    return TrainState(jnp.int32(step), params, {"m": jnp.zeros((64, 32)), "count": jnp.int32(step)})


STATES = {step: state_of(step) for step in (1, 2)}
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATES[1])


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step, state in STATES.items():
            checkpoints.save(step, state, {"position": {"next": 8 * step}})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def latest(folder):
    """What `restore_latest` gives, and what it says on the way."""
    lines = []
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore_latest(ABSTRACT, lines.append), lines


def files_of(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 0x10
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(RNG.bytes(path.stat().st_size)),
    "a bit": flip,
}


def test_the_checksum_sees_every_place_and_no_layout():
    x = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    tree = {"x": x, "n": jnp.int32(3), "flags": jnp.array([True, False]), "half": x.astype(jnp.bfloat16)}
    there = {
        "other": x.at[3, 4].add(1e-5),
        "swapped rows": x[jnp.array([1, 0, *range(2, 8)])],
        "swapped columns": x[:, jnp.array([0, 5, 2, 3, 4, 1, 6, 7])],
        "shape": x.reshape(4, 16),
        "sign of zero": x.at[0, 0].set(-0.0),
    }
    whole = checksum(tree)
    assert len({whole, *(checksum({**tree, "x": y}) for y in there.values())}) == 1 + len(there)
    assert (
        checksum({**tree, "n": jnp.int32(4)}) != whole != checksum({**tree, "flags": jnp.array([True] * 2)})
    )
    sharding = named_sharding(make_mesh(MeshConfig(1, 2, 4)), "V D", (8, 8))
    assert checksum({**tree, "x": jax.device_put(x, sharding)}) == whole


@pytest.mark.parametrize(
    "damage",
    ["missing", "a bit", *(pytest.param(d, marks=pytest.mark.slow) for d in ("cut", "empty", "garbage"))],
)
def test_a_damaged_last_checkpoint_is_named_and_the_one_before_is_used(damage, folder, tmp_path):
    """Every file in turn: either nothing that counts was lost, or the damage is found out."""
    found_out = set()
    for file in [path.relative_to(folder) for path in files_of(folder / "2")]:
        copy = tmp_path / "copy" / "checkpoints"
        shutil.rmtree(copy.parent, ignore_errors=True)
        shutil.copytree(folder, copy)
        DAMAGES[damage](copy / file)
        (state, beside), lines = latest(copy)
        step = int(state.step)
        assert equal(state, STATES[step]), file
        assert beside == {"position": {"next": 8 * step}}
        assert bool(lines) == (step == 1)
        if lines:
            found_out.add(file.parts[1])
            assert lines[0].startswith(f"{copy / '2'}: is damaged")
            assert str(copy / "1") in lines[0]
            assert not (copy / "2").exists()
            assert (copy.parent / "checkpoints-damaged" / "2").is_dir()
    assert {"state", "data"} <= found_out


def test_bits_that_orbax_does_not_miss_are_found_out(folder):
    """The largest file holds the arrays."""
    file = max(files_of(folder / "2"), key=lambda path: path.stat().st_size)
    flip(file)
    with Checkpoints(folder) as checkpoints, pytest.raises(UnusableCheckpointError, match="its checksum"):
        checkpoints.restore(2, ABSTRACT)


def test_training_goes_on_over_the_place_of_a_damaged_one(folder):
    flip(max(files_of(folder / "2"), key=lambda path: path.stat().st_size))
    for _ in range(2):  # the second time one of the same number is aside already
        with Checkpoints(folder) as checkpoints:
            assert checkpoints.restore_latest(ABSTRACT, lambda _: None)[0].step == 1
            checkpoints.save(2, STATES[2], {})
        assert latest(folder)[1] == []
        flip(max(files_of(folder / "2"), key=lambda path: path.stat().st_size))
    assert latest(folder)[1] != []
    aside = folder.with_name("checkpoints-damaged")
    assert sorted(path.name for path in aside.iterdir()) == ["2", "2-2", "2-3"]


def test_where_all_are_damaged_none_is_touched(folder):
    for step in ("1", "2"):
        (folder / step / "data" / "metadata").write_bytes(b"{}")
    before = {path: path.read_bytes() for path in files_of(folder)}
    with pytest.raises(UserError, match=rf"{folder}/2: is damaged.*nor can the 1 before it.* to begin anew"):
        latest(folder)
    shutil.rmtree(folder / "1")
    with pytest.raises(UserError, match=r"/2: is damaged.* and there is no other"):
        latest(folder)
    assert {path: path.read_bytes() for path in files_of(folder)} == {
        path: content for path, content in before.items() if "1" not in path.relative_to(folder).parts[:1]
    }


def test_another_student_is_not_called_damage(folder):
    narrow = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[:1], x.dtype), ABSTRACT)
    with Checkpoints(folder) as checkpoints, pytest.raises(UserError, match="or is not of this student"):
        checkpoints.restore_latest(narrow, lambda _: None)
    assert (folder / "1").is_dir()
    assert (folder / "2").is_dir()


def test_a_folder_has_one_writer_and_readers_change_nothing(folder):
    (folder / "4.orbax-checkpoint-tmp").mkdir()  # of a save that was killed, or is under way
    with Checkpoints(folder, read_only=True) as reader:
        assert reader.latest == 2
        assert (folder / "4.orbax-checkpoint-tmp").is_dir()
        with Checkpoints(folder) as writer:
            assert writer.latest == 2
            with pytest.raises(UserError, match=rf"process {os.getpid()} is writing there"):
                Checkpoints(folder)
            writer.save(3, state_of(3), {})  # cleared away in the background, and by now
            assert not (folder / "4.orbax-checkpoint-tmp").exists()
        assert reader.restore(2, ABSTRACT)[0].step == 2
    Checkpoints(folder).__exit__(None)


@pytest.mark.parametrize("when", ["at the next save", "while training", "at the end"])
def test_a_full_disk_is_one_error_and_the_run_can_go_on(when, folder, capfd):
    large = TrainState(jnp.int32(3), {"w": jnp.asarray(RNG.normal(size=(512, 512)), jnp.float32)}, {})

    def run():
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(3, large, {})
            if when == "at the next save":
                checkpoints.save(4, large, {})
            elif when == "while training":
                while True:
                    checkpoints.check()
                    time.sleep(0.01)

    with files_of_at_most(100_000), pytest.raises(UserError, match=r"could not be written .* is .*/2\."):
        run()
    assert capfd.readouterr().err == ""  # the error is for the command to show
    settle(folder)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore_latest(ABSTRACT, pytest.fail)[0].step == 2
        checkpoints.save(3, large, {})
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_an_error_on_the_way_out_does_not_hide_the_one_before(folder):
    def run():
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(3, STATES[2], {})
            raise KeyError

    with files_of_at_most(0), pytest.raises(KeyError):
        run()


def settle(folder):
    """Wait for the threads of a failed save, which end with the process elsewhere."""
    names = None
    while names != (names := sorted(folder.rglob("*"))):
        time.sleep(0.2)


def with_w(state, *names):
    """The state with a W that trains for each of these teachers."""
    learnt = {name: Learnt(jnp.full((5, 2), 0.5), {"mu": jnp.ones((5, 2))}) for name in names}
    return dataclasses.replace(state, projections=learnt)


def test_a_w_that_is_not_in_a_checkpoint_starts_and_one_that_is_stays(tmp_path):
    states = {1: with_w(STATES[1], "one"), 2: with_w(STATES[2], "one", "two")}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states[2])
    lines = []
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, states[1], {})
        checkpoints.wait()
        found, _ = checkpoints.restore_latest(abstract, lines.append)
        assert list(found.projections) == ["one"]
        assert equal(found, states[1])
        assert lines == [
            f"{tmp_path / 'checkpoints' / '1'}: W of two did not train yet; it starts as it was built"
        ]
        checkpoints.save(2, states[2], {})
        checkpoints.wait()
        assert equal(checkpoints.restore_latest(abstract, lines.append)[0], states[2])
        assert len(lines) == 1
        for kept, lost in ((("one",), "two"), ((), "one, two")):
            less = dataclasses.replace(
                abstract, projections={name: abstract.projections[name] for name in kept}
            )
            with pytest.raises(
                UserError, match=rf"2: holds the trained W of {lost} and its moments"
            ) as refusal:
                checkpoints.restore_latest(less, lines.append)
            assert not isinstance(refusal.value, UnusableCheckpointError)
            assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.pop("state"), 'lacks "state"'),
        (lambda content: content.update(beside=[3]), r"beside=\[3\] must be an object"),
        (lambda content: content.update(frozen="x"), 'frozen="x" must be'),
        (lambda content: content.update(more=1), 'unknown key "more"'),
    ],
)
def test_other_fields_with_the_right_checksum_are_damage_too(folder, change, words):
    [path] = [path for path in files_of(folder / "2" / "data") if b"checksum" in path.read_bytes()]
    content = json.loads(path.read_text())
    del content["checksum"]
    change(content)
    path.write_text(
        json.dumps({**content, "checksum": zlib.crc32(json.dumps(content, sort_keys=True).encode())})
    )
    with Checkpoints(folder) as checkpoints, pytest.raises(UnusableCheckpointError, match=words):
        checkpoints.restore(2, ABSTRACT)
