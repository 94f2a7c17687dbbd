"""Documents -> tokens of both sides, aligned, cut to the length of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xtoken_jax.alignment.rows import cut_together, with_document_marks
from xtoken_jax.alignment.spans import Side, Spans, align_texts_together
from xtoken_jax.data.config import DataConfig
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import TokenizerPair

LITTLE = 2**19  # student tokens, a second or two of tokenizing
_AT_ONCE = 256  # documents tokenized in one call: enough to keep all cores busy

Document = str
Part = dict[str, Spans]  # a text as each teacher, by its name, reads it; of the same student tokens


@dataclass(frozen=True)
class Record:
    """Where a part comes from.

    Attributes:
        source: its name in the config.
        document: its number among those of the source that hold text, from 0.
        part: which of the document's parts it is, from 0.
    """

    source: str
    document: int
    part: int


def student_of(part: Part) -> Side:
    """The student's tokens; their chunk ids are those of the first teacher's alignment."""
    return next(iter(part.values())).student


def encode(pairs: Mapping[str, TokenizerPair], documents: Sequence[Document]) -> list[Part]:
    """Each document, of whatever length, tokenized by all sides and aligned with each teacher.

    Args:
        pairs: by teacher; the student's tokenizer is one. Without a teacher, the student's with itself.
        documents: a few of them; what becomes of one does not depend on the others.
    """
    aligned = align_texts_together([*pairs.values()], documents)
    return [
        {
            name: with_document_marks(pair, spans)
            for (name, pair), spans in zip(pairs.items(), row, strict=True)
        }
        for row in aligned
    ]


def cut_parts(row: Part, config: DataConfig) -> list[Part]:
    """A document's parts, each within a row's length on every side, cut where all tokenizers have a border.

    A part of one student token is left out: it predicts nothing.
    """
    lengths = [config.length_of(name) for name in row]
    parts = cut_together([*row.values()], config.student_length, lengths)
    return [dict(zip(row, part, strict=True)) for part in parts if len(part[0].student) > 1]


def read_parts(
    pairs: Mapping[str, TokenizerPair], documents: Mapping[str, Sequence[Document]], config: DataConfig
) -> dict[str, list[Part]]:
    """All parts of each source's documents, in the order of its text.

    Raises:
        UserError: a source whose text is too short for a part of two tokens.
    """
    found = {}
    for name, texts in documents.items():
        found[name] = [
            part
            for first in range(0, len(texts), _AT_ONCE)
            for row in encode(pairs, texts[first : first + _AT_ONCE])
            for part in cut_parts(row, config)
        ]
        if not found[name]:
            raise UserError(f"source {name!r}: its text is too short, no row has two tokens")
    return found


def cut_little(
    pairs: Mapping[str, TokenizerPair], documents: Mapping[str, Sequence[Document]], config: DataConfig
) -> dict[str, list[tuple[Record, Part]]] | None:
    """All parts of each source, where the text is little enough to be cut up front; None where it is more.

    Raises:
        UserError: a source whose text is too short for a part of two tokens; of little text, fewer parts in
            all than rows in a batch.
    """
    found: dict[str, list[tuple[Record, Part]]] = {}
    tokens, little = 0, True
    for name, texts in documents.items():
        found[name] = []
        first, at_once = 0, 4  # of long texts, a few are much already
        # Of much text, as little is read as shows that a source has any.
        while first < len(texts) and (little or not found[name]):
            rows = encode(pairs, texts[first : first + at_once])
            for document, row in enumerate(rows, first):
                parts = cut_parts(row, config)
                found[name] += [(Record(name, document, part), cut) for part, cut in enumerate(parts)]
                tokens += len(student_of(row))
            first, at_once = first + at_once, min(2 * at_once, _AT_ONCE)
            little = tokens <= LITTLE
        if not found[name]:
            raise UserError(f"source {name!r}: its text is too short, no row has two tokens")
    if not little:
        return None
    if (count := sum(map(len, found.values()))) < config.batch_size:
        raise UserError(
            f"the training text fills {count} rows of {config.student_length} student tokens, fewer than "
            f"data.batch_size={config.batch_size}; give more text, shorter rows or a smaller batch"
        )
    return found
