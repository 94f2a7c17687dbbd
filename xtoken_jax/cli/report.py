"""`xtoken report`: curves of a run, or the ranking of a sweep."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from xtoken_jax.display.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import Console

TEXT = "draw a run's curves from its metrics.jsonl, or rank the runs of a sweep"
HELP = "example: xtoken report runs/quickstart"


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    sub.add_argument(
        "run_folder", metavar="RUN", type=Path, help="the folder of a run, of a sweep, or of several of them"
    )


def run(options: argparse.Namespace, console: Console) -> None:
    """Report each run and sweep in the folder."""
    from xtoken_jax.run.ranking import is_sweep
    from xtoken_jax.run.report import draw_curves, runs_and_sweeps

    for folder in runs_and_sweeps(options.run_folder):
        if is_sweep(folder):
            rank(folder, Terminal())
        else:
            picture = draw_curves(folder, lambda line: console.print(f"warning  {line}", style="yellow"))
            console.print(f"curves   {picture}")


def rank(folder: Path, console: Console) -> None:
    """Write and show the ranking of a sweep and its curves."""
    from xtoken_jax.run.ranking import ranking_table, read_jobs, write_ranking
    from xtoken_jax.run.report import draw_sweep

    def tell(line: str) -> None:
        console.print(f"warning  {line}", style="yellow")

    jobs = read_jobs(folder, tell)
    write_ranking(folder, jobs)
    console.print(ranking_table(folder, jobs))
    console.print(f"ranking  {folder / 'sweep.json'}, {folder / 'sweep.csv'}")
    if (picture := draw_sweep(folder, jobs, tell)) is not None:
        console.print(f"curves   {picture}")
