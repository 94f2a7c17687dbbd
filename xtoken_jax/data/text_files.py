"""Plain text: a file is a document."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

from xtoken_jax.data.compressed import decompressed, is_compressed
from xtoken_jax.data.data_file import DataFile, fingerprint
from xtoken_jax.errors import UserError


class TextFiles:
    """Texts in files of their own, read and decompressed when they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Look that they are there."""
        self._files = [DataFile(path) for path in paths]

    def __len__(self) -> int:
        return len(self._files)

    def keys(self) -> None:
        """A text has none."""

    def read(self, number: int, keys: Sequence[str]) -> str:
        """The text of a file, without its byte-order mark."""
        file = self._files[number]
        raw = b"".join(decompressed(file)) if is_compressed(file.path) else file.read()
        try:
            return raw.removeprefix(codecs.BOM_UTF8).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{file.path}: cannot be read as UTF-8 text ({error})") from error

    def where(self, number: int) -> str:
        """The file."""
        return str(self._files[number].path)

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Of the files as they lie on disk."""
        return fingerprint(self._files)
