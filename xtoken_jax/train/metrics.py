"""metrics.jsonl: one JSON object a line, with the step it belongs to."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xtoken_jax.distributed.processes import is_first
from xtoken_jax.errors import UserError
from xtoken_jax.files import MAX_JSON_BYTES, parse_json, to_json, write_whole
from xtoken_jax.files.fields import whole
from xtoken_jax.files.new_files import open_to_append

METRICS_FILE = "metrics.jsonl"
_STEP = whole(0, 2**53)


class MetricsLog:
    """Appends rows; those past the step that a run goes on from are dropped first.

    Of several processes, the first one does; the others do nothing.

    Attributes:
        kept: the rows of earlier starts that stay, known to the first process.
        faults: a line about what was there that is no row, and was removed.
    """

    def __init__(self, path: Path, first: int) -> None:
        """Open for a run that goes on from step `first`, 0 for a new one.

        Raises:
            UserError: the file cannot be written; it is then as it was.
        """
        self._path = path
        self.kept: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self._writes = is_first()
        if not self._writes:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                rows = read_metrics(path, self.faults.append)
                self.kept = [row for row in rows if first and row["step"] <= first]
                write_whole(path, "".join(to_json(row) + "\n" for row in self.kept))
        except OSError as error:
            raise self._unwritten(error) from error

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add a row; numbers that are not finite become null, which every reader of JSON takes.

        Raises:
            UserError: it cannot be written.
        """
        if not self._writes:
            return
        try:
            with open_to_append(self._path) as file:
                file.write(to_json({"step": step, **values}) + "\n")
        except OSError as error:
            raise self._unwritten(error) from error

    def sync(self) -> None:
        """Have the rows on the disk, as a checkpoint will be that goes on behind them."""
        if self._writes and self._path.is_file():
            with open_to_append(self._path) as file:
                os.fsync(file.fileno())

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path}: cannot be written ({error.strerror or error}); once it can be, the same "
            "command resumes from the last checkpoint"
        )


def shown_figure(name: str, value: float | None) -> str:
    """A held-out figure as people read it; None for one that is not finite."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.1%}" if name.endswith("accuracy") else f"{value:.3f}"


def read_metrics(path: Path, tell: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl: each has a whole "step", the rest is as it was read.

    A last line without its end is left out: a kill or a full disk cut it short.

    Args:
        path: the file.
        tell: gets a line that says how many other lines are no such rows and are left out.

    Raises:
        UserError: the file cannot be read.
    """
    rows, wrong = [], []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_JSON_BYTES), b""), 1):
                try:
                    row = parse_json(line, f"{path}:{number}", what="metrics", max_bytes=MAX_JSON_BYTES)
                except UserError:
                    row = {}
                if _STEP.holds(row.get("step")):
                    rows.append(row)
                elif (line.endswith(b"\n") and line.strip()) or len(line) == MAX_JSON_BYTES:
                    wrong.append(number)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if wrong:
        tell(f"{path}: {len(wrong):,} lines hold no metrics and are left out; line {wrong[0]} is the first")
    return rows
