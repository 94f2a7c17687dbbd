"""What orbax and TensorStore print of errors that they raise as well: kept off the terminal."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

_ORBAX = f"{os.sep}orbax{os.sep}"


def without_orbax_reports() -> None:
    """From now on, drop orbax's logged tracebacks, its reads that fail unheard beside the first, and what
    TensorStore's threads say to an event loop that has gone. Every other report goes where it went.
    """
    logging.getLogger("absl").addFilter(_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_not_of_orbax)
    before = sys.unraisablehook
    if getattr(before, "of_orbax", False):
        return

    def report(what: Any) -> None:
        code = getattr(what.object, "cr_code", None)  # of a coroutine
        gone = isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"
        if not gone and (code is None or _ORBAX not in code.co_filename):
            before(what)

    report.of_orbax = True  # type: ignore[attr-defined]
    sys.unraisablehook = report


def _not_of_orbax(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return not (_ORBAX in record.pathname or _ORBAX in said or "tensorstore_spec" in said)
