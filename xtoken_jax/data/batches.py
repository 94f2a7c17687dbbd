"""Rows -> Batch, the one type that goes to the devices, made ahead of the step that takes it."""

from __future__ import annotations

import functools
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from xtoken_jax.alignment.align import collate, token_rows
from xtoken_jax.alignment.batch import Alignment, StoredRows, TokenRows
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.encode import Document, Part, Record, cut_little, encode, student_of
from xtoken_jax.data.row_streams import Lane, Row, State, spread, streams_of
from xtoken_jax.data.tally import Tally
from xtoken_jax.teacher_cache.reader import TeacherCache
from xtoken_jax.teacher_cache.shards import PartRows
from xtoken_jax.tokens.tokenizer import TokenizerPair

_AHEAD = 4  # rows of each lane that are ready or being made
_BATCHES_AHEAD = 2
_KEPT = 8  # batches whose records are known


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TeacherBatch:
    """A batch as one teacher reads it.

    Attributes:
        rows: TokenRows of [B, T_t].
        alignment: chunk ids of its tokens and of the student's, and which chunks count.
        stored: its distributions, where they are cached.
    """

    rows: TokenRows
    alignment: Alignment
    stored: StoredRows | None = None


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


def make_batch(
    pairs: Mapping[str, TokenizerPair],
    rows: Sequence[Part],
    config: DataConfig,
    stored: Mapping[str, StoredRows] | None = None,
) -> Batch:
    """Pad and stack rows; numpy arrays until they are put on devices.

    Args:
        pairs: by teacher.
        rows: B of them.
        config: lengths.
        stored: of those teachers that are cached, what is stored of these rows.
    """
    student = next(iter(pairs.values())).student
    teachers = {}
    for name, pair in pairs.items():
        length, spans = config.length_of(name), [row[name] for row in rows]
        teachers[name] = TeacherBatch(
            token_rows([s.teacher for s in spans], length, pair.teacher.pad_id),
            collate(spans, config.student_length, length),
            None if stored is None else stored.get(name),
        )
    own = token_rows([student_of(row) for row in rows], config.student_length, student.pad_id)
    return Batch(own, teachers)


def training_batches(
    pairs: Mapping[str, TokenizerPair],
    documents: Mapping[str, Sequence[Document]],
    config: DataConfig,
    *,
    caches: Mapping[str, TeacherCache] | None = None,
    rows: slice | Sequence[int] = slice(None),
    threads: int | None = None,
    tallies: MutableMapping[str, Tally] | None = None,
) -> Batches:
    """An endless iterator of Batch, shuffled anew in every epoch, whose position can be saved.

    Args:
        pairs: by teacher; the student's tokenizer is one. Without a teacher, the student's with itself.
        documents: of each training source, by its name.
        config: lengths, batch size, packing, seed and the sources' weights.
        caches: by teacher, of those whose outputs are cached.
        rows: which rows of the global batch are made here; they are the same whoever makes them.
        threads: that make them; None for as many as there are processors, up to 8.
        tallies: receives the counts of each source by its name, as `cut_little` gives them.

    Raises:
        UserError: a source without a row that has a token to learn, or less text than a batch holds.
    """
    weights = config.weights()
    cut = cut_little(pairs, documents, config, tallies=tallies)
    streams = streams_of(documents, weights, config.seed, cut)
    encode_all = functools.partial(encode, pairs)

    def lane(slot: int) -> Lane:
        return Lane(slot, streams, weights, encode_all, config)

    slots = range(*rows.indices(config.batch_size)) if isinstance(rows, slice) else rows
    if not slots:
        raise ValueError(f"rows={rows}: none of a batch of {config.batch_size}")
    threads = threads or min(8, os.cpu_count() or 1)
    return Batches(pairs, lane, slots, config, threads, caches or {})


def join_states(states: Sequence[State]) -> State:
    """One position of what several hosts' `Batches.get_state` gave, each with the lanes it makes."""
    lanes = {slot: state for position in states for slot, state in position["lanes"].items()}
    return {**states[0], "lanes": dict(sorted(lanes.items(), key=lambda lane: int(lane[0])))}


class Batches:
    """The batches of some lanes, in an order that neither threads nor hosts nor a restart change.

    Threads run a few rows ahead of what is asked for; they start with the first batch and end with this
    object, or with `close`.
    """

    def __init__(
        self,
        pairs: Mapping[str, TokenizerPair],
        lane: Callable[[int], Lane],
        slots: Sequence[int],
        config: DataConfig,
        threads: int,
        caches: Mapping[str, TeacherCache],
    ) -> None:
        """Of some rows of the global batch and what makes the lane of each, at its beginning."""
        self._pairs, self._lane, self._config, self._threads = pairs, lane, config, threads
        self._caches = caches
        self._number = 0
        self._states = {slot: lane(slot).get_state() for slot in slots}
        self._records: deque[tuple[int, list[tuple[Record, ...]]]] = deque(maxlen=_KEPT)
        self._ahead: _Ahead | None = None

    def anew(self, caches: Mapping[str, TeacherCache] | None = None) -> Batches:
        """The same rows from the beginning, with what `caches` hold; little text is not cut a second time."""
        return Batches(self._pairs, self._lane, [*self._states], self._config, self._threads, caches or {})

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        if self._ahead is None:
            lanes = [self._lane(slot) for slot in self._states]  # threads of before may be at the others
            self._ahead = _Ahead(self._pairs, lanes, self._states, self._config, self._threads, self._caches)
            weakref.finalize(self, self._ahead.close)
        made = self._ahead.take()
        self._number += 1
        self._states = made.states
        self._records.append((self._number, made.records))
        return made.batch

    def records_of(self, number: int) -> list[tuple[Record, ...]]:
        """Of each row made here of one of the last batches, where its parts come from.

        Args:
            number: of the batch since the stream began, from 1.

        Raises:
            KeyError: a batch that this object has not made, or not lately.
        """
        return dict(self._records)[number]

    @property
    def records(self) -> list[tuple[Record, ...]]:
        """`records_of` the last batch."""
        return self.records_of(self._number)

    def get_state(self) -> State:
        """The position behind the last batch, plain values: of each lane made here under its number.

        Hosts that make other lanes have those; `set_state` takes all of them, joined.
        """
        lanes = {str(slot): state for slot, state in self._states.items()}
        return {"number": self._number, "batch_size": self._config.batch_size, "lanes": lanes}

    def set_state(self, state: State) -> None:
        """Go on behind the batch at which `get_state` was asked; lanes that are not made here may be in it.

        A state of another batch size is gone on from at about the same place, and not exactly.
        """
        self.close()
        found = state["lanes"]
        if state["batch_size"] != self._config.batch_size:
            common = spread([*found.values()], self._config.batch_size)
            found = {str(slot): common for slot in self._states}
        self._number = state["number"]
        self._states = {slot: found[str(slot)] for slot in self._states}

    def close(self) -> None:
        """Stop running ahead; the next batch starts it again."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


@dataclass(frozen=True)
class _Made:
    batch: Batch
    records: list[tuple[Record, ...]]
    states: dict[int, State]  # of the lanes, behind the batch


class _Ahead:
    """Threads that make rows, lane by lane, and one that stacks them."""

    def __init__(
        self,
        pairs: Mapping[str, TokenizerPair],
        lanes: Sequence[Lane],
        states: Mapping[int, State],
        config: DataConfig,
        threads: int,
        caches: Mapping[str, TeacherCache],
    ) -> None:
        self._pairs, self._config, self._caches = pairs, config, caches
        self._makers = ThreadPoolExecutor(threads, "xtoken-rows")
        self._stacker = ThreadPoolExecutor(1, "xtoken-batches")
        self._slots = [*states]
        self._queues = [_LaneQueue(*both, caches) for both in zip(lanes, states.values(), strict=True)]
        for _ in range(_AHEAD):
            for rows in self._queues:
                self._makers.submit(rows.make)
        self._batches: deque[Future[_Made]] = deque(
            self._stacker.submit(self._stack) for _ in range(_BATCHES_AHEAD)
        )

    def take(self) -> _Made:
        made = self._batches.popleft().result()
        self._batches.append(self._stacker.submit(self._stack))
        return made

    def _stack(self) -> _Made:
        rows, found, states = [], [], {}
        for slot, made in zip(self._slots, self._queues, strict=True):
            row, of_caches, states[slot] = made.take()
            rows.append(row)
            found.append(of_caches)
            self._makers.submit(made.make)
        stored = {
            name: cache.rows([of_caches[name] for of_caches in found], self._config.length_of(name))
            for name, cache in self._caches.items()
        }
        batch = make_batch(self._pairs, [row.tokens for row in rows], self._config, stored)
        return _Made(batch, [row.records for row in rows], states)

    def close(self) -> None:
        """End the threads, once they are done with what they are at."""
        for rows in self._queues:
            rows.close()
        self._makers.shutdown(wait=False, cancel_futures=True)
        self._stacker.shutdown(wait=False, cancel_futures=True)


# A row, what each cache has of its parts, and the lane's state behind it.
_Ready = tuple[Row, dict[str, list[PartRows]], State]


def stored_parts(cache: TeacherCache, row: Row, teacher: str) -> list[PartRows]:
    """The cached distributions of each part of a row, as the teacher of this name reads it."""
    side = row.tokens[teacher].teacher
    # Each part is a segment; a part may have no token on this side.
    ends = np.searchsorted(side.segments, np.arange(len(row.records) + 1))
    return [
        cache.part(record.source, record.document, record.part, side.ids[begin:end])
        for record, begin, end in zip(row.records, ends[:-1], ends[1:], strict=True)
    ]


class _LaneQueue:
    """Rows of one lane that are ready, in its order, whichever thread made them."""

    def __init__(self, lane: Lane, state: State, caches: Mapping[str, TeacherCache]) -> None:
        self._lane, self._state, self._caches = lane, state, caches
        self._begun = False
        self._lock = threading.Lock()
        self._ready: queue.SimpleQueue[_Ready | BaseException] = queue.SimpleQueue()

    def make(self) -> None:
        """One row more."""
        with self._lock:
            try:
                if not self._begun:
                    self._lane.set_state(self._state)
                    self._begun = True
                row = next(self._lane)
                stored = {name: stored_parts(cache, row, name) for name, cache in self._caches.items()}
                made: Any = row, stored, self._lane.get_state()
            except BaseException as error:
                made = error
            self._ready.put(made)

    def take(self) -> _Ready:
        """The next row, what caches have of it, and the lane's state behind it; waits for it."""
        made = self._ready.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        """Let whoever waits for a row go."""
        self._ready.put(RuntimeError("closed"))
