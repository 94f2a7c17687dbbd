"""`xtoken distill`: its arguments, and a run or a sweep."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.table import Table

from xtoken_jax.cli.report import rank
from xtoken_jax.cli.tokenizers import print_json
from xtoken_jax.display.terminal import Terminal
from xtoken_jax.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

TEXT = "train a student with a teacher, from a config"
HELP = """\
arguments are key=value pairs:

  experiment=quickstart       an embedded run of minutes, on the CPU, without any download
  experiment=quickstart_two_teachers   the same with a second teacher and its tokenizer
  experiment=smollm2          SmolLM2-135M into a Llama 3.1 student (see experiments/smollm2)
  loss=p_kl | h_kl | prefix_kl | none  instead of the audit's choice
  student.path=DIR teacher.path=DIR    your own Hugging Face folders
  student.lora.rank=16        train low-rank adapters alone, merged in the student's folder
  data.train.text.path=FILE.jsonl      your own text
  hosts=auto mesh=fsdp        on all hosts of a TPU slice or a Slurm job (README: pods)
  train.steps=1000 optimizer.learning_rate=1e-4 data.batch_size=16 run_dir=runs/mine

  -m loss=p_kl,h_kl optimizer.learning_rate=1e-5,5e-5   a run for each combination, in runs/NAME/sweep
  -m ... --cfg job                                      the settings of each job; runs nothing
  -m ... hydra/launcher=submitit_slurm                  on a cluster, all at once
  -m ... hydra/sweeper=optuna hydra.sweeper.n_trials=20 'optimizer.learning_rate=interval(1e-5,1e-3)'

The run's folder gets metrics.jsonl, curves.png, checkpoints/ and student/, an ordinary Hugging
Face folder. The same command again goes on where a run was interrupted; SIGTERM and Ctrl-C save
first. resume.allow=[KEY,...] goes on with settings or content that differ.
"""


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    sub.add_argument("-m", "--multirun", action="store_true", help="a sweep: commas part values to try")
    sub.add_argument("--cfg", choices=["job"], help="print the composed settings and do nothing")
    sub.add_argument("--json", action="store_true", help="print the final figures as JSON on stdout")


def run(options: argparse.Namespace, console: Console) -> None:
    """Train, sweep, or print the settings, and show the figures."""
    if options.cfg:
        from xtoken_jax.run.sweep import dump

        print(dump(options.overrides, sweep=options.multirun), end="")
        return
    if options.multirun:
        _sweep(options)
        return
    from xtoken_jax.train.signals import StopSignals

    with StopSignals() as stop:  # before the imports, which take seconds
        from xtoken_jax.distributed.processes import is_first, joined
        from xtoken_jax.run.experiment import load_experiment

        experiment = load_experiment(options.overrides)
        with joined(experiment.hosts):  # before anything touches a device
            from xtoken_jax.run.distill import distill

            first = is_first()  # which alone shows anything
            shown = Terminal(stderr=options.json, quiet=not first)
            result = distill(experiment, shown, stop)
    if not first:
        return
    if options.json:
        print_json({"loss": result.loss.value, "figures": result.figures, "student": str(result.student)})
        return
    from xtoken_jax.train.metrics import shown_figure

    names = list(result.figures["student, untouched"])
    table = Table(title=f"{experiment.name}: held-out figures after {experiment.train.steps} steps")
    table.add_column("model")
    for name in names:
        table.add_column(name, justify="right")
    for row, figures in result.figures.items():
        table.add_row(
            row, *(shown_figure(n, figures[n]) for n in names), style="bold" if row == "distilled" else None
        )
    if names:  # without held-out text there are no figures
        console.print(table)
    console.print(f"student  {result.student}   (an ordinary Hugging Face folder)")
    console.print(f"metrics  {result.metrics}")
    console.print(f"curves   {result.picture}")
    console.print(f"took     {result.seconds:.0f} s")


def _sweep(options: argparse.Namespace) -> None:
    from xtoken_jax.run.sweep import run_sweep

    folder, jobs = run_sweep(options.overrides, quiet=options.json)
    rank(folder, Terminal(stderr=options.json))
    if options.json:
        print_json([job.to_dict() for job in jobs])
    failed = [job for job in jobs if job.status == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} jobs failed, the first with: {failed[0].error}; the same command "
            "runs them again, and no others"
        )
