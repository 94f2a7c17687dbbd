"""experiments/miniature at toy size: made, trained, measured, written down and resumed, in seconds."""

import contextlib
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "miniature"
NAMES = ("world", "student", "tables", "run")


@pytest.fixture(scope="module")
def study():
    """The experiment's modules by name; experiments are no package, and `run` imports the others late."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def work(study, tmp_path_factory):
    """A work folder of an untrained teacher and two small batches; tests that take it run at this size."""
    world, folder = study["world"], tmp_path_factory.mktemp("miniature")
    with pytest.MonkeyPatch.context() as patch:
        small = dataclasses.replace(world.TEACHERS["digits"], layers=1)
        patch.setitem(world.TEACHERS, "digits", small)
        for name, size in {"BATCHES": 2, "SUM_ROWS": 2, "ENGLISH_ROWS": 1, "HELD_OUT": 40}.items():
            patch.setattr(world, name, size)
        # A tokenizer of all the docstrings would take seconds to train.
        patch.setattr(world, "docstrings", lambda: {k: v.upper() for k, v in world.topics().items()})
        teacher = world.model_of(small.size, 1).init(jax.random.key(1))
        arrays = {f"a{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(teacher))}
        np.savez(folder / "teacher-digits.npz", **arrays)
        yield folder


def test_text_is_sums_of_three_digits_a_share_of_them_wrong_and_none_held_out(study, monkeypatch):
    world = study["world"]
    monkeypatch.setattr(world, "BATCHES", 20)
    batch = world.SUM_ROWS + world.ENGLISH_ROWS
    texts = world.texts(0.7)
    lines = [line for i, text in enumerate(texts) if i % batch < world.SUM_ROWS for line in text.splitlines()]
    sums = np.array([line.replace("+", " ").replace("=", " ").split() for line in lines], int)
    assert len(sums) == 20 * world.SUM_ROWS * world.SUMS
    assert sums.min() >= 100
    assert sums.max() <= 999
    wrong = (sums[:, 0] + sums[:, 1] != sums[:, 2]).mean()
    assert abs(wrong - 0.7) < 0.05
    assert not np.isin(1000 * sums[:, 0] + sums[:, 1], world.held_out()).any()
    assert len(world.held_out()) == world.HELD_OUT


def test_the_student_keeps_numbers_whole_and_the_teacher_splits_them(study, work):
    pair = study["world"].pair_of(work, "digits")
    assert len(pair.student.encode("123+456=579\n")) == 6
    assert len(pair.teacher.encode("123+456=579\n")) == 12


def test_a_run_gives_finite_figures(study, work):
    run = next(run for run in study["student"].RUNS if run.learnt)
    found = study["student"].train(work, run, "digits", 0.7, 0, lambda text: None, steps=110)
    figures = [found[f] for f in ("sum", "digit1", "digit2", "digit3", "bits_per_byte", "ce", "kd", "capped")]
    assert np.isfinite(figures).all()
    assert 0 < found["factor"] <= run.max_scale
    assert found["trace"][-1][0] < found["trace"][0][0]  # cross-entropy
    assert len(found["trace"]) == 10


STARTED = """
import signal, sys, time
from types import SimpleNamespace
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without
sys.path.insert(0, {folder!r})
import run

sys.modules["student"] = SimpleNamespace(RUNS=[SimpleNamespace(name="a loss")])
sys.modules["tables"] = SimpleNamespace(write=lambda results: None)
run.tasks, run.key_of = lambda seeds: [(0, "digits", 0.7, 0), (1, "digits", 0.7, 0)], str
run.finished, run.prepare = dict, lambda *_: None

def work_on(*_):
    print("at work", file=sys.stderr, flush=True)
    time.sleep(60)

run.work_on = work_on
if __name__ == "__main__":
    run.main()
"""


@pytest.fixture
def started(tmp_path):
    script = tmp_path / "started.py"
    script.write_text(STARTED.format(folder=str(FOLDER)))
    main = subprocess.Popen(
        [sys.executable, script, "--seeds", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with main:
        assert [main.stderr.readline() for _ in range(2)] == ["at work\n"] * 2
        yield main
        with contextlib.suppress(ProcessLookupError):
            os.killpg(main.pid, signal.SIGKILL)


def rest_of(main):
    """What they write until none of them is left."""
    begin = time.monotonic()
    rest = main.stderr.read()
    assert time.monotonic() - begin < 30
    main.wait()
    return rest


def test_its_processes_end_with_it(started):
    started.terminate()
    rest_of(started)
    assert started.returncode == -signal.SIGTERM


def test_ctrl_c_ends_all_without_a_traceback(started):
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    assert "Traceback" not in rest_of(started)
    assert started.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uld", "gold", "h_kl", "p_kl", "prefix_kl", "alm"])
def test_every_loss_has_a_finite_gradient_on_a_batch_of_the_study(study, work, kind):
    student, world = study["student"], study["world"]
    data = {k: np.asarray(v[0]) for k, v in world.cached_batches(work, "digits", 0.7, print).items()}
    own = np.zeros((*data["student_ids"].shape, world.STUDENT_SIZE), np.float32)
    teacher = np.ones((*data["teacher_ids"].shape, world.TEACHERS["digits"].size), np.float32)
    run = next(run for run in student.RUNS if run.kind == kind)
    term, tables = student.term_of(run, world.pair_of(work, "digits"))
    slope = jax.jit(jax.grad(lambda s, tables: term(s, teacher, data, tables).sum()))(own, tables)
    assert np.isfinite(slope).all()


def test_all_losses_of_a_seed_come_before_the_next_seed(study):
    tasks = study["run"].tasks(3)
    assert [task[0] for task in tasks] == sorted(task[0] for task in tasks)
    assert len({study["run"].key_of(task) for task in tasks}) == len(tasks)
    names = [run.name for run in study["student"].RUNS]
    assert len(set(names)) == len(names)


def test_a_line_cut_short_is_dropped_and_older_settings_stay_out_of_the_tables(study, tmp_path):
    run, student = study["run"], study["student"]
    task = run.tasks(1)[0]
    result = {"key": run.key_of(task), "seed": task[0], "regime": task[1], "wrong_share": task[2]}
    result["name"] = student.RUNS[task[3]].name
    path = tmp_path / "results.jsonl"
    run.append({**result, "key": "of older settings"}, path)
    with path.open("a") as file:
        file.write('{"key": "cut sho')
    run.append(result, path)
    assert set(run.finished(path)) == {"of older settings", result["key"]}
    assert run.current(list(run.finished(path).values())) == [result]


def test_the_report_has_a_row_for_each_loss_with_its_seeds(study, tmp_path, monkeypatch):
    tables = study["tables"]
    monkeypatch.setattr(tables, "HERE", tmp_path)
    (tmp_path / "README.md").write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    figures = {"regime": "digits", "wrong_share": 0.7, "factor": 1.0, "capped": 0.5, **tables.COLUMNS}
    figures |= {column: 0.25 for column in tables.COLUMNS}
    names = [run.name for run in study["student"].RUNS]
    tables.write([{**figures, "name": name, "seed": seed} for name in names for seed in (0, 1)])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for name in names:
        assert f"| {name} | 2 | 0.250 ± 0.000 |" in text
    assert (tmp_path / "accuracy.png").stat().st_size > 0
