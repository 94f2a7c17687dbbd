"""Batches: what they hold, in which order, whoever makes them."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
from tokens import trained

from xtoken_jax.alignment.align import align_texts, with_document_marks
from xtoken_jax.data import encode
from xtoken_jax.data.batches import join_states, make_batch, training_batches
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.encode import read_parts, student_of
from xtoken_jax.data.sources import SourceConfig, SourceKind, read_sources
from xtoken_jax.errors import UserError

PAIR = trained.pair(trained.three_digits, trained.single_digits)
PAIRS = {"teacher": PAIR}
CONFIG = DataConfig(student_length=16, teacher_length=24, batch_size=3, seed=5)
SUMS = {"sums": SourceConfig(kind=SourceKind.arithmetic, documents=2, wrong_share=0.0)}
TEXTS = read_sources(SUMS)
RNG = np.random.default_rng(0)
# Documents of very different lengths.
MANY = {
    name: [
        "".join(f"{n}+1={n + 1}\n" for n in RNG.integers(0, 999, RNG.integers(1, 12))) for _ in range(count)
    ]
    for name, count in (("first", 25), ("second", 14))
}


@pytest.fixture(params=["little", "much"])
def text(request, monkeypatch):
    """The same text as if it were little, whose parts are made up front, and as if it were much."""
    if request.param == "much":
        monkeypatch.setattr(encode, "LITTLE", 0)


def leaves(batch):
    return [np.asarray(x) for x in jax.tree.leaves(batch)]


def same(one, two):
    return all(np.array_equal(a, b) for a, b in zip(leaves(one), leaves(two), strict=True))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def batches_of(config, texts=MANY, **options):
    return training_batches(PAIRS, texts, config, **options)


def test_parts_hold_the_whole_text():
    (parts,) = read_parts(PAIRS, TEXTS, CONFIG).values()
    ids = np.concatenate([student_of(part).ids for part in parts]).tolist()
    text = PAIR.student.decode(ids)
    assert text.count("=") == text.count("\n") == 36
    assert ids.count(PAIR.student.roles["bos"]) == ids.count(PAIR.student.roles["eos"]) == 2
    assert all(len(p["teacher"].student) <= 16 and len(p["teacher"].teacher) <= 24 for p in parts)


def test_masks_padding_and_shapes():
    (row,) = align_texts(PAIR, ["12+30=42"])
    rows = [with_document_marks(PAIR, row), row]
    batch = make_batch(PAIRS, [{"teacher": row} for row in rows], CONFIG)
    teacher, alignment = batch.teachers["teacher"].rows, batch.teachers["teacher"].alignment
    assert batch.student.ids.shape == batch.student.mask.shape == (2, 16)
    assert teacher.ids.shape == teacher.mask.shape == (2, 24)
    assert alignment.valid.shape == (2, 16)
    for i, spans in enumerate(rows):
        for ids, mask, chunks, own, own_chunks, tokenizer in (
            (batch.student.ids, batch.student.mask, alignment.student_chunks,
             spans.student.ids, spans.student.chunks, PAIR.student),
            (teacher.ids, teacher.mask, alignment.teacher_chunks,
             spans.teacher.ids, spans.teacher.chunks, PAIR.teacher),
        ):  # fmt: skip
            count = len(own)
            assert ids[i, :count].tolist() == own.tolist()
            assert np.all(ids[i, count:] == tokenizer.pad_id)
            assert mask[i].tolist() == [True] * count + [False] * (mask.shape[1] - count)
            assert chunks[i, :count].tolist() == own_chunks.tolist()
            assert np.all(chunks[i, count:] == -1)
        assert alignment.valid[i].sum() == spans.chunk_count - 1  # what opens a row does not count
    assert batch.student.ids.dtype == teacher.ids.dtype == np.int32
    # The end-of-text token is a label although it is also what rows are filled with.
    assert batch.student.mask[0].sum() == len(row.student.ids) + 2


def test_too_little_text():
    count = sum(map(len, read_parts(PAIRS, TEXTS, CONFIG).values()))
    with pytest.raises(UserError, match=rf"fills {count} rows of 16 .* data\.batch_size={count + 1}"):
        batches_of(dataclasses.replace(CONFIG, batch_size=count + 1), TEXTS)
    exactly = batches_of(dataclasses.replace(CONFIG, batch_size=count), TEXTS)
    assert next(exactly).student.ids.shape == (count, 16)
    for short in ({"a": ["x"] * 2}, {"a": ["x"] * 400, **MANY}):
        # A row of one token predicts nothing.
        with pytest.raises(UserError, match="source 'a': no row has a token to learn"):
            batches_of(DataConfig(student_length=1, teacher_length=1, batch_size=2), short)


def test_little_text_comes_part_by_part():
    """One a row, every epoch is each part once, in an order of its own."""
    config = dataclasses.replace(CONFIG, pack=False)
    batches = batches_of(config)
    count = sum(len(parts) for parts in read_parts(PAIRS, MANY, config).values())
    records = []
    while len(records) < 3 * count:
        next(batches)
        records += [record for row in batches.records for record in row]
    epochs = [records[n * count : (n + 1) * count] for n in range(3)]
    assert all(len(set(epoch)) == count for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.usefixtures("text")
def test_the_seed_decides_the_order():
    first, again = (take(batches_of(CONFIG), 6) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    other = take(batches_of(dataclasses.replace(CONFIG, seed=6)), 6)
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.usefixtures("text")
def test_all_text_comes_about_equally_often():
    config = dataclasses.replace(CONFIG, batch_size=2)
    batches = batches_of(config)
    found = collections.Counter()
    for _ in range(150):
        next(batches)
        found.update(record for row in batches.records for record in row)
    parts = {name: read_parts(PAIRS, {name: texts}, config)[name] for name, texts in MANY.items()}
    assert len(found) == sum(map(len, parts.values()))
    epochs = found.total() / len(found)
    assert epochs > 2
    assert all(abs(count - epochs) < 3 for count in found.values())


@pytest.mark.usefixtures("text")
def test_the_records_of_a_batch_name_its_segments():
    """Over two epochs: each segment's text stands in its document, and its parts make up the whole."""
    sources = {**SUMS, "more": SourceConfig(kind=SourceKind.arithmetic, documents=3, seed=1)}
    texts = read_sources(sources) | MANY
    roles = PAIR.student.roles
    seen = {}
    batches = batches_of(CONFIG, texts)
    for number in range(1, 120):
        student = next(batches).student
        assert batches.records == batches.records_of(number)
        assert len(batches.records) == CONFIG.batch_size
        for records, ids, segments in zip(batches.records, student.ids, student.segments, strict=True):
            assert segments.max() == len(records)
            for segment, record in enumerate(records, 1):
                kept = [i for i in ids[segments == segment] if i not in (roles["bos"], roles["eos"])]
                text = PAIR.student.decode(np.array(kept))
                assert text in texts[record.source][record.document]
                seen[record.source, record.document, record.part] = text
    with pytest.raises(KeyError):
        batches.records_of(1)
    for name, documents in texts.items():
        for number, document in enumerate(documents):
            parts = [seen[key] for key in sorted(seen) if key[:2] == (name, number)]
            assert "".join(parts) == document


WEIGHTED = dataclasses.replace(
    CONFIG, train={name: SourceConfig(weight=weight) for name, weight in (("first", 1.0), ("second", 3.0))}
)


@pytest.mark.parametrize(
    ("config", "taken"),
    [(CONFIG, 0), (CONFIG, 31), (WEIGHTED, 4), (dataclasses.replace(CONFIG, pack=False), 7)],
)
@pytest.mark.usefixtures("text")
def test_a_saved_position_resumes_exactly(config, taken):
    """Across epochs too, and in a new process: the state is all that is handed over."""
    batches = batches_of(config)
    take(batches, taken)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 5)
    resumed = batches_of(config)
    take(resumed, 2)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert all(same(a, b) for a, b in zip(expected, take(resumed, 5), strict=True))
    assert resumed.records_of(taken + 5) == batches.records_of(taken + 5)


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.usefixtures("text")
def test_the_batches_are_the_same_on_any_number_of_hosts_and_threads(hosts):
    config = dataclasses.replace(WEIGHTED, batch_size=8)
    whole = batches_of(config, threads=1)
    size = 8 // hosts
    parts = [
        batches_of(config, rows=range(host * size, (host + 1) * size), threads=1 + 2 * host)
        for host in range(hosts)
    ]
    for number in range(1, 9):
        expected, found = next(whole), [next(part) for part in parts]
        joined = [np.concatenate(same_leaf) for same_leaf in zip(*map(leaves, found), strict=True)]
        assert same(expected, joined)
        assert whole.records == [row for part in parts for row in part.records]
        if number == 4:
            # They go on from one another's states too.
            states = [part.get_state() for part in parts]
            assert json.dumps(join_states(states[::-1])) == json.dumps(whole.get_state())
            for part in parts:
                part.set_state(whole.get_state())


def test_another_batch_size_goes_on_at_about_the_same_place():
    batches = batches_of(CONFIG)
    take(batches, 20)
    other = batches_of(dataclasses.replace(CONFIG, batch_size=4))
    other.set_state(batches.get_state())
    before = sum(lane["taken"][""] for lane in batches.get_state()["lanes"].values())
    after = sum(lane["taken"][""] for lane in other.get_state()["lanes"].values())
    assert before <= after < before + 4
    assert next(other).student.ids.shape == (4, 16)


def test_packing_leaves_less_padding():
    filled = {}
    for pack in (True, False):
        batches = batches_of(dataclasses.replace(CONFIG, pack=pack))
        filled[pack] = np.mean([next(batches).student.mask.mean() for _ in range(40)])
    assert filled[True] > 0.9 > 0.85 > filled[False]


def test_what_goes_wrong_in_a_thread_is_raised(monkeypatch):
    class Broken(list):
        def __getitem__(self, place):
            if isinstance(place, int) and place > 8:
                raise UserError("document: cannot be read")
            return super().__getitem__(place)

    monkeypatch.setattr(encode, "LITTLE", 0)
    batches = batches_of(CONFIG, {"text": Broken(MANY["first"])})
    with pytest.raises(UserError, match="cannot be read"):
        take(batches, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_length": 1}, r"data\.student_length=1"),
        ({"batch_size": 0}, r"data\.batch_size=0"),
        ({"train": {}}, r"data\.train: name at least one"),
        ({"validation": {"v": SourceConfig()}}, r"data\.validation\.v\.path"),
        ({"train": {"s": dataclasses.replace(SUMS["sums"], weight=0.0)}}, r"train\.s\.weight=0\.0: must be"),
        (
            {"train": {"s": dataclasses.replace(SUMS["sums"], weight=2.0), **SUMS}},
            r"data\.train\.sums\.weight: not given",
        ),
        ({"validation": {"s": dataclasses.replace(SUMS["sums"], weight=2.0)}}, r"validation\.s\.weight=2\.0"),
    ],
)
def test_settings_without_sense(options, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**({"train": SUMS, "validation": SUMS} | options)).validate()
