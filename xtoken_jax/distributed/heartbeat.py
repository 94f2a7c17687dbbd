"""Signs of life between the processes of a run: where one ends, or is lost, all others end too.

jax.distributed ends the others as well, with an abort and a stack of C++ frames, and cannot be told
otherwise. Its patience is set above that of this module; but where process 0 dies, it aborts at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

import jax

LOST = 3  # exit code where another process was lost
_PERIOD = 0.5  # seconds between two signs of life
_LAST_WORDS = 10.0  # seconds at most that process 0, which keeps the board, waits until all have read its end
_BEATS, _ENDS, _HEARD = "xtoken_beats/", "xtoken_ends/", "xtoken_heard/"


class Lifeline:
    """Threads that show that this process lives and look whether the others do, until it is closed.

    Where another process has told its end, or shows no sign of life for too long, this one says so in one
    line and exits at once, whatever it is doing: no more is lost than by `kill -9`, which a run survives.
    """

    def __init__(self, board: Any, index: int, count: int, lost_after: float) -> None:
        """Start.

        Args:
            board: the key-value store of `jax.distributed`, kept by process 0.
            index, count: of this process, of all.
            lost_after: seconds without a sign of life.
        """
        self._board, self._index, self._count, self._lost_after = board, index, count, lost_after
        self._closed = threading.Event()
        self._ending = threading.Lock()  # of this process, taken once
        self._beats = {other: ("", time.monotonic()) for other in range(count) if other != index}
        self._reached = time.monotonic()  # the board
        _say_at_abort(
            "jax ended this process, and says why above, as it does where process 0 is lost; the same "
            "command on all goes on from the last checkpoint"
        )
        for work in (self._show, self._watch):
            threading.Thread(target=work, name=f"xtoken{work.__name__}", daemon=True).start()

    def close(self) -> None:
        """Once all have come to the end."""
        self._closed.set()

    def end(self, code: int, line: str, *, of_jax: bool = False) -> NoReturn:
        """Tell the others, say the line on stderr and exit.

        Args:
            code: what all exit with.
            line: why.
            of_jax: an error of a computation, as it also comes of a process that was lost: whether one was
                is waited for first.
        """
        if of_jax:
            time.sleep(self._lost_after + 4 * _PERIOD)
        if not self._ending.acquire(blocking=False):
            time.sleep(60.0)  # the other thread is about to exit
        self._last_words(_ENDS, json.dumps([code, line]), wait=self._index == 0)
        _exit(code, line)

    def _last_words(self, place: str, words: str, *, wait: bool) -> None:
        """Put something on the board, and wait until all others have read of an end, or have their own."""

        def tell() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0, which keeps it, has gone
                self._board.key_value_set(f"{place}{self._index}", words)
                while wait:
                    read = [key for at in (_HEARD, _ENDS) for key, _ in self._board.key_value_dir_get(at)]
                    if len({_of(key) for key in read} - {self._index}) == self._count - 1:
                        return
                    time.sleep(_PERIOD / 5)

        # in a thread: a question to a machine that is gone may never come back
        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(_LAST_WORDS)

    def _show(self) -> None:
        """A new number every period, and what the others have shown."""
        number = 0
        while not self._closed.wait(_PERIOD):
            number += 1
            try:
                self._board.key_value_set(f"{_BEATS}{self._index}", str(number), allow_overwrite=True)
                beats = {_of(key): beat for key, beat in self._board.key_value_dir_get(_BEATS)}
                ends = {_of(key): end for key, end in self._board.key_value_dir_get(_ENDS)}
            except jax.errors.JaxRuntimeError:  # the board is out of reach, which is noticed in `_watch`
                continue
            now = time.monotonic()
            self._reached = now
            for other, (beat, _) in self._beats.items():
                if beats.get(other, "") != beat:
                    self._beats[other] = beats[other], now
            for other in sorted(ends.keys() - {self._index}):
                code, line = json.loads(ends[other])
                self._follow(code, f"process {other}: {line}")

    def _watch(self) -> None:
        """On a clock of its own, whatever becomes of questions to the board."""
        while not self._closed.wait(_PERIOD):
            oldest = time.monotonic() - self._lost_after
            lost = [other for other, (_, seen) in self._beats.items() if seen < oldest]
            if self._index and self._reached < oldest:
                lost = [0]
            if lost and not self._closed.is_set():
                names = ", ".join(map(str, lost))
                self._follow(
                    LOST,
                    f"process {names} of 0..{self._count - 1} was lost: no sign of life for "
                    f"{self._lost_after:g} s; the same command on all goes on from the last checkpoint",
                )

    def _follow(self, code: int, line: str) -> None:
        if self._ending.acquire(blocking=False):
            self._last_words(_HEARD, "", wait=False)
            _exit(code, line)


def _of(key: str) -> int:
    return int(key.rpartition("/")[2])


def _exit(code: int, line: str) -> NoReturn:
    """Past whatever the main thread is doing, and past jax's own shutdown, which waits for the others."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _exit_at_once(code, line)


def _exit_at_once(code: int, line: str) -> NoReturn:
    shown = "\x1b[?25h\n" if os.isatty(2) else ""  # the cursor, which a progress bar hides
    os.write(2, f"{shown}xtoken: {line}\n".encode())
    os._exit(code)


_kept: list[Any] = []  # what C code calls must not be collected


def _say_at_abort(line: str) -> None:
    """From now on, have an abort, which Python's own handlers do not see, end with a line."""
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _exit_at_once(LOST, line))
    _kept.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
