"""A record that is a JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from xtoken_jax.data.formats.encodings import decoded
from xtoken_jax.errors import UserError, first_line


def json_record(raw: bytes | str, where: Callable[[], str]) -> dict[str, Any]:
    """Return a record.

    Numbers that are not finite are read, since records carry scores that nobody renders; what is rendered
    is checked where messages are read.

    Args:
        raw: JSON, without a byte-order mark.
        where: says which record it is, for errors.

    Raises:
        UserError: it is no JSON object, is nested too deeply, or has one key with two values.
    """
    text = raw if isinstance(raw, str) else decoded(raw, where)
    try:
        record = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise UserError(
            f"{where()}: not a JSON object (nested too deeply); flatten it or leave it out"
        ) from error
    except json.JSONDecodeError as error:
        hint = ""
        if text.strip() in ("{", "["):
            hint = "; an object goes on one line, or all objects in one list, or name its list with records="
        raise UserError(
            f"{where()}: not a JSON object ({error}); correct it or leave it out{hint}"
        ) from error
    except ValueError as error:  # a key with two values, or a number of thousands of digits
        raise UserError(
            f"{where()}: not a JSON object ({first_line(error).split(';')[0]}); correct it or leave it out"
        ) from error
    if not isinstance(record, dict):
        raise UserError(
            f"{where()}: not a JSON object but {type(record).__name__}; give every record its keys, such as "
            '{"text": "..."}'
        )
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        for key, value in pairs:
            if record[key] != value:
                raise ValueError(f"the key {key[:60]!r} has two values")
    return record
