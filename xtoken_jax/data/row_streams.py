"""Lanes: each row of the batch is an endless stream of its own, in an order that the seed decides.

Row r of the batch takes the documents number r, r + B, r + 2 B, ... of the endless order and cuts them to
parts, of which a pool waits and is mixed, or a batch would be B long documents for as long as they last;
rows are filled from it. Of little text, whose few documents could not be mixed well, the order is that of the
parts themselves. So whoever makes some of the rows, on whatever number of hosts and
with whatever number of threads, makes the same ones; and where a lane is takes a few numbers to say.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xtoken_jax.alignment.rows import join_together
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.encode import Document, Part, Record, cut_parts, student_of

# In a lane wait as many parts as make two rows, and 8; up to 64 of no more tokens than this, but for a quick
# start only one more with each row.
_POOL_LEAST, _POOL, _POOL_TOKENS = 8, 64, 65_536
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


Cut = list[tuple[Record, Part]]  # parts, made up front


class Stream:
    """The endless order of some sources' documents or, where they are cut, parts; shuffled every epoch."""

    def __init__(
        self, documents: Mapping[str, Sequence[Document]], seed: int, cut: Cut | None = None
    ) -> None:
        """Documents by source, a uint32 seed, and all parts of them, where the order is to be theirs."""
        self.cut = cut
        self._documents = documents
        self._names = list(documents)
        self._starts = [0, *itertools.accumulate(map(len, documents.values()))]
        self._length = self._starts[-1] if cut is None else len(cut)
        self._seed = seed
        # Lanes are in one epoch or two, of very little text in a few.
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        order = np.arange(self._length, dtype=np.int32 if self._length < 2**31 else np.int64)
        np.random.default_rng([self._seed, epoch]).shuffle(order)
        return order

    def index(self, number: int) -> int:
        """Which document or part comes in a place, from 0, of the order."""
        epoch, place = divmod(number, self._length)
        return int(self._order(epoch)[place])

    def at(self, number: int) -> tuple[str, int]:
        """Source and number in it of the document in a place of the order."""
        index = self.index(number)
        source = bisect.bisect_right(self._starts, index) - 1
        return self._names[source], index - self._starts[source]

    def document(self, number: int) -> Document:
        """The document in a place of the order."""
        source, index = self.at(number)
        return self._documents[source][index]


def streams_of(
    documents: Mapping[str, Sequence[Document]],
    weights: Mapping[str, float] | None,
    seed: int,
    cut: Mapping[str, Cut] | None = None,
) -> dict[str, Stream]:
    """One stream of all text, named ""; with weights, one for each source.

    Args:
        documents: by source.
        weights: each source's share of the tokens.
        seed: of the order.
        cut: the parts of each source, where the order is to be that of the parts.
    """
    if weights is None:
        every = None if cut is None else [part for parts in cut.values() for part in parts]
        return {"": Stream(documents, seed, every)}
    seeds = np.random.SeedSequence(seed).generate_state(len(documents))
    return {
        name: Stream({name: documents[name]}, int(s), None if cut is None else cut[name])
        for name, s in zip(documents, seeds, strict=True)
    }


@dataclass(frozen=True)
class _Piece:
    """A part that is still to come: `number` counts the documents of its stream in this lane."""

    stream: str
    number: int
    record: Record
    tokens: Part
    sizes: tuple[int, ...]  # tokens on the student's and on each teacher's side
    turn: int = 0  # parts come in rising order of it, where they fit


class Lane:
    """The rows of one place in the batch.

    With weights, the next document comes from the source whose student tokens so far are furthest behind
    its weight. A document's parts come to the pool in an order of their own: a long text that several
    lanes read is read in different places.
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
        self._rows, self._come = 0, 0  # rows made, parts that came to wait
        self._waiting: list[_Piece] = []
        self._rest: deque[_Piece] = deque()  # of the document taken last
        self._ahead: dict[tuple[str, int], Part] = {}  # encoded together with one that was needed
        self._at_once = 1

    def __iter__(self) -> Lane:
        return self

    def __next__(self) -> Row:
        self._fill()
        self._rows += 1
        teachers = map(self._config.length_of, self._waiting[0].tokens)
        room: tuple[int, ...] = (self._config.student_length, *teachers)
        pieces: list[_Piece] = []
        passed: list[_Piece] = []
        for piece in self._waiting:
            left = tuple(r - n for r, n in zip(room, piece.sizes, strict=True))
            if min(left) < 0 or (pieces and not self._config.pack):
                passed.append(piece)
            else:
                room = left
                pieces.append(piece)
        self._waiting = passed
        joined = join_together([[*piece.tokens.values()] for piece in pieces])
        tokens = dict(zip(pieces[0].tokens, joined, strict=True))
        return Row(tokens, tuple(piece.record for piece in pieces))

    def _fill(self) -> None:
        """Have as many parts waiting as there are to be."""
        wanted, enough = min(_POOL, _POOL_LEAST + self._rows), 2 * self._config.student_length
        tokens = sum(piece.sizes[0] for piece in self._waiting)
        rng = np.random.default_rng([self._config.seed, self._slot, self._rows])
        while (
            (count := len(self._waiting)) < _POOL_LEAST
            or tokens < enough
            or (count < wanted and tokens < _POOL_TOKENS)
        ):
            while not self._rest:
                stream = self._choose()
                pieces = self._pieces(stream, self._taken[stream])
                self._taken[stream] += 1
                self._tokens[stream] += sum(piece.sizes[0] for piece in pieces)
                self._rest = deque(pieces)
            piece = self._rest.popleft()
            # Parts of a document may overtake as many as wait, or be overtaken: nobody waits for long.
            late = 0 if self._streams[piece.stream].cut else int(rng.integers(wanted))
            piece = replace(piece, turn=self._come + late)
            self._come += 1
            bisect.insort(self._waiting, piece, key=lambda other: other.turn)
            tokens += piece.sizes[0]

    def _choose(self) -> str:
        weights = self._weights
        if weights is None:
            return ""
        if self._phases is None:
            # Lanes begin at different places of the turns that their sources take.
            draws = np.random.default_rng([self._config.seed, self._slot]).random(len(weights)).tolist()
            lengths = [
                len(student_of(self._encoded(name, 0, keep=True)))
                if of.cut is None
                else _sizes(of.cut[0][1])[0]
                for name, of in self._streams.items()
            ]
            self._phases = {n: draw * length for n, draw, length in zip(weights, draws, lengths, strict=True)}
        phases = self._phases
        return min(weights, key=lambda name: (self._tokens[name] + phases[name]) / weights[name])

    def _pieces(self, stream: str, number: int) -> list[_Piece]:
        """The parts of the lane's document of that number, in the order in which they come."""
        place, of = self._slot + self._config.batch_size * number, self._streams[stream]
        if of.cut is not None:
            record, part = of.cut[of.index(place)]
            return [_Piece(stream, number, record, part, _sizes(part))]
        source, document = of.at(place)
        parts = cut_parts(self._encoded(stream, number), self._config)
        order = [0]
        if len(parts) != 1:
            order = np.random.default_rng([self._config.seed, place]).permutation(len(parts)).tolist()
        records = [Record(source, document, part) for part in order]
        return [
            _Piece(stream, number, record, parts[record.part], _sizes(parts[record.part]))
            for record in records
        ]

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
        state: State = {"rows": self._rows, "come": self._come}
        state |= {"taken": dict(self._taken), "tokens": dict(self._tokens)}
        state["waiting"] = [[p.stream, p.number, p.record.part, p.turn] for p in self._waiting]
        state["rest"] = [self._rest[0].stream, self._rest[0].number, len(self._rest)] if self._rest else None
        return state

    def set_state(self, state: State) -> None:
        """Go on from what `get_state` returned, of this lane."""
        self._begin()
        self._rows, self._come = state["rows"], state["come"]
        self._taken |= {name: n for name, n in state["taken"].items() if name in self._streams}
        self._tokens |= {name: n for name, n in state["tokens"].items() if name in self._streams}
        made: dict[tuple[str, int], list[_Piece]] = {}

        def pieces(stream: str, number: int) -> list[_Piece]:
            if (stream, number) not in made:
                made[stream, number] = self._pieces(stream, number) if stream in self._streams else []
            return made[stream, number]

        for stream, number, part, turn in state["waiting"]:
            found = (piece for piece in pieces(stream, number) if piece.record.part == part)
            self._waiting += [replace(piece, turn=turn) for piece in found]
        if state["rest"] is not None:
            stream, number, count = state["rest"]
            self._rest = deque(pieces(stream, number)[-count:])
        self._ahead.clear()


def _sizes(part: Part) -> tuple[int, ...]:
    return (len(student_of(part)), *(len(spans.teacher) for spans in part.values()))


def spread(states: Sequence[State], count: int) -> State:
    """A state for each of `count` lanes that go on from about where other lanes were: nothing waits."""
    found: State = {"rows": 0, "come": 0, "waiting": [], "rest": None}
    for key in ("taken", "tokens"):
        total: dict[str, int] = {}
        for state in states:
            for name, value in state[key].items():
                total[name] = total.get(name, 0) + value
        found[key] = {name: -(-value // count) for name, value in total.items()}
    return found
