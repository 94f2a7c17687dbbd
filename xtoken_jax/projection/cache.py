"""W built when it is first asked for, and read back after that."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from xtoken_jax.errors import UserError
from xtoken_jax.files.trust import is_trusted
from xtoken_jax.hub import cache_folder, private_folder
from xtoken_jax.projection.build import ProjectionOptions, build_projection
from xtoken_jax.projection.files import FORMAT, load_projection, save_projection
from xtoken_jax.projection.matrix import Projection
from xtoken_jax.tokens.tokenizer import TokenizerPair

# One more whenever `build_projection` gives another W for the same pair and options.
ALGORITHM = 2
_FOLDER = "projections"


def cached_projection(
    pair: TokenizerPair,
    *,
    entries: int = 4,
    reverse: bool = False,
    scale_trick: bool = False,
    similar_special: bool = False,
) -> Projection:
    """The W of `build_projection`, from the user's cache folder where it lies there already.

    A file that is damaged, does not fit or could be another user's is built again. A folder that cannot be
    written is no error: then nothing is kept. Several processes may ask at once.

    Args:
        pair: student's and teacher's tokenizer.
        entries, reverse, scale_trick, similar_special: as in `ProjectionOptions`.

    Raises:
        UserError: no entry a row.
    """
    options = ProjectionOptions(entries, reverse, scale_trick, similar_special)
    path = cache_path(pair, options)
    if is_trusted(path):
        with contextlib.suppress(UserError, OSError):
            return load_projection(path, pair, options)
    projection = build_projection(pair, **asdict(options))
    with contextlib.suppress(UserError, OSError):
        private_folder(_FOLDER)
        save_projection(path, projection, pair, options, mode=0o600)
    return projection


def cache_path(pair: TokenizerPair, options: ProjectionOptions) -> Path:
    """Where the W of a pair and of options is kept, under $XTOKEN_CACHE or the user's cache folder."""
    key = [pair.student.file_fingerprint, pair.teacher.file_fingerprint, asdict(options), FORMAT, ALGORITHM]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / _FOLDER / f"{digest}.safetensors"
