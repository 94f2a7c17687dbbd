"""Lanes: nothing lost, nothing doubled, weights followed; on documents of made-up tokens."""

import json
from collections import Counter

import numpy as np
import pytest

from xtoken_jax.alignment.rows import cut_together
from xtoken_jax.alignment.spans import Side, Spans
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.row_streams import Lane, spread, streams_of

PACKED = DataConfig(student_length=32, teacher_length=40, teacher_lengths={"other": 24}, batch_size=3, seed=4)


def encode(documents):
    """A document "7 30 250": 30 chunks, of one to three tokens on each side, the first student token 250."""
    rows = []
    for document in documents:
        seed, count, first = map(int, document.split())
        rng = np.random.default_rng(seed)
        chunks = np.arange(count, dtype=np.int32)
        student = np.repeat(chunks, rng.integers(1, 3, count))
        sides = [np.repeat(chunks, rng.integers(1, 4, count)) for _ in range(2)]
        ids = first + np.arange(len(student), dtype=np.int32)
        rows.append(
            {
                name: Spans(Side.of(ids, student), Side.of(side.copy(), side), count, np.ones(count, bool))
                for name, side in zip(("teacher", "other"), sides, strict=True)
            }
        )
    return rows


def corpus(rng, count):
    """Documents of very different lengths, none of whose tokens another has, the shortest too short."""
    starts = 1000 * np.arange(count)
    lengths = np.maximum(rng.geometric(0.05, count), rng.integers(1, 3, count))
    return [f"{rng.integers(99)} {length} {start}" for length, start in zip(lengths, starts, strict=True)]


def lane_of(texts, config, slot=0, weights=None):
    return Lane(slot, streams_of(texts, weights, config.seed), weights, encode, config)


def parts_of(document, config):
    row = encode([document])[0]
    lengths = [config.length_of(name) for name in row]
    found = cut_together([*row.values()], config.student_length, lengths)
    return [part[0].student.ids.tolist() for part in found if len(part[0].student) > 1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("weights", [None, {"a": 0.8, "b": 0.2}])
def test_what_came_and_what_waits_is_what_was_taken(seed, pack, weights):
    """Every part of every document that a lane has taken comes or waits, once for each time it was taken."""
    rng = np.random.default_rng(seed)
    config = DataConfig(**{**vars(PACKED), "pack": pack, "seed": seed})
    texts = {"a": corpus(rng, 9), "b": corpus(rng, 5)}
    slot = seed % 3
    lane, streams = lane_of(texts, config, slot, weights), streams_of(texts, weights, seed)
    came = Counter()
    for _ in range(100):
        row = next(lane)
        other, teacher = row.tokens["other"], row.tokens["teacher"]
        assert other.student is teacher.student or np.array_equal(other.student.ids, teacher.student.ids)
        assert len(other.student) <= 32
        assert len(teacher.teacher) <= 40
        assert len(other.teacher) <= 24
        assert len(row.records) == 1 or pack
        for number, record in enumerate(row.records):
            # A part is a segment of the same number on all sides, whole and as if it were alone.
            document = texts[record.source][record.document]
            for spans in (other, teacher):
                ids = spans.student.ids[spans.student.segments == number].tolist()
                assert ids == parts_of(document, config)[record.part]
                counts = [
                    len(np.unique(s.chunks[s.segments == number])) for s in (spans.student, spans.teacher)
                ]
                assert counts[0] == counts[1]
            came[record.source, record.document, record.part] += 1
    state = lane.get_state()
    taken = Counter()
    for stream, number in state["taken"].items():
        for n in range(number):
            source, document = streams[stream].at(slot + 3 * n)
            for part in range(len(parts_of(texts[source][document], config))):
                taken[source, document, part] += 1
    for stream, number, part, _ in state["waiting"]:
        came[(*streams[stream].at(slot + 3 * number), part)] += 1
    missing = taken - came
    assert not came - taken
    if state["rest"] is None:
        assert not missing
    else:
        stream, number, count = state["rest"]
        assert missing.total() == count
        assert {key[:2] for key in missing} == {streams[stream].at(slot + 3 * number)}


def test_an_epoch_is_every_document_once():
    texts = {"a": corpus(np.random.default_rng(0), 9), "b": corpus(np.random.default_rng(1), 5)}
    stream = streams_of(texts, None, 7)[""]
    epochs = [[stream.at(14 * epoch + n) for n in range(14)] for epoch in range(4)]
    every = {(name, n) for name, documents in texts.items() for n in range(len(documents))}
    assert all(set(epoch) == every for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert stream.document(3) == texts[stream.at(3)[0]][stream.at(3)[1]]


@pytest.mark.parametrize("share", [0.5, 0.9, 0.01])
def test_tokens_follow_weights_whatever_the_documents_lengths(share):
    rng = np.random.default_rng(0)
    texts = {"long": [f"{n} {rng.integers(100, 300)} 0" for n in range(7)], "short": corpus(rng, 50)}
    lanes = [lane_of(texts, PACKED, slot, {"long": share, "short": 1 - share}) for slot in range(3)]
    tokens = Counter()
    begun = set()  # in which row a lane comes to the long ones
    for lane in lanes:
        found = []
        for number in range(300):
            row = next(lane)
            student = row.tokens["teacher"].student
            for segment, record in enumerate(row.records):
                tokens[record.source] += int((student.segments == segment).sum())
                found += [number] if record.source == "long" else []
        begun |= set(found[:1])
    assert abs(tokens["long"] / tokens.total() - share) < 0.02
    assert len(begun) == len(lanes) or share < 0.5


def test_one_long_text_is_read_in_different_places():
    texts = {"book": ["3 4000 0"]}
    begun = [next(lane_of(texts, PACKED, slot)).records[0].part for slot in range(3)]
    assert len(set(begun)) == 3


@pytest.mark.parametrize("taken", [0, 1, 7, 60])
def test_a_lane_goes_on_from_its_state(taken):
    texts = {"a": corpus(np.random.default_rng(2), 9), "b": ["1 900 0"]}
    weights = {"a": 0.5, "b": 0.5}
    lane, other = (lane_of(texts, PACKED, 1, weights) for _ in range(2))
    for _ in range(taken):
        next(lane)
    state = json.loads(json.dumps(lane.get_state()))
    assert len(json.dumps(state)) < 3000
    next(other)
    other.set_state(state)
    assert other.get_state() == state
    for _ in range(30):
        assert next(other).records == next(lane).records


def test_rows_are_full_whatever_the_documents_lengths():
    for least, most, share in ((1, 3, 0.95), (1, 60, 0.85)):
        rng = np.random.default_rng(0)
        texts = {"a": [f"{n} {rng.integers(least, most)} 0" for n in range(20)]}
        config = DataConfig(student_length=200, teacher_length=240, teacher_lengths={"other": 240})
        filled = []
        lane = lane_of(texts, config)
        for _ in range(25):
            row = next(lane).tokens
            sizes = len(row["teacher"].student), len(row["teacher"].teacher), len(row["other"].teacher)
            filled.append(max(size / length for size, length in zip(sizes, (200, 240, 240), strict=True)))
        assert np.mean(filled) > share, (least, most)


def test_states_of_other_lanes_are_spread_over_new_ones():
    texts = {"a": corpus(np.random.default_rng(2), 9)}
    lanes = [lane_of(texts, PACKED, slot) for slot in range(3)]
    for lane in lanes:
        for _ in range(20):
            next(lane)
    states = [lane.get_state() for lane in lanes]
    found = spread(states, 2)
    taken = sum(state["taken"][""] for state in states)
    assert found["taken"][""] == -(-taken // 2)
    assert found["waiting"] == []
    # A source that is gone, and a part that is no more, are passed over.
    lane = lane_of({"a": texts["a"][:2]}, PACKED)
    lane.set_state(states[0] | {"waiting": [["", 0, 99, 3], ["gone", 1, 0, 4]]})
    assert len(next(lane).records) > 0
