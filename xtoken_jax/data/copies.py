"""What is kept of data files in the user's cache folder, for access to any record."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from xtoken_jax.data.data_file import DataFile
from xtoken_jax.errors import UserError
from xtoken_jax.hub import cache_folder


def kept_file(file: DataFile, name: str) -> Path:
    """Where something is kept that can be made of this state of a file again, in the user's cache folder."""
    return cache_folder() / "data" / f"{file.path.name.split('.')[0]}-{file.key}{name}"


def keep(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file of the cache, whole or not at all; several processes may do so at the same time.

    Raises:
        UserError: there is no room, or no permission; what `write` raises.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(number, "wb") as out:
                write(out)
                out.flush()
                os.fsync(out.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UserError(
            f"{path.parent}: no copy for random access can be kept there ({error.strerror}); "
            "XTOKEN_CACHE=FOLDER names another place"
        ) from error
