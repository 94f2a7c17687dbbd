"""Plain text: a file is a document, or each of its lines."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

from xtoken_jax.data.formats.compressed import decompressed, is_compressed
from xtoken_jax.data.formats.data_file import DataFile, fingerprint
from xtoken_jax.data.formats.encodings import check_text, decoded
from xtoken_jax.data.formats.limits import Limits
from xtoken_jax.data.formats.record_files import RecordFiles, line_offsets


class TextFiles:
    """Texts in files of their own, read and decompressed when they are asked for."""

    def __init__(self, paths: Sequence[Path], limits: Limits) -> None:
        """Look that they are there."""
        self._files = [DataFile(path) for path in paths]
        self._limits = limits

    def __len__(self) -> int:
        return len(self._files)

    def keys(self) -> None:
        """A text has none."""

    def read(self, number: int, keys: Sequence[str], optional: Sequence[str] = ()) -> str:
        """The text of a file, without its byte-order mark."""
        file = self._files[number]
        if is_compressed(file.path):
            raw = self._decompressed(file)
        else:
            self._limits.check_record(file.size, lambda: str(file.path))
            raw = file.read()
        check_text(raw[:8], str(file.path))
        return decoded(raw.removeprefix(codecs.BOM_UTF8), lambda: str(file.path))

    def _decompressed(self, file: DataFile) -> bytes:
        pieces, size = [], 0
        for piece in decompressed(file):
            size += len(piece)
            self._limits.check_record(size, lambda: str(file.path))
            pieces.append(piece)
        return b"".join(pieces)

    def where(self, number: int) -> str:
        """The file."""
        return str(self._files[number].path)

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Of the files as they lie on disk."""
        return fingerprint(self._files)


class TextLines(RecordFiles):
    """The lines of text files, each a document; lines of blanks are none.

    A line ends with a line feed, or with a carriage return and a line feed.
    """

    def __init__(self, paths: Sequence[Path], limits: Limits) -> None:
        """Find the lines of all files."""
        super().__init__(paths, limits, line_offsets, "lines")

    def keys(self) -> None:
        """A text has none."""

    def read(self, number: int, keys: Sequence[str], optional: Sequence[str] = ()) -> str:
        """A line without its end."""
        line = self.content(number).split(b"\n", 1)[0].removesuffix(b"\r")
        if self.place(number)[1] == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        return decoded(line, lambda: self.where(number))
