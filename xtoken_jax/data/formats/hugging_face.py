"""Datasets of the Hugging Face hub, and folders that `datasets` saved; memory-mapped, any row of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xtoken_jax.data.formats.data_file import DataFile
from xtoken_jax.errors import UserError, first_line
from xtoken_jax.hub import UNREACHABLE, quiet_client

_SAMPLED = 4096  # rows


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


class HubRows:
    """The rows of one split of a dataset, which `datasets` keeps in its cache (HF_HOME)."""

    def __init__(self, path: str, *, subset: str | None, split: str) -> None:
        """Load it, from the hub where it is not in the cache.

        Args:
            path: a hub id, org/name or org/name@revision, or a folder that `save_to_disk` wrote.
            subset: the configuration of a dataset that has several.
            split: in the syntax of `datasets`, such as train or train[:10%].
        """
        self._name = f"{path}, split {split}"
        self._rows = _load(path, subset, split)
        # They are mapped: what is cut off one of them must be noticed before it is read.
        self._files = [DataFile(Path(file["filename"])) for file in self._rows.cache_files]
        self._selected: dict[tuple[str, ...], Any] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def keys(self) -> list[str]:
        """Its columns."""
        return list(self._rows.column_names)

    def read(self, number: int, keys: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
        """Some columns of a row."""
        chosen = (*keys, *optional)
        if chosen not in self._selected:  # two threads may both make it; it is the same
            self._selected[chosen] = self._rows.select_columns(list(chosen)).with_format(None)
        if self._files:
            self._files[number % len(self._files)].check()
        try:
            return self._selected[chosen][number]
        except Exception as error:  # whatever Arrow and the decoding of features raise
            raise UserError(
                f"{self.where(number)}: cannot be read ({first_line(error)}); correct the row, or load the "
                "dataset again"
            ) from error

    def where(self, number: int) -> str:
        """Dataset, split and row, from 0."""
        return f"{self._name}, row {number}"

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Of the number of rows, and of up to 4,096 of them, evenly spread: their columns in use."""
        found = hashlib.sha256(len(self).to_bytes(8))
        for number in (
            np.unique(np.linspace(0, len(self) - 1, _SAMPLED).astype(int)).tolist() if len(self) else []
        ):
            row = json.dumps(self.read(number, keys), sort_keys=True, default=repr).encode()
            found.update(len(row).to_bytes(8) + row)
        return found.hexdigest()


def _load(path: str, subset: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("datasets of the hub need datasets: pip install 'xtoken-jax[data]'") from error
    folder = Path(path).expanduser()
    try:
        if folder.is_dir() and is_saved(folder):
            loaded = datasets.load_from_disk(str(folder))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise ValueError(f"no split {split!r}; there is {', '.join(loaded)}")
                return loaded[split]
            if split != "train":
                raise ValueError("it was saved without splits; leave split out")
            return loaded
        name, _, revision = path.partition("@")
        with quiet_client():
            return datasets.load_dataset(name, subset, split=split, revision=revision or None)
    except ConnectionError as error:  # also when offline
        raise UserError(f"{path}: {UNREACHABLE}") from error
    except Exception as error:  # its own errors, the hub's, Arrow's: all mean the same to a user
        chosen = f" ({subset})" if subset else ""
        raise UserError(
            f"{path}{chosen}: no dataset that can be loaded: {first_line(error)}; correct path, subset, "
            "split or revision, or set HF_TOKEN where it is private"
        ) from error
