"""Text files of many records: any record of them, by its offset."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xtoken_jax.data.formats.compressed import is_compressed, plain_copy
from xtoken_jax.data.formats.data_file import DataFile, fingerprint
from xtoken_jax.data.formats.derived_files import keep
from xtoken_jax.data.formats.encodings import check_text
from xtoken_jax.data.formats.limits import Limits

PIECE = 1 << 22  # bytes searched at a time
_KEPT = 1 << 26  # bytes of a file whose offsets are kept: they are found quickly in smaller files
_SOLID = np.ones(256, bool)
_SOLID[list(b" \t\n\r\x0b\x0c")] = False

# Finds the records of a file: the offsets of each, and of the end of the last one. The string is what
# messages call the file, which may be a decompressed copy.
Find = Callable[[DataFile, str], np.ndarray]


@dataclass(frozen=True)
class _Opened:
    """A file, what it is read through, and the offsets of its n records, int64 [n + 1]."""

    given: DataFile
    plain: DataFile
    offsets: np.ndarray


class RecordFiles:
    """The records of text files.

    The offsets of the records, 8 bytes each, are in memory; a record is read when it is asked for.
    Compressed files are read through a decompressed copy in the user's cache folder, where also the offsets
    in large files are kept.
    """

    def __init__(self, paths: Sequence[Path], limits: Limits, find: Find, form: str) -> None:
        """Find the records of all files.

        Args:
            paths: of the files.
            limits: on records and decompressed files.
            find: finds the records of a file.
            form: names `find` and its settings, for the offsets that are kept.
        """
        self._limits = limits
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            self._files = list(pool.map(lambda path: _open(DataFile(path), limits, find, form), paths))
        self._ends = np.cumsum([len(file.offsets) - 1 for file in self._files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, number: int) -> tuple[int, int]:
        """The file of a record, and its number there."""
        file = int(np.searchsorted(self._ends, number, side="right"))
        return file, number - int(self._ends[file]) + len(self._files[file].offsets) - 1

    def content(self, number: int) -> bytes:
        """The bytes from where a record begins to where the next one does."""
        place, record = self.place(number)
        file = self._files[place]
        start, end = map(int, file.offsets[record : record + 2])
        self._limits.check_record(end - start, lambda: self.where(number))
        content = file.plain.read(start, end)
        if file.plain is not file.given:
            file.given.check()
        return content

    def path(self, place: int) -> Path:
        """The path of a file."""
        return self._files[place].given.path

    def where(self, number: int) -> str:
        """file:line, with the number from 1 of the line in which a record begins."""
        place, record = self.place(number)
        file = self._files[place]
        return f"{file.given.path}:{line_number(file.plain, int(file.offsets[record]))}"

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Of the files as they lie on disk."""
        return fingerprint([file.given for file in self._files])


def _open(given: DataFile, limits: Limits, find: Find, form: str) -> _Opened:
    plain, name = plain_copy(given, limits) if is_compressed(given.path) else given, str(given.path)
    check_text(plain.read(0, min(8, plain.size)), name)
    if plain.size < _KEPT:
        return _Opened(given, plain, find(plain, name))
    ending = f"-{hashlib.sha256(form.encode()).hexdigest()[:8]}.offsets.npy"

    def kept() -> Path:
        return keep(plain, ending, lambda out: np.save(out, find(plain, name)))

    path = kept()
    offsets = _load(path, plain.size)
    if offsets is None:
        path.unlink(missing_ok=True)
        offsets = _load(kept(), plain.size)
    return _Opened(given, plain, find(plain, name) if offsets is None else offsets)


def _load(path: Path, size: int) -> np.ndarray | None:
    """The offsets in a file of `size` bytes; None where they are damaged."""
    try:
        offsets = np.load(path, mmap_mode="r")
    except Exception:  # numpy's reader of headers raises errors of Python's own parser, too
        return None
    right = offsets.dtype == np.int64 and offsets.ndim == 1 and len(offsets) and offsets[-1] <= size
    return offsets if right and offsets[0] >= 0 and _rising(offsets) else None


def _rising(offsets: np.ndarray) -> bool:
    """Whether no offset is below the one before it; a block at a time, since the file is mapped."""
    blocks = range(0, len(offsets), PIECE)
    return all(bool((np.diff(offsets[block : block + PIECE + 1]) >= 0).all()) for block in blocks)


def line_number(file: DataFile, offset: int) -> int:
    """The number, from 1, of the line in which a byte is."""
    pieces = range(0, offset, PIECE)
    return 1 + sum(file.read(piece, min(piece + PIECE, offset)).count(b"\n") for piece in pieces)


def solid_start(file: DataFile, start: int, end: int) -> int | None:
    """Where the first byte is that is no blank; None where all are blanks."""
    for base in range(start, end, PIECE):
        piece = np.frombuffer(file.read(base, min(base + PIECE, end)), np.uint8)
        solid = _SOLID[piece]
        if solid.any():
            return base + int(solid.argmax())
    return None


def line_offsets(file: DataFile, name: str = "") -> np.ndarray:
    """int64 [n + 1]: where each line begins that is not all blanks, and where the file ends."""
    found: list[np.ndarray] = []
    begun, solid = None, False  # the line that reaches into the next piece: its start, and if it is not blank
    for base in range(0, file.size, PIECE):
        piece = np.frombuffer(file.read(base, min(base + PIECE, file.size)), np.uint8)
        starts = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(piece == ord("\n")) + 1])
        whole = starts[-1] == len(piece)
        starts = starts[:-1] if whole else starts
        marks = _SOLID[piece[starts]]
        if not marks.all():  # most lines begin with a brace
            marks = np.logical_or.reduceat(_SOLID[piece], starts)
        starts = starts + base
        if begun is not None:
            starts[0], marks[0] = begun, marks[0] or solid
        begun, solid = (None, False) if whole else (int(starts[-1]), bool(marks[-1]))
        if not whole:
            starts, marks = starts[:-1], marks[:-1]
        found.append(starts[marks])
    last = [begun] if begun is not None and solid else []
    return np.concatenate([*found, np.array([*last, file.size], np.int64)])
