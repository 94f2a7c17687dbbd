"""Files in a shared cache folder: only the user's own, or root's, are read."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path


class UntrustedFileWarning(UserWarning):
    """A file of the cache is ignored, since another user could have written it."""


def is_trusted(path: Path) -> bool:
    """Whether a file of the cache may be read; a warning says why one that is there may not.

    Args:
        path: the file. A missing one is not trusted, without a warning.
    """
    try:
        reason = _reason(path)
    except OSError:
        return False
    if reason is not None:
        warnings.warn(
            f"{path}: {reason}; it is not read. XTOKEN_CACHE=FOLDER names a folder that only you can write",
            UntrustedFileWarning,
            stacklevel=2,
        )
    return reason is None


def _reason(path: Path) -> str | None:
    """Why another user could have written a file; None where none could."""
    status, folder = path.lstat(), path.parent.stat()
    if stat.S_ISLNK(status.st_mode):
        return f"is a link to {os.readlink(path)}"
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file"
    trusted = (os.getuid(), 0)
    if status.st_uid not in trusted:
        return f"belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users"
    if folder.st_uid not in trusted:
        return f"is in a folder of user {folder.st_uid}"
    if folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
        return "is in a folder that other users can write"
    return None
