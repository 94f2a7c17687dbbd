"""TensorBoard and Weights & Biases: what metrics.jsonl holds, once, also in a run that goes on."""

import importlib.util
import sys
import types

import pytest

from xtoken_jax.errors import UserError
from xtoken_jax.train.loop import TrainConfig
from xtoken_jax.train.trackers import Trackers, WandbConfig, flat

ROWS = [
    {"step": 0, "validation": {"text bits/byte": 2.5}},
    {"step": 10, "loss": 3.0, "kd/teacher": None, "kd_scale_capped": True},
    {"step": 20, "loss": 2.0, "validation": {"text bits/byte": 1.5}},
]


class FakeRun:
    def __init__(self, step):
        self.step, self.rows, self.finished = step, [], 0

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the module: runs by id, of which each knows how far it came."""
    module = types.ModuleType("wandb")
    module.runs, module.asked = [], []

    def init(**asked):
        module.asked.append(asked)
        same = [
            run
            for run, earlier in zip(module.runs, module.asked, strict=False)
            if earlier["id"] == asked["id"]
        ]
        module.runs.append(FakeRun(max((step + 1 for run in same for step, _ in run.rows), default=0)))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def write(folder, rows, kept=(), **which):
    options = {"tensorboard": False, "wandb": WandbConfig(), "title": "distilling"} | which
    with Trackers(folder, kept, settings={"seed": 1}, **options) as trackers:
        for row in rows:
            trackers.write(row["step"], {name: value for name, value in row.items() if name != "step"})


def test_rows_are_flat_numbers():
    assert flat(ROWS[1]) == {"loss": 3.0, "kd_scale_capped": 1.0}
    assert flat(ROWS[2]) == {"loss": 2.0, "validation/text bits/byte": 1.5}
    assert flat({"loss": float("nan"), "validation": {"step": 1}}) == {"validation/step": 1.0}


def test_weights_and_biases_goes_on_where_it_was(wandb, tmp_path):
    write(tmp_path, ROWS, wandb=WandbConfig("mine"))
    # the run goes on from step 10: what the server has of step 20 is not sent again
    more = [ROWS[2], {"step": 30, "loss": 1.0}]
    write(tmp_path, more, kept=ROWS[:2], wandb=WandbConfig("mine"))
    first, second = wandb.asked
    assert first["id"] == second["id"]
    assert {first["project"], first["resume"], first["config"]["seed"]} == {"mine", "allow", 1}
    assert [[step for step, _ in run.rows] for run in wandb.runs] == [[0, 10, 20], [30]]
    assert wandb.runs[0].rows[2] == (20, {"loss": 2.0, "validation/text bits/byte": 1.5})
    assert [run.finished for run in wandb.runs] == [1, 1]
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", [], wandb=WandbConfig("mine"))
    assert wandb.asked[2]["id"] != first["id"]


def test_weights_and_biases_that_refuses_is_one_line(wandb, tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"^train.wandb.project=mine: No API key configured\.$"):
        write(tmp_path, [], wandb=WandbConfig("mine"))


def test_what_is_not_installed_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for config, extra in (
        (TrainConfig(tensorboard=True), "tensorboard"),
        (TrainConfig(wandb=WandbConfig("mine")), "wandb"),
    ):
        with pytest.raises(UserError, match=rf"^train\.{extra}.*pip install 'xtoken-jax\[{extra}\]'$"):
            config.validate()
    TrainConfig().validate()


def events(folder):
    """(step, name, value) of all files there."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):  # length, its checksum, the event, its checksum
            size = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            place += 16 + size
    return found


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="needs the extra tensorboard")
def test_tensorboard_holds_every_point_once(tmp_path):
    write(tmp_path, ROWS, tensorboard=True)
    more = [ROWS[2], {"step": 30, "loss": 1.0}]
    write(tmp_path, more, kept=ROWS[:2], tensorboard=True)
    expected = [(row["step"], name, value) for row in [*ROWS[:2], *more] for name, value in flat(row).items()]
    found = events(tmp_path / "tensorboard")
    assert [(step, value) for step, _, value in found] == [(step, value) for step, _, value in expected]
    assert len({(step, name) for step, name, _ in found}) == len(found) == 6
    assert any(name.startswith("validation/text") for _, name, _ in found)
