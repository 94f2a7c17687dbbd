"""The safetensors files of a folder, mapped into memory: views of tensors, nothing read ahead.

Files are parsed and checked by the safetensors library; the values are seen through a mapping of our own,
because only that can give pages back to the kernel while the rest of the file is still to be read.
"""

import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from xtoken_jax.errors import UserError
from xtoken_jax.files import parse_json, read_json, shortened
from xtoken_jax.files.foreign import foreign_format

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_AGAIN = "get the model's files again"


class Tensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        dtype: as the file names it, "F32", "BF16", "F16" or one that is not supported.
        shape: as stored.
        values: the mapped values, read-only; empty for a dtype that is not supported.
    """

    dtype: str
    shape: tuple[int, ...]
    values: np.ndarray


class TensorFiles:
    """All tensors of a folder by name.

    Args:
        folder: holds model.safetensors, or the index of a sharded checkpoint and its files.

    Raises:
        UserError: no weights, pickled ones alone, a truncated or foreign file, an index that cannot be read
            or does not fit its files.
    """

    def __init__(self, folder: Path):
        self._maps: list[mmap.mmap] = []
        self._folder = folder
        self._files: dict[str, str] = {}  # tensor -> file, of a sharded checkpoint
        if (folder / WEIGHTS).is_file():
            self.tensors = self._open(folder / WEIGHTS)
            return
        files = self._files = weight_map(folder)
        opened = {name: self._open(folder / name) for name in sorted(set(files.values()))}
        absent = [name for name, file in files.items() if name not in opened[file]]
        if absent:
            raise UserError(f"{folder / INDEX} names tensors that its files do not hold: {first(absent)}")
        self.tensors = {name: opened[file][name] for name, file in files.items()}

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._folder / self._files.get(name, WEIGHTS)

    def release(self) -> None:
        """Give the pages read so far back to the kernel, which keeps them in its own cache or not."""
        for mapped in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):  # not on every POSIX system
                mapped.madvise(mmap.MADV_DONTNEED)

    def _open(self, path: Path) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="np"):  # it refuses what is not a whole file
                pass
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {path}, truncated or not safetensors: {error}") from error
        self._maps.append(mapped)
        return dict(_tensors(mapped, path))


def _tensors(mapped: mmap.mmap, path: Path) -> Iterator[tuple[str, Tensor]]:
    size = int.from_bytes(mapped[:8], "little")
    header = parse_json(mapped[8 : 8 + size], path, what="a safetensors file", remedy=_AGAIN)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind, shape = entry["dtype"], tuple(entry["shape"])
        values = np.empty(0)
        if kind in DTYPES and (count := math.prod(shape)):
            start = 8 + size + entry["data_offsets"][0]
            values = np.frombuffer(mapped, DTYPES[kind], count, start).reshape(shape)
        elif kind in DTYPES:
            values = np.empty(shape, DTYPES[kind])
        yield name, Tensor(kind, shape, values)


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, of a sharded checkpoint's index.

    Raises:
        UserError: no index, one that cannot be read, or names a file that is not in the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        if (known := foreign_format(folder)) is not None:
            raise UserError(f"{folder}: {known}; student.init=random starts from config.json alone")
        raise UserError(
            f"no weights in {folder}: it needs {WEIGHTS} or {INDEX};"
            " student.init=random starts from config.json alone"
        )
    files = read_json(index, what="the index of a checkpoint", remedy=_AGAIN).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
        raise UserError(
            f"{index}: not the index of a checkpoint (weight_map must name the file of each tensor); {_AGAIN}"
        )
    for name in sorted(set(files.values())):
        if Path(name).name != name or not os.path.isfile(folder / name):
            raise UserError(f"{index} names {shortened(name)}, which is not in the folder; {_AGAIN}")
    return files


def first(names: list[str], count: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(name if len(name) <= 200 else name[:197] + "..." for name in names[:count]) + more
