"""The metadata of a GGUF file, read from its head without the tensors and without another package."""

from __future__ import annotations

import struct
from typing import IO, Any

_NUMBERS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
_STRING, _ARRAY = 8, 9


def read_metadata(file: IO[bytes]) -> dict[str, Any]:
    """Key -> Python value of all key-value pairs; reads no further than the last of them.

    Raises:
        ValueError: not a GGUF file of version 2 or 3, or one that ends too early.
    """
    if _take(file, 4) != b"GGUF":
        raise ValueError("not a GGUF file")
    version = _number(file, "<I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not supported")
    _number(file, "<Q")  # how many tensors
    return {_string(file): _value(file, _number(file, "<I")) for _ in range(_number(file, "<Q"))}


def _take(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError("the GGUF file ends inside its metadata")
    return data


def _number(file: IO[bytes], form: str) -> Any:
    return struct.unpack(form, _take(file, struct.calcsize(form)))[0]


def _string(file: IO[bytes]) -> str:
    return _take(file, _number(file, "<Q")).decode("utf-8")


def _value(file: IO[bytes], kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        inner, length = _number(file, "<I"), _number(file, "<Q")
        return [_value(file, inner) for _ in range(length)]
    if kind not in _NUMBERS:
        raise ValueError(f"GGUF value type {kind} is not known")
    return _number(file, _NUMBERS[kind])
