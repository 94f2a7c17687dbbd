"""ArrayRecord files, each record a JSON object or a text."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xtoken_jax.data.formats.data_file import DataFile, fingerprint
from xtoken_jax.data.formats.json_record import json_record
from xtoken_jax.errors import UserError, first_line


class ArrayRecords:
    """The records of ArrayRecord files: all are JSON objects or all are texts, as the first one is.

    Records made by TensorFlow Datasets have an encoding of their own; they are read by their folder.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read how many records there are."""
        self._files = [DataFile(path) for path in paths]
        parts = [Part(str(file.path), 0, _count(file)) for file in self._files]
        self._ends = np.cumsum([part.take for part in parts])
        self._source = open_parts(parts)
        first = self._text(0) if len(self) else ""
        objects = _is_object(first)
        self._keys = [*json_record(first, lambda: self.where(0))] if objects else None

    def __len__(self) -> int:
        return len(self._source)

    def keys(self) -> list[str] | None:
        """Those of the first object; None where the records are texts."""
        return self._keys

    def read(self, number: int, keys: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any] | str:
        """A record."""
        text = self._text(number)
        return text if self._keys is None else json_record(text, lambda: self.where(number))

    def _text(self, number: int) -> str:
        file = self._files[int(np.searchsorted(self._ends, number, side="right"))]
        raw = read_record(self._source, number, file)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.where(number)}: neither JSON nor text in UTF-8; records of TensorFlow Datasets are "
                "read by their folder, which has a dataset_info.json: name that folder"
            ) from error

    def where(self, number: int) -> str:
        """File and record, from 0."""
        place = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[place - 1]) if place else 0
        return f"{self._files[place].path}, record {number - first}"

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Of the files as they lie on disk."""
        return fingerprint(self._files)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@dataclass(frozen=True)
class Part:
    """Some records of a file, as array_record takes it: `take` of them after `skip`."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int = 0  # it asks for this and does not read it


def open_parts(parts: Sequence[Part]) -> Any:
    """array_record's own reader of several files, which it opens when it has to; for several threads."""
    return _module("array_record_data_source").ArrayRecordDataSource(parts)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"array_record.python.{name}")
    except ImportError as error:
        raise UserError("ArrayRecord files need array_record: pip install 'xtoken-jax[data]'") from error


@contextmanager
def _reading(file: DataFile) -> Iterator[None]:
    """Says in one line what array_record raises while a file is read."""
    try:
        yield
    except Exception as error:
        file.check()
        raise UserError(
            f"{file.path}: cannot be read as ArrayRecord ({first_line(error)}); get it again or write it "
            "again"
        ) from error
    file.check()


def _count(file: DataFile) -> int:
    module = _module("array_record_module")
    with _reading(file):
        reader = module.ArrayRecordReader(str(file.path))
        count = int(reader.num_records())
        reader.close()
    return count


def read_record(source: Any, number: int, file: DataFile) -> bytes:
    """A record, which lies in `file`."""
    with _reading(file):
        return source[number]
