"""Tokens of rendered conversations, placed in the pieces that both sides share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from xtoken_jax.alignment.chat_pieces import Piece, Region
from xtoken_jax.alignment.locate import Located


@dataclass(frozen=True)
class Border:
    """The tokens that join a piece with bytes of the template around it.

    Attributes:
        front, back: numbers of the tokens over the beginning and the end of the piece, -1 for none.
        before, after: the bytes of the template in these tokens.
        start, end: place of the piece, as the template writes it.
        front_end, back_start: where the token at the front ends, and that at the back starts.
    """

    front: int
    back: int
    before: bytes
    after: bytes
    start: int
    end: int
    front_end: int
    back_start: int

    def moved(self, tokens: int, place: int) -> Border:
        """The same border after more tokens and pieces."""
        return replace(
            self,
            front=self.front + tokens if self.front >= 0 else -1,
            back=self.back + tokens if self.back >= 0 else -1,
            start=self.start + place,
            end=self.end + place,
            front_end=self.front_end + place,
            back_start=self.back_start + place,
        )


def bases_of(pieces: Sequence[Piece]) -> list[int]:
    """Where each piece begins with the pieces laid end to end, and their total size.

    Three units apart: one on either side for a token that joins the piece with the template, and one between,
    so no two pieces share a boundary.
    """
    return np.cumsum([1, *(len(piece.text.encode()) + 3 for piece in pieces)]).tolist()


def in_pieces(spans: np.ndarray, regions: list[Region], bases: list[int]) -> np.ndarray:
    """Spans [T, 2] within the pieces laid end to end, [0, 0] outside of them."""
    placed = np.zeros_like(spans)
    for region in regions:
        if region.changed:
            continue
        here = slice(*_inside(spans, region))
        whole = (spans[here, 0] >= region.start) & (spans[here, 1] > spans[here, 0])
        moved = spans[here] - region.start + bases[region.piece] + region.skipped
        placed[here] = np.where(whole[:, None], moved, 0)
    return placed


def _inside(spans: np.ndarray, region: Region) -> tuple[int, int]:
    """First and last token that may lie in a region: those that end in it."""
    first, last = np.searchsorted(spans[:, 1], [region.start, region.end], side="right").tolist()
    return first, last


def borders_of(
    raw: bytes, spans: np.ndarray, faithful: np.ndarray, regions: list[Region], bases: list[int]
) -> dict[int, Border]:
    """The borders of the pieces that have any, by piece.

    Args:
        raw: the rendered text.
        spans: int64 [T, 2], the tokens in it.
        faithful: bool [T], the bytes of the token are those of its span.
        regions: where the pieces stand in it.
        bases: of the pieces.
    """
    borders = {}
    for i, region in enumerate(regions):
        if region.changed:
            continue
        before = regions[i - 1].end if i else 0
        following = regions[i + 1].start if i + 1 < len(regions) else len(raw)
        first, last = _inside(spans, region)

        def joins(token: int, border: int, before: int = before, following: int = following) -> bool:
            if token >= len(spans) or not faithful[token]:
                return False
            start, end = spans[token].tolist()
            return before <= start < border < end <= following

        front = first if joins(first, region.start) else -1
        back = last if joins(last, region.end) else -1
        if front < 0 and back < 0:
            continue
        shift = bases[region.piece] + region.skipped - region.start
        borders[region.piece] = Border(
            front,
            back,
            raw[spans[front, 0] : region.start] if front >= 0 else b"",
            raw[region.end : spans[back, 1]] if back >= 0 else b"",
            region.start + shift,
            region.end + shift,
            int(spans[front, 1]) + shift,
            int(spans[back, 0]) + shift,
        )
    return borders


def join_borders(
    student: Located,
    teacher: Located,
    of_student: Mapping[tuple[int, int], Border],
    of_teacher: Mapping[tuple[int, int], Border],
) -> tuple[Located, Located]:
    """Place the tokens that join a piece with the template, where both sides join it with the same bytes.

    Elsewhere such tokens stay in no chunk: the bytes of the template that they hold are written by one side
    alone.

    Args:
        student, teacher: with each token inside a piece placed.
        of_student, of_teacher: the borders of either side.
    """
    sides = (
        replace(student, starts=student.starts.copy(), ends=student.ends.copy()),
        replace(teacher, starts=teacher.starts.copy(), ends=teacher.ends.copy()),
    )
    for key in of_student.keys() & of_teacher.keys():
        both = of_student[key], of_teacher[key]
        front = both[0].start == both[1].start and both[0].before == both[1].before != b""
        back = both[0].end == both[1].end and both[0].after == both[1].after != b""
        if any(border.front == border.back for border in both):  # one token over all of the piece
            front = back = front and back
        for located, border in zip(sides, both, strict=True):
            if front:
                located.starts[border.front] = border.start - 1
                located.ends[border.front] = border.front_end
            if back:
                located.ends[border.back] = border.end + 1
                if border.front != border.back:
                    located.starts[border.back] = border.back_start
    return sides
