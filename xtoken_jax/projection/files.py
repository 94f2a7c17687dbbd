"""W on disk: one safetensors file that knows which pair it belongs to."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from xtoken_jax.errors import UserError
from xtoken_jax.projection.matrix import Projection
from xtoken_jax.tokens.tokenizer import TokenizerPair

FORMAT = "xtoken-projection-1"


def save_projection(path: str | Path, projection: Projection, pair: TokenizerPair) -> None:
    """Write W with the names, sizes and fingerprints of its pair; equal W give equal files."""
    path = Path(path)
    tensors = {
        "indices": np.ascontiguousarray(projection.indices, np.int32),
        "weights": np.ascontiguousarray(projection.weights, np.float32),
    }
    metadata = {**_describe(pair), "format": FORMAT, "content": _content_hash(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # One key, so that the header's order cannot vary between two builds.
    part.write_bytes(save(tensors, metadata={"xtoken": json.dumps(metadata, sort_keys=True)}))
    os.replace(part, path)


def load_projection(path: str | Path, pair: TokenizerPair) -> Projection:
    """Read W and refuse one that was built for other tokenizers.

    Raises:
        UserError: no such file, a damaged or altered file, or another tokenizer pair.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such projection file; build it with `xtoken project`")
    try:
        with safe_open(path, framework="np") as file:
            metadata = json.loads((file.metadata() or {}).get("xtoken", "{}"))
            tensors = {name: file.get_tensor(name) for name in ("indices", "weights")}
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a readable projection file ({error}); build it again") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a projection file of this version ({FORMAT})")
    expected = _describe(pair)
    for side in ("student", "teacher"):
        if metadata.get(f"{side}_fingerprint") != expected[f"{side}_fingerprint"]:
            raise UserError(
                f"{path}: built for the {side} tokenizer {metadata.get(f'{side}_name')!r} of "
                f"{metadata.get(f'{side}_size')} tokens, not for {expected[f'{side}_name']!r} of "
                f"{expected[f'{side}_size']}; build it again with `xtoken project`"
            )
    if metadata.get("content") != _content_hash(tensors):
        raise UserError(f"{path}: its content does not match its checksum; build it again")
    return Projection(tensors["indices"], tensors["weights"], pair.teacher.size)


def _describe(pair: TokenizerPair) -> dict[str, str]:
    return {
        f"{side}_{key}": str(getattr(tokenizer, key))
        for side, tokenizer in (("student", pair.student), ("teacher", pair.teacher))
        for key in ("name", "size", "fingerprint")
    }


def _content_hash(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].shape}{tensors[name].dtype}".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
