"""The key=value words of a command line: checked against the schema, and written as Hydra takes them."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

from xtoken_jax.errors import UserError
from xtoken_jax.run.config_groups import groups, options_of
from xtoken_jax.run.spelling import KEYS

NOT_MEASURED = "data.validation=none"  # the word for no held-out figures

# Of Hydra's grammar, in the values of a sweep.
_FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(")
_NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a teacher or a source
_HUB_ID = re.compile(r"[\w.-]+/[\w.@-]+")
_MODELS_AND_FILES = ("path", "cache", "projection", "chat_template")  # last parts of their keys
_FOLDERS = ("run_dir", "data_dir")


def checked(override: str, schema: type, *, sweep: bool) -> str:
    """The override as Hydra takes it: a group's option as it is, a key that exists as "set or add".

    Args:
        override: as on the command line.
        schema: the dataclass of all keys.
        sweep: whether commas and Hydra's functions make several values.

    Raises:
        UserError: an unknown group, option or key, several values outside of a sweep, or no key=value.
    """
    key, equals, value = override.partition("=")
    if not equals or not key.strip("+~"):
        raise UserError(f"{override!r} is not of the form key=value{_meant_word(override, schema)}")
    key = key.lstrip("+~")
    if re.match(r"hydra[./]", key):
        if not sweep:
            raise UserError(
                f"{override}: Hydra's settings are those of a sweep; add -m: xtoken distill -m ... {override}"
            )
        return override
    if key in groups() and "." not in key:
        if not sweep and ("," in value or _FUNCTION.match(value)):
            raise _several(override)
        options = options_of(key)
        for one in value.split(",") if sweep and not _FUNCTION.match(value) else [value]:
            if one not in options and not (sweep and _FUNCTION.match(one)):
                near = nearest(one, options)
                raise UserError(f"{key}={one}: no such {key}{near}; there is {', '.join(options)}")
        return override
    if override == NOT_MEASURED:
        return f"++{override}"
    kind = _type_of(key, key.split("."), schema, schema)
    if (dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict) and value[:1] not in ("{", "$"):
        raise UserError(f"{override}: {key} is no single value; {_meant(key, kind, value)}")
    if sweep and _FUNCTION.match(value):
        return f"++{key}={value}"
    if typing.get_origin(kind) is list:
        return f"++{key}={value}" if value[:1] in ("[", "$") else f"++{key}=[{value}]"
    text = kind is str or str in typing.get_args(kind)
    if not sweep and _is_several(key.rpartition(".")[2], value, text):
        raise _several(override)
    if text:
        if value[:1] == "~" and os.path.expanduser(value) == value:
            raise UserError(f"{override}: no such user on this machine as {value.partition('/')[0]}")
        # A path may hold what Hydra's grammar reads as structure: blanks, commas, "=".
        value = ",".join(_quoted(one) for one in (value.split(",") if sweep else [value]))
    return f"++{key}={value}"


def _several(override: str) -> UserError:
    return UserError(
        f"{override}: several values make a sweep; add -m for a run with each: "
        f"xtoken distill -m ... {override}"
    )


def _is_several(last: str, value: str, text: bool) -> bool:
    """Whether a value lists several for the last part of a key; a path may hold a comma."""
    if value[:1] in ("'", '"', "$", "{", "["):
        return False
    if not text or last not in (*_MODELS_AND_FILES, *_FOLDERS):
        return "," in value or _FUNCTION.match(value) is not None
    parts = value.split(",")
    if len(parts) == 1 or last in _FOLDERS or _exists(value):
        return False
    return all(_exists(part) or _HUB_ID.fullmatch(part) for part in parts)


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _meant_word(word: str, schema: type) -> str:
    """What a word without a "=" may have meant."""
    name, _, value = word.partition(":")
    if name in keys(schema):
        return f"; write {name}={value.strip() or 'VALUE'}"
    for group in ("experiment", *groups()):
        if name in groups() and value.strip() in options_of(name):
            return f"; write {name}={value.strip()}"
        if word in options_of(group):
            return f"; did you mean {group}={word}?"
    if _exists(word):
        return f"; did you mean student.path={word}?"
    return ", such as experiment=quickstart"


def _meant(key: str, kind: Any, value: str) -> str:
    """What to write instead of a value for a group of keys."""
    if typing.get_origin(kind) is dict:
        key, kind = f"{key}.NAME", typing.get_args(kind)[1]
    if not dataclasses.is_dataclass(kind):
        return f"did you mean {key}={value}?"
    hints = typing.get_type_hints(kind)
    likely = next((f"did you mean {key}.{name}={value}?; " for name in ("path", "kind") if name in hints), "")
    return f"{likely}there is {', '.join(sorted(hints))}"


def _quoted(value: str) -> str:
    if value == "null" or value[:1] in ("'", '"'):
        return value
    return "'" + value.replace("'", "\\'") + "'"


def _type_of(key: str, path: list[str], kind: Any, schema: type) -> Any:
    """Follow a dotted key through the dataclasses to its type; an error names the nearest that exists."""
    if typing.get_origin(kind) is dict and path:  # a name of the user's own, then its keys
        if not _NAME.fullmatch(path[0]):
            raise UserError(f"{key}: the name {path[0]!r} may have letters, digits, _ and - alone")
        return _type_of(key, path[1:], typing.get_args(kind)[1], schema)
    if not path:
        return kind
    if not dataclasses.is_dataclass(kind):
        raise UserError(f"{key}: {key.removesuffix('.' + '.'.join(path))} is a single value and has no keys")
    hints = typing.get_type_hints(kind)
    if path[0] not in hints:
        known = list(hints) + (groups() if kind is schema else [])
        parent = key[: -len(".".join(path))]
        inside = [] if parent else _inside(path[0], schema)
        near = f", did you mean {' or '.join(inside)}?" if inside else nearest(path[0], known, parent)
        raise UserError(f"{key}: no such key{near}; there is {', '.join(sorted(set(known)))}")
    return _type_of(key, path[1:], hints[path[0]], schema)


def _inside(name: str, schema: type) -> list[str]:
    """Keys that a bare name, such as steps or lr, may stand for; up to three."""
    same = [key for key in keys(schema) if key.rpartition(".")[2] == name and ".NAME" not in key]
    return same[:3] or ([KEYS[name]] if name in KEYS else [])


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """A question that names the nearest of the known names; "" if none is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def keys(schema: Any) -> list[str]:
    """All dotted keys; NAME stands for a name of the user's own, whose keys come last."""
    return sorted(_keys(schema, ""), key=lambda key: ".NAME" in key)


def _keys(kind: Any, prefix: str) -> Iterator[str]:
    for name, inner in typing.get_type_hints(kind).items():
        key = f"{prefix}{name}"
        if typing.get_origin(inner) is dict:
            key, inner = f"{key}.NAME", typing.get_args(inner)[1]
        if dataclasses.is_dataclass(inner):
            yield from _keys(inner, f"{key}.")
        else:
            yield key


def continuations(word: str, schema: Any) -> list[str]:
    """What the last part of a word may become: `train.st` is `train.steps=`, `tra` is `train.`."""
    key, equals, _ = word.partition("=")
    parent, dot, _ = key.rpartition(".")
    try:
        kind = _type_of(key, (key if equals else parent).split(".") if equals or dot else [], schema, schema)
    except UserError:
        return []
    if equals:
        return [f"{key}={value}" for value in _values(kind)]
    if typing.get_origin(kind) is dict:
        return [f"{parent}.text."] if parent.startswith("data.") else []
    if not dataclasses.is_dataclass(kind):
        return []
    hints = typing.get_type_hints(kind).items()
    return [f"{parent}{dot}{name}{'.' if _has_keys(inner) else '='}" for name, inner in hints]


def _has_keys(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict


def _values(kind: Any) -> list[str]:
    """The values that a type names; none for numbers and texts."""
    choices = [one for one in (kind, *typing.get_args(kind)) if isinstance(one, type)]
    if bool in choices:
        return ["true", "false"]
    named = next((one for one in choices if issubclass(one, Enum)), None)
    values = [str(member.value) for member in named] if named else []
    return values + ["null"] * (type(None) in choices)
