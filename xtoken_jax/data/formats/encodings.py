"""Text files are UTF-8; what else a file is, by its first bytes."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from xtoken_jax.errors import UserError

_MARKS = (  # UTF-32 first: its little-endian mark begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_WITHOUT_MARK: dict[
    tuple[bool, ...], str
] = {  # which of the first four bytes are zero, where text begins with an ASCII character
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
}
_OTHERS = (
    (b"\x1f\x8b", "compressed with gzip; add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard; add .zst to its name"),
    (b"\xfd7zXZ\0", "compressed with xz; add .xz to its name"),
    *((b"BZh%d1AY&" % level, "compressed with bzip2; add .bz2 to its name") for level in range(1, 10)),
    (b"PK\x03\x04", "a ZIP archive; unpack it"),
    (b"PAR1", "a Parquet file; read it with kind=parquet"),
    (b"\x89HDF", "an HDF5 file; convert it to JSON Lines or Parquet"),
)


def check_text(head: bytes, name: str) -> None:
    """Raise UserError if the first bytes of a file are not those of UTF-8 text.

    Args:
        head: at least 8 bytes, where the file has that many.
        name: what messages call the file.
    """
    encoding = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)
    encoding = encoding or _WITHOUT_MARK.get(tuple(byte == 0 for byte in head[:4]))
    if encoding is not None:
        raise UserError(
            f"{name}: its encoding is {encoding}, and only UTF-8 is read; convert it: "
            f"iconv -f {encoding} -t UTF-8 FILE > NEW"
        )
    for mark, what in _OTHERS:
        if head.startswith(mark):
            raise UserError(f"{name}: not text but {what}")


def decoded(raw: bytes, where: Callable[[], str]) -> str:
    """Return UTF-8 bytes as text; UserError names the place where they are not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where()}: not UTF-8 ({error.reason} at byte {error.start:,}); convert the file, if it is "
            "Latin-1 with: iconv -f LATIN1 -t UTF-8 FILE > NEW"
        ) from error
