"""The console of the `xtoken` command."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from xtoken_jax.errors import printable


class Terminal(Console):
    """A console for texts from anywhere: they are printed as they are, but for what `printable` replaces.

    Rich's markup is off, since names and errors may hold square brackets and colons.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        """Open it on stdout or stderr; lines are not wrapped."""
        super().__init__(
            stderr=stderr, quiet=quiet, highlight=False, soft_wrap=True, markup=False, emoji=False
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a text of a string, which may be a table's cell, before its place is measured."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as Rich does, with texts made printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
