"""From aligned documents to rows of bounded length: marks, windows, truncation, packing (host, numpy)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np

from xtoken_jax.alignment.arguments import check_lengths
from xtoken_jax.alignment.spans import Side, Spans
from xtoken_jax.tokens.arguments import check_list
from xtoken_jax.tokens.tokenizer import TokenizerPair


def with_document_marks(pair: TokenizerPair, spans: Spans) -> Spans:
    """Add BOS before, where the tokenizer does so itself, and EOS behind, where there is one.

    BOS on both sides, and EOS on both sides, pair with each other; one-sided marks are gaps.
    """
    opens = [[t.roles["bos"]] if t.adds_bos else [] for t in (pair.student, pair.teacher)]
    closes = [[t.roles["eos"]] if "eos" in t.roles else [] for t in (pair.student, pair.teacher)]
    open_pairs, close_pairs = all(opens), all(closes)
    count = spans.chunk_count + open_pairs

    def marked(side: Side, opening: list[int], closing: list[int]) -> Side:
        first = [0 if open_pairs else -1] * len(opening)
        last = [count if close_pairs else -1] * len(closing)
        return Side(
            np.concatenate([opening, side.ids, closing]).astype(np.int32),
            np.concatenate([first, _moved(side.chunks, open_pairs), last]).astype(np.int32),
            # A text opens with BOS whatever it says; that it ends here is to be learnt.
            np.concatenate([[True] * len(opening), side.targets, [True] * len(closing)]).astype(bool),
            np.pad(side.segments, (len(opening), len(closing)), "edge" if len(side) else "constant"),
        )

    return Spans(
        marked(spans.student, opens[0], closes[0]),
        marked(spans.teacher, opens[1], closes[1]),
        count + close_pairs,
        np.concatenate([[True] * open_pairs, spans.exact, [True] * close_pairs]).astype(bool),
    )


def _moved(chunks: np.ndarray, by: int) -> np.ndarray:
    return np.where(chunks >= 0, chunks + by, -1).astype(np.int32)


def cut(spans: Spans, student_length: int, teacher_length: int) -> Iterator[Spans]:
    """Cut a text into windows that fit both context lengths, at boundaries both tokenizers share.

    A chunk longer than a window loses the tokens that overflow it, and with them its id.
    """
    for (window,) in cut_together([spans], student_length, [teacher_length]):
        yield window


def cut_together(
    rows: Sequence[Spans], student_length: int, teacher_lengths: Sequence[int]
) -> Iterator[tuple[Spans, ...]]:
    """`cut` of a text that several teachers read, at boundaries that all tokenizers share.

    Args:
        rows: the text aligned with each teacher; the student's tokens are the same in all.
        student_length: tokens of a window on the student's side.
        teacher_lengths: on each teacher's.

    Yields:
        A window of the text: with each teacher a Spans, of the same student tokens. A teacher that shares
        no boundary with the student leaves nothing to yield.
    """
    starts = [_chunk_starts(spans) for spans in rows]
    shared = reduce(np.intersect1d, [student for student, _ in starts])
    chunks = [np.searchsorted(student, shared) for student, _ in starts]
    sides = [shared, *(teacher[of] for (_, teacher), of in zip(starts, chunks, strict=True))]
    lengths = [student_length, *teacher_lengths]
    first = 0
    while first < len(shared) - 1:
        last = min(
            int(np.searchsorted(side, side[first] + length, side="right")) - 1
            for side, length in zip(sides, lengths, strict=True)
        )
        last = max(last, first + 1)
        windows = []
        for spans, side, of, length in zip(rows, sides[1:], chunks, teacher_lengths, strict=True):
            begin, end = int(of[first]), int(of[last])
            parts = [spans.student[shared[first] : shared[last]], spans.teacher[side[first] : side[last]]]
            parts = [replace(part, chunks=_moved(part.chunks, -begin)) for part in parts]
            window = Spans(parts[0], parts[1], end - begin, spans.exact[begin:end])
            windows.append(truncate(window, student_length, length))
        yield tuple(windows)
        first = last


def _chunk_starts(spans: Spans) -> list[np.ndarray]:
    """On either side, int [C + 1]: the token that each chunk begins with, and the end."""
    starts = []
    for side in (spans.student, spans.teacher):
        start = np.searchsorted(_filled(side.chunks), np.arange(spans.chunk_count + 1))
        # Gaps in front of the first chunk and behind the last stay with those chunks.
        start[0], start[-1] = 0, len(side)
        starts.append(start)
    return starts


def _filled(chunks: np.ndarray) -> np.ndarray:
    """Chunk ids in which a gap takes the id of the token before it, so that they never fall."""
    return np.maximum.accumulate(chunks) if len(chunks) else chunks


def truncate(spans: Spans, student_length: int, teacher_length: int, *, side: str = "right") -> Spans:
    """Cut both sides to their lengths; a chunk that lost a token on either side is gone.

    Args:
        spans: a row.
        student_length, teacher_length: tokens kept at most.
        side: "right" keeps the beginning of a row, "left" its end.

    Returns:
        The surviving tokens, with the surviving chunks numbered anew.
    """
    lengths = (student_length, teacher_length)
    both = (spans.student, spans.teacher)
    if all(len(s) <= length for s, length in zip(both, lengths, strict=True)):
        return spans
    lost = np.zeros(spans.chunk_count + 1, bool)  # the last place is for id -1
    parts = []
    for tokens, length in zip(both, lengths, strict=True):
        keep = slice(0, length) if side == "right" else slice(max(len(tokens) - length, 0), len(tokens))
        dropped = tokens.chunks[length:] if side == "right" else tokens.chunks[: keep.start]
        lost[dropped] = True
        parts.append(tokens[keep])
    kept = ~lost[:-1]
    number = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1).astype(np.int32)
    student, teacher = (replace(part, chunks=number[part.chunks]) for part in parts)
    return Spans(student, teacher, int(kept.sum()), spans.exact[kept])


def join(documents: Sequence[Spans]) -> Spans:
    """Several documents in one row, one behind the other, each a segment of its own.

    No chunk spans two documents: the ids of each follow those of the one before.
    """
    return join_together([[document] for document in documents])[0]


def join_together(documents: Sequence[Sequence[Spans]]) -> tuple[Spans, ...]:
    """`join` of documents that several teachers read: a document has the same segment numbers on all sides.

    Args:
        documents: each aligned with each teacher, of the same student tokens in all.

    Returns:
        The row, aligned with each teacher.
    """
    if len(documents) == 1:
        return tuple(documents[0])
    # All sides count the documents alike, though one may have no token in one of them.
    segments = np.cumsum([0, *(1 + max(map(_last_segment, document)) for document in documents)])
    return tuple(_join(spans, segments) for spans in zip(*documents, strict=True))


def _last_segment(spans: Spans) -> int:
    return max(int(side.segments.max(initial=0)) for side in (spans.student, spans.teacher))


def _join(documents: Sequence[Spans], first_segments: np.ndarray) -> Spans:
    chunk_starts = np.cumsum([0, *(d.chunk_count for d in documents)])
    joined = []
    for parts in ([d.student for d in documents], [d.teacher for d in documents]):
        chunks = [_moved(p.chunks, int(start)) for p, start in zip(parts, chunk_starts, strict=False)]
        segments = [p.segments + first for p, first in zip(parts, first_segments, strict=False)]
        joined.append(
            Side(
                np.concatenate([p.ids for p in parts]),
                np.concatenate(chunks),
                np.concatenate([p.targets for p in parts]),
                np.concatenate(segments).astype(np.int32),
            )
        )
    exact = np.concatenate([d.exact for d in documents])
    return Spans(joined[0], joined[1], int(chunk_starts[-1]), exact)


def pack(documents: Sequence[Spans], student_length: int, teacher_length: int) -> list[Spans]:
    """Put documents into as few rows as first-fit finds, both sides in lockstep.

    Each document goes into the first row that has room for it on both sides; one that is too
    long for any row is truncated. Documents keep their order within a row.
    """
    documents = check_list("documents", documents, Spans, "Spans, an aligned document")
    check_lengths(student_length=student_length, teacher_length=teacher_length)
    rows: list[list[Spans]] = []
    room = np.zeros((0, 2), np.int64)
    for document in documents:
        document = truncate(document, student_length, teacher_length)
        need = np.array([len(document.student), len(document.teacher)])
        fits = np.flatnonzero((room >= need).all(1))
        if len(fits):
            row = int(fits[0])
        else:
            row = len(rows)
            rows.append([])
            room = np.append(room, [[student_length, teacher_length]], axis=0)
        rows[row].append(document)
        room[row] -= need
    return [join(row) for row in rows]
