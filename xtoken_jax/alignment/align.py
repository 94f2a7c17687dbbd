"""Texts -> ids on both sides and their alignment, padded to fixed lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.alignment.spans import Spans, align_encodings
from xtoken_jax.tokens.tokenizer import TokenizerPair


def align_texts(pair: TokenizerPair, texts: Sequence[str]) -> Iterator[Spans]:
    """Encode each text with both tokenizers, without special tokens, and align."""
    student = pair.student.encode_batch(list(texts))
    teacher = pair.teacher.encode_batch(list(texts))
    for text, s, t in zip(texts, student, teacher, strict=True):
        yield align_encodings(pair, text, s, t)


def with_document_marks(pair: TokenizerPair, spans: Spans) -> Spans:
    """Add BOS before, where the tokenizer does so itself, and EOS behind, where there is one.

    BOS on both sides, and EOS on both sides, pair with each other; one-sided marks are gaps.
    """
    opens = [[t.roles["bos"]] if t.adds_bos else [] for t in (pair.student, pair.teacher)]
    closes = [[t.roles["eos"]] if "eos" in t.roles else [] for t in (pair.student, pair.teacher)]
    open_pairs, close_pairs = all(opens), all(closes)
    count = spans.chunk_count + open_pairs

    def chunks(inner: np.ndarray, opening: list[int], closing: list[int]) -> np.ndarray:
        shifted = np.where(inner >= 0, inner + open_pairs, -1)
        first = [0 if open_pairs else -1] * len(opening)
        last = [count if close_pairs else -1] * len(closing)
        return np.concatenate([first, shifted, last]).astype(np.int32)

    return Spans(
        np.concatenate([opens[0], spans.student_ids, closes[0]]).astype(np.int32),
        np.concatenate([opens[1], spans.teacher_ids, closes[1]]).astype(np.int32),
        chunks(spans.student_chunks, opens[0], closes[0]),
        chunks(spans.teacher_chunks, opens[1], closes[1]),
        count + close_pairs,
        np.concatenate([[True] * open_pairs, spans.exact, [True] * close_pairs]).astype(bool),
    )


def cut(spans: Spans, student_length: int, teacher_length: int) -> Iterator[Spans]:
    """Cut a text into windows that fit both context lengths, at boundaries both tokenizers share.

    A chunk longer than a window loses the tokens that overflow it and is not `exact` there.
    """
    starts = [
        np.searchsorted(_filled(chunks), np.arange(spans.chunk_count + 1))
        for chunks in (spans.student_chunks, spans.teacher_chunks)
    ]
    # Gaps in front of the first chunk and behind the last stay with those chunks.
    for start, ids in zip(starts, (spans.student_ids, spans.teacher_ids), strict=True):
        start[0], start[-1] = 0, len(ids)
    first = 0
    while first < spans.chunk_count:
        last = min(
            int(np.searchsorted(start, start[first] + length, side="right")) - 1
            for start, length in zip(starts, (student_length, teacher_length), strict=True)
        )
        last = max(last, first + 1)
        yield _window(spans, starts, first, last, (student_length, teacher_length))
        first = last


def _filled(chunks: np.ndarray) -> np.ndarray:
    """Chunk ids in which a gap takes the id of the token before it, so that they never fall."""
    return np.maximum.accumulate(chunks) if len(chunks) else chunks


def _window(spans: Spans, starts: list[np.ndarray], first: int, last: int, lengths: tuple[int, int]) -> Spans:
    ids, chunks, complete = [], [], np.ones(last - first, bool)
    sides = [(spans.student_ids, spans.student_chunks), (spans.teacher_ids, spans.teacher_chunks)]
    for (side_ids, side_chunks), start, length in zip(sides, starts, lengths, strict=True):
        end = min(start[last], start[first] + length)
        lost = side_chunks[end : start[last]]
        complete[lost[lost >= 0] - first] = False
        kept = side_chunks[start[first] : end]
        ids.append(side_ids[start[first] : end])
        chunks.append(np.where(kept >= 0, kept - first, -1).astype(np.int32))
    return Spans(ids[0], ids[1], chunks[0], chunks[1], last - first, spans.exact[first:last] & complete)


def pad(rows: Sequence[np.ndarray], length: int, fill: int) -> np.ndarray:
    """int32 [B, length]: rows cut or filled on the right."""
    out = np.full((len(rows), length), fill, np.int32)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row[:length]
    return out


def collate(rows: Sequence[Spans], student_length: int, teacher_length: int) -> Alignment:
    """The alignment of several windows; C = min(student_length, teacher_length).

    Every chunk needs a token on each side, so no row can hold more of them. Chunks whose
    bytes differ, that lost a token to truncation, or that open a row, are not valid.
    """
    capacity = min(student_length, teacher_length)
    valid = np.zeros((len(rows), capacity), bool)
    for row, spans in enumerate(rows):
        kept = spans.exact.copy()
        overflows = (spans.student_chunks[student_length:], spans.teacher_chunks[teacher_length:])
        for lost in overflows:
            kept[lost[lost >= 0]] = False
        # Nothing precedes a row's first token, so no position predicts it: of a chunk that opens a
        # row, the two sides' remaining positions would stand for different bytes.
        opening = [chunks[0] for chunks in (spans.student_chunks, spans.teacher_chunks) if len(chunks)]
        kept[[chunk for chunk in opening if chunk >= 0]] = False
        valid[row, : len(kept)] = kept[:capacity]
    sides = [
        pad([r.student_chunks for r in rows], student_length, -1),
        pad([r.teacher_chunks for r in rows], teacher_length, -1),
    ]
    student_chunks, teacher_chunks = (np.where(c < capacity, c, -1) for c in sides)
    return Alignment(student_chunks, teacher_chunks, valid)


def align(
    pair: TokenizerPair,
    texts: Sequence[str],
    *,
    student_length: int,
    teacher_length: int,
    document_marks: bool = True,
) -> tuple[np.ndarray, np.ndarray, Alignment]:
    """Encode and align a batch of texts.

    Args:
        pair: student's and teacher's tokenizer.
        texts: B texts.
        student_length: T_s, tokens a row; longer rows are cut on the right.
        teacher_length: T_t.
        document_marks: add BOS and EOS as `with_document_marks` does.

    Returns:
        student_ids int32 [B, T_s], teacher_ids int32 [B, T_t], both filled with the
        tokenizer's `pad_id`, and the Alignment.

    Example:
        ids_s, ids_t, alignment = align(pair, ["1 + 201"], student_length=8, teacher_length=8)
    """
    rows = list(align_texts(pair, texts))
    if document_marks:
        rows = [with_document_marks(pair, r) for r in rows]
    return (
        pad([r.student_ids for r in rows], student_length, pair.student.pad_id),
        pad([r.teacher_ids for r in rows], teacher_length, pair.teacher.pad_id),
        collate(rows, student_length, teacher_length),
    )


def row_mask(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    """bool [B, length]: True where a row has a token."""
    lengths = np.array([[len(row)] for row in rows])
    return np.arange(length)[None, :] < lengths
