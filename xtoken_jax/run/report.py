"""The curves of a run, and of the runs of a sweep, as pictures."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xtoken_jax.errors import UserError, printable
from xtoken_jax.files import read_json, write_whole, writing
from xtoken_jax.files.fields import OBJECT, mapping, number
from xtoken_jax.files.folders import refuse_links
from xtoken_jax.run.ranking import Job, is_sweep
from xtoken_jax.train.metrics import METRICS_FILE, read_metrics

PICTURE = "curves.png"
RESULT_FILE = "result.json"
BASELINE_FOLDER = "no_teacher"
_RUNS = {"": ("distilled", "tab:blue"), BASELINE_FOLDER: ("without a teacher", "tab:orange")}
_COLOURED = 10  # jobs of a sweep; the others are gray
_TEACHERS = ("gray", "tab:green", "tab:purple", "tab:red", "tab:brown")  # in all panels, by place
_SHARES = {
    "agreement": ("same top token", "-"),
    "lost_mass": ("lost by W", "--"),
    "projection_moved": ("W has moved", "-."),
}
_COLUMNS = 4  # panels side by side, at most
_PANELS = 24  # of a picture
_LINES = 16  # of a panel
_LONGEST = 60  # characters of a name
_FIGURE = number(-1e100, 1e100)  # axes need room around what they show

Rows = list[dict[str, Any]]


class _Line(NamedTuple):
    label: str
    color: str
    points: list[tuple[int, float]]
    style: str = "-"


@dataclass
class _Panel:
    """Lines over the steps, and levels, by label."""

    title: str
    lines: list[_Line]
    levels: list[tuple[str, str, float]] = field(default_factory=list)  # label, color, value
    marker: str = ""
    bounds: tuple[float, float] | None = None  # of the y axis


def runs_and_sweeps(folder: Path) -> list[Path]:
    """Return the runs and sweeps to report: the folder itself, or those in it; a run's own sweep, too.

    Raises:
        UserError: there is none.
    """
    own = _reportable(folder)
    parts = own if folder in own else [part for child in _folders(folder) for part in _reportable(child)]
    if parts:
        return parts
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}; name a folder that xtoken distill wrote, such as runs/NAME")
    raise UserError(
        f"{folder}: not a run or a sweep, and none in it (no {METRICS_FILE}); name a folder that "
        "xtoken distill wrote, such as runs/NAME"
    )


def _reportable(folder: Path) -> list[Path]:
    """The folder if it is a run or a sweep, and the sweeps directly in it."""
    if is_sweep(folder):
        return [folder]
    own = [folder] if (folder / METRICS_FILE).is_file() else []
    return own + [child for child in _folders(folder) if is_sweep(child)]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def draw_curves(run: Path, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Draw training and validation figures of a run, and of its baseline, over the steps.

    Args:
        run: the run's folder. Where its result is there too, the teachers' figures are drawn as levels.
        tell: gets a line for each thing that is left out of the picture.

    Returns:
        The path of the PNG.

    Raises:
        UserError: a folder without metrics, or one in which a link leads out of it.
    """
    refuse_links(run)
    rows = {
        sub: [_cleaned(row) for row in read_metrics(path, tell)]
        for sub in _RUNS
        if (path := run / sub / METRICS_FILE).is_file()
    }
    if not rows.get(""):
        raise UserError(f"{run}: not a run, it has no {METRICS_FILE}, or one without metrics")
    teachers = _teachers(run / RESULT_FILE, tell)
    panels = [panel for panel in [*_training(rows), *_held_out(rows, teachers)] if panel.lines]
    if not panels:
        raise UserError(f"{run / METRICS_FILE}: holds no figures that can be drawn")
    if len(panels) > _PANELS:
        tell(f"{run}: {len(panels)} panels are too many for a picture; it has the first {_PANELS}")
    panels = panels[:_PANELS]
    crowded = [panel.title for panel in panels if len(panel.lines) + len(panel.levels) > _LINES]
    if crowded:
        tell(f"{run}: more than {_LINES} lines under {crowded[0]!r}; it has the first {_LINES}")
    high = -(-len(panels) // _COLUMNS)
    grid = high, -(-len(panels) // high)
    with _plain_text():
        figure = Figure(figsize=(4.2 * grid[1], 3.4 * grid[0]), layout="constrained", dpi=110)
        every = figure.subplots(*grid, squeeze=False).flat
        for panel, axes in zip_longest(panels, every):
            if panel is None:
                axes.axis("off")
            else:
                _draw(panel, axes)
        return _save(figure, run / PICTURE)


@contextlib.contextmanager
def _plain_text() -> Iterator[None]:
    """Within, names are drawn as they are: matplotlib takes what stands between two dollar signs for TeX."""
    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def _cleaned(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics with its figures alone, under names that can be drawn."""
    figures: dict[str, Any] = {
        _name(name): value for name, value in row.items() if name != "validation" and _FIGURE.holds(value)
    }
    validation = row.get("validation")
    if isinstance(validation, dict):
        figures["validation"] = {_name(name): v for name, v in validation.items() if _FIGURE.holds(v)}
    return figures


def _name(text: str) -> str:
    """A name from a file in one line, without its end where it is long."""
    shown = printable(" ".join(text.split()))
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"


def _teachers(path: Path, tell: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """The teachers' held-out figures in a result.json, by row of its table."""
    if not path.is_file():
        return {}
    try:
        figures = read_json(path, what="the result of a run", remedy="resume the run, which writes it again")
        figures = figures.get("figures")
        if not mapping(OBJECT).holds(figures):
            raise UserError(f"{path}: has no table of figures")
    except UserError as error:
        tell(f"{error}; the teachers' figures are left out")
        return {}
    return {
        _name(row): {_name(name): value for name, value in values.items() if _FIGURE.holds(value)}
        for row, values in figures.items()
        if row.split(" ")[0] == "teacher"
    }


def _training(rows: dict[str, Rows]) -> list[_Panel]:
    """Cross-entropy; the distillation terms, each teacher's or its parts; and what are shares."""
    ce = [_Line(*_RUNS[sub], _points(part, "ce")) for sub, part in rows.items()]
    names, parts = _terms(rows)
    several = len(names) > 1
    # Of several teachers each one's term, of one alone the parts of its term.
    terms = names if several else parts
    whole = "weighted sum" if several else "sum" if terms else "distilled"
    kd = [_Line(whole, "tab:blue", _points(rows[""], "kd"))]
    for place, name in enumerate(terms):
        label, color = (name, _color(place)) if several else (name.split("/")[1], f"C{place + 1}")
        kd.append(_Line(label, color, _points(rows[""], f"kd/{name}")))
    shares = []
    for kind, (key, (said, style)) in enumerate(_SHARES.items()):
        for place, name in enumerate(names):
            look = (f"{said}, {name}", _color(place)) if several else (said, f"C{kind}")
            shares.append(_Line(*look, _points(rows[""], f"{key}/{name}"), style if several else "-"))
    return [
        _Panel("cross-entropy (nats per token)", [line for line in ce if line.points]),
        _Panel("distillation term (nats per chunk)", [line for line in kd if line.points]),
        _Panel("shares", [line for line in shares if line.points], bounds=(-0.02, 1.02)),
    ]


def _terms(rows: dict[str, Rows]) -> tuple[list[str], list[str]]:
    """The teachers by name, the first one first, and the parts of their terms as NAME/PART."""
    found = list(dict.fromkeys(key[3:] for row in rows[""] for key in row if key.startswith("kd/")))
    found.sort(key=lambda name: name.split("/")[0] != "teacher")
    return [name for name in found if "/" not in name], [name for name in found if "/" in name]


def _held_out(rows: dict[str, Rows], teachers: dict[str, dict[str, float]]) -> list[_Panel]:
    """A panel for each figure, with the teachers' as levels."""
    names = sorted({name for part in rows.values() for row in part for name in row.get("validation", {})})
    # The row of a teacher is its name, with "teacher" in front of all but the first one's.
    colors = {row: _color(place) for place, row in enumerate(teachers)}
    for place, name in enumerate(_terms(rows)[0]):
        colors["teacher" if name == "teacher" else f"teacher {name}"] = _color(place)
    panels = []
    for name in names:
        lines = []
        for sub, part in rows.items():
            found = [{"step": row["step"], **row["validation"]} for row in part if "validation" in row]
            lines.append(_Line(*_RUNS[sub], _points(found, name)))
        levels = [(row, colors[row], values[name]) for row, values in teachers.items() if name in values]
        panels.append(_Panel(f"held-out {name}", [line for line in lines if line.points], levels, "o"))
    return panels


def _draw(panel: _Panel, axes: Axes) -> None:
    for label, color, points, style in panel.lines[:_LINES]:
        look: dict[str, Any] = {"color": color, "linestyle": style, "marker": panel.marker, "markersize": 3}
        axes.plot(*zip(*points, strict=True), label=label, **look)
    for label, color, value in panel.levels[: _LINES - len(panel.lines)] if len(panel.lines) < _LINES else ():
        axes.axhline(value, color=color, linestyle=":", label=label)
    axes.set(title=panel.title, xlabel="step", ylim=panel.bounds)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _color(place: int) -> str:
    """Of a teacher."""
    return _TEACHERS[place % len(_TEACHERS)]


def _points(rows: Rows, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def draw_sweep(
    folder: Path, jobs: Sequence[Job], tell: Callable[[str], None] = lambda line: None
) -> Path | None:
    """Draw the held-out figures of a sweep's jobs over the steps, the best ones in colour.

    Args:
        folder: the sweep's.
        jobs: the best first.
        tell: gets a line for each thing that is left out of the picture.

    Returns:
        The path of the PNG; None where no job has a figure yet.
    """
    rows = {job.folder.name: _validations(job.folder, tell) for job in jobs}
    rows = {name: found for name, found in rows.items() if found}
    names = list(dict.fromkeys(name for found in rows.values() for _, values in found for name in values))
    if not names:
        return None
    if len(names) > _PANELS:
        tell(
            f"{folder}: {len(names)} held-out figures are too many for a picture; it has the first {_PANELS}"
        )
    names = names[:_PANELS]
    high = -(-len(names) // _COLUMNS)
    wide = -(-len(names) // high)
    with _plain_text():
        size = 4.6 * wide, 3.8 * high + 0.2 * min(len(rows), _COLOURED)
        figure = Figure(figsize=size, layout="constrained", dpi=110)
        lines: dict[str, Any] = {}
        for axes, name in zip_longest(figure.subplots(high, wide, squeeze=False).flat, names):
            if name is None:
                axes.axis("off")
                continue
            for place, (job, found) in enumerate(rows.items()):
                points = [(step, values[name]) for step, values in found if name in values]
                if not points:
                    continue
                color = f"C{place}" if place < _COLOURED else "lightgray"
                look: dict[str, Any] = {"color": color, "zorder": 3 - place / len(rows), "marker": "o"}
                (line,) = axes.plot(*zip(*points, strict=True), markersize=3, **look)
                lines.setdefault(_name(job) if place < _COLOURED else "others", line)
            axes.set(title=f"held-out {name}", xlabel="step")
            axes.title.set_fontsize(10)
            axes.grid(alpha=0.3)
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", fontsize=8)
        return _save(figure, folder / PICTURE)


def _validations(run: Path, tell: Callable[[str], None]) -> list[tuple[int, dict[str, float]]]:
    path = run / METRICS_FILE
    try:
        rows = read_metrics(path, tell) if path.is_file() else []
    except UserError as error:
        tell(f"{error}; its curve is left out")
        return []
    return [(row["step"], row["validation"]) for row in map(_cleaned, rows) if row.get("validation")]


def _save(figure: Figure, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with writing(path):
        write_whole(path, picture.getvalue())
    return path
