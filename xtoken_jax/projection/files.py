"""W on disk: one safetensors file that knows which pair it belongs to and how it was built."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from xtoken_jax.errors import UserError
from xtoken_jax.files import parse_json, write_whole
from xtoken_jax.projection.build import ProjectionOptions
from xtoken_jax.projection.matrix import Projection
from xtoken_jax.tokens.tokenizer import TokenizerPair

FORMAT = "xtoken-projection-2"  # -1 held no build options
_AGAIN = "build it again with `xtoken project`"


def save_projection(
    path: str | Path,
    projection: Projection,
    pair: TokenizerPair,
    options: ProjectionOptions | None = None,
    *,
    mode: int = 0o666,
) -> None:
    """Write W with the names, sizes and fingerprints of its pair; equal W give equal files.

    The rows are sorted by falling weight, as readers expect and training may have undone. The
    file appears whole or not at all, also where two processes write it at once.

    Args:
        path: the file; its folder is made.
        projection: W.
        pair: whose.
        options: how it was built. None: not known, for example because it was trained.
        mode: permissions of the file, which the umask reduces.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    tensors = _stored(projection)
    metadata = {
        **_describe(pair),
        "format": FORMAT,
        "content": _content_hash(tensors),
        "options": None if options is None else asdict(options),
    }
    # One key, so that the header's order cannot vary between two builds.
    content = save(tensors, metadata={"xtoken": json.dumps(metadata, sort_keys=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content, mode=mode)


def load_projection(
    path: str | Path, pair: TokenizerPair, options: ProjectionOptions | None = None
) -> Projection:
    """Read W and refuse one that was built for other tokenizers.

    Args:
        path: the file.
        pair: whose it must be.
        options: how it must have been built. None: in any way.

    Raises:
        UserError: no such file, a damaged or altered file, one of an earlier format, another
            tokenizer pair, or other options than those that were named.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such projection file; build it with `xtoken project`")
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get("xtoken", "{}")
            tensors = {name: file.get_tensor(name) for name in ("indices", "weights")}
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise UserError(f"{path}: not a readable projection file ({error}); build it again") from error
    metadata = parse_json(text, path, what="a projection file", remedy=_AGAIN)
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        said = f", but of {found}" if found else ""
        raise UserError(f"{path}: not a projection file of this version ({FORMAT}){said}; {_AGAIN}")
    _check_pair(path, metadata, pair)
    if options is not None and metadata.get("options") != asdict(options):
        found = _named(metadata.get("options"))
        raise UserError(f"{path}: built with {found}, not with {_named(asdict(options))}; {_AGAIN}")
    if metadata.get("content") != _content_hash(tensors):
        raise UserError(f"{path}: its content does not match its checksum; build it again")
    if wrong := _fault(tensors, pair):
        raise UserError(f"{path}: {wrong}; {_AGAIN}")
    return Projection(tensors["indices"], tensors["weights"], pair.teacher.size)


def _stored(projection: Projection) -> dict[str, np.ndarray]:
    """Its arrays with the rows sorted, and -1 wherever the weight is 0."""
    indices = np.asarray(projection.indices, np.int32)
    weights = np.where(indices >= 0, np.asarray(projection.weights, np.float32), np.float32(0))
    indices = np.where(weights > 0, indices, np.int32(-1))
    order = np.argsort(-weights, axis=1, kind="stable")
    return {
        "indices": np.take_along_axis(indices, order, 1),
        "weights": np.take_along_axis(weights, order, 1),
    }


def _check_pair(path: Path, metadata: dict[str, Any], pair: TokenizerPair) -> None:
    expected = _describe(pair)
    for side in ("student", "teacher"):
        if metadata.get(f"{side}_fingerprint") == expected[f"{side}_fingerprint"]:
            continue
        name, size = metadata.get(f"{side}_name"), metadata.get(f"{side}_size")
        other, other_size = expected[f"{side}_name"], expected[f"{side}_size"]
        changed = ", whose files have changed since" if (name, size) == (other, other_size) else ""
        raise UserError(
            f"{path}: built for the {side} tokenizer {name!r} of {size} tokens, not for {other!r} of "
            f"{other_size}{changed}; {_AGAIN}"
        )


def _fault(tensors: dict[str, np.ndarray], pair: TokenizerPair) -> str | None:
    """What makes these arrays no W of this pair; None if nothing does."""
    indices, weights = tensors["indices"], tensors["weights"]
    if (indices.dtype, weights.dtype) != (np.int32, np.float32):
        return f"holds {indices.dtype} and {weights.dtype}, not int32 and float32"
    if indices.ndim != 2 or indices.shape != weights.shape or indices.shape[1] < 1:
        return f"holds arrays of shapes {indices.shape} and {weights.shape}, not of one [V_s, K]"
    if len(indices) != pair.student.size:
        return f"has {len(indices)} rows, but {pair.student.name!r} has {pair.student.size} tokens"
    if indices.min(initial=-1) < -1 or indices.max(initial=-1) >= pair.teacher.size:
        return f"has ids that {pair.teacher.name!r}, of {pair.teacher.size} tokens, has not"
    if not np.isfinite(weights).all() or (weights < 0).any():
        return "has weights that are negative or not finite"
    if not np.array_equal(indices >= 0, weights > 0) or (np.diff(weights, axis=1) > 0).any():
        return "has rows that are not sorted by falling weight and padded behind"
    sums = weights.sum(1, dtype=np.float64)
    if not np.all((sums == 0) | (np.abs(sums - 1) < 1e-4)):
        return "has rows that do not sum to 1"
    return None


def _named(options: dict[str, Any] | None) -> str:
    if not isinstance(options, dict):
        return "options that it does not name"
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _describe(pair: TokenizerPair) -> dict[str, str]:
    metadata: dict[str, str] = {}
    for side, tokenizer in (("student", pair.student), ("teacher", pair.teacher)):
        metadata[f"{side}_name"] = tokenizer.name
        metadata[f"{side}_size"] = str(tokenizer.size)
        metadata[f"{side}_fingerprint"] = tokenizer.file_fingerprint
    return metadata


def _content_hash(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].shape}{tensors[name].dtype}".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
