"""Documents of the training sources that are held out where no validation source is named."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xtoken_jax.data.documents import Documents, Records
from xtoken_jax.data.records import says_nothing
from xtoken_jax.errors import UserError

FEWEST = 10  # documents of a source that some are held out of
MOST = 200  # documents held out of a source

Texts = dict[str, Documents]


def hold_out(sources: Mapping[str, Documents], share: float) -> tuple[Texts, Texts]:
    """Split sources into documents to train on and documents to measure on.

    The choice depends on nothing but the number of documents and the share: it is spread evenly over each
    source, at least one document, at most `MOST`. A source of fewer than `FEWEST` documents is trained on
    as a whole.

    Args:
        sources: by name.
        share: of each source's documents that are held out; 0 for none.

    Returns:
        The documents of each source to train on, and those held out of the sources that have enough.

    Raises:
        UserError: no source has enough documents.
    """
    if share == 0:
        return dict(sources), {}
    train, held_out = {}, {}
    for name, documents in sources.items():
        if len(documents) < FEWEST:
            train[name] = documents
            continue
        chosen = _spread(documents, min(MOST, max(1, round(share * len(documents)))))
        held_out[name] = _part(documents, chosen, "held out")
        rest = np.delete(np.arange(len(documents), dtype=np.int64), chosen)
        train[name] = _part(documents, rest, "without those held out")
    if not held_out:
        counts = ", ".join(f"{len(documents)} in {name}" for name, documents in sources.items())
        raise UserError(
            f"data.validation: not given, and too few documents to hold any out ({counts}; a source needs "
            f"{FEWEST}); name data.validation.NAME.path, or data.validation=none for no held-out figures"
        )
    return train, held_out


def number_in_source(documents: Documents, number: int) -> int:
    """The number of a document among all records of its source."""
    records = documents.records
    return int(records.numbers[number]) if isinstance(records, _Chosen) else number


def _spread(documents: Documents, count: int) -> list[int]:
    """Numbers of documents that say something, one in the middle of each of `count` stretches, or after."""
    size = len(documents)
    chosen = []
    for place in range(count):
        middle, end = (2 * place + 1) * size // (2 * count), (place + 1) * size // count
        chosen.append(next((n for n in range(middle, end) if not says_nothing(documents[n])), middle))
    return chosen


def _part(documents: Documents, numbers: Sequence[int] | np.ndarray, which: str) -> Documents:
    return documents.replaced(_Chosen(documents.records, np.asarray(numbers), len(documents), which))


class _Chosen:
    """Some of the records of a source."""

    def __init__(self, records: Records, numbers: np.ndarray, size: int, which: str) -> None:
        """Choose `numbers`, which rise, among the first `size` records; `which` enters the fingerprint."""
        self.numbers = numbers
        self._records, self._size, self._which = records, size, which

    def __len__(self) -> int:
        return len(self.numbers)

    def keys(self) -> list[str] | None:
        return self._records.keys()

    def read(self, number: int, keys: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any] | str:
        return self._records.read(int(self.numbers[number]), keys, optional)

    def where(self, number: int) -> str:
        return self._records.where(int(self.numbers[number]))

    def fingerprint(self, keys: Sequence[str]) -> str:
        """SHA-256 of the whole source's fingerprint and of the choice."""
        chosen = f"{self._records.fingerprint(keys)}, {self._which}, {len(self)} of {self._size}"
        return hashlib.sha256(chosen.encode()).hexdigest()
