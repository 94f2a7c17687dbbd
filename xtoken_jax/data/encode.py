"""Documents -> tokens of both sides, aligned, cut to the length of a row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xtoken_jax.alignment.chat import align_chats_together
from xtoken_jax.alignment.prompts import align_completions_together
from xtoken_jax.alignment.rows import cut_together, with_document_marks
from xtoken_jax.alignment.spans import Side, Spans, align_texts_together
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.records import Conversation, Document, Exchange, Marked, says_nothing, text_of
from xtoken_jax.data.tally import Tally, count_unguided
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

LITTLE = 2**19  # student tokens, a second or two of tokenizing
_AT_ONCE = 256  # documents tokenized in one call: enough to keep all cores busy

Part = dict[str, Spans]  # a text as each teacher, by its name, reads it; of the same student tokens


@dataclass(frozen=True)
class Record:
    """Where a part comes from.

    Attributes:
        source: its name in the config.
        document: its number among the records of the source, from 0.
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

    Texts and exchanges get document marks; of a conversation each side's chat template makes all that stands
    around its messages. The targets are what the document asks for. One that says nothing is empty.

    Args:
        pairs: by teacher; the student's tokenizer is one. Without a teacher, the student's with itself.
        documents: a few of them; what becomes of one does not depend on the others.

    Raises:
        UserError: a tokenizer without a chat template; one that refuses a conversation.
    """
    groups: dict[_Align, list[int]] = {}
    for place, document in enumerate(documents):
        groups.setdefault(_how(document), []).append(place)
    encoded: dict[int, tuple[Spans, ...]] = {}
    for align, places in groups.items():
        aligned = align([*pairs.values()], [documents[place] for place in places])
        encoded |= zip(places, aligned, strict=True)
    return [dict(zip(pairs, encoded[place], strict=True)) for place in range(len(documents))]


_Align = Callable[[Sequence[TokenizerPair], Sequence[Any]], list[tuple[Spans, ...]]]


def _how(document: Document) -> _Align:
    """What aligns a document, together with all others for which it is the same."""
    if says_nothing(document):
        return _empty
    if isinstance(document, Conversation):
        return _chats if document.targets == "assistant" else _whole_chats
    if isinstance(document, Exchange) and document.targets == "completion":
        return _exchanges
    return _rendered if isinstance(document, Marked) else _texts


def _empty(pairs: Sequence[TokenizerPair], documents: Sequence[Document]) -> list[tuple[Spans, ...]]:
    return align_texts_together(pairs, [""] * len(documents))


def _texts(pairs: Sequence[TokenizerPair], documents: Sequence[str | Exchange]) -> list[tuple[Spans, ...]]:
    return _marked(pairs, align_texts_together(pairs, [text_of(document) for document in documents]))


def _rendered(pairs: Sequence[TokenizerPair], documents: Sequence[str]) -> list[tuple[Spans, ...]]:
    """Texts whose markers are tokens; a document mark that a text spells itself is not added again."""
    reading = [TokenizerPair(_reads_markers(pair.student), _reads_markers(pair.teacher)) for pair in pairs]
    rows = align_texts_together(reading, documents)
    return [
        tuple(
            with_document_marks(_unmarked(pair, spans), spans) for pair, spans in zip(pairs, row, strict=True)
        )
        for row in rows
    ]


def _reads_markers(tokenizer: Tokenizer) -> Tokenizer:
    return replace(tokenizer, backend=tokenizer.markup_backend)


def _unmarked(pair: TokenizerPair, spans: Spans) -> TokenizerPair:
    """The pair without the document marks that a row has on that side."""

    def without(tokenizer: Tokenizer, ids: np.ndarray) -> Tokenizer:
        bos, eos = (tokenizer.roles.get(role) for role in ("bos", "eos"))
        if len(ids) and ids[0] == bos:
            tokenizer = replace(tokenizer, adds_bos=False)
        if len(ids) and ids[-1] == eos:
            tokenizer = replace(tokenizer, roles={r: i for r, i in tokenizer.roles.items() if r != "eos"})
        return tokenizer

    return TokenizerPair(without(pair.student, spans.student.ids), without(pair.teacher, spans.teacher.ids))


def _exchanges(pairs: Sequence[TokenizerPair], documents: Sequence[Exchange]) -> list[tuple[Spans, ...]]:
    prompts, completions = [d.prompt for d in documents], [d.completion for d in documents]
    return _marked(pairs, align_completions_together(pairs, prompts, completions))


def _marked(pairs: Sequence[TokenizerPair], rows: Sequence[tuple[Spans, ...]]) -> list[tuple[Spans, ...]]:
    return [
        tuple(with_document_marks(pair, spans) for pair, spans in zip(pairs, row, strict=True))
        for row in rows
    ]


def _chats(
    pairs: Sequence[TokenizerPair], documents: Sequence[Conversation], targets: str = "assistant"
) -> list[tuple[Spans, ...]]:
    return align_chats_together(
        pairs,
        [document.messages for document in documents],
        targets=targets,
        where=lambda place: documents[place].where(),
    )


_whole_chats = functools.partial(_chats, targets="all")


def cut_parts(row: Part, config: DataConfig) -> list[Part]:
    """A document's parts, each within a row's length on every side, cut where all tokenizers have a border.

    A part is left out if nothing in it can be learnt: one of a single token, or of a prompt alone.
    """
    lengths = [config.length_of(name) for name in row]
    parts = cut_together([*row.values()], config.student_length, lengths)
    return [dict(zip(row, part, strict=True)) for part in parts if part[0].student.targets[1:].any()]


def read_parts(
    pairs: Mapping[str, TokenizerPair],
    documents: Mapping[str, Sequence[Document]],
    config: DataConfig,
    *,
    tallies: MutableMapping[str, Tally] | None = None,
) -> dict[str, list[Part]]:
    """All parts of each source's documents, in the order of its text.

    Args:
        pairs: by teacher.
        documents: by source.
        config: lengths.
        tallies: receives the counts of each source by its name.

    Raises:
        UserError: a source that is too short for a part with a token to learn.
    """
    found: dict[str, list[Part]] = {}
    for name, texts in documents.items():
        found[name], tally = [], Tally()
        for first in range(0, len(texts), _AT_ONCE):
            for _, parts in _cut_documents(pairs, texts[first : first + _AT_ONCE], config, tally):
                found[name] += parts
        _check_rows(name, found[name], tally)
        if tallies is not None:
            tallies[name] = tally
    return found


def _cut_documents(
    pairs: Mapping[str, TokenizerPair], documents: Sequence[Document], config: DataConfig, tally: Tally
) -> Iterator[tuple[Part, list[Part]]]:
    """Each document as a whole and in parts, counted."""
    for document, row in zip(documents, encode(pairs, documents), strict=True):
        parts = cut_parts(row, config)
        unguided = sum(count_unguided(part.values()) for part in parts)
        tally.add(document, student_of(row), [student_of(part) for part in parts], unguided)
        yield row, parts


def _check_rows(name: str, rows: Sequence[object], tally: Tally) -> None:
    if not rows:
        raise UserError(
            f"source {name!r}: no row has a token to learn; of its {tally.records:,} records, "
            f"{tally.reasons() or 'none was read'}"
        )


def cut_little(
    pairs: Mapping[str, TokenizerPair],
    documents: Mapping[str, Sequence[Document]],
    config: DataConfig,
    *,
    tallies: MutableMapping[str, Tally] | None = None,
) -> dict[str, list[tuple[Record, Part]]] | None:
    """All parts of each source, where the text is little enough to be cut up front; None where it is more.

    Args:
        pairs: by teacher.
        documents: by source.
        config: lengths and batch size.
        tallies: receives the counts of each source by its name; of much text, those of its first records.

    Raises:
        UserError: a source that is too short for a part with a token to learn; of little text, fewer parts
            in all than rows in a batch.
    """
    found: dict[str, list[tuple[Record, Part]]] = {}
    tokens, little = 0, True
    for name, texts in documents.items():
        found[name], tally = [], Tally()
        first, at_once = 0, 4  # of long texts, a few are much already
        # Of much text, as little is read as shows that a source has any.
        while first < len(texts) and (little or not found[name]):
            rows = _cut_documents(pairs, texts[first : first + at_once], config, tally)
            for document, (row, parts) in enumerate(rows, first):
                found[name] += [(Record(name, document, part), cut) for part, cut in enumerate(parts)]
                tokens += len(student_of(row))
            first, at_once = first + at_once, min(2 * at_once, _AT_ONCE)
            little = tokens <= LITTLE
        _check_rows(name, found[name], tally)
        if tallies is not None:
            tallies[name] = tally
    if not little:
        return None
    if (count := sum(map(len, found.values()))) < config.batch_size:
        raise UserError(
            f"the training text fills {count} rows of {config.student_length} student tokens, fewer than "
            f"data.batch_size={config.batch_size}; give more text, shorter rows or a smaller batch"
        )
    return found
