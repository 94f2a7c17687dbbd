"""Types and ranges of values in files that anyone may have written, checked before they are used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from xtoken_jax.errors import UserError


@dataclass(frozen=True)
class Check:
    """What a value must be.

    Attributes:
        wanted: a noun phrase for messages.
        holds: whether a value, as JSON has it, is that.
    """

    wanted: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Check:
    """A whole number from `low` to `high`; a float is none, and neither is a boolean."""
    wanted = f"a whole number from {low:,} to {high:,}"
    if low == 1:
        wanted = f"a positive whole number, at most {high:,}"
    return Check(wanted, lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Check:
    """A finite number from `low` to `high`."""

    def holds(value: Any) -> bool:
        return type(value) in (int, float) and low <= value <= high and math.isfinite(value)

    return Check(f"a number from {low:g} to {high:g}", holds)


FLAG = Check("true or false", lambda value: isinstance(value, bool))
TEXT = Check("a string", lambda value: isinstance(value, str))


def one_of(*values: str | None) -> Check:
    """One of some strings, or null where None is among them."""
    names = ", ".join("null" if value is None else value for value in values)
    return Check(f"one of {names}", lambda value: isinstance(value, str | None) and value in values)


def optional(check: Check) -> Check:
    """Null, or a value for which `check` holds."""
    return Check(f"{check.wanted}, or null", lambda value: value is None or check.holds(value))


def either(*checks: Check) -> Check:
    """A value for which one of the checks holds."""
    wanted = " or ".join(check.wanted for check in checks)
    return Check(wanted, lambda value: any(check.holds(value) for check in checks))


def listing(check: Check, most: int, least: int = 0) -> Check:
    """A list of at most `most` such values."""

    def holds(value: Any) -> bool:
        return isinstance(value, list) and least <= len(value) <= most and all(map(check.holds, value))

    return Check(f"a list of {least:,} to {most:,} values, each {check.wanted}", holds)


def mapping(check: Check) -> Check:
    """An object all of whose values are such."""

    def holds(value: Any) -> bool:
        return isinstance(value, dict) and all(map(check.holds, value.values()))

    return Check(f"an object of values, each {check.wanted}", holds)


OBJECT = Check("an object", lambda value: isinstance(value, dict))


def check_fields(
    content: Any,
    table: Mapping[str, Check],
    where: str = "",
    *,
    remedy: str = "correct it",
    complete: bool = False,
) -> None:
    """Raise UserError for the first value that is not what the table wants.

    Args:
        content: the object; keys that are not in the table are not looked at.
        table: key -> what its value must be.
        where: begins the message, such as the file's name; "" where the caller adds it.
        remedy: ends the message.
        complete: whether every key of the table must be there, and no other.
    """
    prefix = f"{where}: " if where else ""
    if not isinstance(content, dict):
        raise UserError(f"{prefix}{shown(content)} where an object belongs; {remedy}")
    if complete:
        missing = [key for key in table if key not in content]
        if missing or (missing := [key for key in content if key not in table]):
            wrong = "lacks" if missing[0] in table else "has the unknown key"
            raise UserError(f"{prefix}{wrong} {shown(missing[0])}; {remedy}")
    for key, check in table.items():
        if key in content and not check.holds(content[key]):
            raise UserError(f"{prefix}{key}={shown(content[key])} must be {check.wanted}; {remedy}")


def shown(value: Any, longest: int = 60) -> str:
    """Return a value as JSON for a message, cut off where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= longest else text[: longest - 3] + "..."
