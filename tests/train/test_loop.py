"""The loop, with a step of a few numbers: kills, signals, full disks, and losses that are not finite."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import files_of_at_most
from rich.console import Console

from xtoken_jax.alignment.batch import Alignment, TokenRows
from xtoken_jax.data.batches import Batch, TeacherBatch
from xtoken_jax.data.encode import Record
from xtoken_jax.distributed.mesh import single_device_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.train import checkpoint
from xtoken_jax.train.loop import TrainConfig, train
from xtoken_jax.train.metrics import MetricsLog, read_metrics
from xtoken_jax.train.non_finite import NonFinite, NonFiniteLossError
from xtoken_jax.train.signals import Stopped, StopSignals
from xtoken_jax.train.step import TrainState
from xtoken_jax.train.trained_projection import Learnt

BAD = {4, 5, 9}  # the batches that make a loss of NaN, where there are such
STEPS = 12
MESH = single_device_mesh()


class Batches:
    """Batch n holds the number n, from 1."""

    def __init__(self):
        self.drawn = 0

    def __next__(self):
        self.drawn += 1
        ids = np.full((1, 2), self.drawn, np.int32)
        side = TokenRows(ids, ids > 0, ids > 0, ids)
        return Batch(side, {"teacher": TeacherBatch(side, Alignment(ids, ids, ids > 0))})

    def get_state(self):
        return {"drawn": self.drawn}

    def set_state(self, state):
        self.drawn = state["drawn"]


@jax.jit
def step(state, teacher_params, tables, batch, frozen=None):
    number = batch.student.ids[0, 0]
    bad = (teacher_params["bad"] == number).any()
    w = state.params["w"] * 0.9 + jnp.sin(number.astype(jnp.float32))
    loss = jnp.where(bad, jnp.nan, w.sum())
    params = {"w": jnp.where(bad, state.params["w"], w)}
    metrics = {"loss": loss, "ce": loss, "gradient_norm": loss, "finite": ~bad}
    return TrainState(state.step + 1, params, state.opt_state), metrics


def start():
    return jax.device_put(TrainState(jnp.int32(0), {"w": jnp.arange(3.0)}, {}), MESH.devices.flat[0])


def run(folder, *, stop=None, bad=(), evaluate=None, console=None, state=None, by=step, **config):
    state = state or start()
    return train(
        state,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state),
        by,
        Batches(),
        teacher_params={"bad": jnp.array([*bad, 0, 0, 0, 0][:4])},
        tables=None,
        evaluate=evaluate or (lambda params: {"w": float(params["w"].sum())}),
        config=TrainConfig(**{"steps": STEPS, "log_every": 1, "evaluate_every": 4, "save_every": 3} | config),
        folder=folder,
        mesh=MESH,
        title="toy",
        console=console or Console(quiet=True),
        records=lambda number: [[Record("text", 7 * number, 0), Record("sums", 1, number)]],
        stop=stop,
    )


def trace(folder):
    """All that metrics.jsonl says but for the time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    rows = trace(folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "validation" in row] == [0, 4, 8, 12]
    return rows


class _Snapshots:
    """Copies of a folder before each change that Python makes below it: what a kill there would leave."""

    def __init__(self):
        self.of = self.into = None
        self.copying = threading.RLock()
        self.count = 0

    def __call__(self, event, args):
        changes = {"os.mkdir", "os.remove", "os.rename", "os.rmdir"}
        writes = event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        if self.of is None or not (writes or event in changes) or not isinstance(args[0], str | os.PathLike):
            return
        if not str(args[0]).startswith(str(self.of)):
            return
        with self.copying:
            folder, self.of = self.of, None  # not of the copying itself
            with contextlib.suppress(shutil.Error, OSError):  # what a thread removes meanwhile
                shutil.copytree(folder, self.into / str(self.count))
            self.of, self.count = folder, self.count + 1


SNAPSHOTS = _Snapshots()
sys.addaudithook(SNAPSHOTS)


@pytest.mark.parametrize("share", [0.06, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_change_on_disk_loses_nothing(share, whole, tmp_path, monkeypatch):
    """In the middle of saves, of their clean-up, of metrics.jsonl, in a first start and in a second."""
    folder, copies, draw = tmp_path / "run", tmp_path / "copies", Batches.__next__
    folder.mkdir()
    copies.mkdir()
    SNAPSHOTS.into, SNAPSHOTS.of = copies, folder
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Batches, "__next__", lambda self: draw(self) if self.drawn < 7 else next(iter(())))
            with pytest.raises(StopIteration):
                run(folder)
        run(folder)  # a second start, from behind rows that are dropped
    finally:
        SNAPSHOTS.of = None
    assert trace(folder) == whole
    moments = sorted(copies.iterdir(), key=lambda path: int(path.name))
    assert len(moments) > 60
    random.seed(0)
    kinds = set()
    for copy in random.sample(moments, round(share * len(moments))):
        kinds |= {path.name.split(".", 1)[-1] for path in copy.glob("checkpoints/*")}
        run(copy)
        assert trace(copy) == whole, copy
        assert not list(copy.glob("checkpoints/*tmp*"))
    assert "orbax-checkpoint-tmp" in kinds


@pytest.mark.parametrize("line", ['{"step": 12, "lo', "\0\0\0", '{"step": 12, "loss": 3}\n'])
def test_rows_past_the_checkpoint_go_whole_or_cut(line, whole, tmp_path):
    run(tmp_path, steps=8)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line)
    run(tmp_path)
    assert trace(tmp_path) == whole


def test_a_w_that_begins_to_train_in_a_run_under_way_starts_as_it_was_built(tmp_path, monkeypatch):
    run(tmp_path, steps=3)
    fresh = Learnt(jnp.zeros((4, 2)), {"mu": jnp.zeros((4, 2))})
    begin = replace(start(), projections=jax.device_put({"teacher": fresh}, MESH.devices.flat[0]))

    def counting(state, *args):
        after, metrics = step(state, *args)
        learnt = jax.tree.map(lambda x: x + 1, state.projections)
        return replace(after, projections=learnt), metrics

    said = io.StringIO()
    for steps in (6, 9):  # from a checkpoint without W, then from one that has it
        console = Console(file=said, width=400)
        end = run(tmp_path, steps=steps, state=begin, by=counting, console=console)
        np.testing.assert_array_equal(end.projections["teacher"].logits, steps - 3)
        np.testing.assert_array_equal(end.projections["teacher"].opt_state["mu"], steps - 3)
    assert said.getvalue().count("W of teacher did not train yet; it starts as it was built") == 1


def signal_at(monkeypatch, where, number, kind):
    """Send this process a signal at the n-th call of a function of a module or class."""
    owner, name = where
    real, calls = getattr(owner, name), []

    def called(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(kind)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["a step", "a row", "a save", "an evaluation", "the last evaluation"])
def test_a_signal_saves_and_the_same_run_goes_on(where, kind, whole, tmp_path, monkeypatch, capfd):
    places = {
        "a step": ((Batches, "__next__"), 5),
        "a row": ((MetricsLog, "write"), 7),
        "a save": ((checkpoint.Checkpoints, "save"), 2),
    }
    evaluations = []

    def evaluate(params):
        evaluations.append(1)
        if len(evaluations) == {"an evaluation": 2, "the last evaluation": 4}.get(where):
            signal.raise_signal(kind)
        return {"w": float(params["w"].sum())}

    if where in places:
        signal_at(monkeypatch, *places[where], kind)
    with StopSignals() as stop, pytest.raises(Stopped) as stopped:
        run(tmp_path, stop=stop, evaluate=evaluate)
    monkeypatch.undo()
    name, code = ("SIGTERM", 0) if kind == signal.SIGTERM else ("Ctrl-C", 130)
    at = {"a step": 5, "a row": 5, "a save": 7, "an evaluation": 4, "the last evaluation": STEPS}[where]
    assert stopped.value.code == code
    said = (
        f"stopped by {name}: step {at} of {STEPS} is saved in {tmp_path / 'checkpoints' / str(at)}; the same"
    )
    assert str(stopped.value).startswith(said)
    assert (f"{name}: saving after this step" in capfd.readouterr().err) == ("evaluation" not in where)
    run(tmp_path)
    assert trace(tmp_path) == whole


def test_before_and_after_training_a_signal_ends_at_once(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(), pytest.raises(Stopped, match="goes on from the last checkpoint"):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_after_another_signal_ends_the_process():
    code = """
import signal
from xtoken_jax.train.signals import StopSignals
with StopSignals() as stop, stop.held():
    for kind in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(kind)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 130
    assert ended.stderr.count("SIGTERM: saving after this step") == 1
    assert "ended; the same command goes on" in ended.stderr


def test_a_damaged_last_checkpoint_costs_only_its_steps(whole, tmp_path):
    run(tmp_path, steps=9)
    (tmp_path / "checkpoints" / "9" / "data" / "metadata").write_bytes(b"{")
    out = io.StringIO()
    run(tmp_path, console=Console(file=out, width=500))
    assert f"warning  {tmp_path / 'checkpoints' / '9'}: is damaged" in out.getvalue()
    assert "toy: goes on from step 6" in out.getvalue()
    assert trace(tmp_path) == whole


def test_a_damaged_only_checkpoint_changes_nothing(tmp_path):
    run(tmp_path, keep=1)
    (file,) = (tmp_path / "checkpoints" / str(STEPS)).glob("state/_METADATA")
    file.write_bytes(b"")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"is damaged.*there is no other; put back a copy"):
        run(tmp_path, steps=20)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("size", [0, 700])
def test_a_full_disk_ends_the_run_which_goes_on_from_there(size, whole, tmp_path):
    """With no room for a row, and with none for a checkpoint."""
    run(tmp_path, steps=4)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    words = r"(metrics.jsonl: cannot|a checkpoint could not) be written \(File"
    with files_of_at_most(len(metrics) + size), pytest.raises(UserError, match=words):
        run(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(metrics)
    names = None  # the threads of the failed save end with the process elsewhere
    while names != (names := sorted(tmp_path.rglob("*"))):
        time.sleep(0.2)
    run(tmp_path)
    assert trace(tmp_path) == whole


def test_not_finite_steps_are_skipped_counted_and_written_down(tmp_path, monkeypatch):
    run(tmp_path / "whole", bad=BAD, non_finite=NonFinite.skip, max_skips=2)
    rows = {row["step"]: row for row in trace(tmp_path / "whole") if "loss" in row}
    assert {number for number, row in rows.items() if row["loss"] is None} == BAD
    assert [rows[number]["skipped_steps"] for number in (3, 4, 5, 8, 9, 12)] == [0, 1, 2, 2, 3, 3]
    w = np.arange(3.0, dtype=np.float32)
    for number in range(1, STEPS + 1):
        w = w if number in BAD else w * np.float32(0.9) + np.sin(np.float32(number))
    np.testing.assert_allclose(rows[STEPS]["loss"], w.sum(), rtol=1e-5)
    written = read_metrics(tmp_path / "whole" / "non_finite.jsonl")
    assert [row["step"] for row in written] == sorted(BAD)
    assert written[1] == {
        "step": 5, "loss": "nan", "gradient_norm": "nan",
        "rows": [
            [{"source": "text", "document": 35, "part": 0}, {"source": "sums", "document": 1, "part": 5}]
        ],
    }  # fmt: skip
    # the counts go on where a run does, in the middle of a streak, and no step is written down twice
    signal_at(monkeypatch, (Batches, "__next__"), 4, signal.SIGTERM)
    with StopSignals() as stop, pytest.raises(Stopped):
        run(tmp_path / "cut", bad=BAD, non_finite=NonFinite.skip, stop=stop)
    with pytest.raises(NonFiniteLossError, match=r"step 5.*2 in a row"):
        run(tmp_path / "cut", bad=BAD, non_finite=NonFinite.skip, max_skips=1)
    run(tmp_path / "cut", bad=BAD, non_finite=NonFinite.skip)
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert read_metrics(tmp_path / "cut" / "non_finite.jsonl") == written


def test_too_many_in_a_row_end_the_run(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"step 5: .* the last of 2 in a row \(train.max_skips=1\)"):
        run(tmp_path, bad=BAD, non_finite=NonFinite.skip, max_skips=1, log_every=4)


def test_by_default_the_first_one_ends_the_run(tmp_path):
    for _ in range(2):
        with pytest.raises(
            NonFiniteLossError, match=r"step 4: the loss is nan .*or train.non_finite=skip"
        ) as end:
            run(tmp_path, bad=BAD)
        assert str(tmp_path / "checkpoints" / "3") in str(end.value)
        assert [row["step"] for row in read_metrics(tmp_path / "non_finite.jsonl")] == [4]
    assert "loss" not in trace(tmp_path)[-1] or trace(tmp_path)[-1]["step"] == 3
    run(tmp_path, bad=BAD, non_finite=NonFinite.skip)
