"""Fuzzers of a run's folder, a sweep's folder and what reads them: claim, report, export."""

import contextlib
import io
import json
import random
from pathlib import Path
from unittest import mock

from matplotlib.figure import Figure

from fuzz.frame import Parser
from fuzz.mutations import spoil_json, spoil_presence, spoiled_bytes, spoiled_value
from xtoken_jax.cli.parser import main
from xtoken_jax.errors import UserError
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.run.folder import claim, day_of, finished
from xtoken_jax.run.ranking import Job
from xtoken_jax.run.run_file import read_run

WORDS = (
    "student.path=models/student", "teacher.path=models/teacher", "data.train.text.path=text.jsonl",
    "data.validation.text.path=text.jsonl", "teachers.twin.path=models/twin", "train.steps=4",
)  # fmt: skip
FIGURES = {"text bits/byte": 1.5, "sums accuracy": 0.25}
RESULT = {
    "loss": "p_kl",
    "figures": dict.fromkeys(("student, untouched", "teacher", "teacher twin", "distilled"), FIGURES),
    "text": {"text": {"records": 4, "tokens": 100, "targets": 50, "skipped": {}}},
}  # fmt: skip


def _write_run(folder: Path) -> None:
    run = folder / "run"
    claim(run, load_experiment([*WORDS, f"run_dir={run}"]), {"student.weights": "1"}, [2])
    _write_figures(run)
    (run / "no_teacher").mkdir()
    (run / "no_teacher" / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())


def _write_figures(run: Path) -> None:
    run.mkdir(exist_ok=True)
    step = {"ce": 2.0, "kd": 0.5, "kd/teacher": 0.5, "kd/teacher/common": 0.3, "agreement/teacher": 0.4}
    rows = [{"step": number, **values} for number in range(3) for values in (step, {"validation": FIGURES})]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "result.json").write_text(json.dumps(RESULT))


def _write_sweep(folder: Path) -> None:
    for name, error in (("a=1", None), ("a=2", "the loss is nan [/red]")):
        sweep = folder / "sweep"
        sweep.mkdir(exist_ok=True)
        _write_figures(sweep / name)
        status = "failed" if error else "finished"
        job = Job(sweep / name, [name], "1", status, "p_kl", FIGURES, "text bits/byte", error)
        (sweep / f"{name}.job.json").write_text(json.dumps(job.to_dict()))


def _spoil_metrics(rng: random.Random, path: Path) -> None:
    """Spoil the values of some lines, or the bytes of the file."""
    if rng.random() < 0.4:
        path.write_bytes(spoiled_bytes(rng, path.read_bytes()))
        return
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for _ in range(rng.choice((1, 1, 3))):
        number = rng.randrange(len(lines))
        lines[number] = spoiled_value(rng, lines[number])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _spoil(rng: random.Random, path: Path) -> None:
    if rng.random() < 0.1:
        spoil_presence(rng, path)
    elif path.suffix == ".jsonl":
        _spoil_metrics(rng, path)
    else:
        spoil_json(rng, path)


def _spoil_run(rng: random.Random, folder: Path) -> None:
    _spoil(rng, rng.choice(sorted(path for path in folder.rglob("*") if path.is_file())))


def _spoil_settings(rng: random.Random, folder: Path) -> None:
    _spoil(rng, folder / "run" / "run.json")


def _report(folder: Path) -> None:
    """Run the command, but draw nothing, which takes half a second; test_report.py has odd names."""
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
        mock.patch.object(Figure, "savefig"),
    ):
        code = main(["report", str(folder)])
    if code:
        raise UserError(said.getvalue().removesuffix("\n"))


def _read_report(folder: Path) -> None:
    _report(folder / "run")


def _read_sweep(folder: Path) -> None:
    _report(folder / "sweep")


def _read_settings(folder: Path) -> None:
    run = folder / "run"
    experiment = load_experiment([*WORDS, f"run_dir={run}"])
    faults = []
    for read in (
        lambda: read_run(run),
        lambda: day_of(run, experiment),
        lambda: finished(run, experiment),
        lambda: claim(run, experiment, {"student.weights": "1"}, [2]),
    ):
        try:
            read()
        except UserError as error:
            faults.append(error)
    if faults:
        raise max(faults, key=lambda fault: len(str(fault)))


PARSERS = [
    Parser("run_settings", _write_run, _spoil_settings, _read_settings),
    Parser("run_report", _write_run, _spoil_run, _read_report),
    Parser("sweep_report", _write_sweep, _spoil_run, _read_sweep),
]
