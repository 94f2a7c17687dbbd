"""Folders: that of a model a user names (the only place that may use the network), and the cache."""

import os
import re
from pathlib import Path

from xtoken_jax.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]


def cache_folder() -> Path:
    """Where what can be made again is kept: $XTOKEN_CACHE, or xtoken-jax in the user's cache folder."""
    own = os.environ.get("XTOKEN_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "xtoken-jax"


def resolve_folder(path_or_id: str | Path) -> Path:
    """The local folder of a model: the path itself, or a download where it is a hub id.

    Only a string of the form `org/name` that is not a path on this machine is looked up on the hub.
    What looks like a path (absolute, starting with `.` or `~`, no slash, or more than one) never
    reaches the network.

    Raises:
        UserError: a missing folder, a file in its place, or a hub id that cannot be fetched.
    """
    text = str(path_or_id)
    if not text:
        raise UserError("the model's folder is empty; give a path or a hub id")
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"not a folder: {text}")
    if isinstance(path_or_id, Path) or not _HUB_ID.fullmatch(text):
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"no such folder: {text}{where}")

    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=_PATTERNS))
    # the hub's client raises its own errors, httpx's and OSErrors; all mean the same to a user
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"no such folder: {text}, and it could not be fetched from the hub as a model id: {reason}"
        ) from error
