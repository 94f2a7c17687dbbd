"""JSON Lines: one JSON object a line, any line read by its offset."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from xtoken_jax.data.compressed import is_compressed, plain_copy
from xtoken_jax.data.copies import keep
from xtoken_jax.data.data_file import DataFile, fingerprint
from xtoken_jax.errors import UserError

_PIECE = 1 << 24
_KEPT = 1 << 26  # bytes of a file whose index is kept: finding the lines of less takes no time


class JsonLines:
    """The objects in files of JSON Lines; lines of blanks are none.

    In memory are the offsets of the lines, 8 bytes each; a line is read when it is asked for. Compressed
    files are read through a decompressed copy in the user's cache folder, where also the offsets of large
    files are kept.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Find the lines of all files."""
        self._given = [DataFile(path) for path in paths]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            opened = list(pool.map(_open, self._given))
        self._files = [file for file, _ in opened]
        self._starts = [starts for _, starts in opened]
        self._ends = np.cumsum([len(starts) for starts in self._starts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def keys(self) -> list[str]:
        """Those of the first object."""
        return [*self.read(0, ())] if len(self) else []

    def _place(self, number: int) -> tuple[int, int]:
        """The file, and the line among those that are not blank."""
        file = int(np.searchsorted(self._ends, number, side="right"))
        return file, number - int(self._ends[file]) + len(self._starts[file])

    def read(self, number: int, keys: Sequence[str]) -> dict[str, Any]:
        """The object of a line, all of it."""
        place, line = self._place(number)
        file, starts = self._files[place], self._starts[place]
        start, end = int(starts[line]), int(starts[line + 1]) if line + 1 < len(starts) else file.size
        raw = file.read(start, end).strip()
        if file is not self._given[place]:
            self._given[place].check()
        try:
            record = json.loads(raw.removeprefix(codecs.BOM_UTF8).decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{self.where(number)}: not UTF-8 ({error})") from error
        except (ValueError, RecursionError) as error:
            hint = "; a JSON array has to become one object a line" if raw.startswith(b"[") else ""
            raise UserError(f"{self.where(number)}: not a JSON object ({error}){hint}") from error
        if not isinstance(record, dict):
            raise UserError(f"{self.where(number)}: not a JSON object but {type(record).__name__}")
        return record

    def where(self, number: int) -> str:
        """file:line, with the line's number from 1, blank ones counted."""
        place, line = self._place(number)
        start = int(self._starts[place][line])
        pieces = range(0, start, _PIECE)
        read = self._files[place].read
        count = 1 + sum(read(piece, min(piece + _PIECE, start)).count(b"\n") for piece in pieces)
        return f"{self._given[place].path}:{count}"

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Of the files as they lie on disk."""
        return fingerprint(self._given)


def _open(given: DataFile) -> tuple[DataFile, np.ndarray]:
    file = plain_copy(given) if is_compressed(given.path) else given
    if file.size < _KEPT:
        return file, _line_starts(file)
    path = keep(file, ".lines.npy", lambda out: np.save(out, _line_starts(file)))
    return file, np.load(path, mmap_mode="r")


def _line_starts(file: DataFile) -> np.ndarray:
    """int64: where each line begins that is not all blanks."""
    found, opening = [], []
    next_line = np.zeros(1, np.int64)
    for base in range(0, file.size, _PIECE):
        piece = np.frombuffer(file.read(base, min(base + _PIECE, file.size)), np.uint8)
        starts = np.concatenate([next_line, np.flatnonzero(piece == ord("\n")) + (base + 1)])
        inside = starts < base + len(piece)
        starts, next_line = starts[inside], starts[~inside]
        found.append(starts)
        opening.append(piece[starts - base])
    if not found:
        return np.zeros(0, np.int64)
    starts = np.concatenate(found)
    # Most lines open with a brace; only of the others is all looked at.
    opens = np.concatenate(opening) > ord(" ")
    for line in np.flatnonzero(~opens).tolist():
        end = int(starts[line + 1]) if line + 1 < len(starts) else file.size
        opens[line] = bool(file.read(int(starts[line]), end).strip())
    return starts[opens]
