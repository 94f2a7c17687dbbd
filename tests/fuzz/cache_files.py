"""Fuzzers of teacher caches and of projection files."""

import json
import random
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from teacher_cache.test_teacher_cache import DOCUMENTS, TAUS, write
from tokens import trained

from fuzz.frame import Parser
from fuzz.mutations import spoil_json, spoil_presence, spoil_safetensors
from xtoken_jax.projection.build import ProjectionOptions, build_projection
from xtoken_jax.projection.files import _content_hash, load_projection, save_projection
from xtoken_jax.teacher_cache.reader import INDEX_FILE, TeacherCache
from xtoken_jax.tokens.tokenizer import TokenizerPair

IDS = "ids.npz"
W = "W.safetensors"


def _write_cache(folder: Path) -> None:
    held = write(folder / "cache")
    np.savez(folder / IDS, **{f"{name} {document}": ids for (name, document), (ids, _) in held.items()})


def _spoil_index(rng: random.Random, folder: Path) -> None:
    spoil_json(rng, folder / "cache" / INDEX_FILE)


def _spoil_shard(rng: random.Random, folder: Path) -> None:
    shards = sorted((folder / "cache").glob("*.safetensors"))
    path = rng.choice(shards)
    if rng.random() < 0.2:
        spoil_presence(rng, path)
    else:
        spoil_safetensors(rng, path)
        if rng.random() < 0.8:  # the index agrees with it as far as a size goes
            _adjust(folder / "cache" / INDEX_FILE, path)


def _adjust(index: Path, shard: Path) -> None:
    content = json.loads(index.read_text())
    for entry in content["shards"]:
        if entry["file"] == shard.name:
            entry["bytes"] = shard.stat().st_size
    index.write_text(json.dumps(content))


def _read_cache(folder: Path) -> None:
    with np.load(folder / IDS) as held:
        ids = dict(held)
    cache = TeacherCache(folder / "cache", TAUS[0])
    cache.check({"teacher.config": "1", "data.train.a": "x"})
    repr(cache.index.checksum)
    for name, counts in DOCUMENTS.items():
        for document in range(len(counts)):
            cache.rows([[cache.part(name, document, 0, ids[f"{name} {document}"])]], 8)


def _write_projection(folder: Path) -> None:
    for name, make in (("student", trained.three_digits), ("teacher", trained.single_digits)):
        trained.save(folder / name, *make())
    pair = _pair(folder)
    save_projection(folder / W, build_projection(pair), pair, ProjectionOptions())


def _pair(folder: Path) -> TokenizerPair:
    # From one working directory, since W names the folders.
    return TokenizerPair.load(folder / "student", folder / "teacher")


def _spoil_projection(rng: random.Random, folder: Path) -> None:
    if rng.random() < 0.5:
        spoil_safetensors(rng, folder / W)
    else:
        _spoil_values(rng, folder / W)


def _spoil_values(rng: random.Random, path: Path) -> None:
    """Other numbers, types and shapes in a file that is right as safetensors."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    values = tensors[name]
    kind = rng.randrange(5)
    if kind == 0:
        dtype = rng.choice((np.float64, np.float16, np.int64, np.uint8, np.int8, np.int32, np.float32))
        with np.errstate(all="ignore"):
            tensors[name] = values.astype(dtype)
    elif kind == 1:
        tensors[name] = rng.choice(
            (values[:-1], values[:, :0], values[:0], values.T, values[None], values.ravel())
        )
        tensors[name] = np.ascontiguousarray(tensors[name])
    elif kind == 2:
        odd = (
            rng.choice((-1, -2, 10**8, 2**31 - 1, 0))
            if name == "indices"
            else rng.choice((np.nan, np.inf, -1, 0, 2))
        )
        values[rng.randrange(len(values)), rng.randrange(values.shape[1])] = odd
    elif kind == 3:
        del tensors[name]
    else:
        tensors["more"] = values
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    if rng.random() < 0.7 and set(tensors) == {"indices", "weights"}:
        metadata = {
            "xtoken": json.dumps({**json.loads(metadata["xtoken"]), "content": _content_hash(tensors)})
        }
    save_file(tensors, path, metadata)


def _read_projection(folder: Path) -> None:
    load_projection(folder / W, _pair(folder))


PARSERS = [
    Parser("cache_index", _write_cache, _spoil_index, _read_cache),
    Parser("cache_shards", _write_cache, _spoil_shard, _read_cache),
    Parser("projection", _write_projection, _spoil_projection, _read_projection),
]
