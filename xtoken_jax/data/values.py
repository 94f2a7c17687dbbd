"""Values of a record: texts, and what a chat template may render."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from xtoken_jax.errors import UserError

_DEEPEST = 100  # levels of lists and objects in a message


def text_of_value(value: Any, key: str, where: Callable[[], str]) -> str:
    """Return a value that is text; UserError where it is none.

    Args:
        value: a string, or UTF-8 bytes.
        key: what messages call it.
        where: says which record it is of.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where()}: {key!r} is not UTF-8 ({error}); convert the data to UTF-8"
            ) from error
    if not isinstance(value, str):
        raise UserError(
            f"{where()}: {key!r} holds {type(value).__name__}, not text; correct the record or leave it out"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell
        raise UserError(
            f"{where()}: {key!r} is not text ({error}); correct the record or leave it out"
        ) from error
    return value


def rendered(value: Any, name: str, where: Callable[[], str], depth: int = _DEEPEST) -> Any:
    """Return what a template may render: plain lists and objects without keys that hold null.

    Columns give every object all keys, absent ones as null.

    Raises:
        UserError: it is nested too deeply, or holds what no JSON and no text can: a number that is not
            finite, half of a surrogate pair.
    """
    value = plain(value)
    if isinstance(value, Mapping | list) and not depth:
        refuse_depth(name, where)
    if isinstance(value, Mapping):
        return {
            text_of_value(k, name, where): rendered(v, name, where, depth - 1)
            for k, v in value.items()
            if v is not None
        }
    if isinstance(value, list):
        return [rendered(v, name, where, depth - 1) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{where()}: {name} holds {value}, which is not JSON; correct the record or leave it out"
        )
    return text_of_value(value, name, where) if isinstance(value, str | bytes) else value


def refuse_depth(name: str, where: Callable[[], str]) -> NoReturn:
    """Raise the UserError of a value that is nested too deeply."""
    raise UserError(
        f"{where()}: {name} is nested more than {_DEEPEST} deep; flatten it or leave the record out"
    )


def is_something(value: Any) -> bool:
    """Return whether a value is neither null nor empty."""
    values = [value]
    while values:
        value = plain(values.pop())
        if isinstance(value, list | Mapping):
            values += value.values() if isinstance(value, Mapping) else value
        elif value is not None and value != "" and value != b"":
            return True
    return False


def plain(value: Any) -> Any:
    """A list where it is a numpy array or a tuple."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, tuple) else value
