"""Documents -> aligned windows -> Batch, the one type that goes to the devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grain
import jax

from xtoken_jax.alignment.align import collate, token_rows
from xtoken_jax.alignment.batch import Alignment, TokenRows
from xtoken_jax.alignment.rows import cut, with_document_marks
from xtoken_jax.alignment.spans import Spans, align_texts
from xtoken_jax.data.sources import SourceConfig, digest, read_documents
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
        batch_size: B, rows of the global batch.
        seed: of the order of the rows.
    """

    train: dict[str, SourceConfig] = field(default_factory=dict)
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    student_length: int = 1024
    teacher_length: int = 1024
    batch_size: int = 8
    seed: int = 0

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        for name in ("student_length", "teacher_length"):
            if getattr(self, name) < 2:
                raise UserError(f"data.{name}={getattr(self, name)}: must be at least 2")
        if self.batch_size < 1:
            raise UserError(f"data.batch_size={self.batch_size}: must be at least 1")
        for part in ("train", "validation"):
            sources = getattr(self, part)
            if not sources:
                raise UserError(f"data.{part}: name at least one source of text")
            for name, source in sources.items():
                source.validate(f"data.{part}.{name}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One batch on both sides.

    Attributes:
        student, teacher: TokenRows of [B, T_s] and [B, T_t].
        alignment: chunk ids of the tokens and which chunks count.
    """

    student: TokenRows
    teacher: TokenRows
    alignment: Alignment


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


class Windows(list[Spans]):
    """The aligned rows of one source, in the order of its text.

    Attributes:
        records: of each row, where it comes from.
        digest: of the documents, as `xtoken_jax.data.sources.digest` gives it.
    """

    def __init__(self, rows: Sequence[Spans], records: list[Record], digest: str) -> None:
        """Rows with what is known of them."""
        super().__init__(rows)
        self.records = records
        self.digest = digest


def read_windows(
    pair: TokenizerPair, sources: dict[str, SourceConfig], config: DataConfig
) -> dict[str, Windows]:
    """Read, tokenize and align the documents of each source, cut to the batch's row lengths.

    Raises:
        UserError: a source without text, or without a window of two tokens.
    """
    windows: dict[str, Windows] = {}
    for name, source in sources.items():
        documents = read_documents(source)
        rows, records = [], []
        for first in range(0, len(documents), _TEXTS_AT_ONCE):
            texts = documents[first : first + _TEXTS_AT_ONCE]
            for document, spans in enumerate(align_texts(pair, texts), first):
                marked = with_document_marks(pair, spans)
                parts = cut(marked, config.student_length, config.teacher_length)
                kept = [window for window in parts if len(window.student) > 1]
                rows += kept
                records += [Record(name, document, part) for part in range(len(kept))]
        windows[name] = Windows(rows, records, digest(documents))
        if not windows[name]:
            raise UserError(f"source {name!r}: its text is too short, no row has two tokens")
    return windows


def make_batch(pair: TokenizerPair, rows: Sequence[Spans], config: DataConfig) -> Batch:
    """Pad and stack aligned windows; numpy arrays until they are put on devices."""
    return Batch(
        token_rows([r.student for r in rows], config.student_length, pair.student.pad_id),
        token_rows([r.teacher for r in rows], config.teacher_length, pair.teacher.pad_id),
        collate(rows, config.student_length, config.teacher_length),
    )


def training_batches(
    pair: TokenizerPair, windows: Mapping[str, Sequence[Spans]], config: DataConfig
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
    dataset = _in_order(rows, config, lambda batch: make_batch(pair, batch, config))
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
