"""Shards of a teacher cache: parts of documents, each compressed, in safetensors files with checksums."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from xtoken_jax.errors import UserError, first_line
from xtoken_jax.files import write_whole

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
_LEVEL = 4  # of zlib; 6 takes twice the time and gains 1.4% here


class PartRows(NamedTuple):
    """A teacher's distributions at the n positions of a part of a document.

    Attributes:
        counts: [n], how many tokens are kept of each; None where all V_t are.
        ids: [sum of counts], the tokens, those of a position in any order; None likewise.
        log_probabilities: [sum of counts], or [n V_t] in the order of ids.
        tails: [M, n], log of the sum of p^(1 / tau) over the tokens not kept, for each of M temperatures.
        normalizers: float32 [n].
    """

    counts: np.ndarray | None
    ids: np.ndarray | None
    log_probabilities: np.ndarray
    tails: np.ndarray
    normalizers: np.ndarray


class Form(NamedTuple):
    """How the rows of a cache are stored.

    Attributes:
        size: V_t.
        dtype: of log-probabilities and tails, one of `DTYPES`.
        temperatures: M of them.
        every_token: whether nothing was left out.
    """

    size: int
    dtype: str
    temperatures: tuple[float, ...]
    every_token: bool

    @property
    def id_dtype(self) -> np.dtype:
        """The narrowest that holds V_t."""
        return np.dtype(np.uint16 if self.size < 2**16 else np.uint32)


class Entry(NamedTuple):
    """A part as a shard lists it.

    Attributes:
        key: (source, document, part), the source by its number in the cache.
        ids: the teacher's tokens, int32 [n].
        content: what `packed` returned.
    """

    key: tuple[int, int, int]
    ids: np.ndarray
    content: bytes


def packed(rows: PartRows, form: Form) -> tuple[bytes, int]:
    """Rows as bytes, the tokens of a position by rising id, and how many bytes before compression."""
    dtype = DTYPES[form.dtype]
    values, tables = rows.log_probabilities.astype(dtype), [rows.tails.astype(dtype), rows.normalizers]
    if form.every_token:
        arrays = [values, *tables]
    else:
        assert rows.counts is not None and rows.ids is not None  # noqa: PT018
        owners = np.repeat(np.arange(len(rows.counts), dtype=np.int64), rows.counts)
        order = np.argsort(owners * form.size + rows.ids)
        ids = rows.ids[order].astype(np.int64)
        # Steps from id to id are smaller numbers than ids, and compress to less.
        steps = np.diff(ids, prepend=0)
        first = _first(rows.counts)
        steps[first] = ids[first]
        arrays = [rows.counts.astype(form.id_dtype), steps.astype(form.id_dtype), values[order], *tables]
    # First bytes of all numbers, then second ones: alike bytes stand together, which is what zlib finds.
    planes = [array.reshape(-1).view(np.uint8).reshape(array.size, -1).T.tobytes() for array in arrays]
    content = b"".join(planes)
    return zlib.compress(content, _LEVEL), len(content)


def unpacked(content: bytes, count: int, form: Form, width: int | None = None) -> PartRows:
    """The rows of a part of `count` tokens.

    No more is decompressed than the rows of so many tokens take.

    Args:
        content: what `packed` returned.
        count: n.
        form: of the cache.
        width: the most tokens that are kept of a distribution; None: V_t.

    Raises:
        ValueError, zlib.error: the bytes are not such rows.
    """
    stream = zlib.decompressobj()
    rest = content

    def take(dtype: np.dtype, number: int) -> np.ndarray:
        nonlocal rest
        size = number * dtype.itemsize
        data = b""
        while len(data) < size and (piece := stream.decompress(rest, size - len(data))):
            data, rest = data + piece, stream.unconsumed_tail
        planes = np.frombuffer(data, np.uint8, size).reshape(dtype.itemsize, number)
        return np.ascontiguousarray(planes.T).view(dtype).reshape(number)

    counts = ids = None
    entries = count * form.size
    if not form.every_token:
        counts = take(form.id_dtype, count)
        if counts.max(initial=0) > (form.size if width is None else width):
            raise ValueError(f"{counts.max():,} tokens of a distribution, more than the index says")
        entries = int(counts.sum(dtype=np.int64))
        steps = take(form.id_dtype, entries).astype(np.int64)
        sums, first = np.cumsum(steps), _first(counts)
        every = sums - np.repeat(sums[first] - steps[first], counts[counts > 0])
        if every.max(initial=0) >= form.size:
            raise ValueError(f"token {every.max():,} of a vocabulary of {form.size:,}")
        ids = every.astype(form.id_dtype)
    dtype = DTYPES[form.dtype]
    log_probabilities = take(dtype, entries)
    tails = take(dtype, len(form.temperatures) * count).reshape(len(form.temperatures), count)
    normalizers = take(np.dtype(np.float32), count)
    if stream.decompress(rest, 1) or not stream.eof:
        raise ValueError("more bytes than its rows take")
    return PartRows(counts, ids, log_probabilities, tails, normalizers)


def _first(counts: np.ndarray) -> np.ndarray:
    """Where the entries of each position that has any begin."""
    ends = np.cumsum(counts, dtype=np.int64)
    return (ends - counts)[counts > 0]


def tokens_checksum(ids: np.ndarray) -> int:
    """A number of a part's token ids."""
    return zlib.crc32(np.asarray(ids, "<i4").tobytes())


def write_shard(path: Path, entries: Sequence[Entry]) -> tuple[bytes, int]:
    """Write a shard, or replace it; the bytes that were written, and a checksum of its tables.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.numpy import save

    sizes = [len(entry.content) for entry in entries]
    tables: dict[str, np.ndarray] = {
        "keys": np.array([entry.key for entry in entries], np.int64).reshape(-1, 3),
        "tokens": np.array([len(entry.ids) for entry in entries], np.int32),
        "ids_crc32": np.array([tokens_checksum(entry.ids) for entry in entries], np.uint32),
        "content_crc32": np.array([zlib.crc32(entry.content) for entry in entries], np.uint32),
        "offsets": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    }
    content = np.frombuffer(b"".join(entry.content for entry in entries), np.uint8)
    written = save({**tables, "content": content})
    write_whole(path, written)
    return written, _checksum(tables.values())


def _checksum(tables: Iterable[np.ndarray]) -> int:
    found = 0
    for table in tables:
        found = zlib.crc32(table.tobytes(), found)
    return found


# Tables of a shard -> dtype; all have an entry a part, but for one more of offsets.
_TABLES = {
    "keys": np.int64, "tokens": np.int32, "ids_crc32": np.uint32, "content_crc32": np.uint32,
    "offsets": np.int64,
}  # fmt: skip


def _misshapen(tables: Sequence[np.ndarray], content: list[int]) -> str | None:
    """Return why these cannot be the tables of a shard with so much content, None if they can."""
    count = len(tables[0]) if tables[0].ndim else 0
    shapes = (count, 3), (count,), (count,), (count,), (count + 1,)
    for (name, dtype), table, shape in zip(_TABLES.items(), tables, shapes, strict=True):
        if (table.dtype, table.shape) != (dtype, shape):
            return (
                f"{name} is {table.dtype} of shape {list(table.shape)}, not {dtype.__name__} of {list(shape)}"
            )
    offsets = tables[-1]
    if len(content) != 1 or offsets[0] != 0 or offsets[-1] != content[0] or (np.diff(offsets) < 0).any():
        return "its offsets do not fit its content"
    return None


class Shard:
    """A shard to read from; parts are read when they are asked for.

    Args:
        path: of the file.
        size: bytes that it has.
        checksum: of its tables.
        width: the most tokens that are kept of a distribution; None: V_t.

    Raises:
        UserError: no such file, or a damaged one.
    """

    def __init__(self, path: Path, size: int, checksum: int, width: int | None = None):
        from safetensors import SafetensorError, safe_open

        self.path, self._width = path, width
        try:
            if path.stat().st_size != size:
                raise damaged(path, f"{path.stat().st_size} bytes instead of {size}")
            self._file = safe_open(path, framework="np")
            tables = [self._file.get_tensor(name) for name in _TABLES]
            if wrong := _misshapen(tables, self._file.get_slice("content").get_shape()):
                raise damaged(path, wrong)
            if _checksum(tables) != checksum:
                raise damaged(path, "the checksum of its tables is another")
            keys, self._tokens, self._ids, self._contents, self._offsets = tables
            self._places = {tuple(key): place for place, key in enumerate(keys.tolist())}
        except (OSError, SafetensorError, AttributeError, TypeError) as error:  # numpy lacks some dtypes
            raise damaged(path, first_line(error)) from error

    def read(self, key: tuple[int, int, int], ids: np.ndarray, form: Form, name: str) -> PartRows:
        """The rows of a part.

        Args:
            key: (source, document, part).
            ids: the tokens that the teacher sees there.
            form: of the cache.
            name: of the part, for what goes wrong.

        Raises:
            UserError: no such part, other tokens, or a damaged shard.
        """
        place = self._places.get(key)
        if place is None:
            raise UserError(
                f"{self.path}: has nothing of {name}; the cache was made of other text or lengths"
            )
        if self._tokens[place] != len(ids) or self._ids[place] != tokens_checksum(ids):
            raise UserError(f"{self.path}: {name} has other tokens there than the teacher sees here")
        begin, end = self._offsets[place : place + 2].tolist()
        content = self._file.get_slice("content")[begin:end].tobytes()
        if zlib.crc32(content) != self._contents[place]:
            raise damaged(self.path, f"the checksum of {name} is another")
        try:
            return unpacked(content, len(ids), form, self._width)
        except (ValueError, zlib.error) as error:
            raise damaged(self.path, f"{name} cannot be unpacked: {first_line(error)}") from error


def damaged(path: Path, how: str) -> UserError:
    """What to say of a file that is not what was written."""
    return UserError(
        f"{path}: damaged ({how}); the same xtoken cache-teacher again makes this part of the cache anew"
    )
