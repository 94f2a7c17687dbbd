"""TensorFlow Datasets, without TensorFlow: by name, or by the folder of a prepared one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xtoken_jax.data.formats.array_record import Part, open_parts, read_record
from xtoken_jax.data.formats.data_file import DataFile, fingerprint
from xtoken_jax.data.formats.json_record import json_record
from xtoken_jax.data.formats.limits import Limits
from xtoken_jax.data.layouts import shown
from xtoken_jax.errors import UserError, first_line

_FORMAT = "array_record"
_FEATURES = "features.json"
_PACKAGE = "tensorflow_datasets.core.features."
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # the last one up to TFDS 4.4


def is_prepared(folder: Path) -> bool:
    """Whether a folder is that of a prepared dataset and version."""
    return (folder / "dataset_info.json").is_file() and (folder / _FEATURES).is_file()


class TfdsExamples:
    """The examples of one split of a dataset that is stored in ArrayRecord files."""

    def __init__(self, path: str, *, split: str, data_dir: str | None) -> None:
        """Find the dataset; by name it is downloaded and prepared where it is not there yet.

        Args:
            path: a name such as wikipedia/20230601.en:1.0.0, or the folder of a prepared version.
            split: in the syntax of TFDS, such as train or train[:10%].
            data_dir: where datasets lie that are named; None for the default of TFDS.
        """
        builder = _builder(path, data_dir)
        self._name, self._split = path, split
        self._features = builder.info.features
        if builder.info.file_format is None or builder.info.file_format.value != _FORMAT:
            stored = getattr(builder.info.file_format, "value", "an unknown format")
            raise UserError(
                f"{path}: stored as {stored}, which needs TensorFlow or has no random access; prepare it "
                f"with file_format='{_FORMAT}', or name another data_dir"
            )
        try:
            instructions = builder.info.splits[split].file_instructions
        except (KeyError, ValueError, AssertionError) as error:
            there = ", ".join(sorted(builder.info.splits))
            raise UserError(
                f"{path}: no split {split!r}; there is {there}, and parts as train[:10%]: name one with "
                "split="
            ) from error
        found = [i for i in instructions if i.take]
        self._files = [DataFile(Path(i.filename)) for i in found]
        self._parts = [(i.skip, i.take) for i in found]
        self._source = open_parts([Part(i.filename, i.skip, i.take) for i in found]) if found else []
        self._ends = np.cumsum([i.take for i in found])

    def __len__(self) -> int:
        return len(self._source)

    def keys(self) -> list[str] | None:
        """Those of its features."""
        return sorted(self._features) if hasattr(self._features, "keys") else ["text"]

    def read(self, number: int, keys: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
        """An example, as numpy arrays and bytes."""
        place = int(np.searchsorted(self._ends, number, side="right"))
        raw = read_record(self._source, number, self._files[place])
        try:
            example = self._features.deserialize_example_np(raw)
        except Exception as error:
            raise UserError(
                f"{self.where(number)}: cannot be read as an example ({first_line(error)}); prepare the "
                "dataset again"
            ) from error
        return {key: example[key] for key in (*keys, *optional) if key in example}

    def where(self, number: int) -> str:
        """Dataset, split and example, from 0."""
        return f"{self._name}, split {self._split}, example {number}"

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Of the files that hold the split, and of its part of each."""
        return hashlib.sha256(f"{fingerprint(self._files)} {self._parts}".encode()).hexdigest()


def _features_of(name: str, data_dir: str | None) -> list[Path]:
    """The features.json of every version of a dataset that is prepared, which TFDS finds by its name."""
    from tensorflow_datasets.core.utils import file_utils

    given = None if data_dir is None else str(Path(data_dir).expanduser())
    dataset = re.split(r"[/:]", name)[0]
    roots = [Path(root) for root in file_utils.list_data_dirs(given_data_dir=given)]
    return [path for root in roots for path in sorted((root / dataset).rglob(_FEATURES))] if dataset else []


def _check_classes(path: Path) -> None:
    """Refuse features of classes that are not TFDS's own: TFDS imports the module that such a class names.

    Raises:
        UserError: another class, or a file that is not JSON.
    """
    file = DataFile(path)
    Limits().check_record(file.size, lambda: str(path))
    values: list[Any] = [json_record(file.read(), lambda: str(path))]
    names: list[str] = []
    while values:
        value = values.pop()
        if isinstance(value, dict):
            names += [value[key] for key in _CLASS_KEYS if isinstance(value.get(key), str)]
            if isinstance(value.get("json"), str):  # features within a text
                values.append(json_record(value["json"], lambda: str(path)))
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
    for name in names:
        if not name.startswith(_PACKAGE):
            raise UserError(
                f"{path}: its features have the class {shown(name)}, and only those of tensorflow_datasets "
                "are loaded; prepare the dataset with these, or convert it to JSON Lines or Parquet"
            )


def _builder(path: str, data_dir: str | None) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            "datasets of TFDS need tensorflow-datasets: pip install 'xtoken-jax[data]'"
        ) from error
    folder = Path(path).expanduser()
    by_folder = folder.is_dir() and is_prepared(folder)
    for features in [folder / _FEATURES] if by_folder else _features_of(path, data_dir):
        _check_classes(features)
    try:
        if by_folder:
            return tfds.builder_from_directory(folder)
        builder = tfds.builder(path, data_dir=data_dir and str(Path(data_dir).expanduser()))
        if not builder.is_prepared():
            builder.download_and_prepare(file_format=_FORMAT)
        return builder
    except Exception as error:  # the generation of a dataset may raise anything
        place = "" if data_dir is None else f" in {data_dir}"
        raise UserError(
            f"{path}: no dataset of TFDS that is prepared{place} or can be prepared ({first_line(error)}); "
            "correct the name, or name the folder of a prepared version"
        ) from error
