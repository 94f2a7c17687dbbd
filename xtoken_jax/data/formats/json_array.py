"""The elements of a JSON list in a file of any size, by the offsets of the commas between them."""

from __future__ import annotations

import codecs
import json
import re

import numpy as np

from xtoken_jax.data.formats.data_file import DataFile
from xtoken_jax.data.formats.record_files import PIECE, solid_start
from xtoken_jax.data.layouts import listed
from xtoken_jax.errors import UserError

_QUOTE, _SLASH, _COMMA = b'"\\,'
_CLOSING = {ord("["): ord("]"), ord("{"): ord("}")}
_STRUCTURE = np.zeros(256, bool)
_STRUCTURE[list(b'"[]{},')] = True
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_MEMBER = re.compile(rb'[ \t\n\r]*("(?:[^"\\]|\\.)*+")[ \t\n\r]*:[ \t\n\r]*(.)', re.DOTALL)
_KEY_BYTES = 1 << 12  # the longest key that is looked for
_HEAD = 1 << 12  # bytes that most often tell how a file begins
_MEMBERS = 10_000  # of the object that holds the list


def first_byte(file: DataFile) -> tuple[int, bytes]:
    """Where a file's content begins, behind blanks and a byte-order mark, and its first byte."""
    head = file.read(0, min(_HEAD, file.size))
    if head.lstrip()[:1] in (b"{", b"["):
        start: int | None = len(head) - len(head.lstrip())
    else:
        mark = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        start = solid_start(file, mark, file.size)
    return (file.size, b"") if start is None else (start, file.read(start, start + 1))


def list_offsets(file: DataFile, name: str, key: str | None = None) -> np.ndarray:
    """int64 [n + 1]: where the bracket of a list is and each comma in it, then its closing bracket.

    Args:
        file: JSON, of which only the outermost structure is looked at.
        name: what messages call the file.
        key: of the list in an object that is the whole file; None where the list is the whole file.

    Raises:
        UserError: the file holds no such list, or something else besides.
    """
    start, opening = first_byte(file)
    if opening != (b"[" if key is None else b"{"):
        what = "a list" if opening == b"[" else "neither a list nor an object"
        raise UserError(
            f"{name}: records={key} names a key of an object, and the file is {what}; leave it out"
        )
    offsets = _separators(file, start, name)
    if solid_start(file, int(offsets[-1]) + 1, file.size) is not None:
        hint = "one list is read" if key is None else f"leave records={key} out for one object a line"
        raise UserError(
            f"{name}: holds more behind the {'list' if key is None else 'object'} that it begins with; {hint}"
        )
    if key is not None:
        offsets = _separators(file, _list_start(file, offsets, name, key), name)
    inside = int(offsets[0]) + 1, int(offsets[-1])
    return offsets[:1] if len(offsets) == 2 and solid_start(file, *inside) is None else offsets


def _list_start(file: DataFile, offsets: np.ndarray, name: str, key: str) -> int:
    """Where the list under a key begins, in an object whose members are between the offsets."""
    starts: dict[str, int] = {}
    if len(offsets) > _MEMBERS:
        raise UserError(
            f"{name}: an object of {len(offsets) - 1:,} keys; records={key} is for one with few keys"
        )
    for before, after in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        member = _MEMBER.match(file.read(before + 1, min(after, before + _KEY_BYTES)))
        if member is None:
            continue
        try:
            spelled = json.loads(member[1])
        except ValueError:
            continue
        if spelled == key and key in starts:
            raise UserError(f"{name}: has two keys {key!r}; keep one")
        starts[spelled] = before + 1 + member.start(2)
    if key not in starts:
        raise UserError(
            f"{name}: no key {key!r} in its object, which has {listed([*starts])}; name the list with "
            "records="
        )
    start = starts[key]
    if file.read(start, start + 1) != b"[":
        raise UserError(f"{name}: {key!r} holds no list; name the key of the list of records with records=")
    return start


def _separators(file: DataFile, start: int, name: str) -> np.ndarray:
    """int64: the bracket at `start`, each comma directly inside of it, and its closing bracket."""
    found = [np.array([start])]
    depth, quoted, slashes = 0, 0, 0
    for base in range(start, file.size, PIECE):
        piece = np.frombuffer(file.read(base, min(base + PIECE, file.size)), np.uint8)
        places = np.flatnonzero(_STRUCTURE[piece])
        escaped, slashes = _escaped(piece, slashes)
        if len(escaped):
            places = places[~np.isin(places, escaped, assume_unique=True)]
        marks = piece[places]
        quotes = marks == _QUOTE
        strings = np.cumsum(quotes) + quoted  # odd inside of a string
        plain = ~quotes & (strings % 2 == 0)
        quoted = int(strings[-1] % 2) if len(strings) else quoted
        places, marks = places[plain], marks[plain]
        depths = np.cumsum(_STEP[marks], dtype=np.int64) + depth
        ends = np.flatnonzero(depths == 0)
        last = int(ends[0]) if len(ends) else len(depths)
        found.append(places[:last][(marks[:last] == _COMMA) & (depths[:last] == 1)] + base)
        if len(ends):
            if marks[last] != _CLOSING[file.read(start, start + 1)[0]]:
                raise UserError(
                    f"{name}: a bracket at byte {base + int(places[last]):,} closes another kind of bracket; "
                    "it is not JSON, correct it or write it again"
                )
            return np.concatenate([*found, places[last : last + 1] + base])
        depth = int(depths[-1]) if len(depths) else depth
    raise UserError(
        f"{name}: ends inside of its JSON, at {file.size:,} bytes; it was cut off or lacks a quote or "
        "bracket, get it again or correct it"
    )


def _escaped(piece: np.ndarray, before: int) -> tuple[np.ndarray, int]:
    """The places behind an odd number of backslashes, and how many backslashes the piece ends in.

    Args:
        piece: bytes.
        before: backslashes that the piece before it ended in.
    """
    slashes = np.flatnonzero(piece == _SLASH)
    first = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)  # of each run
    begins, ends = (
        slashes[first],
        slashes[np.append(first[1:], len(slashes)) - 1] + 1 if len(first) else first,
    )
    lengths = ends - begins
    if before and len(begins) and begins[0] == 0:
        lengths[0] += before
        before = 0
    escaped = ends[lengths % 2 == 1]
    if before % 2:
        escaped = np.concatenate([np.zeros(1, escaped.dtype), escaped])
    after = int(lengths[-1]) if len(ends) and ends[-1] == len(piece) else 0
    return escaped[escaped < len(piece)], after
