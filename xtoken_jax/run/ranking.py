"""The jobs of a sweep, ranked: a table, sweep.json and sweep.csv."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from xtoken_jax.errors import UserError, printable
from xtoken_jax.files import read_json, to_json, write_whole
from xtoken_jax.files.fields import (
    TEXT,
    Check,
    check_fields,
    listing,
    mapping,
    number,
    one_of,
    optional,
    shown,
)
from xtoken_jax.files.folders import refuse_links

JOB_FILE = ".job.json"  # behind the name of the job's folder
_COLUMNS = 8  # of a table in a terminal
_OVERRIDE = Check("KEY=VALUE", lambda value: isinstance(value, str) and "=" in value)
_JOB = {
    "folder": TEXT,
    "overrides": listing(_OVERRIDE, 10_000),
    "sweep": TEXT,
    "status": one_of("running", "finished", "stopped", "failed"),
    "loss": optional(TEXT),
    "figures": mapping(optional(number(-1e100, 1e100))),
    "metric": optional(TEXT),
    "error": optional(TEXT),
}


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


def read_jobs(folder: Path, tell: Callable[[str], None] = lambda line: None) -> list[Job]:
    """All jobs of a sweep's folder, the best first; those without a figure behind, by name.

    Args:
        folder: the sweep's.
        tell: gets a line for each file that is no job's and is left out.

    Raises:
        UserError: a folder without jobs, or one in which a link leads out of it.
    """
    paths = sorted(folder.glob(f"*{JOB_FILE}"))
    if not paths:
        raise UserError(f"{folder}: not a sweep, it has no file that ends in {JOB_FILE}")
    refuse_links(folder)
    jobs, faults = [], []
    for path in paths:
        try:
            jobs.append(_read_job(path))
        except UserError as error:
            faults.append(error)
    if not jobs:
        raise faults[0]
    for fault in faults:
        tell(f"{fault}; it is left out")

    def place(job: Job) -> float:
        value = job.figures.get(job.metric or "")
        return math.inf if value is None else -value if rises(job.metric or "") else value

    return sorted(jobs, key=place)


def _read_job(path: Path) -> Job:
    remedy = "run the sweep again"
    content = read_json(path, what="the file of a sweep's job", remedy=remedy)
    check_fields(content, _JOB, f"{path}: not the file of a sweep's job", remedy=remedy, complete=True)
    folder = path.name.removesuffix(JOB_FILE)
    if content["folder"] != folder:
        raise UserError(f"{path}: folder={shown(content['folder'])} is not {shown(folder)}; {remedy}")
    return Job(**content | {"folder": path.with_name(folder)})


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
    """For the terminal: the first figures and swept keys, all of which are in sweep.csv."""
    keys, figures = swept_keys(jobs), figure_names(jobs)
    shown_keys, shown_figures = keys[:_COLUMNS], figures[:_COLUMNS]
    after = next((job.metric for job in jobs if job.metric), None)
    by = f", by {after}" if after else ""
    hidden = [
        f"{len(every) - _COLUMNS} more {name}" for every, name in ((keys, "keys"), (figures, "figures"))
        if len(every) > _COLUMNS
    ]  # fmt: skip
    caption = f"{' and '.join(hidden)}: see sweep.csv" if hidden else None
    table = Table(title=Text(f"{len(jobs)} jobs in {folder}{by}"), caption=caption)
    table.add_column("", justify="right")
    for key in shown_keys:
        table.add_column(Text(printable(key)))
    if "loss" not in keys:
        table.add_column("loss")
    for name in shown_figures:
        table.add_column(Text(printable(name)), justify="right")
    table.add_column("")
    for rank, job in enumerate(jobs, 1):
        cells = [job.values.get(key, "") for key in shown_keys]
        if "loss" not in keys:
            cells.append(job.loss or "")
        for name in shown_figures:
            value = job.figures.get(name)
            cells.append("" if value is None else f"{value:.1%}" if rises(name) else f"{value:.3f}")
        note = "" if job.status == "finished" else job.error or job.status
        style = "bold" if rank == 1 and job.figures else None
        table.add_row(*(Text(printable(cell)) for cell in (str(rank), *cells, note)), style=style)
    return table


def swept_keys(jobs: Sequence[Job]) -> list[str]:
    """What differs between the jobs."""
    return list(dict.fromkeys(key for job in jobs for key in job.values))


def figure_names(jobs: Sequence[Job]) -> list[str]:
    """Of all held-out figures, that which the sweep is after first."""
    return list(dict.fromkeys([*(j.metric for j in jobs if j.metric), *(n for j in jobs for n in j.figures)]))
