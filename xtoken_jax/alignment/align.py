"""Texts -> ids on both sides and their alignment, padded to fixed lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xtoken_jax.alignment.arguments import check_fit, check_lengths, check_sides
from xtoken_jax.alignment.batch import AlignedBatch, Alignment, TokenRows
from xtoken_jax.alignment.rows import truncate, with_document_marks
from xtoken_jax.alignment.spans import Side, Spans, align_texts
from xtoken_jax.tokens.arguments import check_list, check_pair, check_texts
from xtoken_jax.tokens.tokenizer import TokenizerPair


def pad(rows: Sequence[np.ndarray], length: int, fill: int, *, side: str = "right") -> np.ndarray:
    """[B, length] in the rows' dtype: rows of at most `length`, filled on one side."""
    out = np.full((len(rows), length), fill, rows[0].dtype if len(rows) else np.int32)
    for target, row in zip(out, rows, strict=True):
        target[slice(None, len(row)) if side == "right" else slice(length - len(row), None)] = row
    return out


def token_rows(sides: Sequence[Side], length: int, pad_id: int, *, padding_side: str = "right") -> TokenRows:
    """One side of a batch as arrays.

    Args:
        sides: B rows of at most `length` tokens.
        length: T.
        pad_id: what rows are filled with.
        padding_side: "right" or "left".

    Returns:
        TokenRows of numpy arrays [B, T]. A row's first token, and the first of every packed
        document, is no target: no position of its document predicts it.
    """

    sides = check_list("sides", sides, Side, "Side, such as Spans.student")
    check_lengths(length=length)
    check_sides(padding_side=padding_side)
    check_fit("sides", sides, length)

    def padded(arrays: list[np.ndarray], fill: int) -> np.ndarray:
        return pad(arrays, length, fill, side=padding_side)

    arrays: dict[str, Any] = {
        "ids": padded([s.ids for s in sides], pad_id),
        "mask": padded([np.ones(len(s), bool) for s in sides], False),
        "targets": padded([s.targets & ~_opens(s) for s in sides], False),
        "segments": padded([s.segments + np.int32(1) for s in sides], 0),
    }
    return TokenRows(**arrays)


def _opens(side: Side) -> np.ndarray:
    """bool [T]: the first token of each document of a row."""
    opens = np.ones(len(side), bool)
    opens[1:] = side.segments[1:] != side.segments[:-1]
    return opens


def collate(
    rows: Sequence[Spans], student_length: int, teacher_length: int, *, padding_side: str = "right"
) -> Alignment:
    """The alignment of several rows that fit; C = min(student_length, teacher_length).

    Every chunk needs a token on each side, so no row can hold more of them. A chunk counts if
    its bytes are equal on both sides, all its tokens are targets and it opens no document on
    either side: nothing predicts a document's first token, so that the two sides' other
    positions would stand for different bytes.
    """
    rows = check_list("rows", rows, Spans, "Spans, a row of `align_texts`")
    check_lengths(student_length=student_length, teacher_length=teacher_length)
    check_sides(padding_side=padding_side)
    check_fit("rows of the student", [row.student for row in rows], student_length)
    check_fit("rows of the teacher", [row.teacher for row in rows], teacher_length)
    valid = np.zeros((len(rows), min(student_length, teacher_length)), bool)
    for row, spans in enumerate(rows):
        kept = spans.exact.copy()
        for side in (spans.student, spans.teacher):
            without = side.chunks[~side.targets | _opens(side)]
            kept[without[without >= 0]] = False
        valid[row, : len(kept)] = kept
    return Alignment(
        pad([r.student.chunks for r in rows], student_length, -1, side=padding_side),
        pad([r.teacher.chunks for r in rows], teacher_length, -1, side=padding_side),
        valid,
    )


def align(
    pair: TokenizerPair,
    texts: Sequence[str],
    *,
    student_length: int,
    teacher_length: int,
    document_marks: bool = True,
    padding_side: str = "right",
    truncation_side: str = "right",
) -> AlignedBatch:
    """Encode and align a batch of texts.

    Args:
        pair: student's and teacher's tokenizer.
        texts: B texts.
        student_length: T_s, tokens a row; a longer row is cut, and a chunk that loses a token
            on either side is gone.
        teacher_length: T_t.
        document_marks: add BOS and EOS as `with_document_marks` does.
        padding_side, truncation_side: "right" or "left", on both sides of the pair.

    Returns:
        AlignedBatch: `student` and `teacher` are TokenRows with ids int32 [B, T], `mask` and `targets`
        bool [B, T]. It unpacks as (student_ids, teacher_ids, alignment).

    Raises:
        UserError: a text that is not valid Unicode; one text instead of a list; a side that is neither
            "right" nor "left"; a length below 1.

    Example:
        batch = align(pair, ["1 + 201"], student_length=8, teacher_length=8)
        ce, labels = next_token_cross_entropy(logits, batch.student.ids, batch.student.targets)
    """
    check_pair(pair)
    check_sides(padding_side=padding_side, truncation_side=truncation_side)
    check_lengths(student_length=student_length, teacher_length=teacher_length)
    return to_batch(
        pair,
        align_texts(pair, check_texts("texts", texts)),
        student_length=student_length,
        teacher_length=teacher_length,
        document_marks=document_marks,
        padding_side=padding_side,
        truncation_side=truncation_side,
    )


def to_batch(
    pair: TokenizerPair,
    rows: Sequence[Spans],
    *,
    student_length: int,
    teacher_length: int,
    document_marks: bool = False,
    padding_side: str = "right",
    truncation_side: str = "right",
) -> AlignedBatch:
    """Make a batch of rows that `align_completions`, `align_chats` or `pack` returned.

    Args:
        pair: student's and teacher's tokenizer.
        rows: B rows.
        student_length, teacher_length, padding_side, truncation_side: as in `align`.
        document_marks: add BOS and EOS as `with_document_marks` does; not for chats, whose templates have
            their own.

    Returns:
        AlignedBatch, as `align` does.

    Raises:
        UserError: something else than rows; a side that is neither "right" nor "left"; a length below 1.
    """
    check_pair(pair)
    check_sides(padding_side=padding_side, truncation_side=truncation_side)
    check_lengths(student_length=student_length, teacher_length=teacher_length)
    rows = check_list("rows", rows, Spans, "Spans, a row of `align_completions` or `align_chats`")
    if document_marks:
        rows = [with_document_marks(pair, r) for r in rows]
    rows = [truncate(r, student_length, teacher_length, side=truncation_side) for r in rows]
    student, teacher = (
        token_rows([getattr(r, name) for r in rows], length, tokenizer.pad_id, padding_side=padding_side)
        for name, length, tokenizer in (
            ("student", student_length, pair.student),
            ("teacher", teacher_length, pair.teacher),
        )
    )
    return AlignedBatch(
        student, teacher, collate(rows, student_length, teacher_length, padding_side=padding_side)
    )
