"""The quickstarts as shipped: their models, and a step of the one with two teachers."""

import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from xtoken_jax.run.distill import distill
from xtoken_jax.run.experiment import PACKAGE, load_experiment
from xtoken_jax.train.metrics import read_metrics

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "quickstart"
ASSETS = PACKAGE / "assets" / "quickstart"


@pytest.fixture
def make(monkeypatch):
    """The experiment's script; experiments are no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("make")
    for name in ("make", "make_tokenizers"):
        sys.modules.pop(name, None)


def test_all_models_of_both_experiments_are_in_the_package():
    for name in ("quickstart", "quickstart_two_teachers"):
        experiment = load_experiment([f"experiment={name}"])
        for config in (experiment.student, *experiment.every_teacher().values()):
            folder = Path(config.path)
            assert folder.parent == ASSETS
            for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                assert (folder / file).is_file()
    sizes = [path.stat().st_size for path in (ASSETS / "teacher_english").iterdir()]
    assert sum(sizes) < 2.2e6  # it travels in the wheel


def test_models_that_are_there_are_not_made_again(make, monkeypatch, tmp_path, capsys):
    made = []
    monkeypatch.setattr(make, "distill", lambda experiment, console: made.append(experiment.name))
    monkeypatch.setattr(sys, "argv", ["make.py", "--work", str(tmp_path)])
    before = {path: path.stat().st_mtime_ns for path in ASSETS.rglob("*")}
    make.main()
    assert made == []
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in ASSETS.rglob("*")} == before
    assert capsys.readouterr().out.count("is there") == 3


@pytest.mark.slow
def test_a_step_with_two_teachers_is_said_and_written_for_each(tmp_path):
    words = ["train.steps=1", "train.evaluate_every=0", "baseline=false", "data.batch_size=8"]
    words += ["data.validation.english.limit=1", "data.validation.arithmetic.documents=8"]
    said = io.StringIO()
    experiment = load_experiment(
        ["experiment=quickstart_two_teachers", *words, f"run_dir={tmp_path / 'run'}"]
    )
    result = distill(experiment, Console(file=said, width=300))
    assert list(result.figures) == ["teacher", "teacher english", "student, untouched", "distilled"]
    losses = json.loads((tmp_path / "run" / "result.json").read_text())["losses"]
    assert losses == {"teacher": "p_kl", "english": "h_kl"}
    for line in ("teacher  english: ", "loss     p_kl, weight 1: ", "loss     h_kl, weight 1: "):
        assert line in said.getvalue()
    (row,) = [row for row in read_metrics(result.metrics) if "loss" in row]
    for name in losses:
        assert row[f"chunks/{name}"] > 0
        assert row[f"aligned_share/{name}"] > 0.5
        assert 0 <= row[f"agreement/{name}"] <= 1
    both = row["kd/teacher"] + row["kd/english"]
    np.testing.assert_allclose(row["kd"], both, rtol=1e-5)
    np.testing.assert_allclose(row["loss"], row["ce"] + 2 * both, rtol=1e-5)
