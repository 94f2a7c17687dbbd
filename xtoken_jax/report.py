"""The curves of a run, as a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from xtoken_jax.errors import UserError
from xtoken_jax.files import write_whole
from xtoken_jax.ranking import Job
from xtoken_jax.train.metrics import METRICS_FILE, read_metrics

PICTURE = "curves.png"
RESULT_FILE = "result.json"
BASELINE_FOLDER = "no_teacher"
_RUNS = {"": ("distilled", "tab:blue"), BASELINE_FOLDER: ("without a teacher", "tab:orange")}
_COLOURED = 10  # jobs of a sweep; the others are gray
_LEVELS = ("gray", "tab:green", "tab:purple")
_TRAINING = {"ce": "cross-entropy (nats per token)", "kd": "distillation term (nats per chunk)"}


def draw_curves(run: Path) -> Path:
    """Draw training and validation figures of a run, and of its baseline, over the steps.

    Args:
        run: the run's folder. Where its result is there too, the teachers' figures are drawn as levels.

    Returns:
        The path of the PNG.

    Raises:
        UserError: a folder without metrics.
    """
    rows = {sub: read_metrics(path) for sub in _RUNS if (path := run / sub / METRICS_FILE).is_file()}
    if not rows.get(""):
        raise UserError(f"{run}: not a run, it has no {METRICS_FILE}")
    result = run / RESULT_FILE
    figures = json.loads(result.read_text())["figures"] if result.is_file() else {}
    teachers = {row: values for row, values in figures.items() if row.split()[0] == "teacher"}
    validation = sorted(
        {name for part in rows.values() for row in part for name in row.get("validation", {})}
    )
    panels = [name for name in _TRAINING if any(name in row for row in rows[""])] + validation
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained", dpi=110)
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for sub, (label, color) in _RUNS.items():
            points = [
                (row["step"], value) for row in rows.get(sub, []) if (value := _value(row, name)) is not None
            ]
            if points:
                marker = "o" if name in validation else ""
                axes.plot(*zip(*points, strict=True), color=color, label=label, marker=marker, markersize=3)
        for (row, values), color in zip(teachers.items(), _LEVELS * len(teachers), strict=False):
            if name in values:
                axes.axhline(values[name], color=color, linestyle=":", label=row)
        axes.set(title=_TRAINING.get(name, f"held-out {name}"), xlabel="step")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return _save(figure, run / PICTURE)


def draw_sweep(folder: Path, jobs: Sequence[Job]) -> Path | None:
    """Draw the held-out figures of a sweep's jobs over the steps, the best ones in colour.

    Args:
        folder: the sweep's.
        jobs: the best first.

    Returns:
        The path of the PNG; None where no job has a figure yet.
    """
    rows = {job.folder.name: _validations(job.folder) for job in jobs}
    rows = {name: found for name, found in rows.items() if found}
    names = list(dict.fromkeys(name for found in rows.values() for _, values in found for name in values))
    if not names:
        return None
    size = 4.6 * len(names), 3.8 + 0.2 * min(len(rows), _COLOURED)
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    lines: dict[str, Any] = {}
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for place, (job, found) in enumerate(rows.items()):
            points = [(step, values[name]) for step, values in found if name in values]
            color = f"C{place}" if place < _COLOURED else "lightgray"
            look: dict[str, Any] = {"color": color, "zorder": 3 - place / len(rows), "marker": "o"}
            (line,) = axes.plot(*zip(*points, strict=True), markersize=3, **look)
            lines.setdefault(job if place < _COLOURED else "others", line)
        axes.set(title=f"held-out {name}", xlabel="step")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", fontsize=8)
    return _save(figure, folder / PICTURE)


def _validations(run: Path) -> list[tuple[int, dict[str, float]]]:
    path = run / METRICS_FILE
    rows = read_metrics(path) if path.is_file() else []
    return [(row["step"], row["validation"]) for row in rows if "validation" in row]


def _save(figure: Figure, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())
    return path


def _value(row: dict[str, Any], name: str) -> float | None:
    return row.get(name) if name in _TRAINING else row.get("validation", {}).get(name)
