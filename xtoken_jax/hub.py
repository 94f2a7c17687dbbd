"""Folders: that of a model a user names (the only place that may use the network), and the cache."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from xtoken_jax.errors import UserError
from xtoken_jax.files.foreign import foreign_format

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w./-]*))?")
_PREPARED = re.compile(r"(experiments/[\w-]+)/files/")
# Only what is read here; repositories also hold the same weights in other formats, pickles among them.
_TEXTS = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
    "adapter_config.json", "model_index.json", "modules.json",  # which tell that it is another kind of model
]  # fmt: skip
_WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model*-of-*.safetensors"]

UNREACHABLE = (
    "the hub cannot be reached, and no copy is in the cache; check the network (and HF_HUB_OFFLINE), or name "
    "a local folder"
)


def cache_folder() -> Path:
    """Where what can be made again is kept: $XTOKEN_CACHE, or xtoken-jax in the user's cache folder."""
    own = os.environ.get("XTOKEN_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "xtoken-jax"


def private_folder(name: str) -> Path:
    """Make a folder in the cache folder; new ones can be read by their user only.

    Raises:
        OSError: it cannot be made.
    """
    root = cache_folder()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = root / name
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def resolve_folder(path_or_id: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model: the path itself, or a download where it is a hub id.

    Only a string of the form `org/name` or `org/name@revision` that is not a path on this machine is looked
    up on the hub; a revision is a branch, a tag or a commit. What looks like a path (absolute, starting
    with `.` or `~`, no slash, or more than one) never reaches the network. Downloads are those of
    `huggingface_hub`: kept in its cache, under HF_HOME; with the token of HF_TOKEN or of `hf auth login`
    where a model asks for one; none with HF_HUB_OFFLINE=1.

    Args:
        path_or_id: a folder or hub id.
        weights: whether a download has the safetensors too, or config, tokenizer and chat template alone.

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
        known = foreign_format(path)
        raise UserError(f"not a folder: {text}" if known is None else f"not a folder: {text} is {known}")
    found = _HUB_ID.fullmatch(text)
    if isinstance(path_or_id, Path) or not found:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"no such folder: {text}{where}{how_to_prepare(text)}")
    return _download(*found.groups(), patterns=_TEXTS + _WEIGHTS * weights)


def _download(name: str, revision: str | None, *, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        with quiet_client():
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    # the hub's client raises its own errors, httpx's and OSErrors; all mean the same to a user
    except Exception as error:
        if isinstance(error, errors.GatedRepoError):
            reason = "its terms must be accepted there, and HF_TOKEN hold a token of who did"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"it has no revision {revision}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = "there is none of this name, or it is private and HF_TOKEN holds no token for it"
        elif isinstance(error, errors.LocalEntryNotFoundError):
            reason = UNREACHABLE
        else:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        named = name if revision is None else f"{name}@{revision}"
        raise UserError(
            f"no such folder: {named}, and it could not be fetched from the hub as a model id: {reason}"
        ) from error


def how_to_prepare(path: str) -> str:
    """End of a message about a missing file: the script that makes it; "" unless it is an experiment's."""
    experiment = _PREPARED.match(path)
    if experiment is None:
        return ""
    return f"; in the repository's root, run python {experiment[1]}/prepare.py, which makes it"


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """Silence the hub's client, which logs two lines for each retry; what it raises says the same."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
