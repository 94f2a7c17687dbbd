"""Progress of long work: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SILENCE = 30.0  # seconds without a line in a log file, about, while work advances


class Bar:
    """A progress bar; where the console is no terminal, lines without control characters in its place."""

    def __init__(
        self,
        console: Console,
        title: str,
        total: int,
        *,
        completed: int = 0,
        unit: str = "",
        hidden: bool = False,
    ) -> None:
        """Show nothing yet.

        Args:
            console: where to.
            title: of the work.
            total, completed: units of work.
            unit: their name, in the plural.
            hidden: show nothing at all.
        """
        units = [TextColumn(unit)] if unit else []
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *units,
            TimeRemainingColumn(), TextColumn("{task.fields[shown]}"),
        )  # fmt: skip
        self._console, self._title, self._total, self._unit = console, title, total, unit
        self._completed = completed
        self._lines = not hidden and not console.is_terminal
        self._said = time.monotonic()
        self._progress = Progress(*columns, console=console, disable=hidden or self._lines)
        self._task = self._progress.add_task(title, total=total, completed=completed, shown="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, *, completed: int | None = None, shown: str | None = None) -> None:
        """Move the bar, with `shown` after it; a log file gets a line after half a minute without any."""
        if completed is not None:
            self._completed = completed
        self._progress.update(self._task, completed=self._completed)
        if shown is not None:
            self._progress.update(self._task, shown=shown)
        if self._lines and time.monotonic() - self._said > _SILENCE:
            self.line(shown or "")

    def begin(self, what: str) -> None:
        """Name what takes a while now, after the bar or in a line."""
        self._progress.update(self._task, shown=what, refresh=True)
        self._say(f"{self._title}: {what}")

    def line(self, text: str, *, completed: int | None = None) -> None:
        """Add a line to a log file; a terminal has the bar."""
        self._completed = self._completed if completed is None else completed
        unit = f" {self._unit}" if self._unit else ""
        self._say(f"{self._title}: {self._completed:,}/{self._total:,}{unit}  {text}".rstrip())

    def _say(self, text: str) -> None:
        if self._lines:
            self._said = time.monotonic()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
