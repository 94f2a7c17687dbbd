"""The jobs of a sweep, ranked: a table, sweep.json and sweep.csv."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from xtoken_jax.errors import UserError
from xtoken_jax.files import read_json, to_json, write_whole

JOB_FILE = ".job.json"  # behind the name of the job's folder


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        folder: the run's.
        overrides: what it was swept to, "key=value".
        sweep: number of the command that ran it last.
        status: running, finished, stopped or failed.
        loss: its term.
        figures: held-out, at the end; None where one is not finite.
        metric: which of them the sweep is after.
        error: why it failed.
    """

    folder: Path
    overrides: list[str]
    sweep: str
    status: str
    loss: str | None = None
    figures: dict[str, float | None] = field(default_factory=dict)
    metric: str | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the folder by its name."""
        return asdict(self) | {"folder": self.folder.name}

    @property
    def values(self) -> dict[str, str]:
        """Key -> value that it was swept to."""
        return dict(override.split("=", 1) for override in self.overrides)


def rises(metric: str) -> bool:
    """Whether more of a held-out figure is better: of accuracies, not of bits per byte."""
    return metric.endswith("accuracy")


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds the jobs of a sweep."""
    return any(folder.glob(f"*{JOB_FILE}"))


def read_jobs(folder: Path) -> list[Job]:
    """All jobs of a sweep's folder, the best first; those without a figure behind, by name.

    Raises:
        UserError: a folder without jobs, or a file that is none of a job's.
    """
    jobs = []
    for path in sorted(folder.glob(f"*{JOB_FILE}")):
        try:
            content = read_json(path, what="the job of a sweep")
            jobs.append(Job(**(content | {"folder": folder / content["folder"]})))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: is no job of a sweep ({error})") from error
    if not jobs:
        raise UserError(f"{folder}: not a sweep, it has no file that ends in {JOB_FILE}")

    def place(job: Job) -> float:
        value = job.figures.get(job.metric or "")
        return (
            math.inf if value is None or math.isnan(value) else -value if rises(job.metric or "") else value
        )

    return sorted(jobs, key=place)


def write_ranking(folder: Path, jobs: Sequence[Job]) -> None:
    """sweep.json and sweep.csv."""
    write_whole(folder / "sweep.json", to_json([job.to_dict() for job in jobs], indent=2) + "\n")
    keys, figures = swept_keys(jobs), figure_names(jobs)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["rank", *keys, "loss", *figures, "status", "folder", "error"])
    for rank, job in enumerate(jobs, 1):
        values = [job.values.get(key, "") for key in keys]
        found = [job.figures.get(name) for name in figures]
        values += [job.loss or "", *("" if value is None else str(value) for value in found)]
        rows.writerow([rank, *values, job.status, job.folder.name, job.error or ""])
    write_whole(folder / "sweep.csv", text.getvalue())


def ranking_table(folder: Path, jobs: Sequence[Job]) -> Table:
    """For the terminal."""
    keys, figures = swept_keys(jobs), figure_names(jobs)
    after = next((job.metric for job in jobs if job.metric), None)
    by = f", by {after}" if after else ""
    table = Table(title=f"{len(jobs)} jobs in {folder}{by}")
    table.add_column("", justify="right")
    for key in keys:
        table.add_column(key)
    if "loss" not in keys:
        table.add_column("loss")
    for name in figures:
        table.add_column(name, justify="right")
    table.add_column("")
    for rank, job in enumerate(jobs, 1):
        cells = [job.values.get(key, "") for key in keys]
        if "loss" not in keys:
            cells.append(job.loss or "")
        for name in figures:
            value = job.figures.get(name)
            cells.append("" if value is None else f"{value:.1%}" if rises(name) else f"{value:.3f}")
        note = "" if job.status == "finished" else job.error or job.status
        table.add_row(str(rank), *cells, note, style="bold" if rank == 1 and job.figures else None)
    return table


def swept_keys(jobs: Sequence[Job]) -> list[str]:
    """What differs between the jobs."""
    return list(dict.fromkeys(key for job in jobs for key in job.values))


def figure_names(jobs: Sequence[Job]) -> list[str]:
    """Of all held-out figures, that which the sweep is after first."""
    return list(dict.fromkeys([*(j.metric for j in jobs if j.metric), *(n for j in jobs for n in j.figures)]))
