"""Counts for one source: tokens, targets, and the records that give no row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from xtoken_jax.alignment.spans import Side, Spans
from xtoken_jax.data.records import Document, says_nothing, text_of

BLANK = "blank"
NOTHING_TO_LEARN = "with nothing to learn"
CUT_OFF = "whose targets do not fit a row"


@dataclass
class Tally:
    """Counts over the records of one source that were read.

    Attributes:
        records: number of records read.
        tokens: student tokens in all rows.
        targets: student tokens that the loss is on.
        unguided: those of them that no teacher's chunk covers: the cross-entropy alone is on them.
        endless: turns of the assistant that end without a control token.
        skipped: reason (`BLANK`, `NOTHING_TO_LEARN`, `CUT_OFF`) -> records that give no row.
    """

    records: int = 0
    tokens: int = 0
    targets: int = 0
    unguided: int = 0
    endless: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, document: Document, row: Side, parts: Sequence[Side], unguided: int = 0) -> None:
        """Count one record.

        Args:
            document: the record.
            row: the student's tokens of all of it.
            parts: the student's tokens of the parts that training reads.
            unguided: the number of their targets that no teacher's chunk covers.
        """
        self.records += 1
        self.tokens += sum(map(len, parts))
        # The first token of a part is predicted by nothing.
        self.targets += sum(int(part.targets[1:].sum()) for part in parts)
        self.unguided += unguided
        self.endless += row.endless
        if not parts:
            self.skipped[_reason(document, row)] += 1

    def describe(self, *, taught: bool = False) -> str:
        """One line, such as `1,204 of 5,310 tokens are targets; skipped 2 of 90 records: 2 blank`.

        Args:
            taught: whether there is a teacher.
        """
        line = f"{self.targets:,} of {self.tokens:,} tokens are targets"
        if taught and self.unguided:
            line += f", {self.unguided:,} of them without a teacher: the two sides write other bytes there"
        if self.endless:
            line += (
                "; assistant's turns without an end marker in the student's chat template, after which the "
                f"student does not learn to stop: {self.endless:,}"
            )
        if self.skipped:
            line += f"; skipped {self.skipped.total():,} of {self.records:,} records: {self.reasons()}"
        return line

    def reasons(self) -> str:
        """The skipped records by reason, such as `2 blank, 1 with nothing to learn`."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.most_common())


def count_unguided(aligned: Iterable[Spans]) -> int:
    """The number of a part's targets that no teacher's chunk covers.

    Args:
        aligned: the part as each teacher reads it, of the same student tokens.
    """
    missing: list[np.ndarray] = []
    for spans in aligned:
        counts = np.append(spans.exact, False)  # the last place is for id -1
        for side in (spans.student, spans.teacher):
            counts[side.chunks[~side.targets]] = False
            counts[side.chunks[:1]] = False  # nothing predicts the first token
        missing.append(spans.student.targets & ~counts[spans.student.chunks])
    return int(np.logical_and.reduce(missing)[1:].sum())


def _reason(document: Document, row: Side) -> str:
    if says_nothing(document):
        return NOTHING_TO_LEARN if text_of(document).strip() else BLANK
    return CUT_OFF if row.targets[1:].any() else NOTHING_TO_LEARN
