"""What is kept of data files in the user's cache folder, for access to any record."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from xtoken_jax.data.formats.data_file import DataFile
from xtoken_jax.errors import UserError
from xtoken_jax.files.trust import is_trusted
from xtoken_jax.hub import cache_folder, private_folder

_FOLDER = "data"
NOTE = ".source"  # behind a copy's name: a file with the path of what it was made of
_COPY = re.compile(
    r".*-([0-9a-f]{16})(\.jsonl|\.lines\.npy|-[0-9a-f]{8}\.offsets\.npy|-[0-9a-f]{8}\.parquet)", re.DOTALL
)
_OUTDATED = ".lines.npy"
_PART = re.compile(rf"\.{_COPY.pattern}(?:\.source)?\.\w{{8}}", re.DOTALL)
_STEM = 40  # characters of the source's name that the copy's name begins with; names end at 255 bytes


class State(Enum):
    """Of what a copy was made of."""

    current = "as it was"
    changed = "changed since"
    gone = "gone"
    unfinished = "left by a run that was killed"
    outdated = "of an earlier version of xtoken"
    unknown = "not known"


@dataclass(frozen=True)
class Copy:
    """A file in the cache folder.

    Attributes:
        path: the file.
        size: bytes.
        age: seconds since it was written.
        source: what it was made of, a data file or another copy; None where that is not known.
        state: of the source. A copy can go where it is changed, gone or unfinished.
    """

    path: Path
    size: int
    age: float
    source: Path | None
    state: State

    @property
    def useless(self) -> bool:
        """Whether no run will read it again."""
        return self.state in (State.changed, State.gone, State.unfinished, State.outdated)


def keep(file: DataFile, name: str, write: Callable[[BinaryIO], object]) -> Path:
    """Where something is kept that can be made of this state of a file, in the user's cache folder.

    It is made where it is not there, whole or not at all; several processes may ask at the same time. Before
    that, what processes that were killed left unfinished is removed.

    Args:
        file: the source.
        name: the end of the name: what is made of it.
        write: makes it.

    Raises:
        UserError: there is no room, or no permission; what `write` raises.
    """
    stem = file.path.name.split(".")[0][:_STEM]
    path = _folder() / f"{stem}-{file.key}{name}"
    if not is_trusted(path):
        for part in filter(_is_part, path.parent.glob(".*")):
            with contextlib.suppress(OSError):
                _remove_leftover(part)
        _write(path, write)
    note = path.with_name(path.name + NOTE)
    if not note.is_file():  # without it the copy is never cleared away, and that is all
        with contextlib.suppress(UserError):
            _write(note, lambda out: out.write(os.fsencode(file.path.resolve())))
    return path


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    try:
        private_folder(_FOLDER)
        number, name = _locked_file(path)
        with open(number, "wb") as out:
            try:
                write(out)
                out.flush()
                os.fsync(out.fileno())
                os.replace(name, path)  # under the lock: no other process takes the file for a leftover
            except BaseException:
                os.unlink(name)
                raise
    except OSError as error:
        raise UserError(
            f"{path.parent}: no copy for random access can be kept there ({error.strerror}); "
            "XTOKEN_CACHE=FOLDER names another place"
        ) from error


def _locked_file(path: Path) -> tuple[int, str]:
    """A new file for the content of `path`, locked until it is closed, however the process ends."""
    while True:
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with contextlib.suppress(OSError):  # a file system without locks: leftovers stay there
            fcntl.flock(number, fcntl.LOCK_EX)
        if os.fstat(number).st_nlink:
            return number, name
        os.close(number)  # another process took the file for a leftover before it was locked


@contextlib.contextmanager
def _leftover(path: Path) -> Iterator[bool]:
    """Whether the process that wrote an unfinished copy has ended and so lost its lock on the file.

    The lock is held inside the `with`, so that nobody starts to write a file that is about to be removed.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        abandoned = True
    except OSError:
        abandoned = False
    try:
        yield abandoned
    finally:
        os.close(number)


def _is_part(path: Path) -> bool:
    """Whether a file has the name of an unfinished copy."""
    return _PART.fullmatch(path.name) is not None


def _remove_leftover(path: Path) -> None:
    with _leftover(path) as abandoned:
        if abandoned:
            path.unlink(missing_ok=True)


def copies() -> list[Copy]:
    """What is in the cache folder of data files, the largest first; files of other names are no copies."""
    folder = _folder()
    found = [copy for path in folder.iterdir() if (copy := _read(path))] if folder.is_dir() else []
    return sorted(found, key=lambda copy: (-copy.size, copy.path))


def clear() -> list[Copy]:
    """Remove the copies that no run will read again, and return them.

    Raises:
        UserError: one cannot be removed.
    """
    gone: list[Copy] = []
    while useless := [copy for copy in copies() if copy.useless]:  # a source may be a copy that has just gone
        for copy in useless:
            try:
                if copy.state is State.unfinished:
                    _remove_leftover(copy.path)
                    continue
                copy.path.unlink(missing_ok=True)
                copy.path.with_name(copy.path.name + NOTE).unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{copy.path}: cannot be removed ({error.strerror})") from error
        gone += useless
    return gone


def _folder() -> Path:
    return cache_folder() / _FOLDER


def _read(path: Path) -> Copy | None:
    """None where it is none, or has just been removed."""
    try:
        about = path.stat()
    except OSError:
        return None
    age = max(0.0, time.time() - about.st_mtime)
    if _is_part(path):
        with _leftover(path) as abandoned:
            return Copy(path, about.st_size, age, None, State.unfinished) if abandoned else None
    whole = _COPY.fullmatch(path.name)
    if not whole:
        return None
    if whole[2] == _OUTDATED:
        return Copy(path, about.st_size, age, None, State.outdated)
    try:
        source = Path(os.fsdecode(path.with_name(path.name + NOTE).read_bytes()))
    except OSError:
        return Copy(path, about.st_size, age, None, State.unknown)
    try:
        state = State.current if DataFile(source).key == whole[1] else State.changed
    except UserError as error:
        there = not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError)
        state = State.unknown if there else State.gone
    return Copy(path, about.st_size, age, source, state)
