"""A progress bar on stderr for what may take long: it shows only where it does, and only on a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from xtoken_jax.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE = 2.0  # seconds before it shows


class LoadingBar:
    """Bytes done of a known total.

    Args:
        title: what stands before the bar.
        total: bytes.
    """

    def __init__(self, title: str, total: int):
        self._title, self._total, self._done = title, total, 0
        self._started = time.monotonic()
        self._progress: Progress | None = None

    def advance(self, count: int) -> None:
        """Count further bytes as done."""
        self._done += count
        if self._progress is None and time.monotonic() - self._started > PATIENCE and sys.stderr.isatty():
            self._progress = self._show()
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=self._done)

    def _show(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
        )
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        progress.add_task(printable(self._title), total=self._total)
        progress.start()
        return progress

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away, however the work ended."""
        if self._progress is not None:
            self._progress.stop()
