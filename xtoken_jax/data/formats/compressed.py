"""Files compressed with gzip, Zstandard, bzip2 or xz."""

from __future__ import annotations

import bz2
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from xtoken_jax.data.formats.data_file import DataFile
from xtoken_jax.data.formats.derived_files import keep
from xtoken_jax.data.formats.limits import Limits
from xtoken_jax.errors import UserError

ENDINGS = ("", ".gz", ".zst", ".bz2", ".xz")
_PIECE = 1 << 15  # compressed bytes read at a time
_MOST = 1 << 20  # decompressed bytes at a time
_SLICE = 1 << 11  # bytes of Zstandard, which has no bound: they become 64 MiB at most
_XZ_MEMORY = 1 << 28  # bytes; `xz -9` needs 65 MB


def is_compressed(path: Path) -> bool:
    """Whether its ending says so."""
    return path.suffix.lower() in ENDINGS[1:]


def decompressed(file: DataFile) -> Iterator[bytes]:
    """The content in pieces of bounded size; UserError where it is damaged or ends early."""
    ending = file.path.suffix.lower()
    make = {".gz": _Gzip, ".zst": _Zstandard, ".bz2": bz2.BZ2Decompressor, ".xz": _xz}[ending]
    stream: Any = make()
    fresh = True
    try:
        for start in range(0, file.size, _PIECE):
            piece = file.read(start, min(start + _PIECE, file.size))
            while piece := piece.lstrip(b"\0") if fresh else piece:  # gzip and xz pad with zeros
                fresh = False
                while not stream.eof:
                    yield stream.decompress(piece, _MOST)
                    piece = b""
                    if stream.needs_input:
                        break
                if stream.eof:  # several compressed streams may follow one another
                    piece = stream.unused_data
                    stream, fresh = make(), True
    except (zlib.error, lzma.LZMAError, OSError, EOFError, _zstandard_error()) as error:
        raise UserError(
            f"{file.path}: cannot be read, it is damaged ({error}); get it again, or correct its ending if "
            f"it is no {ending} file"
        ) from error
    if not fresh or not file.size:
        raise UserError(f"{file.path}: cannot be read, it ends before its {ending} stream does; get it again")


class _Gzip:
    """zlib's decompressor with the interface of those of bz2 and lzma."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, most: int) -> bytes:
        content = self._stream.decompress(self._stream.unconsumed_tail + data, most)
        self.needs_input = not self._stream.unconsumed_tail and len(content) < most
        return content


class _Zstandard:
    """The decompressor of zstandard, which knows no bound, by slices of its input."""

    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(".zst files need zstandard: pip install 'xtoken-jax[data]'") from error
        self._stream = zstandard.ZstdDecompressor().decompressobj()
        self._rest = memoryview(b"")

    @property
    def eof(self) -> bool:
        return bool(self._stream.eof)

    @property
    def needs_input(self) -> bool:
        return not self._rest

    @property
    def unused_data(self) -> bytes:
        return bytes(self._stream.unused_data) + bytes(self._rest)

    def decompress(self, data: bytes, most: int) -> bytes:
        if data:
            self._rest = memoryview(data)
        now, self._rest = self._rest[:_SLICE], self._rest[_SLICE:]
        return bytes(self._stream.decompress(now))


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


def _zstandard_error() -> type[Exception]:
    try:
        from zstandard import ZstdError
    except ImportError:
        return zlib.error
    return ZstdError


def plain_copy(file: DataFile, limits: Limits) -> DataFile:
    """The file decompressed, in the user's cache folder; made once for every state of the file.

    No such format can be read from the middle, and a run reads in a shuffled order.

    Raises:
        UserError: a file that is damaged, or larger than the limits or the free disk space allow.
    """

    def write(out: BinaryIO) -> None:
        disk = os.fstatvfs(out.fileno())
        free, written = disk.f_bavail * disk.f_frsize, 0
        for piece in decompressed(file):
            written += len(piece)
            limits.check_whole(written, file.size, free, str(file.path))
            out.write(piece)

    return DataFile(keep(file, ".jsonl", write))
