"""Ways to spoil bytes, JSON values and safetensors files."""

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Values that a field of JSON may hold by mistake or malice.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 255, 65536, 10**6, 10**8, 2**31 - 1, 2**31, 2**32, 2**53, 2**63,
    2**64, 10**30, 0.0, -0.0, 0.5, 1.0, 1.5, -2.5, 1e-300, 1e300, "", "x", "0", "1", "-1", "true", "null",
    " ", "\0", "\ud83d\ude00", "../x", "/etc/passwd", "é", "\u2581", "##", "x" * 5000, "[", "{{",
    "(?", "${oc.env:HOME}", [], {}, [None], [0], [1, 2],
    ["x"], [[]], [{}], {"x": 1}, {"": None}, {"type": "x"}, {"content": "x"},
    [["a", "b"]], [1.5, 2.5],
)  # fmt: skip


def spoil_json(rng: random.Random, path: Path) -> None:
    """Change a JSON file: mostly one to three of its values, sometimes its bytes or its whole."""
    content = path.read_bytes()
    kind = rng.random()
    if kind < 0.12:
        path.write_bytes(spoiled_bytes(rng, content))
    elif kind < 0.18:
        path.write_bytes(odd_document(rng, content))
    else:
        value = json.loads(content)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            value = spoiled_value(rng, value)
        path.write_text(json.dumps(value))


def spoiled_bytes(rng: random.Random, content: bytes) -> bytes:
    """Change some bytes: one flipped, a block left out, repeated, or put in, or the end cut off."""
    where, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 8, 100))
    kind = rng.randrange(6)
    if kind == 0:
        return content[:where]
    if kind == 1:
        return content[:where] + content[where + length :]
    if kind == 2:
        return content[:where] + content[where : where + length] * 2 + content[where + length :]
    if kind == 3:
        return content[:where] + rng.randbytes(length) + content[where:]
    if kind == 4:
        return (
            content[:where] + rng.choice((b'"', b"{", b"}", b"[", b",", b"\\", b"\0")) + content[where + 1 :]
        )
    changed = bytearray(content)
    for _ in range(length):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def odd_document(rng: random.Random, content: bytes) -> bytes:
    """Return a whole document of another kind."""
    deep = rng.choice((50, 101, 1000, 100_000))
    return rng.choice(
        (
            b"", b"null", b"[]", b"{}", b"3", b'"x"', b"\xff\xfe\0", b"\0" * 100, b"NaN", b"\x80\x03]q\0.",
            content.decode(errors="replace").encode("utf-16"), b"\xef\xbb\xbf" + content, content + content,
            b"[" * deep, b'{"a":' * deep, b"[" * deep + b"]" * deep, b'{"a":' * deep + b"1" + b"}" * deep,
            b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1e999}', rb'{"a": "\ud800"}', b"version https://git-lfs",
        )
    )  # fmt: skip


def places(value: Any, most: int = 400) -> list[tuple[Any, Any]]:
    """Containers and keys of the values within a JSON value, of a long list or object the ends alone."""
    found: list[tuple[Any, Any]] = []
    level = [value]
    while level and len(found) < most:
        following = []
        for outer in level:
            keys: Sequence[Any] = list(outer) if isinstance(outer, dict) else range(len(outer))
            keys = [*keys[:20], *keys[20:][-5:]]
            found += [(outer, key) for key in keys]
            following += [outer[key] for key in keys if isinstance(outer[key], dict | list)]
        level = following
    return found


def spoiled_value(rng: random.Random, value: Any) -> Any:
    """Change one value within a JSON value: another, none, twice, under another name, or nested deeply."""
    value = copy.deepcopy(value)
    every = places(value) if isinstance(value, dict | list) else []
    if not every:
        return rng.choice(ODD_VALUES)
    outer, key = rng.choice(every)
    kind = rng.random()
    if kind < 0.6:
        outer[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif kind < 0.72:
        del outer[key]
    elif kind < 0.8:
        other, other_key = rng.choice(every)
        outer[key] = copy.deepcopy(other[other_key])
    elif kind < 0.86 and isinstance(outer, dict):
        outer[rng.choice(("x", key + "x", key.upper(), ""))] = outer.pop(key)
    elif kind < 0.9:
        outer[key] = [outer[key]]
    elif kind < 0.94 and isinstance(outer[key], int | float):
        outer[key] = outer[key] * rng.choice((-1, 2, 10, 1000, 10**6, 0.5))
    elif isinstance(outer[key], list):
        outer[key] = outer[key] * rng.choice((0, 2, 3, 1000 if len(outer[key]) < 100 else 2))
    else:
        for _ in range(rng.choice((3, 90, 300))):
            outer[key] = {"x": outer[key]} if rng.random() < 0.5 else [outer[key]]
    return value


def spoil_safetensors(rng: random.Random, path: Path) -> None:
    """Change a safetensors file: its header's values, the header's length, its bytes, or what follows."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    kind = rng.random()
    if kind < 0.55:
        value = json.loads(header)
        for _ in range(rng.choice((1, 1, 2))):
            value = spoiled_value(rng, value)
        header = json.dumps(value).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    elif kind < 0.65:
        header = odd_document(rng, header)
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    elif kind < 0.75:
        odd = rng.choice((0, 1, size - 1, size + 1, len(content), 2**31, 2**40, 2**63, 2**64 - 1))
        path.write_bytes(odd.to_bytes(8, "little") + content[8:])
    elif kind < 0.85:
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        path.write_bytes(spoiled_bytes(rng, content))


def spoil_presence(rng: random.Random, path: Path) -> None:
    """Put something else in the place of a file: nothing, a folder, a link to nowhere, or an empty file."""
    path.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path.name)
    elif kind == 2:
        path.write_bytes(b"")
