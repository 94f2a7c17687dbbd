"""What a run says of its progress: a bar on a terminal, plain lines in a log file."""

import io

from rich.console import Console
from test_loop import run

from xtoken_jax.run.cache_teacher import cache_teacher
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.teacher_cache.distributions import Keep
from xtoken_jax.train import progress
from xtoken_jax.train.progress import Bar


def log():
    """A console as `nohup` and Slurm give it."""
    return Console(file=io.StringIO(), highlight=False, soft_wrap=True)


def test_a_log_file_gets_a_line_at_each_log_evaluation_and_save(tmp_path):
    console = log()
    run(tmp_path, console=console, log_every=5, evaluate_every=6, save_every=8)
    said = console.file.getvalue()
    assert all(sign == "\n" or sign.isprintable() for sign in said)
    lines = said.splitlines()
    assert [line.split("  ")[0] for line in lines if line != "toy: compiling the step"] == [
        f"toy: {n}/12" for n in (0, 5, 6, 8, 10, 12, 12, 12)
    ]
    assert lines[0].startswith("toy: 0/12  w 3.000")
    assert lines[1] == "toy: compiling the step"
    assert lines[2].startswith("toy: 5/12  ce ")
    assert lines[2].endswith(" tokens/s")
    assert lines[3].startswith("toy: 6/12  w ")
    assert lines[4] == f"toy: 8/12  saving {tmp_path / 'checkpoints' / '8'}"
    assert lines[-1] == f"toy: 12/12  saving {tmp_path / 'checkpoints' / '12'}"


def test_a_terminal_gets_a_bar_that_names_the_compilation(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    run(tmp_path, console=console)
    said = console.file.getvalue()
    assert "compiling the step" in said
    assert "━" in said
    assert "toy: 1/12" not in said


def test_a_finished_run_says_nothing_more(tmp_path):
    run(tmp_path)
    console = log()
    run(tmp_path, console=console)
    assert console.file.getvalue().splitlines() == ["toy: goes on from step 12"]


def test_a_cache_says_how_far_it_is_by_shard(words, tmp_path):
    console = log()
    experiment = load_experiment(words)
    keep = Keep(8, 1.0, "float16", (1.0,))
    cache_teacher(experiment, "teacher", keep, tmp_path / "cache", console, shard_bytes=2**15)
    said = console.file.getvalue()
    assert all(sign == "\n" or sign.isprintable() for sign in said)
    lines = [line for line in said.splitlines() if line.startswith("caching: ")]
    assert len(lines) > 1
    assert lines[-1].startswith("caching: 64/64 documents  ")
    assert lines[-1].endswith(" tokens/s")


def test_long_silence_is_broken(monkeypatch):
    console = log()
    monkeypatch.setattr(progress, "_SILENCE", 0.0)
    with Bar(console, "caching", 10, unit="documents") as bar:
        bar.update(completed=4)
    assert console.file.getvalue() == "caching: 4/10 documents\n"
