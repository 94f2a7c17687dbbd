"""Rows of different lengths, in batches of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def in_batches(rows: Sequence[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Rows in lists of `size`, the last one filled up with empty rows, so that one compilation serves."""
    for first in range(0, len(rows), size):
        batch = list(rows[first : first + size])
        yield batch + [rows[0][:0]] * (size - len(batch))
