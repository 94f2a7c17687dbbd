"""Write the generated pages of the documentation: every configuration key, every command.

MkDocs runs this as a hook before each build; `python docs/generate.py` writes the same pages by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parent / "reference"


class Key(typing.NamedTuple):
    """One configuration key."""

    name: str
    type: str
    default: str
    meaning: str


def meanings(cls: type) -> dict[str, str]:
    """Field -> its text in the `Attributes:` section of a dataclass's docstring, bases included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        doc = inspect.cleandoc(base.__doc__ or "")
        _, marker, section = doc.partition("Attributes:\n")
        if not marker:
            continue
        section = re.split(r"\n(?=\S)", section)[0]  # up to the next section
        for entry in re.split(r"\n(?=    \S)", section):
            names, colon, text = entry.strip().partition(": ")
            if colon:
                found |= dict.fromkeys(re.split(r", ", names), " ".join(text.split()))
    return found


def keys(cls: type, prefix: str = "") -> Iterator[Key]:
    """Every key below a dataclass, in the order of its fields."""
    hints, said = typing.get_type_hints(cls), meanings(cls)
    for field in dataclasses.fields(cls):
        name, kind = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from keys(typing.cast(type, kind), f"{name}.")
        elif typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1]):
            yield from keys(typing.get_args(kind)[1], f"{name}.NAME.")
        else:
            yield Key(name, type_name(kind), default_of(field), said.get(field.name, ""))


def type_name(kind: Any) -> str:
    """A type as a user writes its values."""
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in kind)
    if typing.get_origin(kind) is list:
        return f"list of {type_name(options[0])}"
    if typing.get_origin(kind) is dict:
        return f"{type_name(options[1])} by name"
    if options:
        return " or ".join([*map(type_name, options), "`null`"])
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
    return names.get(kind, kind.__name__)


def default_of(field: dataclasses.Field[Any]) -> str:
    """A field's default as a user writes it."""
    value = field.default
    if value is dataclasses.MISSING:
        assert field.default_factory is not dataclasses.MISSING
        value = field.default_factory()
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool):
        value = str(value).lower()
    return "`null`" if value is None else f"`{value}`" if value != "" else "empty"


def configuration() -> str:
    """The page of all configuration keys."""
    from xtoken_jax.run.experiment import Experiment

    lines = [
        "# Configuration keys",
        "",
        "Every key that `xtoken distill` and `xtoken cache-teacher` take as `key=value`. `NAME` stands for a "
        "name of your choice. `xtoken distill ... --cfg job` prints the settings of a run.",
        "",
    ]
    group = None
    for key in keys(Experiment):
        first = key.name.split(".")[0] if "." in key.name else ""
        if first != group:
            group = first
            lines += ["", f"## `{first}`" if first else "## Run", ""]
            lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
        cells = (f"`{key.name}`", key.type, key.default, key.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def commands() -> str:
    """The page of all commands, from their parsers."""
    from xtoken_jax.cli.parser import make_parser

    parser = make_parser()
    lines = ["# Commands", "", "What `xtoken COMMAND --help` prints.", ""]
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, sub in subparsers.choices.items():
        sub.formatter_class = _Wide if sub.formatter_class is argparse.HelpFormatter else sub.formatter_class
        lines += [f"## `xtoken {name}`", "", "```text", sub.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


class _Wide(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, width=100)


def write() -> None:
    """Write the pages where they changed."""
    REFERENCE.mkdir(exist_ok=True)
    for name, text in (("configuration.md", configuration()), ("commands.md", commands())):
        path = REFERENCE / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def on_pre_build(config: object) -> None:
    """Hook of MkDocs."""
    write()


if __name__ == "__main__":
    write()
