"""Files that are there whole or not at all, whenever the process ends."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xtoken_jax.errors import UserError


def to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Return strict JSON, in which a number that is not finite is null: every reader of JSON takes it.

    Args:
        value: plain values, in lists and objects.
        indent: spaces a level; None for one line.
        ensure_ascii: escape other characters.
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


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
