"""An audit on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from xtoken_jax.coverage.audit import Audit, TextShare
from xtoken_jax.coverage.token_classes import UNUSED
from xtoken_jax.coverage.token_rows import describe_row, short_name, visible

_LONGEST = 16  # characters of a token, so that a run of dashes leaves room for its neighbours


def show_audit(audit: Audit, console: Console) -> None:
    """Print coverage by class, what falls out and where W sends it, the text's share, the loss."""
    console.print(_coverage(audit))
    console.print(
        Text.assemble(
            ("●", "bold"), " critical; common: one to one with a teacher token; H-KL: with its relaxed set"
        )
    )
    reserved = sum(c.empty for c in audit.classes if c.name == UNUSED)
    note = f", {reserved:,} of them kept in reserve" if reserved else ""
    console.print(f"tokens that W sends nowhere: {audit.empty_rows:,}{note}\n")
    console.print(_fallen(audit))
    if audit.sample:
        console.print(_sample(audit.sample))
        often = "   ".join(f"{visible(text, _LONGEST)} ({n:,})" for text, n in audit.sample[0].frequent)
        if often:
            console.print(Text(f"most often outside: {often}\n"))
    loss = audit.recommended_loss, "bold"
    console.print(Text.assemble("recommended loss: ", loss, f"; {audit.reason}"))


def _table(title: str, *numbers: str) -> Table:
    """A table with a column of class names, wide enough for the longest, and columns of numbers."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("class", no_wrap=True, min_width=28)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _coverage(audit: Audit) -> Table:
    student, teacher = short_name(audit.student), short_name(audit.teacher)
    title = f"student tokens that are teacher tokens too: {student} → {teacher}"
    table = _table(title, "tokens", "common", "share", "H-KL", "no row")
    for c in audit.rows:
        cells = [f"{c.size:,}", f"{c.common:,}", f"{c.coverage:.1%}", f"{c.relaxed:,}", f"{c.empty:,}"]
        if not c.size:
            cells = ["0", *[""] * 4]
        style = "dim" if not c.size else "bold" if c.critical else None
        table.add_row(f"{'●' if c.critical else ' '} {c.name}", *cells, style=style)
    return table


def _fallen(audit: Audit) -> Table:
    table = _table("what falls out, and where W sends it")
    table.expand = True  # to the width of the terminal, and no further
    heading = "student token → teacher tokens with weights"
    table.add_column(heading, no_wrap=True, overflow="ellipsis", ratio=1)
    for c in audit.rows:
        if c.missing:
            rows = "    ".join(describe_row(row, _LONGEST) for row in c.missing)
            table.add_row(f"{'●' if c.critical else ' '} {c.name}", Text(rows))
    return table


def _sample(sample: tuple[TextShare, ...]) -> Table:
    whole = sample[0]
    title = f"the text: {whole.tokens:,} student tokens, {whole.bytes:,} bytes; shares of it"
    outside = ("outside\ncommon", "in\nbytes", "outside\nH-KL's", "no\nrow")
    table = _table(title, "tokens", "of the\ntext", *outside)
    for s in sample:
        of_text = (s.tokens, s.outside_strict, s.outside_relaxed, s.empty)
        share, strict, relaxed, empty = (f"{n / whole.tokens:.1%}" for n in of_text)
        lost_bytes = f"{s.outside_strict_bytes / max(whole.bytes, 1):.1%}"
        cells = [f"{s.tokens:,}", share, strict, lost_bytes, relaxed, empty]
        table.add_row(f"  {s.name}", *cells, style="bold" if s is whole else None)
    return table
