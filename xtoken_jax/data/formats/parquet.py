"""Parquet files: any row of them, through its row group."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from xtoken_jax.data.formats.data_file import DataFile, fingerprint
from xtoken_jax.data.formats.derived_files import keep
from xtoken_jax.data.formats.limits import Limits
from xtoken_jax.data.layouts import listed
from xtoken_jax.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

_LARGEST_GROUP = 1 << 25  # bytes of the columns that are read
_GROUP_ROWS = 256  # of a copy
_IN_MEMORY = 1 << 28  # bytes of row groups that are kept


class ParquetFiles:
    """The rows of Parquet files.

    A row group is read as a whole, and the last 256 MiB of them are kept. Rows are wanted in a shuffled
    order, so that one group is read for nearly every row: a file with groups above 32 MiB (of the columns in
    use) is read through a copy of these columns with small groups, in the user's cache folder.
    """

    def __init__(self, paths: Sequence[Path], limits: Limits) -> None:
        """Read what the files say of themselves."""
        self._given = [DataFile(path) for path in paths]
        self._footers = [_footer(file) for file in self._given]
        self._names = [_names(file, footer) for file, footer in zip(self._given, self._footers, strict=True)]
        self._ends = np.cumsum([footer.num_rows for footer in self._footers])
        self._limits = limits
        self._columns: dict[tuple[tuple[str, ...], tuple[str, ...]], _Columns] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def keys(self) -> list[str]:
        """The columns of all files."""
        return list(dict.fromkeys(name for names in self._names for name in names))

    def _place(self, number: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._ends, number, side="right"))
        return file, number - int(self._ends[file]) + self._footers[file].num_rows

    def read(self, number: int, keys: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
        """Some columns of a row; UserError where a file lacks one that is not optional."""
        chosen = tuple(keys), tuple(optional)
        with self._lock:
            if chosen not in self._columns:
                self._columns[chosen] = self._open(*chosen)
            columns = self._columns[chosen]
        row = columns.read(*self._place(number))
        return {
            name: self._value(column, name, number)
            for name, column in zip(row.column_names, row.columns, strict=True)
        }

    def _open(self, keys: Sequence[str], optional: Sequence[str]) -> _Columns:
        """Some columns of each file, the optional ones where it has them."""
        chosen = []
        for file, names in zip(self._given, self._names, strict=True):
            if missing := [key for key in keys if key not in names]:
                raise UserError(
                    f"{file.path}: no column {missing[0]!r}; it has {listed(names)}; name a column that all "
                    "files have, or leave the file out"
                )
            chosen.append([*keys, *(key for key in optional if key in names)])
        return _Columns(self._given, self._footers, chosen, self._limits)

    def _value(self, column: pa.ChunkedArray, name: str, number: int) -> Any:
        try:
            return column[0].as_py()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.where(number)}: {name!r} is not UTF-8 ({error.reason} at byte {error.start:,}); "
                "write the file again with text in UTF-8"
            ) from error
        except (ValueError, OverflowError) as error:  # such as a date that Python has not
            raise UserError(
                f"{self.where(number)}: {name!r} cannot be read ({first_line(error)}); correct the row or "
                "leave it out"
            ) from error

    def where(self, number: int) -> str:
        """File and row, from 0."""
        place, row = self._place(number)
        return f"{self._given[place].path}, row {row}"

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Of the files as they lie on disk."""
        return fingerprint(self._given)


class _Columns:
    """Some columns of all files, a row group at a time."""

    def __init__(
        self, given: Sequence[DataFile], footers: Sequence[Any], keys: Sequence[list[str]], limits: Limits
    ) -> None:
        self._given, self._keys, self._limits = given, keys, limits
        self._files = [self._opened(*file) for file in zip(given, footers, keys, strict=True)]
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def _opened(self, file: DataFile, footer: Any, keys: list[str]) -> tuple[DataFile, Any, np.ndarray]:
        """What a file is read through, its footer, and where its row groups end."""
        groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
        sizes = [_bytes_of(group, keys) for group in groups]
        self._limits.check_whole(sum(sizes), file.size, None, str(file.path))
        if any(size > _LARGEST_GROUP for size in sizes):
            chosen = hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:8]
            file = DataFile(keep(file, f"-{chosen}.parquet", partial(_rewrite, file, keys)))
            footer = _footer(file)
            groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
        return file, footer, np.cumsum([group.num_rows for group in groups])

    def read(self, place: int, row: int) -> pa.Table:
        """A row of a file."""
        ends = self._files[place][2]
        group = int(np.searchsorted(ends, row, side="right"))
        with self._lock:
            table = self._groups.get((place, group))
            if table is not None:
                self._groups.move_to_end((place, group))
        if table is None:
            table = self._read_group(place, group)
            with self._lock:
                if (place, group) not in self._groups:
                    self._groups[place, group] = table
                    self._bytes += table.nbytes
                while self._bytes > _IN_MEMORY and len(self._groups) > 1:
                    self._bytes -= self._groups.popitem(last=False)[1].nbytes
        self._given[place].check()
        return table.slice(row - int(ends[group]) + table.num_rows, 1)

    def _read_group(self, place: int, group: int) -> pa.Table:
        file, footer, _ = self._files[place]
        # A reader of its own: one is not for several threads.
        with _reading(file), _parquet().ParquetFile(file.path, metadata=footer) as reader:
            return reader.read_row_group(group, columns=self._keys[place], use_threads=False)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install 'xtoken-jax[data]'") from error
    return pyarrow.parquet


@contextmanager
def _reading(file: DataFile) -> Iterator[None]:
    """Says in one line what pyarrow raises while a file is read."""
    import pyarrow as pa

    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        file.check()
        raise UserError(
            f"{file.path}: cannot be read as Parquet ({first_line(error)}); get it again or write it again"
        ) from error


def _footer(file: DataFile) -> Any:
    parquet = _parquet()
    with _reading(file):
        return parquet.read_metadata(file.path)


def _names(file: DataFile, footer: Any) -> list[str]:
    """The columns of a file."""
    with _reading(file):
        return list(footer.schema.to_arrow_schema().names)


def _bytes_of(group: Any, keys: Sequence[str]) -> int:
    """Uncompressed bytes of some columns of a row group; a nested one is several there."""
    columns = [group.column(c) for c in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in keys)


def _rewrite(file: DataFile, keys: Sequence[str], out: BinaryIO) -> None:
    """Some columns, in groups of 256 rows."""
    parquet = _parquet()
    with _reading(file):
        reader = parquet.ParquetFile(file.path)
        batches = reader.iter_batches(_GROUP_ROWS, columns=list(keys), use_threads=False)
    writer = None
    while True:
        with _reading(file):
            batch = next(batches, None)
        if batch is None:
            break
        writer = writer or parquet.ParquetWriter(out, batch.schema)
        writer.write_batch(batch)
    if writer is not None:
        writer.close()
