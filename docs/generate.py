"""Write the generated pages of the documentation: configuration keys, commands, public names.

Run `python docs/generate.py` after a change of a configuration dataclass, a file in `configs/`, a parser or a
public name. The pages are committed: readers of a clone have no site to look at.
`tests/docs/test_reference.py` compares them with the code, so `mkdocs build` needs neither jax nor this
package.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
REFERENCE = DOCS / "reference"


class Key(typing.NamedTuple):
    """One row of a table of keys."""

    name: str
    type: str
    default: str
    meaning: str


def meanings(cls: type) -> dict[str, str]:
    """Map each field to its text in the `Attributes:` section of a dataclass's docstring, bases included."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        doc = inspect.cleandoc(base.__doc__ or "")
        _, marker, section = doc.partition("Attributes:\n")
        if not marker:
            continue
        section = re.split(r"\n(?=\S)", section)[0]  # up to the next section
        for entry in re.split(r"\n(?=    \S)", section):
            names, colon, text = entry.strip().partition(": ")
            if colon:
                texts |= dict.fromkeys(re.split(r", ", names), " ".join(text.split()))
    return texts


class Keys:
    """The keys below a dataclass; a dataclass that was shown before is linked, not repeated."""

    def __init__(self) -> None:
        self._shown: dict[type, str] = {}  # dataclass -> the prefix under which its keys are listed

    def of(self, cls: type, prefix: str) -> Iterator[Key]:
        """Yield the keys of a dataclass in the order of its fields, below a prefix such as `train.`."""
        base = next((base for base in cls.__mro__ if base in self._shown), None)
        hidden: set[str] = set()
        if base is not None:
            hidden = {field.name for field in dataclasses.fields(base)}
            shown = self._shown[base]
            link = f"[`{shown}*`](#{anchor(shown)})"
            yield Key(
                f"{prefix}*", "", "", f"The keys of {link}, with the same meaning and the same defaults."
            )
        self._shown.setdefault(cls, prefix)
        hints, texts = typing.get_type_hints(cls), meanings(cls)
        for field in dataclasses.fields(cls):
            if field.name in hidden:
                continue
            name, kind = f"{prefix}{field.name}", hints[field.name]
            if (inner := dataclass_in(kind)) is not None:
                yield from self.of(inner, f"{name}." if inner is kind else f"{name}.NAME.")
            elif field.name in texts:
                values = type_name(kind)
                yield Key(name, values, default_of(field), sentence(texts[field.name], values))
            else:
                raise ValueError(
                    f"{name}: no meaning in the `Attributes:` of {cls.__module__}.{cls.__name__}"
                )


def dataclass_in(kind: Any) -> type | None:
    """Return the dataclass that a field holds, or holds by name; else None."""
    if typing.get_origin(kind) is dict:
        kind = typing.get_args(kind)[1]
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def anchor(prefix: str) -> str:
    """Return the heading under which a prefix is listed."""
    return prefix.split(".")[0]


def sentence(text: str, values: str = "") -> str:
    """Return a docstring's entry with a capital letter, unless it begins with code, a symbol or a value."""
    word = text.split()[0].rstrip(",:;")
    as_it_is = (
        not word.isalpha() or not word.islower() or f"`{word}`" in values or re.match("[a-z] [<>=]", text)
    )
    return text if as_it_is else text[0].upper() + text[1:]


def type_name(kind: Any) -> str:
    """Return a type as a user writes its values."""
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
    """Return a field's default as a user writes it."""
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
    """Return the page of all configuration keys."""
    from xtoken_jax.run.experiment import Experiment

    lines = [
        "# Configuration keys",
        "",
        "`xtoken distill` and `xtoken cache-teacher` take these keys as `key=value`. `NAME` stands for a "
        "name of your choice. A key or value that does not exist is refused, with the nearest one that does. "
        "`xtoken distill ... --cfg job` prints the settings of a run without starting it.",
        "",
        "Values use Hydra's grammar: `null` for nothing, `[a,b]` for a list, quotes around texts with commas "
        "or equals signs. All keys exist since version 0.1.0. Generated by `docs/generate.py`.",
        "",
        "## Groups",
        "",
        "A group selects a file of defaults from the folder `configs/`; single keys go on top of it.",
        "",
        "| group | choices |",
        "|---|---|",
    ]
    for group, choices in groups().items():
        lines.append(f"| `{group}=` | {', '.join(f'`{choice}`' for choice in choices)} |")
    hints, texts, keys = typing.get_type_hints(Experiment), meanings(Experiment), Keys()
    fields = dataclasses.fields(Experiment)
    run = [
        Key(field.name, type_name(hints[field.name]), default_of(field), sentence(texts[field.name]))
        for field in fields
        if dataclass_in(hints[field.name]) is None
    ]
    lines += section("Run", run)
    nested = [field.name for field in fields if dataclass_in(hints[field.name]) is hints[field.name]]
    by_name = [field.name for field in fields if typing.get_origin(hints[field.name]) is dict]
    for name in [*nested, *by_name]:  # further teachers last: they have the keys of `teacher` and of `loss`
        inner = dataclass_in(hints[name])
        assert inner is not None
        lines += section(f"`{name}`", keys.of(inner, f"{name}." if name in nested else f"{name}.NAME."))
    return "\n".join(lines) + "\n"


def section(title: str, rows: typing.Iterable[Key]) -> list[str]:
    """Return the lines of one table of keys."""
    lines = ["", f"## {title}", "", "| key | values | default | meaning |", "|---|---|---|---|"]
    for key in rows:
        cells = (f"`{key.name}`", key.type, key.default, key.meaning)
        lines.append("| " + " | ".join(escaped(cell) for cell in cells) + " |")
    return lines


def escaped(cell: str) -> str:
    """Return a text that does not end its cell of a table."""
    return cell.replace("|", "\\|")


def groups() -> dict[str, list[str]]:
    """Map each configuration group to its choices."""
    from xtoken_jax.run.experiment import CONFIG_FOLDER

    folders = sorted(path for path in CONFIG_FOLDER.iterdir() if path.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def commands() -> str:
    """Return the page of all commands, from their parsers."""
    from xtoken_jax.cli.parser import make_parser

    lines = [
        "# Commands",
        "",
        "`xtoken COMMAND --help` prints the same in the terminal. Every command exits with 0 when it "
        "succeeds. After a wrong input it prints one line that names it, and exits with 2. Generated by "
        "`docs/generate.py`.",
        "",
    ]
    for name, parser in make_parser()[1].items():
        lines += [f"## `xtoken {name}`", "", sentence(parser.description or "").rstrip(".") + ".", ""]
        lines += ["```text", usage(parser), "```", "", "| argument | meaning |", "|---|---|"]
        for action in arguments(parser):
            lines.append(f"| {escaped(shown(action))} | {escaped(meaning(action, name))} |")
        if parser.epilog:
            lines += ["", "```text", parser.epilog.strip("\n"), "```"]
        lines.append("")
    return "\n".join(lines)


def arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the arguments of a command: positional ones first, --help left out."""
    actions = [action for action in parser._actions if action.dest != "help"]
    return sorted(actions, key=lambda action: bool(action.option_strings))


def value(action: argparse.Action) -> str:
    """Return the placeholder of an argument's value; empty for a switch."""
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    name = str(action.metavar or action.dest.upper())
    return {"+": f"{name} ...", "*": f"[{name} ...]"}.get(str(action.nargs), name)


def shown(action: argparse.Action) -> str:
    """Return an argument with its spellings and its value, as code."""
    names = ", ".join(f"`{option}`" for option in action.option_strings)
    return f"{names} `{value(action)}`" if names and value(action) else names or f"`{value(action)}`"


def meaning(action: argparse.Action, command: str) -> str:
    """Return an argument's help, and whether it is required."""
    if action.help is None and action.metavar == "KEY=VALUE":
        return "Settings: [all keys](configuration.md)."
    if not action.help:
        raise ValueError(f"xtoken {command}: {action.dest} has no help")
    required = " Required." if action.required and action.option_strings else ""
    return sentence(action.help).rstrip(".") + "." + required


def usage(parser: argparse.ArgumentParser) -> str:
    """Return one line on how to call a command; argparse's own differs between versions of Python."""
    parts = []
    for action in arguments(parser):
        name = action.option_strings[-1] if action.option_strings else ""
        text = " ".join(filter(None, (name, value(action))))
        parts.append(text if action.required or text.startswith("[") else f"[{text}]")
    lines, width = [parser.prog], 100
    for part in parts:
        if len(lines[-1]) + len(part) >= width:
            lines.append(" " * len(parser.prog))
        lines[-1] += f" {part}"
    return "\n".join(lines)


# Public names by topic, in the order of the page. A name of `losses` has its prefix.
API = {
    "Tokenizers": "Tokenizer TokenizerPair",
    "Alignment": (
        "align align_completions align_chats pack to_batch AlignedBatch token_rows collate "
        "Alignment TokenRows align_tokens chunks_of_ids TokenAlignment"
    ),
    "Projection W": (
        "build_projection cached_projection ProjectionOptions Projection LearnableProjection "
        "Partition prefix_tables shard_projection save_projection load_projection"
    ),
    "Audit": "audit Audit",
    "Errors": "UserError",
    "Losses of a chunk": (
        "losses.projection_kl losses.hybrid_kl losses.hybrid_terms losses.HybridTerms "
        "losses.prefix_kl losses.rank_l1 losses.likelihood_matching losses.same_vocabulary_kl "
        "losses.same_vocabulary_kl_by_chunk"
    ),
    "From chunks to the objective": (
        "losses.valid_chunks losses.masked_mean losses.next_token_cross_entropy losses.total_loss "
        "losses.dynamic_scale losses.kd_scale_capped"
    ),
    "By configuration": "losses.LossConfig losses.LossKind losses.loss_tables losses.distillation_loss",
    "Several teachers": (
        "losses.combine_teachers losses.TeacherTerm losses.teacher_scores "
        "losses.blockwise_teacher_scores losses.TeacherScores losses.average_logits "
        "losses.TeachersConfig losses.TeachersMode losses.Score"
    ),
    "From hidden states": "losses.blockwise_loss losses.BlockwiseLoss",
    "Split vocabularies": (
        "losses.vocab_parallel_cross_entropy losses.vocab_parallel_hybrid_kl "
        "losses.vocab_parallel_hybrid_terms losses.vocab_parallel_likelihood_matching "
        "losses.vocab_parallel_prefix_kl losses.vocab_parallel_projection_kl"
    ),
}


def public_names() -> list[str]:
    """Return the public names of the package; those of `losses` have its prefix."""
    import xtoken_jax

    names = [name for name in xtoken_jax.__all__ if name != "losses"]
    return names + [f"losses.{name}" for name in xtoken_jax.losses.__all__]


def api() -> str:
    """Return the page of the Python API, whose entries mkdocstrings fills in."""
    public, placed = set(public_names()), " ".join(API.values()).split()
    if forgotten := sorted(public - set(placed)):
        raise ValueError(f"name a topic in API for the public names {', '.join(forgotten)}")
    lines = [
        "# Python API",
        "",
        "The public names of `xtoken_jax` and `xtoken_jax.losses`. Everything else may change without "
        "notice. Names are loaded on first use, so `import xtoken_jax` is fast, and the losses need only jax "
        "and numpy.",
        "",
        "Shapes are given in [letters](../concepts.md#shape-letters). [The losses in your "
        "code](../guides/python.md) shows how the parts fit together.",
    ]
    for topic, names in API.items():
        lines += ["", f"## {topic}"]
        for name in names.split():
            if name in public:
                lines += ["", f"::: xtoken_jax.{name}"]
    return "\n".join(lines) + "\n"


PAGES = {"configuration.md": configuration, "commands.md": commands, "api.md": api}


def write() -> None:
    """Write the pages that changed."""
    REFERENCE.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        path, text = REFERENCE / name, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    write()
