"""CSV and TSV files: one record a row, any row read by its offset."""

from __future__ import annotations

import codecs
import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from xtoken_jax.data.formats.data_file import DataFile
from xtoken_jax.data.formats.encodings import decoded
from xtoken_jax.data.formats.limits import Limits
from xtoken_jax.data.formats.record_files import PIECE, RecordFiles, line_number
from xtoken_jax.data.layouts import listed, shown
from xtoken_jax.errors import UserError, first_line

_QUOTE, _LINE, _RETURN = b'"\n\r'


class CsvRows(RecordFiles):
    """The rows of CSV files (RFC 4180) below a first row with the names of the columns.

    A field in double quotes may hold delimiters, line ends and doubled quotes; another field holds no quote.
    Empty lines are no rows.
    """

    def __init__(self, paths: Sequence[Path], limits: Limits, *, delimiter: str | None = None) -> None:
        """Find the rows of all files.

        Args:
            paths: of the files.
            limits: on records and decompressed files.
            delimiter: character between fields; None for a tab in .tsv files and a comma in others.
        """
        super().__init__(paths, limits, partial(_offsets, delimiter=delimiter), f"csv {delimiter!r}")
        self._delimiters = [_delimiter(str(path), delimiter) for path in paths]
        self._headers = [self._header(place) for place in range(len(paths))]
        self._chosen = delimiter

    def _header(self, place: int) -> list[str]:
        """The names of a file's columns, which stand before its first row."""
        file, name = self._files[place].plain, str(self.path(place))
        end = int(self._files[place].offsets[0])
        self._limits.check_record(end, lambda: name)
        raw = file.read(0, end).removeprefix(codecs.BOM_UTF8).lstrip(b"\r\n")
        if not raw:
            raise UserError(f"{name}: empty; its first row must name the columns")
        header = _fields(raw, self._delimiters[place], lambda: name)
        if len(set(header)) < len(header):
            twice = shown(Counter(header).most_common(1)[0][0])
            raise UserError(f"{name}: several columns are named {twice}; rename them in the first row")
        other = next((d for d in ";\t|" if d in header[0]), None)
        if len(header) == 1 and other is not None:
            setting = "tab" if other == "\t" else f"'{other}'"
            raise UserError(
                f"{name}: its first row names one column, {shown(header[0])}; perhaps delimiter={setting}"
            )
        return header

    def keys(self) -> list[str]:
        """The columns of the files."""
        return list(dict.fromkeys(column for header in self._headers for column in header))

    def read(self, number: int, keys: Sequence[str], optional: Sequence[str] = ()) -> dict[str, str]:
        """A row, all of it."""
        place = self.place(number)[0]
        header = self._headers[place]

        def where() -> str:
            return self.where(number)

        fields = _fields(self.content(number), self._delimiters[place], where)
        if len(fields) != len(header):
            raise UserError(
                f"{where()}: a row of {len(fields)} fields, and the first row names {len(header)} columns "
                f"({listed(header)}); a field with {self._delimiters[place]!r} in it needs double quotes"
            )
        return dict(zip(header, fields, strict=True))

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Of the files as they lie on disk, and of the delimiter where it is chosen."""
        found = super().fingerprint(keys)
        if self._chosen is None:
            return found
        return hashlib.sha256(f"{found} delimiter {self._chosen}".encode()).hexdigest()


def _delimiter(name: str, chosen: str | None) -> str:
    if chosen is not None:
        return chosen
    return "\t" if ".tsv" in [suffix.lower() for suffix in Path(name).suffixes[-2:]] else ","


def _fields(raw: bytes, delimiter: str, where: Callable[[], str]) -> list[str]:
    text = decoded(raw, where).rstrip("\r\n")
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True))
    except (csv.Error, StopIteration) as error:
        raise UserError(
            f"{where()}: not a row of CSV ({first_line(error)}); correct it or leave it out"
        ) from error


def _offsets(file: DataFile, name: str, *, delimiter: str | None) -> np.ndarray:
    """int64 [n + 1]: where each row begins below the first one, and where the file ends.

    Raises:
        UserError: a quote inside of a field without quotes, text behind a quoted field, a quoted field that
            does not end, or a carriage return that is no part of a line end.
    """
    may_precede = np.zeros(256, bool)
    may_precede[[ord(_delimiter(name, delimiter)), _QUOTE, _LINE]] = True
    may_follow = may_precede.copy()
    may_follow[_RETURN] = True
    mark = len(codecs.BOM_UTF8) if file.read(0, min(3, file.size)) == codecs.BOM_UTF8 else 0
    found = []
    quoted, opened = 0, 0  # whether a quoted field reaches into the piece, and where the last one begins
    for base in range(mark, file.size, PIECE):
        end = min(base + PIECE, file.size)
        # With one byte before the piece, and two behind it.
        before = file.read(base - 1, base) if base > mark else b"\n"
        content = before + file.read(base, end) + (file.read(end, min(end + 2, file.size)) + b"\n\n")[:2]
        around = np.frombuffer(content, np.uint8)
        piece = around[1:-2]
        quotes = np.flatnonzero(piece == _QUOTE) + 1
        opening, closing = quotes[quoted::2], quotes[1 - quoted :: 2]

        def outside(places: np.ndarray, quotes: np.ndarray = quotes, quoted: int = quoted) -> np.ndarray:
            return places[(np.searchsorted(quotes, places) + quoted) % 2 == 0]

        returns = outside(np.flatnonzero(piece == _RETURN) + 1)
        for places, what in (
            (opening[~may_precede[around[opening - 1]]], "a quote inside of a field without quotes"),
            (closing[~may_follow[around[closing + 1]]], "text behind the closing quote of a field"),
            (returns[around[returns + 1] != _LINE], "a carriage return that ends no line"),
        ):
            if len(places):
                raise UserError(
                    f"{name}:{line_number(file, base + int(places[0]) - 1)}: {what}; put the field in double "
                    "quotes, and write each quote in it twice"
                )
        lines = outside(np.flatnonzero(piece == _LINE) + 1)
        starts = np.insert(lines + 1, 0, 1) if base == mark else lines + 1
        empty = (around[starts] == _LINE) | (around[starts] == _RETURN) & (around[starts + 1] == _LINE)
        found.append(starts[~empty] + (base - 1))
        opened = base - 1 + int(opening[-1]) if len(opening) else opened
        quoted = (quoted + len(quotes)) % 2
    if quoted:
        raise UserError(
            f"{name}:{line_number(file, opened)}: a quoted field begins here and does not end; add the "
            "closing quote, and write each quote inside of a field twice"
        )
    rows = np.concatenate([*found, np.array([file.size])])
    return rows[1:] if len(rows) > 1 else rows
