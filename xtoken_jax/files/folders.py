"""Folders that may come from a stranger or be in use: links that lead out of them, locks, new ones."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from xtoken_jax.errors import UserError
from xtoken_jax.files.new_files import lock

_LOCKS = Path("/proc/locks")  # Linux


def refuse_links(folder: Path) -> None:
    """Refuse a folder in which a link leads out of it, since files outside could be read or overwritten.

    The folder itself, and folders above it, may be links.

    Raises:
        UserError: names the link and its target.
    """
    inside = Path(os.path.realpath(folder))
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise UserError(
                    f"{path}: is a link to {os.readlink(path)}, outside of {folder}, where nothing may be "
                    "read or written; put a copy in its place, or delete the link"
                )


@contextlib.contextmanager
def locked(folder: Path, option: str) -> Iterator[None]:
    """Make a folder and lock it; the lock ends with the process.

    Args:
        folder: the folder.
        option: how a command names it, for messages, such as "run_dir=...".

    Raises:
        UserError: it cannot be made, or another process holds the lock.
    """
    number = lock_folder(folder, option)
    try:
        yield
    finally:
        os.close(number)


def lock_folder(folder: Path, option: str) -> int:
    """Make a folder, lock it and return a file descriptor, which releases the lock when it is closed.

    Args:
        folder, option: as in `locked`.

    Raises:
        UserError: it cannot be made, or another process holds the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror or error}); choose another {option}"
        ) from error
    if lock(number, wait=False) is False:
        holder = _holder(os.fstat(number))
        os.close(number)
        named = "another process" if holder is None else f"process {holder}"
        raise UserError(f"{folder}: {named} is writing there; end it, or choose another {option}")
    return number


def _holder(status: os.stat_result) -> int | None:
    """Process that holds the lock on a file; None where the system does not say, as for another host's."""
    with contextlib.suppress(OSError, ValueError):
        for line in _LOCKS.read_text().splitlines():
            # "1: FLOCK ADVISORY WRITE 4711 08:01:131 0 EOF"; waiting processes have "->" in second place
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK":
                major, minor, inode = words[5].split(":")
                device = os.makedev(int(major, 16), int(minor, 16))
                if (device, int(inode)) == (status.st_dev, status.st_ino) and int(words[4]) > 0:
                    return int(words[4])
    return None
