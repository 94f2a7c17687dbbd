"""Runs without validation sources: some training documents are held out, or nothing is measured."""

import json

import pytest

from xtoken_jax.cli.parser import main
from xtoken_jax.train.metrics import read_metrics


@pytest.fixture
def without(words, tmp_path):
    """Words of two steps without a validation source."""
    words = [word for word in words if not word.startswith("data.validation")]
    return [
        *words,
        "train.steps=2",
        "train.log_every=1",
        "optimizer.warmup_steps=0",
        f"run_dir={tmp_path / 'run'}",
    ]


def held_out_line(text):
    (line,) = [line for line in text.splitlines() if line.startswith("held out")]
    return line


def test_documents_are_held_out_of_training(without, tmp_path, capsys):
    """Of 64 documents every 32nd, whatever the seed; a cache of the teacher makes the same choice."""
    cache, run = tmp_path / "cache", tmp_path / "run"
    assert main(["cache-teacher", *without, "--out", str(cache), "--top-k", "8"]) == 0
    said = "held out 1 of 64 documents of text; not trained on (data.validation_share=0.02)"
    assert held_out_line(capsys.readouterr().err) == said
    words = [*without, f"teacher.cache={cache}"]
    assert main(["distill", *words]) == 0
    printed = capsys.readouterr().out
    assert held_out_line(printed) == said
    assert "documents: 63 of text" in printed
    figures = json.loads((run / "result.json").read_text())["figures"]
    assert list(figures) == ["teacher", "student, untouched", "distilled"]
    assert all(row["text bits/byte"] > 0 for row in figures.values())
    assert "text bits/byte" in printed
    # another share is another text, for the run and for the cache
    assert main(["distill", *without, "data.validation_share=0.1"]) == 2
    assert "data.validation_share=0.02 there, 0.1 here" in capsys.readouterr().err
    other = f"run_dir={tmp_path / 'other'}"
    assert main(["distill", *words, "data.validation_share=0.1", other]) == 2
    assert "made of another data.train.text" in capsys.readouterr().err


def test_nothing_is_measured(without, tmp_path, capsys):
    run = tmp_path / "run"
    words = [*without, "data.validation=none", "baseline=true"]
    assert main(["distill", *words]) == 0
    printed = capsys.readouterr().out
    assert held_out_line(printed) == "held out nothing: data.validation=none, no held-out figures"
    assert "documents: 64 of text" in printed
    assert f"curves   {run / 'curves.png'}" in printed
    assert "held-out figures after" not in printed
    figures = json.loads((run / "result.json").read_text())["figures"]
    assert figures == {
        "teacher": {},
        "student, untouched": {},
        "trained without a teacher": {},
        "distilled": {},
    }
    assert not any("validation" in row for row in read_metrics(run / "metrics.jsonl"))
    assert main(["report", str(run)]) == 0
    assert main(["distill", *words]) == 0  # it is the same run


def test_a_sweep_without_figures(without, tmp_path, capsys):
    words = [*without, "data.validation=none", "optimizer.learning_rate=1e-3,1e-4"]
    assert main(["distill", "-m", *words]) == 0
    printed = capsys.readouterr().out
    assert printed.count("optimizer.learning_rate=") >= 2
    jobs = json.loads((tmp_path / "run" / "sweep" / "sweep.json").read_text())
    assert [job["status"] for job in jobs] == ["finished", "finished"]
    assert [job["figures"] for job in jobs] == [{}, {}]
    assert main(["report", str(tmp_path / "run" / "sweep")]) == 0
    assert main(["distill", "-m", *words, "hydra/sweeper=optuna"]) == 2
    error = capsys.readouterr().err
    assert "a search needs held-out figures" in error or "not installed" in error
