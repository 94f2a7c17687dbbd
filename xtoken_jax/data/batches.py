"""Documents -> aligned windows -> Batch, the one type that goes to the devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grain
import jax

from xtoken_jax.alignment.align import collate, token_rows
from xtoken_jax.alignment.batch import Alignment, TokenRows
from xtoken_jax.alignment.rows import cut_together, with_document_marks
from xtoken_jax.alignment.spans import Side, Spans, align_texts_together
from xtoken_jax.data.shapes import text_of
from xtoken_jax.data.sources import SourceConfig, read_documents
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import TokenizerPair

_TEXTS_AT_ONCE = 256  # texts tokenized in one call: enough to keep all cores busy


@dataclass
class DataConfig:
    """What is trained on and measured on, and the shape of a batch.

    Attributes:
        train, validation: sources of text; each a list or, so that single values can be
            overridden, a mapping of name -> source.
        student_length, teacher_length: T_s and T_t, tokens a row.
        teacher_lengths: name of a teacher -> T_t of its own, such as a shorter one where its tokens are
            longer.
        batch_size: B, rows of the global batch.
        seed: of the order of the rows.
    """

    train: dict[str, SourceConfig] = field(default_factory=dict)
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    student_length: int = 1024
    teacher_length: int = 1024
    teacher_lengths: dict[str, int] = field(default_factory=dict)
    batch_size: int = 8
    seed: int = 0

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        lengths = {name: getattr(self, name) for name in ("student_length", "teacher_length")}
        lengths |= {f"teacher_lengths.{name}": length for name, length in self.teacher_lengths.items()}
        for name, length in lengths.items():
            if length < 2:
                raise UserError(f"data.{name}={length}: must be at least 2")
        if self.batch_size < 1:
            raise UserError(f"data.batch_size={self.batch_size}: must be at least 1")
        for part in ("train", "validation"):
            sources = getattr(self, part)
            if not sources:
                raise UserError(f"data.{part}: name at least one source of text")
            for name, source in sources.items():
                source.validate(f"data.{part}.{name}")

    def length_of(self, teacher: str) -> int:
        """T_t of a teacher."""
        return self.teacher_lengths.get(teacher, self.teacher_length)


Window = dict[str, Spans]  # a row as each teacher, by its name, reads it; of the same student tokens


def student_of(window: Window) -> Side:
    """The student's tokens; their chunk ids are those of the first teacher's alignment."""
    return next(iter(window.values())).student


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TeacherBatch:
    """A batch as one teacher reads it.

    Attributes:
        rows: TokenRows of [B, T_t].
        alignment: chunk ids of its tokens and of the student's, and which chunks count.
    """

    rows: TokenRows
    alignment: Alignment


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One batch: the same text for the student and for each teacher.

    Attributes:
        student: TokenRows of [B, T_s].
        teachers: by name.
    """

    student: TokenRows
    teachers: dict[str, TeacherBatch]


@dataclass(frozen=True)
class Record:
    """Where a row of a batch comes from.

    Attributes:
        source: its name in the config.
        document: its number among those of the source that hold text, from 0.
        part: which row of the document it is, from 0.
    """

    source: str
    document: int
    part: int


class Windows(list[Window]):
    """The aligned rows of one source, in the order of its text.

    Attributes:
        records: of each row, where it comes from.
        digest: of the documents, as `Documents.digest` says.
    """

    def __init__(self, rows: Sequence[Window], records: list[Record], digest: str) -> None:
        """Rows with what is known of them."""
        super().__init__(rows)
        self.records = records
        self.digest = digest


def read_windows(
    pairs: Mapping[str, TokenizerPair], sources: dict[str, SourceConfig], config: DataConfig
) -> dict[str, Windows]:
    """Read, tokenize and align the documents of each source, cut to the batch's row lengths.

    Args:
        pairs: by teacher; the student's tokenizer is one. Without a teacher, the student's with itself.
        sources: by name.
        config: lengths of the rows.

    Raises:
        UserError: a source without text, or without a window of two tokens.
    """
    lengths = [config.length_of(name) for name in pairs]
    windows: dict[str, Windows] = {}
    for name, source in sources.items():
        documents = read_documents(source)
        rows: list[Window] = []
        records: list[Record] = []
        for first in range(0, len(documents), _TEXTS_AT_ONCE):
            texts = [text_of(document) for document in documents[first : first + _TEXTS_AT_ONCE]]
            for document, row in enumerate(align_texts_together([*pairs.values()], texts), first):
                parts = cut_together(_marked(pairs, row), config.student_length, lengths)
                kept = [dict(zip(pairs, part, strict=True)) for part in parts if len(part[0].student) > 1]
                rows += kept
                records += [Record(name, document, part) for part in range(len(kept))]
        windows[name] = Windows(rows, records, documents.digest)
        if not windows[name]:
            raise UserError(f"source {name!r}: its text is too short, no row has two tokens")
    return windows


def _marked(pairs: Mapping[str, TokenizerPair], row: Sequence[Spans]) -> list[Spans]:
    return [with_document_marks(pair, spans) for pair, spans in zip(pairs.values(), row, strict=True)]


def make_batch(pairs: Mapping[str, TokenizerPair], rows: Sequence[Window], config: DataConfig) -> Batch:
    """Pad and stack aligned windows; numpy arrays until they are put on devices."""
    student = next(iter(pairs.values())).student
    teachers = {}
    for name, pair in pairs.items():
        length, spans = config.length_of(name), [row[name] for row in rows]
        teachers[name] = TeacherBatch(
            token_rows([s.teacher for s in spans], length, pair.teacher.pad_id),
            collate(spans, config.student_length, length),
        )
    own = token_rows([student_of(row) for row in rows], config.student_length, student.pad_id)
    return Batch(own, teachers)


def training_batches(
    pairs: Mapping[str, TokenizerPair], windows: Mapping[str, Sequence[Window]], config: DataConfig
) -> grain.DatasetIterator:
    """An endless iterator of Batch, shuffled anew in every epoch, whose position can be saved.

    Raises:
        UserError: fewer windows than rows in a batch.
    """
    rows = [window for part in windows.values() for window in part]
    if len(rows) < config.batch_size:
        raise UserError(
            f"the training text fills {len(rows)} rows of {config.student_length} student tokens, fewer than "
            f"data.batch_size={config.batch_size}; give more text, shorter rows or a smaller batch"
        )
    dataset = _in_order(rows, config, lambda batch: make_batch(pairs, batch, config))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def batch_records(windows: dict[str, Windows], config: DataConfig) -> Callable[[int], list[Record]]:
    """Number of a batch of `training_batches`, from 0 -> where its rows come from, in their order."""
    records = [record for part in windows.values() for record in part.records]
    dataset = _in_order(records, config, list)
    return lambda number: dataset[number]


def _in_order(
    rows: Sequence[Any], config: DataConfig, batch_fn: Callable[[Sequence[Any]], Any]
) -> grain.MapDataset:
    return (
        grain.MapDataset.source(rows)
        .seed(config.seed)
        .shuffle()
        .repeat()
        # Without the flag grain rounds the endless length up, past the largest index, for batches of 1.
        .batch(config.batch_size, drop_remainder=True, batch_fn=batch_fn)
    )
