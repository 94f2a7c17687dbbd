"""SIGTERM and Ctrl-C: told to the training between two steps, so that it can save and leave.

Of several processes, one that gets a signal while training tells the others, and all leave at the same step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jax

_GOES_ON = "the same command goes on from the last checkpoint"
_SIGNALS = (None, "SIGTERM", "Ctrl-C")  # numbered, for `largest`


class Stopped(KeyboardInterrupt):
    """The process was asked to end, and nothing is lost.

    Attributes:
        code: what it exits with: 0 after SIGTERM, 130 after Ctrl-C.
    """

    def __init__(self, name: str, what: str = _GOES_ON) -> None:
        """Say which signal it was, and what comes of it."""
        super().__init__(f"stopped by {name}: {what}")
        self.name = name
        self.code = 130 if name == "Ctrl-C" else 0


class StopSignals:
    """While entered, SIGTERM and the first Ctrl-C raise `Stopped`, or wait where they are held.

    A second Ctrl-C ends the process at once, which loses no more than `kill -9` does. Without being entered,
    or outside the main thread, it changes nothing.

    Attributes:
        requested: the first signal that came, "SIGTERM" or "Ctrl-C"; None before.
    """

    def __init__(self, what: str = _GOES_ON) -> None:
        """Nothing is changed yet; `what` is said to come of a signal."""
        self.requested: str | None = None
        self._what = what
        self._held = False
        self._before: dict[int, Any] = {}
        self._asked: jax.Array | None = None  # of all processes, what they got

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within, signals are only noted in `requested`."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `held`: what can be broken off, since it is done again. Raises `Stopped`.

        Of several processes none can break off alone: it is left where all call `check`.
        """
        if _several():
            yield
            return
        self._held = False
        try:
            if self.requested is not None:
                raise Stopped(self.requested, self._what)
            yield
        finally:
            self._held = True

    def agreed(self, *, now: bool = False) -> str | None:
        """The signal that this process or another got, the same answer on all, which must all ask.

        Args:
            now: wait for the others' answers; else, with several processes, those of the time before are
                returned, which are there, and a signal is known one call later.
        """
        if not _several():
            return self.requested
        from xtoken_jax.distributed.processes import largest

        before, self._asked = self._asked, largest(_SIGNALS.index(self.requested))
        found = self._asked if now else before
        return None if found is None else _SIGNALS[int(found)]

    def check(self) -> None:
        """In between what `at_once` lets be broken off: raises `Stopped` on all processes, or on none."""
        if _several() and (name := self.agreed(now=True)) is not None:
            raise Stopped(name, self._what)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.requested is None:
            self.requested = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            if not self._held:
                raise Stopped(self.requested, self._what)
            more = "; once more ends at once" if number == signal.SIGINT else ""
            _say(f"{self.requested}: saving after this step{more}")
        elif number == signal.SIGINT:
            _say(f"ended; {self._what}")
            os._exit(130)


def end_at_once(number: int, _: FrameType | None = None) -> NoReturn:
    """Handle a signal while nothing is being written: say so and exit as `Stopped` does."""
    stopped = Stopped("Ctrl-C" if number == signal.SIGINT else "SIGTERM")
    _say(str(stopped))
    end_process(stopped.code)


def end_process(code: int) -> NoReturn:
    """Flush what was printed and exit without the interpreter's shutdown.

    The shutdown crashes (SIGSEGV) while native threads of XLA still compile or compute. Files and trackers
    have to be closed before.
    """
    if (multiprocessing := sys.modules.get("multiprocessing")) is not None:
        for child in multiprocessing.active_children():  # the shutdown would have ended them
            child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(code)


def _several() -> bool:
    import jax  # here: a handler is wanted before the seconds that this takes

    return jax.process_count() > 1


def _say(text: str) -> None:
    """Write to stderr past Python's buffers, which a signal may have come upon half-way."""
    shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # the cursor, which a progress bar hides
    os.write(2, f"{shown}\nxtoken: {text}\n".encode())
