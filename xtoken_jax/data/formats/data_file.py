"""Files that have to stay as they are while a run reads them."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from xtoken_jax.errors import UserError

_OPEN = 128  # files kept open
_WHOLE = 1 << 30  # bytes that are hashed; of more, blocks
_BLOCK = 1 << 16
_PIECE = 1 << 24  # bytes read at a time


class DataFile:
    """A file as it was when it was opened: size and time of change are compared at every read.

    Attributes:
        path: the file.
        size: bytes.
    """

    def __init__(self, path: Path) -> None:
        """Remember what it is like; UserError where it is not there."""
        self.path = path
        self._state = self._look()
        self.size = self._state[0]

    @property
    def key(self) -> str:
        """A name, for what is kept about this very state of the file."""
        return hashlib.sha256(f"{self.path.resolve()} {self._state}".encode()).hexdigest()[:16]

    def _look(self) -> tuple[int, int, int]:
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read ({error.strerror}); correct the path or its permissions"
            ) from error
        return found.st_size, found.st_mtime_ns, found.st_ino

    def check(self) -> None:
        """UserError if it is not what it was."""
        try:
            now = self._look()
        except UserError as error:
            raise UserError(f"{self.path}: gone since it was opened; put it back as it was") from error
        if now != self._state:
            raise UserError(
                f"{self.path}: changed since it was opened ({self._state[0]:,} bytes then, {now[0]:,} now); "
                "put it back as it was, or begin another run with the new data"
            )

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        """The bytes from `start` to `end`; threads may read at the same time."""
        end = self.size if end is None else end
        try:
            descriptor = _opened(self.path, self._state)
            parts = []
            while start < end:
                part = os.pread(descriptor.number, min(end - start, _PIECE), start)
                if not part:
                    break
                parts.append(part)
                start += len(part)
        except OSError as error:
            self.check()
            raise UserError(
                f"{self.path}: cannot be read ({error.strerror}); mend the disk or the permissions, or copy "
                "it elsewhere"
            ) from error
        self.check()
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Descriptor:
    """An open file, closed with its last user: one that is dropped while a thread reads from it stays."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(maxsize=_OPEN)
def _opened(path: Path, state: tuple[int, int, int]) -> _Descriptor:
    return _Descriptor(path)


def fingerprint(files: Sequence[DataFile]) -> str:
    """SHA-256 of the sizes and contents of files, in their order; `Documents.digest` says of how much."""
    found = hashlib.sha256()
    whole = sum(file.size for file in files) <= _WHOLE
    blocks = max(2, min(256, _WHOLE // _BLOCK // max(len(files), 1)))
    for file in files:
        found.update(file.size.to_bytes(8))
        last = max(file.size - _BLOCK, 0)
        if whole or file.size <= blocks * _BLOCK:
            starts, length = list(range(0, file.size, _PIECE)), _PIECE
        else:
            starts, length = [last * block // (blocks - 1) for block in range(blocks)], _BLOCK
        for start in starts:
            found.update(file.read(start, min(start + length, file.size)))
    return found.hexdigest()
