"""Files that are there whole or not at all, whenever the process ends, and JSON from anywhere."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from xtoken_jax.errors import UserError, first_line
from xtoken_jax.files.new_files import NewFile

MAX_JSON_BYTES = (
    64 << 20
)  # the largest published tokenizer.json has 34 MB; parsed, JSON takes up to 25 times this
MAX_JSON_DEPTH = 100  # Python's parser and writer end at some 1,000
_MAX_DIGITS = 40  # tokenizer_config.json has 10^30 as model_max_length
_KINDS = {dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "boolean"}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(
    path: str | Path,
    *,
    what: str,
    remedy: str = "replace it with an intact copy",
    kind: type = dict,
    max_bytes: int = MAX_JSON_BYTES,
    max_depth: int = MAX_JSON_DEPTH,
) -> Any:
    """Return the content of a JSON file that anyone may have written.

    Args:
        path: the file.
        what: a noun phrase for messages, such as "the settings of a model".
        remedy: what messages advise.
        kind: type of the outermost value.
        max_bytes: size of the largest file that is read.
        max_depth: deepest nesting of objects and lists.

    Raises:
        UserError: the file cannot be read, is too large, or is refused by `parse_json`.
    """
    content = read_bytes(path, what=what, remedy=remedy, max_bytes=max_bytes)
    return parse_json(
        content, path, what=what, remedy=remedy, kind=kind, max_bytes=max_bytes, max_depth=max_depth
    )


def read_bytes(path: str | Path, *, what: str, remedy: str, max_bytes: int) -> bytes:
    """Return the content of a regular file; the arguments are those of `read_json`.

    Raises:
        UserError: the file cannot be read or is too large.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                content = file.read(max_bytes + 1)
                reason = f"larger than {max_bytes:,} bytes" if len(content) > max_bytes else None
            else:
                reason = "not a regular file"
    except OSError as error:
        reason = error.strerror or first_line(error)
    except ValueError as error:  # a null character in the path
        reason = first_line(error)
    if reason is None:
        return content
    raise UserError(f"{path}: not {what} ({reason}); {remedy}".replace("\0", "\\0"))


def parse_json(
    content: bytes | str,
    where: str | Path,
    *,
    what: str,
    remedy: str = "replace it with an intact copy",
    kind: type = dict,
    max_bytes: int = MAX_JSON_BYTES,
    max_depth: int = MAX_JSON_DEPTH,
) -> Any:
    """Return the value of strict JSON in UTF-8, with or without a byte-order mark.

    Args:
        content: the JSON.
        where: the file that holds it, for messages.
        what, remedy, kind, max_bytes, max_depth: as in `read_json`.

    Raises:
        UserError: content that is too large, nested too deeply, not UTF-8, not JSON (as NaN and Infinity),
            has a key with two different values, an absurd number or half of a surrogate pair, or has another
            outermost type.
    """
    try:
        if len(content) > max_bytes:
            raise ValueError(f"larger than {max_bytes:,} bytes")
        text = content if isinstance(content, str) else _decoded(content)
        value = json.loads(
            text.removeprefix("\ufeff"),
            object_pairs_hook=_without_duplicates,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_refuse_constant,
        )
        if _deeper_than(value, max_depth):
            raise ValueError(f"nested more than {max_depth} deep")
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        reason = f"nested more than {max_depth} deep"
    except UnicodeEncodeError:
        reason = "half of a surrogate pair, which is no character"
    except MemoryError:
        reason = "too large for the memory of this machine"
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg}, line {error.lineno} column {error.colno}"
    except ValueError as error:
        reason = first_line(error)
    else:
        if isinstance(value, kind):
            return value
        reason = f"{_kind_name(type(value))} where {_kind_name(kind)} belongs"
    raise UserError(f"{where}: not {what} ({reason}); {remedy}")


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the writer of a named pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _decoded(content: bytes) -> str:
    for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE):
        if content.startswith(mark) or b"\0" in content[:4]:
            raise ValueError("UTF-16 or UTF-32, not UTF-8")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start:,}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if seen.setdefault(key, value) != value:
                raise ValueError(f"the key {shortened(key)} has two different values")
    return content


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits):,} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {shortened(digits)} is beyond float64")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not JSON")


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        if not level:
            return False
        parts = (part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer))
        level = [part for part in parts if isinstance(part, dict | list)]
    return bool(level)


def _kind_name(kind: type) -> str:
    name = _KINDS.get(kind, "null")
    return "null" if name == "null" else f"an {name}" if name == "object" else f"a {name}"


def shortened(text: str, longest: int = 60) -> str:
    """Return a text in quotes and in one line, without its end where it is longer than `longest`."""
    return repr(text) if len(text) <= longest else repr(text[:longest]) + "..."


def to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Return strict JSON, in which a number that is not finite is null: every reader of JSON takes it.

    Args:
        value: plain values, in lists and objects.
        indent: spaces a level; None for one line.
        ensure_ascii: escape other characters.
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def write_whole(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write a file, or replace it, so that a kill at any moment leaves the earlier or the new content.

    Args:
        path: the file. A link there is replaced, and never followed.
        content: what to write; a text becomes UTF-8.
        mode: permissions of the file, which the umask reduces.

    Raises:
        OSError: the file cannot be written; what was there before is unchanged.
    """
    with NewFile(path, mode=mode) as new:
        new.write(content.encode() if isinstance(content, str) else content)
        new.take_place()


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Around what writes there, whole or not at all.

    Raises:
        UserError: it cannot be written. The system's own error of a full disk names no place.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{place}: cannot be written ({error.strerror or error}) and is as it was; once it can be, give "
            "the same command again"
        ) from error


def to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, would survive a loss of power."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
