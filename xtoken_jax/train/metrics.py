"""metrics.jsonl: one JSON object a line, with the step it belongs to."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from xtoken_jax.errors import UserError
from xtoken_jax.files import parse_json, to_json, write_whole
from xtoken_jax.hosts import is_first

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends rows; those past the step that a run goes on from are dropped first.

    Of several processes, the first one does; the others do nothing.

    Attributes:
        kept: the rows of earlier starts that stay, known to the first process.
    """

    def __init__(self, path: Path, first: int) -> None:
        """Open for a run that goes on from step `first`, 0 for a new one.

        Raises:
            UserError: the file cannot be written; it is then as it was.
        """
        self._path = path
        self.kept: list[dict[str, Any]] = []
        self._writes = is_first()
        if not self._writes:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                self.kept = [row for row in read_metrics(path) if first and row["step"] <= first]
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
            with self._path.open("a") as file:
                file.write(to_json({"step": step, **values}) + "\n")
        except OSError as error:
            raise self._unwritten(error) from error

    def sync(self) -> None:
        """Have the rows on the disk, as a checkpoint will be that goes on behind them."""
        if self._writes and self._path.is_file():
            with self._path.open("a") as file:
                os.fsync(file.fileno())

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path}: cannot be written ({error.strerror}); once it can, the same command goes on from "
            "the last checkpoint"
        )


def shown_figure(name: str, value: float | None) -> str:
    """A held-out figure as people read it; None for one that is not finite."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.1%}" if name.endswith("accuracy") else f"{value:.3f}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill or a full disk is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(parse_json(line, path, what="a list of metrics"))
        except UserError:
            break
    return rows
