"""metrics.jsonl: one JSON object a line, with the step it belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends rows; those past the step that a run goes on from are dropped first."""

    def __init__(self, path: Path, first: int) -> None:
        """Open for a run that goes on from step `first`, 0 for a new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_metrics(path) if path.is_file() else []
        kept = [row for row in rows if first and row["step"] <= first]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._path = path

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add a row."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
