"""Short texts of arrays and of what holds them, which never contain the arrays (jax only)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np


def described(value: Any) -> str:
    """The dtype and shape of an array, traced or abstract ones too; the value or type of anything else."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {list(value.shape)}"
    return repr(value) if value is None or isinstance(value, int | str) else type(value).__name__


def readable(holder: Any, headline: str = "") -> str:
    """A dataclass as its name, a headline and a line for each field."""
    lines = [f"  {field.name}: {described(getattr(holder, field.name))}" for field in fields(holder)]
    return "\n".join([f"{type(holder).__name__}({headline}", *lines]) + ")"


def size_of(array: Any, axis: int = 0) -> str:
    """The length of an axis with thousands apart; "?" where the array has no shape, as inside of jax."""
    shape = getattr(array, "shape", ())
    return f"{shape[axis]:,}" if len(shape) > axis else "?"


def rows_of(indices: Any) -> str:
    """How many rows of W have one entry, several or none; nothing where they are not numpy's."""
    if not isinstance(indices, np.ndarray) or indices.ndim != 2:
        return ""
    entries = (indices >= 0).sum(1)
    one, several = (entries == 1).sum(), (entries > 1).sum()
    return f": {one:,} rows of one entry, {several:,} of several, {len(indices) - one - several:,} empty"
