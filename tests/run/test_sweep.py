"""Sweeps: Hydra chooses and starts the jobs; each is a run of its own, finished ones are not run again."""

import csv
import importlib.util
import json
import signal
from pathlib import Path

import pytest
import yaml

from xtoken_jax.cli.parser import main
from xtoken_jax.errors import UserError
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.train.signals import Stopped

PNG = b"\x89PNG"


@pytest.fixture
def ran(monkeypatch):
    """Runs of `distill` without training: it notes which, and leaves what a run leaves."""
    from xtoken_jax.run.folder import claim

    found = []

    def distill(experiment, console, stop):
        found.append(experiment)
        rate, kind = experiment.optimizer.learning_rate, experiment.loss.kind.value
        if rate > 1:
            raise UserError("the loss is nan")
        if rate == 1:
            raise RuntimeError("out of memory\nand more")
        if rate == 0.5:
            raise Stopped(signal.SIGTERM, "step 1 is saved")
        run = Path(experiment.run_dir)
        claim(run, experiment, {})
        figures = {"text bits/byte": 100 * rate + (kind == "h_kl"), "sums accuracy": rate}
        rows = [
            {"step": step, "validation": {name: value + 1 / (1 + step) for name, value in figures.items()}}
            for step in (0, 5)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = {"loss": kind, "figures": {"student, untouched": {}, "distilled": figures}}
        (run / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr("xtoken_jax.run.distill.distill", distill)
    return found


@pytest.fixture
def sweep(words, tmp_path):
    return ["distill", "-m", *words, "train.steps=2", f"run_dir={tmp_path / 'run 1'}"]


def jobs_of(folder):
    return json.loads((folder / "sweep.json").read_text())


def test_every_combination_is_a_run_and_is_ranked(sweep, ran, capsys, tmp_path):
    swept = ["loss=p_kl,h_kl", "optimizer.learning_rate=2e-3,1e-3"]
    assert main([*sweep, *swept]) == 0
    folder = tmp_path / "run 1" / "sweep"
    assert [(e.loss.kind.value, e.optimizer.learning_rate) for e in ran] == [
        ("p_kl", 2e-3), ("p_kl", 1e-3), ("h_kl", 2e-3), ("h_kl", 1e-3),
    ]  # fmt: skip
    assert {e.run_dir for e in ran} == {
        str(folder / f"loss={loss},optimizer.learning_rate={rate}")
        for loss in ("p_kl", "h_kl")
        for rate in ("0.002", "0.001")
    }
    out = capsys.readouterr().out
    assert "4 jobs in" in out
    assert "by text bits/byte" in out
    best = jobs_of(folder)
    assert [job["figures"]["text bits/byte"] for job in best] == [0.1, 0.2, 1.1, 1.2]
    assert best[0]["overrides"] == ["loss=p_kl", "optimizer.learning_rate=0.001"]
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [rows[0][key] for key in ("rank", "loss", "optimizer.learning_rate")] == ["1", "p_kl", "0.001"]
    assert rows[3]["sums accuracy"] == "0.002"
    assert (folder / "curves.png").read_bytes().startswith(PNG)
    # the same again runs nothing, one more value runs that
    assert main([*sweep, *swept]) == 0
    assert len(ran) == 4
    capsys.readouterr()
    assert main([*sweep, "loss=p_kl,h_kl", "optimizer.learning_rate=1e-3,3e-3", "--json"]) == 0
    assert len(ran) == 6
    assert len(json.loads(capsys.readouterr().out)) == 4
    assert len(jobs_of(folder)) == 6
    # by the other figure, of which more is better
    assert main([*sweep, *swept, "sweep.metric=sums accuracy"]) == 0
    assert len(ran) == 6
    (folder / "curves.png").unlink()
    capsys.readouterr()
    for parent in (folder, folder.parent, folder.parent.parent):
        assert main(["report", str(parent)]) == 0
        assert f"6 jobs in {folder}" in capsys.readouterr().out
        (folder / "curves.png").unlink()


def test_a_job_that_fails_is_told_and_the_others_run(sweep, ran, capsys, tmp_path):
    assert main([*sweep, "optimizer.learning_rate=5.0,1e-3,1.0,-1"]) == 2
    captured = capsys.readouterr()
    assert "xtoken: 3 of 4 jobs failed, the first with: " in captured.err
    assert "Traceback" not in captured.err
    jobs = {job["overrides"][0].partition("=")[2]: job for job in jobs_of(tmp_path / "run 1" / "sweep")}
    assert {value: job["status"] for value, job in jobs.items()} == {
        "5.0": "failed", "0.001": "finished", "1.0": "failed", "-1": "failed",
    }  # fmt: skip
    assert jobs["1.0"]["error"] == "RuntimeError: out of memory"
    assert jobs["-1"]["error"] == "optimizer.learning_rate=-1.0: must be above 0"
    assert next(iter(jobs)) == "0.001"


def test_a_signal_ends_the_sweep_and_the_same_command_goes_on(sweep, ran, capsys, tmp_path):
    assert main([*sweep, "optimizer.learning_rate=1e-3,0.5,2e-3"]) == 0
    assert "step 1 is saved" in capsys.readouterr().err
    assert [e.optimizer.learning_rate for e in ran] == [1e-3, 0.5]
    assert main([*sweep, "optimizer.learning_rate=1e-3,2e-3"]) == 0
    assert [e.optimizer.learning_rate for e in ran] == [1e-3, 0.5, 2e-3]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["loss=p_kl,h_k"], "loss=h_k: no such loss, did you mean h_kl?"),
        (["optimizer.learning_rat=1,2"], "optimizer.learning_rat: no such key"),
        (["optimizer.learning_rate=choice(1e-3"], "choice(1e-3"),
        (["hydra/launcher=nonsense", "loss=p_kl"], "hydra/launcher"),
    ],
)
def test_a_mistake_is_one_line(sweep, ran, capsys, more, expected):
    assert main([*sweep, *more]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not ran


def test_a_plugin_that_is_missing_is_named_with_its_extra(sweep, ran, capsys, monkeypatch):
    monkeypatch.setattr("xtoken_jax.run.sweep._installed", lambda _: False)
    for word, extra in (("hydra/launcher=submitit_slurm", "submitit"), ("hydra/sweeper=optuna", "optuna")):
        assert main([*sweep, word]) == 2
        assert f"not installed; pip install 'xtoken-jax[{extra}]'" in capsys.readouterr().err
    assert not ran


def test_texts_are_swept_too_and_functions_are_hydras(sweep, ran, pair_folders, tmp_path):
    student, teacher = pair_folders
    assert main([*sweep, f"teacher.path={teacher},{student}", "train.seed=range(1,3)"]) == 0
    assert [(e.teacher.path, e.train.seed) for e in ran] == [
        (str(path), seed) for path in (teacher, student) for seed in (1, 2)
    ]
    assert len({e.run_dir for e in ran}) == 4


def test_a_sweep_does_not_take_the_place_of_a_run(sweep, ran, tmp_path):
    from xtoken_jax.run.folder import claim

    assert main([*sweep, "loss=p_kl,h_kl"]) == 0
    words = [word for word in sweep if "=" in word]
    assert claim(tmp_path / "run 1", load_experiment(words), {}) == []


def test_cfg_prints_what_would_run(sweep, ran, capsys):
    assert main([word for word in sweep if word != "-m"] + ["--cfg", "job", "loss=h_kl"]) == 0
    assert "\n  kind: h_kl\n" in capsys.readouterr().out
    assert not ran


def test_cfg_of_a_sweep_prints_a_document_for_each_job(sweep, ran, capsys, tmp_path):
    # no launcher has to be installed to look at the settings
    plugin = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]
    assert main([*sweep, *plugin, "loss=p_kl,h_kl", "train.seed=range(1,3)", "--cfg", "job"]) == 0
    documents = [*yaml.safe_load_all(capsys.readouterr().out)]
    assert [(d["loss"]["kind"], d["train"]["seed"]) for d in documents] == [
        ("p_kl", 1), ("p_kl", 2), ("h_kl", 1), ("h_kl", 2),
    ]  # fmt: skip
    # those that the sweep itself runs in
    assert main([*sweep, "loss=p_kl,h_kl", "train.seed=range(1,3)"]) == 0
    assert [d["run_dir"] for d in documents] == [e.run_dir for e in ran]
    capsys.readouterr()
    assert main([*sweep, "hydra/sweeper=optuna", "optimizer.weight_decay=interval(0,1)", "--cfg", "job"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# searched: optimizer.weight_decay=interval(0,1)\n")
    assert (
        yaml.safe_load(out)["optimizer"]["weight_decay"] == load_experiment(sweep[2:]).optimizer.weight_decay
    )
    assert main([*sweep, "train.steps=5,0", "--cfg", "job"]) == 2
    assert capsys.readouterr() == ("", "xtoken: train.steps=0: must be at least 1\n")


def test_json_is_one_document_on_stdout(sweep, ran, capsys):
    """Whatever the jobs say, and of one that fails too."""
    assert main([*sweep, "optimizer.learning_rate=1e-3,5.0", "--json"]) == 2
    out, err = capsys.readouterr()
    assert [(job["status"], job["error"]) for job in json.loads(out)] == [
        ("finished", None), ("failed", "the loss is nan"),
    ]  # fmt: skip
    for word in ("learning_rate=0.001", "failed   the loss is nan", "ranking  ", "1 of 2 jobs failed"):
        assert word in err


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs the extra optuna")
def test_optuna_searches_for_the_figure(sweep, ran, tmp_path):
    options = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=1"]
    options += ["hydra.sweeper.sampler.seed=1", "optimizer.learning_rate=tag(log,interval(1e-5,1.5))"]
    main([*sweep, *options])
    folder = tmp_path / "run 1" / "sweep"
    assert len(ran) == 6
    jobs = jobs_of(folder)
    best = (folder / "hydra" / "optimization_results.yaml").read_text()
    assert f"best_value: {jobs[0]['figures']['text bits/byte']}" in best


def test_a_sweep_without_a_run_dir_writes_below_runs(words, ran, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["distill", "-m", *words, "name=mine", "optimizer.learning_rate=1e-3,2e-3"]) == 0
    folder = tmp_path / "runs" / "mine" / "sweep"
    assert [Path(e.run_dir).parent for e in ran] == [folder, folder]
