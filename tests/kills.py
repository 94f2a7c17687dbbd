"""A kill before the n-th change to the file system: from then on, the program changes nothing any more."""

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir"}
EXCHANGES = {"renameat2", "renamex_np"}  # from the C library, where Python sees only the look-up


class Kill(BaseException):
    """Nothing on the way catches it."""


class _Counter:
    def __init__(self) -> None:
        self.left: int | None = None
        self.thread = 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.left is None or threading.get_ident() != self.thread or not _changes(event, args):
            return
        if self.left == 0:
            raise Kill
        self.left -= 1


def _changes(event: str, args: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool(args[2] & (os.O_WRONLY | os.O_RDWR))
    return event in CHANGES or (event == "ctypes.dlsym" and args[1] in EXCHANGES)


_counter = _Counter()
sys.addaudithook(_counter)  # for as long as the process lives: there is no taking it away


def killed(moment: int, action: Callable[[], Any]) -> bool:
    """Run the action but for change number `moment`, from 0, and all after it; False if it has fewer.

    Handlers and `finally` run as they do not in a kill, but what they would change raises, too.
    """
    _counter.left, _counter.thread = moment, threading.get_ident()
    try:
        action()
    except Kill:
        return True
    finally:
        _counter.left = None
    return False
