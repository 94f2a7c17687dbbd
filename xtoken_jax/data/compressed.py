"""Files compressed with gzip or Zstandard."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtoken_jax.data.copies import keep
from xtoken_jax.data.data_file import DataFile
from xtoken_jax.errors import UserError

ENDINGS = ("", ".gz", ".zst")
_PIECE = 1 << 20


def is_compressed(path: Path) -> bool:
    """Whether its ending says so."""
    return path.suffix in ENDINGS[1:]


def decompressed(file: DataFile) -> Iterator[bytes]:
    """The content in pieces; UserError where it is damaged or ends early."""
    make = _gzip if file.path.suffix == ".gz" else _zstandard
    stream, fresh = make(), True
    try:
        for start in range(0, file.size, _PIECE):
            piece = file.read(start, min(start + _PIECE, file.size))
            while piece := piece.lstrip(b"\0") if fresh else piece:  # gzip pads to the blocks of a tape
                yield stream.decompress(piece)
                fresh, piece = False, b""
                if stream.eof:  # several compressed streams may follow one another
                    stream, fresh, piece = make(), True, stream.unused_data
    except (zlib.error, _zstandard_error()) as error:
        raise UserError(f"{file.path}: cannot be read, it is damaged ({error})") from error
    if not fresh or not file.size:
        raise UserError(f"{file.path}: cannot be read, it ends before its {file.path.suffix} stream does")


def _gzip() -> Any:
    return zlib.decompressobj(wbits=31)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(".zst files need zstandard: pip install 'xtoken-jax[data]'") from error
    return zstandard.ZstdDecompressor().decompressobj()


def _zstandard_error() -> type[Exception]:
    try:
        from zstandard import ZstdError
    except ImportError:
        return zlib.error
    return ZstdError


def plain_copy(file: DataFile) -> DataFile:
    """The file decompressed, in the user's cache folder; made once for every state of the file.

    Neither format can be read from the middle, and a run reads in a shuffled order.
    """
    return DataFile(keep(file, ".jsonl", lambda out: out.writelines(decompressed(file))))
