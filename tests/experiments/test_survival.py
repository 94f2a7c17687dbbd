"""experiments/survival/kill.py: that it would see a difference and, in minutes, that there is none."""

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "survival"


@pytest.fixture(scope="module")
def kill():
    """The module; experiments are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("kill")


def write_run(folder, rows, *, student=b"weights", result="{}"):
    (folder / "student").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "student" / "model.safetensors").write_bytes(student)
    (folder / "result.json").write_text(result)


ROWS = [{"step": step, "loss": 1.5 + step, "tokens_per_second": 9 * step} for step in range(3)]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda folder: None, None),
        (lambda folder: write_metrics(folder, [*ROWS, ROWS[-1]]), "other rows"),
        (lambda folder: write_metrics(folder, ROWS[:-1]), "other rows"),
        (lambda folder: write_metrics(folder, [*ROWS[:2], {"step": 2, "loss": 3.5000002}]), "is not"),
        (lambda folder: write_metrics(folder, [*ROWS[:2], {"step": 2, "loss": 3.6}]), "apart"),
        (
            lambda folder: (folder / "student" / "model.safetensors").write_bytes(b"weightS"),
            "another student",
        ),
        (lambda folder: (folder / "result.json").write_text("{ }"), "another result.json"),
        (lambda folder: (folder / ".student.partial").mkdir(), "left"),
    ],
)
def test_a_difference_is_seen(change, fault, kill, tmp_path):
    for name in ("whole", "run"):
        write_run(tmp_path / name, ROWS)
    change(tmp_path / "run")
    found = kill.Found()
    kill.compare(tmp_path / "whole", tmp_path / "run", found, exact=True)
    assert (found.faults == []) == (fault is None)
    assert fault is None or fault in found.faults[0]


def write_metrics(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [["mesh.data=8"], ["mesh.data=8", "mesh.fsdp=4 mesh.tensor=2"]])
def test_a_killed_run_ends_as_if_it_had_not_been(meshes, kill, words, tmp_path):
    pace = ["train.steps=12", "train.save_every=2", "train.log_every=1", "train.evaluate_every=4"]
    words = [*words, *pace, "baseline=true", "optimizer.learning_rate=3e-3", "optimizer.warmup_steps=2"]
    found = kill.study(
        words, tmp_path / "work", 3, each=3, seed=0, meshes=meshes, kinds=("save", "term", "any")
    )
    assert found.faults == []
    assert sum(found.kills.values()) == 3
