"""Two encodings of one text -> chunks (host, numpy).

A chunk is the smallest run of student tokens and run of teacher tokens that cover the
same bytes: every boundary that both tokenizers share ends one (X-Token, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tokenizers

from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair


@dataclass(frozen=True)
class Spans:
    """One text, encoded and aligned.

    Attributes:
        student_ids, teacher_ids: int32 [T_s], [T_t].
        student_chunks, teacher_chunks: int32 [T_s], [T_t], the chunk of each token, rising
            from 0, or -1 for a token that is in none.
        chunk_count: C.
        exact: bool [C], both sides of the chunk are the same bytes.
    """

    student_ids: np.ndarray
    teacher_ids: np.ndarray
    student_chunks: np.ndarray
    teacher_chunks: np.ndarray
    chunk_count: int
    exact: np.ndarray


def walk(student_spans: np.ndarray, teacher_spans: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Chunk ids from the text spans of two encodings.

    Args:
        student_spans: int [T_s, 2], start and end of each token in the text, in one unit
            for both sides (bytes or characters), not falling. A token with start = end
            covers no text and is a gap.
        teacher_spans: int [T_t, 2].

    Returns:
        int32 chunk ids [T_s] and [T_t], -1 for gaps and for text that only one side
        covers, and the number of chunks. Linear in the number of tokens but for a sort.
    """
    edges = np.intersect1d(student_spans, teacher_spans)
    student_block, teacher_block = (_block_of(spans, edges) for spans in (student_spans, teacher_spans))
    blocks = np.intersect1d(student_block, teacher_block)
    blocks = blocks[blocks >= 0]

    def number(block: np.ndarray) -> np.ndarray:
        place = np.searchsorted(blocks, block)
        known = np.append(blocks, -2)[place] == block
        return np.where(known, place, -1).astype(np.int32)

    return number(student_block), number(teacher_block), len(blocks)


def _block_of(spans: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The interval (edges[i], edges[i+1]] each token ends in; -1 if it is empty or leaves it."""
    if not len(edges) or not len(spans):
        return np.full(len(spans), -1)
    block = np.searchsorted(edges, spans[:, 1], side="left") - 1
    starts_inside = spans[:, 0] >= edges[np.maximum(block, 0)]
    inside = (spans[:, 1] > spans[:, 0]) & (block >= 0) & (spans[:, 1] <= edges[-1]) & starts_inside
    return np.where(inside, block, -1)


def align_encodings(
    pair: TokenizerPair, text: str, student: tokenizers.Encoding, teacher: tokenizers.Encoding
) -> Spans:
    """Align two encodings of `text` made without special tokens.

    Where the bytes of both sides' tokens spell the text, the walk is over bytes and exact.
    Where a tokenizer normalizes (NFC, lower case) or adds (a dummy prefix space), the walk
    is over the characters of the text that each token came from, and a chunk is `exact`
    only if its two byte strings are equal.
    """
    raw = text.encode()
    sides = [(pair.student, student), (pair.teacher, teacher)]
    ids = [np.asarray(encoding.ids, np.int32) for _, encoding in sides]
    faithful = all(tokenizer.token_bytes.join(i) == raw for (tokenizer, _), i in zip(sides, ids, strict=True))
    spans = [
        _byte_spans(tokenizer, i) if faithful else _character_spans(tokenizer, i, encoding)
        for (tokenizer, encoding), i in zip(sides, ids, strict=True)
    ]
    student_chunks, teacher_chunks, count = walk(*spans)
    if faithful:
        exact = np.ones(count, bool)
    else:
        pieces = [
            _chunk_bytes(tokenizer, i, chunks, count)
            for (tokenizer, _), i, chunks in zip(sides, ids, (student_chunks, teacher_chunks), strict=True)
        ]
        exact = np.array([s == t for s, t in zip(*pieces, strict=True)], bool)
    return Spans(ids[0], ids[1], student_chunks, teacher_chunks, count, exact)


def _byte_spans(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    ends = np.cumsum(tokenizer.token_bytes.lengths[ids], dtype=np.int64)
    return np.stack([ends - tokenizer.token_bytes.lengths[ids], ends], axis=1)


def _character_spans(tokenizer: Tokenizer, ids: np.ndarray, encoding: tokenizers.Encoding) -> np.ndarray:
    """Character spans that do not overlap: tokens that share a character end where the last one does."""
    spans = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    if not len(spans):
        return spans
    ends = np.maximum.accumulate(spans[:, 1])
    # A piece of a character has the whole character's offsets. Joined to the token after it,
    # it opens no boundary inside the character.
    starts = spans[:, 0].copy()
    shared = np.flatnonzero(starts[1:] < ends[:-1])
    for i in shared[::-1]:
        ends[i] = ends[i + 1]
    for i in shared:
        starts[i + 1] = starts[i]
    gap = tokenizer.token_bytes.lengths[ids] == 0
    return np.stack([np.where(gap, ends, starts), ends], axis=1)


def _chunk_bytes(tokenizer: Tokenizer, ids: np.ndarray, chunks: np.ndarray, count: int) -> list[bytes]:
    pieces = [b""] * count
    for i, chunk in zip(ids.tolist(), chunks.tolist(), strict=True):
        if chunk >= 0:
            pieces[chunk] += tokenizer.token_bytes.table[i] or b""
    return pieces
