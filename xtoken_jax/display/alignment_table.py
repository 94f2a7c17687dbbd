"""An aligned row on the terminal: both segmentations, one above the other, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from xtoken_jax.alignment.spans import Side, Spans
from xtoken_jax.coverage.token_rows import token_text, visible
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

_BETWEEN_TOKENS, _BETWEEN_COLUMNS = "┊", "┃"
_NAMES = ("student", "teacher")
_STYLES = {"one": "", "several": "yellow", "differs": "bold red", "gap": "cyan"}


@dataclass(frozen=True)
class Column:
    """A chunk, or a run of tokens without one.

    Attributes:
        chunk: its number, None for tokens in no chunk.
        student, teacher: the texts of the tokens, blanks as ·, special tokens as they are spelled.
        exact: both sides are the same bytes; False for tokens in no chunk.
    """

    chunk: int | None
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    exact: bool

    @property
    def kind(self) -> str:
        """ "gap", "differs" in bytes, "several" tokens on a side, or "one" to one."""
        if self.chunk is None:
            return "gap"
        if not self.exact:
            return "differs"
        return "several" if len(self.student) > 1 or len(self.teacher) > 1 else "one"


def columns(pair: TokenizerPair, spans: Spans) -> list[Column]:
    """The chunks of a row and the runs of tokens between them, in the order of the text."""
    student = _runs(pair.student, spans.student)
    teacher = _runs(pair.teacher, spans.teacher)
    found = []
    for chunk in range(spans.chunk_count + 1):
        # What stands in front of a chunk, and behind the last one.
        gaps = student.get((chunk, False), ()), teacher.get((chunk, False), ())
        if any(gaps):
            found.append(Column(None, *gaps, False))
        if chunk < spans.chunk_count:
            inside = student.get((chunk, True), ()), teacher.get((chunk, True), ())
            found.append(Column(chunk, *inside, bool(spans.exact[chunk])))
    return found


def _runs(tokenizer: Tokenizer, side: Side) -> dict[tuple[int, bool], tuple[str, ...]]:
    """(chunk, True) -> its tokens; (chunk, False) -> the tokens without a chunk in front of it."""
    runs: dict[tuple[int, bool], tuple[str, ...]] = {}
    reached = np.maximum.accumulate(np.append(-1, side.chunks))[1:] + 1
    for token, chunk, following in zip(
        side.ids.tolist(), side.chunks.tolist(), reached.tolist(), strict=True
    ):
        key = (chunk, True) if chunk >= 0 else (following, False)
        runs[key] = (*runs.get(key, ()), visible(token_text(tokenizer, token)))
    return runs


def show_alignment(pair: TokenizerPair, spans: Spans, console: Console) -> None:
    """Print a row of tokens as two lines, in pieces as wide as the console, and a count of each kind."""
    found = columns(pair, spans)
    for line in _lines(found, console.width):
        for text in line:
            console.print(text, soft_wrap=True)
        console.print()
    counts = {kind: sum(c.kind == kind for c in found) for kind in _STYLES}
    gaps = sum(len(c.student) + len(c.teacher) for c in found if c.kind == "gap")
    console.print(
        Text.assemble(
            f"{len(spans.student)} student tokens, {len(spans.teacher)} teacher tokens, "
            f"{spans.chunk_count} chunks: {counts['one']} of one token on each side, ",
            (f"{counts['several']} of several", _STYLES["several"]),
            ", ",
            (f"{counts['differs']} whose bytes differ", _STYLES["differs"]),
            "; ",
            (f"{gaps} tokens in none", _STYLES["gap"]),
        )
    )


def _lines(found: list[Column], width: int) -> Iterator[tuple[Text, Text]]:
    label = max(map(len, _NAMES)) + 1
    line: list[Column] = []
    used = label + 1
    for column in found:
        need = _width(column) + 1
        if line and used + need > width:
            yield _pair_of_lines(line, label)
            line, used = [], label + 1
        line.append(column)
        used += need
    if line:
        yield _pair_of_lines(line, label)


def _width(column: Column) -> int:
    return max(cell_len(_BETWEEN_TOKENS.join(side)) for side in (column.student, column.teacher))


def _pair_of_lines(line: list[Column], label: int) -> tuple[Text, Text]:
    texts = [Text(name.ljust(label), style="dim").append(_BETWEEN_COLUMNS) for name in _NAMES]
    for column in line:
        for text, side in zip(texts, (column.student, column.teacher), strict=True):
            content = _BETWEEN_TOKENS.join(side)
            text.append(content, style=_STYLES[column.kind] or "default")
            text.append(" " * (_width(column) - cell_len(content)) + _BETWEEN_COLUMNS, style="dim")
    return texts[0], texts[1]
