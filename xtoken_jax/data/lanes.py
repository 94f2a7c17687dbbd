"""Lanes: each row of the batch is an endless stream of its own, in an order that the seed decides.

Row r of the batch takes the documents number r, r + B, r + 2 B, ... of the endless order, cuts them to
parts and fills its rows with these. So whoever makes some of the rows, on whatever number of hosts and
with whatever number of threads, makes the same ones; and where a lane is takes a few numbers to say.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from xtoken_jax.alignment.rows import join_together
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.encode import Document, Part, Record, cut_parts, student_of

_LOOK_AHEAD = 16  # parts among which one that fits is looked for
_TOKENS_AT_ONCE = 16_384  # about as many are encoded in one call, in documents of
_DOCUMENTS_AT_ONCE = 32  # at most: a call costs as much as a thousand tokens

Encode = Callable[[Sequence[Document]], list[Part]]
State = dict[str, Any]  # plain values, for JSON


@dataclass(frozen=True)
class Row:
    """A row of a batch.

    Attributes:
        tokens: its parts, one behind the other, each a segment.
        records: of each part, where it comes from.
    """

    tokens: Part
    records: tuple[Record, ...]


class Stream:
    """The endless order of the documents of some sources, shuffled anew in every epoch."""

    def __init__(self, documents: Mapping[str, Sequence[Document]], seed: int) -> None:
        """Documents by source; a uint32 seed."""
        self._documents = documents
        self._names = list(documents)
        self._starts = [0, *itertools.accumulate(map(len, documents.values()))]
        self._order = grain.MapDataset.range(self._starts[-1]).seed(seed).shuffle().repeat()

    def at(self, number: int) -> tuple[str, int]:
        """Source and number in it of the document that comes in a place, from 0, of the order."""
        index = int(self._order[number])
        source = bisect.bisect_right(self._starts, index) - 1
        return self._names[source], index - self._starts[source]

    def document(self, number: int) -> Document:
        """The document in a place of the order."""
        source, index = self.at(number)
        return self._documents[source][index]


def streams_of(
    documents: Mapping[str, Sequence[Document]], weights: Mapping[str, float] | None, seed: int
) -> dict[str, Stream]:
    """One stream of all documents, named ""; with weights, one for each source."""
    if weights is None:
        return {"": Stream(documents, seed)}
    seeds = np.random.SeedSequence(seed).generate_state(len(documents))
    return {name: Stream({name: documents[name]}, int(s)) for name, s in zip(documents, seeds, strict=True)}


@dataclass(frozen=True)
class _Piece:
    """A part that is still to come: `number` counts the documents of its stream in this lane."""

    stream: str
    number: int
    record: Record
    tokens: Part


class Lane:
    """The rows of one place in the batch.

    With weights, the next document comes from the source whose student tokens so far are furthest behind
    its weight. A document's parts come in an order of their own: a long text that several lanes read is
    read in different places.
    """

    def __init__(
        self,
        slot: int,
        streams: Mapping[str, Stream],
        weights: Mapping[str, float] | None,
        encode: Encode,
        config: DataConfig,
    ) -> None:
        """Of slot r in 0 .. B - 1; streams as `streams_of` returns them for the weights."""
        self._slot, self._streams, self._encode, self._config = slot, streams, encode, config
        self._weights = weights
        self._phases: dict[str, float] | None = None
        self._begin()

    def _begin(self) -> None:
        self._taken = dict.fromkeys(self._streams, 0)  # documents
        self._tokens = dict.fromkeys(self._streams, 0)  # of the student, in those documents
        self._waiting: list[_Piece] = []
        self._rest: deque[_Piece] = deque()  # of the document taken last
        self._ahead: dict[tuple[str, int], Part] = {}  # encoded together with one that was needed
        self._at_once = 1

    def __iter__(self) -> Lane:
        return self

    def __next__(self) -> Row:
        room = [self._config.student_length]
        pieces: list[_Piece] = []
        place = 0
        while True:
            self._fill(_LOOK_AHEAD if self._config.pack else 1)
            if place == len(self._waiting):
                break
            if not pieces:
                names = self._waiting[0].tokens
                room = [self._config.student_length, *(self._config.length_of(name) for name in names)]
            left = [r - n for r, n in zip(room, _sizes(self._waiting[place].tokens), strict=True)]
            if min(left) < 0:
                place += 1
                continue
            room = left
            pieces.append(self._waiting.pop(place))
            if not self._config.pack:
                break
        joined = join_together([[*piece.tokens.values()] for piece in pieces])
        tokens = dict(zip(pieces[0].tokens, joined, strict=True))
        return Row(tokens, tuple(piece.record for piece in pieces))

    def _fill(self, count: int) -> None:
        """Have `count` parts waiting."""
        while len(self._waiting) < count:
            while not self._rest:
                stream = self._choose()
                pieces = self._pieces(stream, self._taken[stream])
                self._taken[stream] += 1
                self._tokens[stream] += sum(len(student_of(piece.tokens)) for piece in pieces)
                self._rest = deque(pieces)
            self._waiting.append(self._rest.popleft())

    def _choose(self) -> str:
        weights = self._weights
        if weights is None:
            return ""
        if self._phases is None:
            # Lanes begin at different places of the turns that their sources take.
            draws = np.random.default_rng([self._config.seed, self._slot]).random(len(weights)).tolist()
            lengths = (len(student_of(self._encoded(name, 0, keep=True))) for name in weights)
            self._phases = {n: draw * length for n, draw, length in zip(weights, draws, lengths, strict=True)}
        phases = self._phases
        return min(weights, key=lambda name: (self._tokens[name] + phases[name]) / weights[name])

    def _pieces(self, stream: str, number: int) -> list[_Piece]:
        """The parts of the lane's document of that number, in the order in which they come."""
        place = self._slot + self._config.batch_size * number
        source, document = self._streams[stream].at(place)
        parts = cut_parts(self._encoded(stream, number), self._config)
        order = [0]
        if len(parts) != 1:
            order = np.random.default_rng([self._config.seed, place]).permutation(len(parts)).tolist()
        return [_Piece(stream, number, Record(source, document, part), parts[part]) for part in order]

    def _encoded(self, stream: str, number: int, *, keep: bool = False) -> Part:
        if (stream, number) not in self._ahead:
            numbers = range(number, number + self._at_once)
            of = self._streams[stream]
            rows = self._encode([of.document(self._slot + self._config.batch_size * n) for n in numbers])
            self._ahead |= {(stream, n): row for n, row in zip(numbers, rows, strict=True)}
            tokens = sum(len(student_of(row)) for row in rows)
            fitting = _TOKENS_AT_ONCE * len(rows) // max(tokens, 1)
            self._at_once = min(max(fitting, 1), _DOCUMENTS_AT_ONCE)
        return self._ahead[stream, number] if keep else self._ahead.pop((stream, number))

    def get_state(self) -> State:
        """Where the lane is; the parts themselves are made again."""
        state: State = {"taken": dict(self._taken), "tokens": dict(self._tokens)}
        state["waiting"] = [[p.stream, p.number, p.record.part] for p in self._waiting]
        state["rest"] = [self._rest[0].stream, self._rest[0].number, len(self._rest)] if self._rest else None
        return state

    def set_state(self, state: State) -> None:
        """Go on from what `get_state` returned, of this lane."""
        self._begin()
        self._taken |= {name: n for name, n in state["taken"].items() if name in self._streams}
        self._tokens |= {name: n for name, n in state["tokens"].items() if name in self._streams}
        made: dict[tuple[str, int], list[_Piece]] = {}

        def pieces(stream: str, number: int) -> list[_Piece]:
            if (stream, number) not in made:
                made[stream, number] = self._pieces(stream, number) if stream in self._streams else []
            return made[stream, number]

        for stream, number, part in state["waiting"]:
            self._waiting += [p for p in pieces(stream, number) if p.record.part == part]
        if state["rest"] is not None:
            stream, number, count = state["rest"]
            self._rest = deque(pieces(stream, number)[-count:])
        self._ahead.clear()


def _sizes(part: Part) -> list[int]:
    """Tokens on the student's and on each teacher's side."""
    return [len(student_of(part)), *(len(spans.teacher) for spans in part.values())]


def spread(states: Sequence[State], count: int) -> State:
    """A state for each of `count` lanes that go on from about where other lanes were: nothing waits."""
    found: State = {"waiting": [], "rest": None}
    for key in ("taken", "tokens"):
        total: dict[str, int] = {}
        for state in states:
            for name, value in state[key].items():
                total[name] = total.get(name, 0) + value
        found[key] = {name: -(-value // count) for name, value in total.items()}
    return found
