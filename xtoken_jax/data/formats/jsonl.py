"""JSON: one object a line, or a list of objects; any of them read by its offset."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from xtoken_jax.data.formats.data_file import DataFile
from xtoken_jax.data.formats.json_array import first_byte, list_offsets
from xtoken_jax.data.formats.json_record import json_record
from xtoken_jax.data.formats.limits import Limits
from xtoken_jax.data.formats.record_files import RecordFiles, line_offsets


class JsonObjects(RecordFiles):
    """The objects in JSON files, each of which has one object a line, or a list of objects.

    Lines of blanks are none. In a list, objects may stand on any number of lines.
    """

    def __init__(self, paths: Sequence[Path], limits: Limits, *, records: str | None = None) -> None:
        """Find the objects of all files.

        Args:
            paths: of the files.
            limits: on records and decompressed files.
            records: key of the list, in files that are one object which holds it.
        """
        super().__init__(paths, limits, partial(_offsets, key=records), f"json {records!r}")
        self._listed = [first_byte(file.plain)[1] == b"[" or records is not None for file in self._files]
        self._records = records

    def keys(self) -> list[str]:
        """Those of the first object."""
        return [*self.read(0, ())] if len(self) else []

    def read(self, number: int, keys: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
        """An object, all of it."""
        raw = self.content(number)
        listed = self._listed[self.place(number)[0]]
        raw = raw[1:] if listed else raw.strip().removeprefix(codecs.BOM_UTF8)
        return json_record(raw, lambda: self.where(number))

    def where(self, number: int) -> str:
        """File and line, or in a list the number of the record from 0."""
        place, record = self.place(number)
        return f"{self.path(place)}, record {record}" if self._listed[place] else super().where(number)

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Of the files as they lie on disk, and of the key of the list."""
        found = super().fingerprint(keys)
        if self._records is None:
            return found
        return hashlib.sha256(f"{found} records {self._records}".encode()).hexdigest()


def _offsets(file: DataFile, name: str, *, key: str | None) -> np.ndarray:
    if key is None and first_byte(file)[1] != b"[":
        return line_offsets(file)
    return list_offsets(file, name, key)
