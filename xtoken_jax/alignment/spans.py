"""Two encodings of one text -> chunks (host, numpy).

A chunk is the smallest run of student tokens and run of teacher tokens that cover the
same bytes: every boundary that both tokenizers share ends one (X-Token, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xtoken_jax.alignment.locate import Located, locate
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair


@dataclass(frozen=True)
class Side:
    """The tokens of one side of an aligned row.

    Attributes:
        ids: int32 [T].
        chunks: int32 [T], the chunk of each token, rising from 0, or -1 for a token in none.
        targets: bool [T], the tokens that are to be learnt: not those of a prompt.
        segments: int32 [T], which document of the row a token belongs to, rising from 0.
        endless: the number of an assistant's turns that end without a control token; 0 for parts of a row.
    """

    ids: np.ndarray
    chunks: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    endless: int = 0

    @classmethod
    def of(cls, ids: np.ndarray, chunks: np.ndarray) -> Side:
        """One document, all of it to be learnt."""
        return cls(ids, chunks, np.ones(len(ids), bool), np.zeros(len(ids), np.int32))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Side:
        return Side(self.ids[part], self.chunks[part], self.targets[part], self.segments[part])


@dataclass(frozen=True)
class Spans:
    """A row, encoded by both tokenizers and aligned.

    Attributes:
        student, teacher: the tokens of both sides.
        chunk_count: C.
        exact: bool [C], both sides of the chunk are the same bytes.
    """

    student: Side
    teacher: Side
    chunk_count: int
    exact: np.ndarray


def walk(
    student_spans: np.ndarray, teacher_spans: np.ndarray, length: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Chunk ids from the text spans of two encodings.

    Args:
        student_spans: int [T_s, 2], start and end of each token in the text, in one unit
            for both sides, not falling. Tokens may leave text out between them and may share
            a span, but not overlap otherwise. A token with start = end is a gap.
        teacher_spans: int [T_t, 2].
        length: of the text, whose two ends are then boundaries of both sides, covered or not.

    Returns:
        int32 chunk ids [T_s] and [T_t], -1 for gaps and for text that only one side
        covers, and the number of chunks. Linear in the length of the text.
    """
    if length is None:
        length = max(student_spans.max(initial=-1), teacher_spans.max(initial=-1))
        ends = []
    else:
        ends = [0, length]
    edges = np.ones(1 + length, bool)
    for spans in (student_spans, teacher_spans):
        boundary = np.zeros_like(edges)
        boundary[spans] = True
        boundary[ends] = True
        edges &= boundary
    block_of = np.cumsum(edges)  # 0 before the first edge, then 1, 2, ...
    blocks = []
    for spans in (student_spans, teacher_spans):
        # A gap is in no block, nor is what starts before the first edge or ends behind the last.
        inside = spans[:, 1] > spans[:, 0]
        block = block_of[spans[:, 0]]
        inside &= (block > 0) & (block < (block_of[-1] if len(block_of) else 0))
        blocks.append(np.where(inside, block, 0))
    both = np.ones(int(block_of[-1]) + 1 if len(block_of) else 1, bool)
    for block in blocks:
        both &= np.bincount(block, minlength=len(both)) > 0
    both[0] = False
    number = np.where(both, np.cumsum(both) - 1, -1).astype(np.int32)
    return number[blocks[0]], number[blocks[1]], int(both.sum())


def align_texts(pair: TokenizerPair, texts: Sequence[str]) -> list[Spans]:
    """Encode each text with both tokenizers, without special tokens, and align."""
    return align_located(pair, locate(pair.student, texts), locate(pair.teacher, texts))


def align_texts_together(pairs: Sequence[TokenizerPair], texts: Sequence[str]) -> list[tuple[Spans, ...]]:
    """`align_texts` with several teachers of one student, whose tokenizer encodes each text once.

    Returns:
        For each text, a Spans for every pair; the student's tokens are the same in all.
    """
    student = locate(pairs[0].student, texts)
    by_pair = [align_located(pair, student, locate(pair.teacher, texts)) for pair in pairs]
    return list(zip(*by_pair, strict=True))


def align_located(pair: TokenizerPair, student: Located, teacher: Located) -> list[Spans]:
    """Align the same texts, located with the student's and with the teacher's tokenizer.

    Texts that both sides spell (but for a dummy blank) are walked all at once, and their chunks
    are exact. Any other is walked alone, and its chunks are exact where their two byte strings
    are equal.

    Returns:
        One Spans a text.
    """
    sides = (student, teacher)
    tiled = (student.plain | student.dummy) & (teacher.plain | teacher.dummy)
    student_chunks, teacher_chunks, counts = _walk_tiled(student, teacher)
    rows = []
    for b in range(len(tiled)):
        here = [slice(side.offsets[b], side.offsets[b + 1]) for side in sides]
        if tiled[b]:
            parts, count = [student_chunks[here[0]], teacher_chunks[here[1]]], int(counts[b])
        else:
            first, second = (
                np.stack([side.starts[part], side.ends[part]], axis=1) - side.text_starts[b]
                for side, part in zip(sides, here, strict=True)
            )
            length = int(student.text_starts[b + 1] - student.text_starts[b])
            *parts, count = walk(first, second, length)
        exact = np.ones(count, bool)
        if not tiled[b]:
            exact = _exact(pair, sides, here, parts, count)
        elif count and (student.dummy[b] or teacher.dummy[b]):
            exact[0] = _opens_alike(pair, sides, here, parts)
        both = [Side.of(side.ids[part], c) for side, part, c in zip(sides, here, parts, strict=True)]
        rows.append(Spans(both[0], both[1], count, exact))
    return rows


def _walk_tiled(student: Located, teacher: Located) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chunk ids int32 of both sides, counted within each text, and chunks a text; right for texts whose
    tokens tile them."""
    boundary = np.zeros(int(student.text_starts[-1]) + 1, bool)
    chunks, counts = [], np.zeros(0, np.int32)
    for side, other in ((student, teacher), (teacher, student)):
        boundary[other.ends] = True
        covers = side.ends > side.starts
        closes = boundary[side.ends] & covers
        boundary[other.ends] = False
        closed = np.cumsum(closes, dtype=np.int32)
        before = np.concatenate([[0], closed])[side.offsets].astype(np.int32)
        numbered = closed - closes - np.repeat(before[:-1], np.diff(side.offsets))
        chunks.append(np.where(covers, numbered, np.int32(-1)))
        counts = np.diff(before)
    return chunks[0], chunks[1], counts


def _opens_alike(
    pair: TokenizerPair, sides: tuple[Located, Located], here: Sequence[slice], chunks: Sequence[np.ndarray]
) -> bool:
    """Whether the first chunk is the same bytes on both sides."""
    written = []
    for side, tokenizer, part, chunk in zip(sides, (pair.student, pair.teacher), here, chunks, strict=True):
        first = np.flatnonzero(chunk[: np.searchsorted(chunk, 1)] == 0)
        written.append(tokenizer.token_bytes.join(side.ids[part][first]))
    return written[0] == written[1]


def _exact(
    pair: TokenizerPair,
    sides: tuple[Located, Located],
    here: Sequence[slice],
    chunks: Sequence[np.ndarray],
    count: int,
) -> np.ndarray:
    """bool [C]: which chunks are the same bytes on both sides."""
    sizes, doubtful = [], np.zeros(count, bool)
    for side, tokenizer, part, chunk in zip(sides, (pair.student, pair.teacher), here, chunks, strict=True):
        inside = chunk >= 0
        lengths = tokenizer.token_bytes.lengths[side.ids[part]]
        sizes.append(np.bincount(chunk[inside], lengths[inside], count))
        # Text that one side leaves out inside a chunk makes its size differ from the chunk's extent.
        first, last = np.full(count, np.iinfo(np.int64).max), np.zeros(count, np.int64)
        np.minimum.at(first, chunk[inside], side.starts[part][inside])
        np.maximum.at(last, chunk[inside], side.ends[part][inside])
        doubtful |= last - first != sizes[-1]
        doubtful[chunk[inside & ~side.faithful[part]]] = True
    exact = (sizes[0] == sizes[1]) & ~doubtful
    candidates = np.flatnonzero((sizes[0] == sizes[1]) & doubtful)
    if len(candidates):
        written = [
            _chunk_bytes(tokenizer, side.ids[part], chunk)
            for side, tokenizer, part, chunk in zip(
                sides, (pair.student, pair.teacher), here, chunks, strict=True
            )
        ]
        exact[candidates] = [written[0][c] == written[1][c] for c in candidates.tolist()]
    return exact


def _chunk_bytes(tokenizer: Tokenizer, ids: np.ndarray, chunks: np.ndarray) -> dict[int, bytes]:
    pieces: dict[int, bytes] = {}
    for i, chunk in zip(ids.tolist(), chunks.tolist(), strict=True):
        pieces[chunk] = pieces.get(chunk, b"") + tokenizer.token_bytes.contents[i]
    return pieces
