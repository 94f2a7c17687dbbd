"""Limits on the size of records and of decompressed files, against damaged and hostile data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xtoken_jax.errors import UserError

MAX_RECORD = 64  # MiB
MAX_RATIO = 200.0
_FREE_SHARE = 0.9  # of the free disk space, for one decompressed file


@dataclass(frozen=True)
class Limits:
    """Limits of one source.

    Attributes:
        max_record: size of the largest record in MiB.
        max_ratio: decompressed bytes for every compressed byte of a file, after a first `max_record`.
    """

    max_record: int = MAX_RECORD
    max_ratio: float = MAX_RATIO

    @property
    def record_bytes(self) -> int:
        """Bytes of the largest record."""
        return self.max_record << 20

    def check_record(self, size: int, where: Callable[[], str]) -> None:
        """Raise UserError if a record of `size` bytes is too large."""
        if size > self.record_bytes:
            raise UserError(
                f"{where()}: a record of {size:,} bytes or more, above max_record={self.max_record} (MiB); "
                "split it or leave it out, or raise max_record of the source"
            )

    def check_whole(self, written: int, compressed: int, free: int | None, name: str) -> None:
        """Raise UserError if the decompressed content of a file is too large.

        Args:
            written: decompressed bytes so far.
            compressed: bytes of the compressed file.
            free: bytes of the disk that were free before; None where nothing is written there.
            name: the compressed file.
        """
        if written > self.record_bytes + self.max_ratio * compressed:
            raise UserError(
                f"{name}: its {compressed:,} bytes decompress to more than {written:,}, above "
                f"max_ratio={self.max_ratio:g} for each byte after max_record={self.max_record} (MiB); if "
                "the file is what it should be, raise max_ratio of the source"
            )
        if free is not None and written > _FREE_SHARE * free:
            raise UserError(
                f"{name}: its {compressed:,} bytes decompress to more than {written:,}, and the disk of the "
                f"cache folder has {free:,} free; XTOKEN_CACHE=FOLDER names a folder on another disk"
            )
