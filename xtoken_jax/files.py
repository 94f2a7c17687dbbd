"""Files that are there whole or not at all, whenever the process ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from xtoken_jax.errors import UserError


def partial_path(path: Path) -> Path:
    """Where the content of a file is until it is whole."""
    return path.with_name(f".{path.name}.partial")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, or replace it, so that a kill at any moment leaves the earlier or the new content.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        to_disk(partial)  # else a machine that dies may keep the name without the content
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Around what writes there, whole or not at all.

    Raises:
        UserError: it cannot be written. The system's own error of a full disk names no place.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{place}: cannot be written ({error.strerror or error}) and is as it was; once it can be, give "
            "the same command again"
        ) from error


def to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, would survive a loss of power."""
    if os.name != "posix":  # elsewhere neither folders nor files opened for reading can be flushed
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
