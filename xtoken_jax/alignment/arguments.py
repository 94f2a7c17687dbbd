"""Checks of the lengths and sides of rows; each names the argument and says what is needed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from xtoken_jax.errors import KindError, UserError


def check_lengths(**lengths: Any) -> None:
    """Raise unless every length is an integer from 1 on."""
    for name, length in lengths.items():
        try:
            value = operator.index(length)
        except TypeError:
            raise KindError(f"{name}={length!r}: an integer is needed") from None
        if value < 1:
            raise UserError(f"{name}={length}: must be at least 1")


def check_sides(**sides: Any) -> None:
    """Raise unless every side of padding or truncation is "right" or "left"."""
    for name, side in sides.items():
        if side not in ("right", "left"):
            raise UserError(f"{name}={side!r}: must be 'right' or 'left'")


def check_fit(name: str, rows: Sequence[Any], length: int) -> None:
    """Raise unless every row has at most `length` tokens."""
    for number, row in enumerate(rows):
        if len(row) > length:
            raise UserError(f"{name}[{number}]: {len(row)} tokens, but the length is {length}; truncate it")
