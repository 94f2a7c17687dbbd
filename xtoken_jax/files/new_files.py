"""Files and folders under names that nobody can guess until they are complete, locked by who writes them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from xtoken_jax.errors import UserError

_HIDDEN = re.compile(r"\.(.+)\.[0-9a-f]{16}\.(partial|old)", re.DOTALL)


class NewFile:
    """A file to write, which takes the place of `path` once it is complete.

    Until then it has a hidden name that cannot be guessed, so no link can be planted there. A process holds a
    lock on the files that it writes: files of killed processes, whose locks are free, are removed.

    Use it as a context manager: a file that has not taken its place at the end is removed.
    """

    def __init__(self, path: Path, *, mode: int = 0o666) -> None:
        """Open the file.

        Args:
            path: its later name. A link there is replaced.
            mode: permissions, which the umask reduces.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path = path
        remove_partials(path.parent, lambda name: name == path.name)
        while True:
            self.partial = hidden(path)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._file: BinaryIO = os.fdopen(os.open(self.partial, flags, mode), "r+b")
            lock(self._file.fileno())
            if self.partial.exists():
                break
            self._file.close()  # another process took it for a leftover before it was locked

    def write(self, content: bytes | memoryview) -> None:
        """Append to the file."""
        self._file.write(content)

    def flush(self) -> None:
        """Let other processes see what was written."""
        self._file.flush()

    def finish(self) -> None:
        """Wait until the content is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def take_place(self) -> None:
        """Rename the finished file to `path`."""
        self.finish()  # otherwise a power loss may keep the name without the content
        os.replace(self.partial, self.path)
        self._file.close()

    def discard(self) -> None:
        """Remove the file, unless it has taken its place."""
        if not self._file.closed:
            with contextlib.suppress(OSError):  # content that was never flushed, on a full disk
                self._file.close()
            self.partial.unlink(missing_ok=True)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder next to `path`, locked and under a hidden name like a `NewFile`.

    The caller renames it. Whatever has its name at the end is removed.

    Raises:
        OSError: it cannot be made.
        UserError: what is there at the end cannot be removed.
    """
    while True:
        partial = hidden(path)
        partial.mkdir()
        number = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
        lock(number)
        if partial.exists():
            break
        os.close(number)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # the error on its way says more than one of this would
        raise
    else:
        if partial.exists():
            with _removing(partial):
                shutil.rmtree(partial)
    finally:
        os.close(number)


def hidden(path: Path, ending: str = "partial") -> Path:
    """Return an unused name next to `path`, which `remove_partials` recognises."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{ending}")


def partial_of(name: str, ending: str = "partial") -> str | None:
    """Return the later name of what `hidden` gave this name; None for other names."""
    found = _HIDDEN.fullmatch(name)
    return None if found is None or found[2] != ending else found[1]


def remove_partials(folder: Path, of: Callable[[str], bool], ending: str = "partial") -> None:
    """Remove what killed processes of this user left in a folder: regular files, and folders.

    Args:
        folder: where to look; a missing one holds nothing.
        of: later name -> whether to remove what was to become a file or folder of this name.
        ending: as in `hidden`.

    Raises:
        UserError: one cannot be removed.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        later = partial_of(name, ending)
        if later is not None and of(later):
            _remove_unlocked(folder / name)


def _remove_unlocked(path: Path) -> None:
    """Remove a file or folder, unless it is a link, another user's, or locked by a process that writes it."""
    try:
        status = path.lstat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)) or not _mine(status):
            return
        access = os.O_RDONLY if stat.S_ISDIR(status.st_mode) else os.O_RDWR  # NFS locks what can be written
        number = os.open(path, access | os.O_NOFOLLOW)
    except OSError:  # gone, or not to be opened
        return
    try:
        if lock(number, wait=False) is False:
            return
        with _removing(path):
            if stat.S_ISDIR(status.st_mode):
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    finally:
        os.close(number)


@contextlib.contextmanager
def _removing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: left over, and cannot be removed ({error.strerror or error}); remove it by hand"
        ) from error


def _mine(status: os.stat_result) -> bool:
    return status.st_uid == os.getuid()


def lock(number: int, *, wait: bool = True) -> bool | None:
    """Lock an open file or folder until it is closed or the process ends.

    Args:
        number: its file descriptor.
        wait: wait for another process that holds the lock.

    Returns:
        True with the lock, False where another process holds it; None where there are no locks.
    """
    try:
        fcntl.flock(number, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def open_to_append(path: Path) -> IO[str]:
    """Open a text file to append to; it is created where it does not exist.

    Raises:
        OSError: it cannot be written, or is a link.
    """
    if path.is_symlink():
        raise OSError(f"it is a link to {os.readlink(path)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    return open(path, "a", encoding="utf-8", opener=lambda name, _: os.open(name, flags, 0o666))
