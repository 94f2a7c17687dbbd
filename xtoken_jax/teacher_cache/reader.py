"""A teacher's outputs on disk, for training without the teacher: a folder of shards and an index.

The rows of a part of a document are found by where it comes from (`Record`), whatever it is packed with, and
carry a checksum of the teacher's tokens, so that other text or another tokenizer is refused and never trained
on. The folder says of what it was made: teacher, tokenizers, text and lengths of rows, each by a fingerprint.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xtoken_jax.alignment.batch import StoredRows
from xtoken_jax.errors import UserError
from xtoken_jax.files import read_json, to_json, write_whole, writing
from xtoken_jax.files.fields import shown
from xtoken_jax.files.folders import refuse_links
from xtoken_jax.files.new_files import partial_of
from xtoken_jax.teacher_cache.index_fields import check_index
from xtoken_jax.teacher_cache.shards import DTYPES, Entry, Form, PartRows, Shard, write_shard

INDEX_FILE = "index.json"
_FORMAT = 1


@dataclass(frozen=True)
class ShardInfo:
    """What the index knows of a shard.

    Attributes:
        file: its name.
        bytes, crc32: of the whole file.
        tables_crc32: of what it says of its parts.
        first: (source, document) of its first part, the source by number.
        next: the same of the shard behind it.
        parts, tokens, raw_bytes: how many; bytes before compression.
        lost: what keeping no more than this costs, as it was measured.
    """

    file: str
    bytes: int
    crc32: int
    tables_crc32: int
    first: tuple[int, int]
    next: tuple[int, int]
    parts: int
    tokens: int
    raw_bytes: int
    lost: dict[str, Any]


@dataclass
class Index:
    """What a cache is.

    Attributes:
        made_of: key, such as teacher.weights or data.train.NAME -> fingerprint.
        keep: how much is kept of a distribution: top_k, top_p, dtype, temperatures.
        size: V_t.
        sources: names, in the order of their numbers.
        width: the most tokens that are kept of a distribution.
        shards: those that are written.
        complete: whether that is all.
        figures: of the teacher on the held-out text, by name, and what that text was.
        names: "teacher", "student" or data.train.NAME -> the path it was made from, for messages alone.
    """

    made_of: dict[str, str]
    keep: dict[str, Any]
    size: int
    sources: list[str]
    width: int = 0
    shards: list[ShardInfo] = field(default_factory=list)
    complete: bool = False
    figures: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @property
    def form(self) -> Form:
        """How rows are stored."""
        keep = self.keep
        everything = keep["top_k"] is None and keep["top_p"] == 1
        return Form(self.size, keep["dtype"], tuple(keep["temperatures"]), everything)

    @property
    def checksum(self) -> str:
        """Of all that is in it, but for figures."""
        content = [self.made_of, self.keep, [shard.crc32 for shard in self.shards]]
        return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"

    def write(self, folder: Path) -> None:
        """Write it into its folder, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        with writing(folder / INDEX_FILE):
            write_whole(folder / INDEX_FILE, to_json({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")


def read_index(folder: Path) -> Index | None:
    """The index of a folder; None where the folder is not there or empty.

    Raises:
        UserError: a folder that holds something else, or an index that cannot be read.
    """
    path = folder / INDEX_FILE
    if folder.is_dir():
        refuse_links(folder)
    if not path.is_file():
        if folder.exists() and not (folder.is_dir() and all(map(_is_leftover, folder.iterdir()))):
            raise UserError(f"{folder}: exists and is not a teacher cache, it has no {INDEX_FILE}")
        return None
    content = read_json(path, what="the index of a teacher cache", remedy="make the cache again")
    if (version := content.get("format", _FORMAT)) != _FORMAT:
        raise UserError(f"{path}: of format {shown(version)}, which is not {_FORMAT}; make the cache anew")
    content.setdefault("names", {})  # which earlier versions did not write
    check_index(content, path)
    shards = [
        ShardInfo(**{**shard, "first": tuple(shard["first"]), "next": tuple(shard["next"])})
        for shard in content.pop("shards")
    ]
    del content["format"]
    return Index(**content, shards=shards)


def difference(
    key: str, there: object, here: object, their_names: Mapping[str, str], our_names: Mapping[str, str]
) -> str:
    """Say how a cache and a run differ in a key of `Index.made_of`: by paths instead of fingerprints."""
    part, _, last = key.rpartition(".")
    subject = part if last in ("config", "weights", "tokenizer", "chat_template") else key
    theirs, ours = their_names.get(subject), our_names.get(subject)
    if theirs is None or ours is None:
        return f"{there} there, {here} here"
    return f"{ours} has changed since" if theirs == ours else f"{theirs} there, {ours} here"


def _is_leftover(path: Path) -> bool:
    return partial_of(path.name) == INDEX_FILE


def add_shard(folder: Path, index: Index, number: int, entries: Sequence[Entry], **known: Any) -> ShardInfo:
    """Write shard `number` and say so in the index; a kill leaves the cache as before or with it.

    Args:
        folder: of the cache.
        index: gets the shard.
        number: where it stands among the shards, at most one behind the last.
        entries: its parts.
        known: `first`, `next`, `raw_bytes` and `lost`.
    """
    name = f"shard-{number:05d}.safetensors"
    with writing(folder / name):
        content, tables = write_shard(folder / name, entries)
    info = ShardInfo(
        file=name,
        bytes=len(content),
        crc32=zlib.crc32(content),
        tables_crc32=tables,
        parts=len(entries),
        tokens=sum(len(entry.ids) for entry in entries),
        **known,
    )
    index.shards[number : number + 1] = [info]
    index.write(folder)
    return info


def is_whole(folder: Path, shard: ShardInfo) -> bool:
    """Whether a shard's file is as it was written, every byte of it."""
    try:
        content = (folder / shard.file).read_bytes()
    except OSError:
        return False
    return len(content) == shard.bytes and zlib.crc32(content) == shard.crc32


class TeacherCache:
    """A finished cache, for reading.

    Args:
        folder: where `xtoken cache-teacher` wrote it.
        temperature: of the loss that reads it.
        key: of the config, which errors name.

    Raises:
        UserError: no cache there, an unfinished one, one that cannot be read, or one for other temperatures:
            what is not kept was summed up for some alone.
    """

    def __init__(self, folder: Path, temperature: float = 1.0, *, key: str = "teacher.cache"):
        index = read_index(folder)
        if index is None:
            raise UserError(f"{key}={folder}: no teacher cache there; xtoken cache-teacher makes one")
        if not index.complete:
            raise UserError(
                f"{key}={folder}: an unfinished teacher cache; the same xtoken cache-teacher goes on with it"
            )
        self.folder, self.index, self._key = folder, index, key
        self._form, self._temperature = index.form, temperature
        known = self._form.temperatures
        if not self._form.every_token and temperature not in known:
            made_for = ", ".join(f"{t:g}" for t in known)
            raise UserError(
                f"{key}={folder}: made for temperature {made_for}, the loss has {temperature:g}; take one of "
                f"these, or make the cache anew with --temperatures {temperature:g}"
            )
        self._numbers = {name: number for number, name in enumerate(index.sources)}
        self._firsts = [shard.first for shard in index.shards]
        self._shards: dict[int, Shard] = {}

    @property
    def any_temperature(self) -> bool:
        """Whether it can be read for every temperature, because it stores every token."""
        return self._form.every_token

    def check(self, made_of: Mapping[str, str], names: Mapping[str, str] | None = None) -> None:
        """Refuse a cache of another teacher, tokenizer, text or of other lengths, naming what differs.

        Args:
            made_of: what is known here; what the cache does not know, or here is not known, is not compared,
                but for sources of text, all of which the cache must have.
            names: as in `Index`, of what is here.
        """
        there = self.index.made_of
        for key, here in made_of.items():
            if key.startswith("data.train.") and key not in there:
                raise UserError(f"{self._key}={self.folder}: has no {key.removeprefix('data.train.')!r} text")
            if there.get(key, here) != here:
                values = difference(key, there[key], here, self.index.names, names or {})
                raise UserError(
                    f"{self._key}={self.folder}: made of another {key} ({values}); "
                    "xtoken cache-teacher makes a cache of this one"
                )

    def part(self, source: str, document: int, part: int, ids: np.ndarray) -> PartRows:
        """The rows of a part of a document, of which the teacher sees these ids, int32 [n].

        Raises:
            UserError: none such there, other ids, outputs that are not finite, or a damaged shard, which is
                named.
        """
        name = f"{source} document {document} part {part}"
        number = self._numbers.get(source)
        where = -1 if number is None else bisect_right(self._firsts, (number, document)) - 1
        if number is None or where < 0:
            raise UserError(f"{self._key}={self.folder}: has nothing of {name}; the cache is of other text")
        if where not in self._shards:
            shard = self.index.shards[where]
            self._shards[where] = Shard(
                self.folder / shard.file, shard.bytes, shard.tables_crc32, self.index.width
            )
        rows = self._shards[where].read((number, document, part), ids, self._form, name)
        # -inf is the logarithm of a probability of 0.
        if not (np.isfinite(rows.normalizers).all() and all((x < np.inf).all() for x in rows[2:4])):
            raise UserError(
                f"{self._key}={self.folder}: the teacher's outputs are not finite in {name}; make the cache "
                "again, with another checkpoint or teacher.compute_dtype=float32"
            )
        return rows

    def rows(self, rows: Sequence[Sequence[PartRows]], length: int) -> StoredRows:
        """What a batch of B rows holds, each of one or more parts behind one another.

        Args:
            rows: the parts of each row, as `part` returns them.
            length: T_t, tokens of a row at most.

        Returns:
            StoredRows of numpy arrays; positions behind a row's last part say nothing, and likewise for all
            tokens.
        """
        form, width = self._form, self.index.size if self._form.every_token else self.index.width
        shape = (len(rows), length)
        found = StoredRows(
            None if form.every_token else np.full((*shape, width), form.size, np.int32),  # type: ignore[arg-type]
            np.zeros((*shape, width), DTYPES[form.dtype]),  # type: ignore[arg-type]
            np.zeros(shape, np.float32),  # type: ignore[arg-type]
            np.zeros(shape, np.float32),  # type: ignore[arg-type]
            form.size,
            self._temperature,
        )
        for row, parts in enumerate(rows):
            place = 0
            for part in parts:
                here = row, slice(place, place + len(part.normalizers))
                found.normalizers[here] = part.normalizers
                if part.counts is None or part.ids is None or found.ids is None:
                    found.log_probabilities[here] = part.log_probabilities.reshape(-1, width)
                else:
                    inside = np.arange(width) < part.counts[:, None]
                    found.ids[here][inside] = part.ids
                    found.log_probabilities[here][inside] = part.log_probabilities
                    tail = part.tails[form.temperatures.index(self._temperature)].astype(np.float32)
                    others = np.maximum(form.size - part.counts.astype(np.int64), 1)
                    found.others[here] = tail - np.log(others, dtype=np.float32)
                place += len(part.normalizers)
        return found
