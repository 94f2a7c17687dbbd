"""Windows, batches and the iterator over them."""

import jax
import numpy as np
import pytest
from tokens import trained

from xtoken_jax.alignment.align import align_texts, with_document_marks
from xtoken_jax.data.batches import (
    DataConfig,
    batch_records,
    make_batch,
    read_windows,
    student_of,
    training_batches,
)
from xtoken_jax.data.sources import SourceConfig, SourceKind, read_documents
from xtoken_jax.errors import UserError

PAIR = trained.pair(trained.three_digits, trained.single_digits)
PAIRS = {"teacher": PAIR}
CONFIG = DataConfig(student_length=16, teacher_length=24, batch_size=3, seed=5)
SUMS = {"sums": SourceConfig(kind=SourceKind.arithmetic, documents=2, wrong_share=0.0)}


@pytest.fixture(scope="module")
def windows():
    return read_windows(PAIRS, SUMS, CONFIG)


def leaves(batch):
    return [np.asarray(x) for x in jax.tree.leaves(batch)]


def same(one, two):
    return all(np.array_equal(a, b) for a, b in zip(leaves(one), leaves(two), strict=True))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_windows_hold_the_whole_text(windows, tmp_path):
    (part,) = windows.values()
    ids = np.concatenate([student_of(w).ids for w in part]).tolist()
    text = PAIR.student.decode(ids)
    assert text.count("=") == text.count("\n") == 36
    assert ids.count(PAIR.student.roles["bos"]) == ids.count(PAIR.student.roles["eos"]) == 2
    assert all(len(w["teacher"].student) <= 16 and len(w["teacher"].teacher) <= 24 for w in part)
    (tmp_path / "a.txt").write_text("x")
    short = {"a": SourceConfig(kind=SourceKind.text, path=str(tmp_path / "a.txt"))}
    with pytest.raises(UserError, match="source 'a': its text is too short"):
        # A window of one token predicts nothing.
        read_windows(PAIRS, short, DataConfig(student_length=1, teacher_length=1))


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


def test_too_few_rows(windows):
    count = sum(map(len, windows.values()))
    with pytest.raises(UserError, match=rf"fills {count} rows of 16 .* data\.batch_size={count + 1}"):
        training_batches(
            PAIRS, windows, DataConfig(student_length=16, teacher_length=24, batch_size=count + 1)
        )
    exactly = DataConfig(student_length=16, teacher_length=24, batch_size=count)
    assert next(training_batches(PAIRS, windows, exactly)).student.ids.shape == (count, 16)


def test_the_seed_decides_the_order(windows):
    first, again = (take(training_batches(PAIRS, windows, CONFIG), 6) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    other = DataConfig(student_length=16, teacher_length=24, batch_size=3, seed=6)
    assert not all(
        same(a, b) for a, b in zip(first, take(training_batches(PAIRS, windows, other), 6), strict=True)
    )


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(windows):
    rows = [w for part in windows.values() for w in part]
    config = DataConfig(student_length=16, teacher_length=24, batch_size=1, seed=5)
    iterator = training_batches(PAIRS, windows, config)
    epochs = [[tuple(next(iterator).student.ids[0].tolist()) for _ in rows] for _ in range(3)]
    padded = sorted(tuple(make_batch(PAIRS, [w], config).student.ids[0].tolist()) for w in rows)
    assert all(sorted(epoch) == padded for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_records_of_a_batch_name_its_rows():
    """Over two epochs: each row's text stands in its document, and its parts make up the whole."""
    sources = {**SUMS, "more": SourceConfig(kind=SourceKind.arithmetic, documents=3, seed=1)}
    windows = read_windows(PAIRS, sources, CONFIG)
    records_of = batch_records(windows, CONFIG)
    texts = {name: read_documents(source) for name, source in sources.items()}
    roles = PAIR.student.roles
    seen = {}
    count = 2 * sum(map(len, windows.values())) // CONFIG.batch_size
    for number, batch in enumerate(take(training_batches(PAIRS, windows, CONFIG), count)):
        records = records_of(number)
        assert len(records) == CONFIG.batch_size
        for record, ids, mask in zip(records, batch.student.ids, batch.student.mask, strict=True):
            kept = [i for i in ids[mask] if i not in (roles["bos"], roles["eos"])]
            text = PAIR.student.decode(np.array(kept))
            assert text in texts[record.source][record.document]
            seen[record.source, record.document, record.part] = text
    for name, documents in texts.items():
        for number, document in enumerate(documents):
            parts = [seen[key] for key in sorted(seen) if key[:2] == (name, number)]
            assert "".join(parts) == document


@pytest.mark.parametrize("taken", [0, 1, 4, 11])
def test_a_saved_position_resumes_exactly(windows, taken):
    """Across epochs too, and in a new process: the state is all that is handed over."""
    iterator = training_batches(PAIRS, windows, CONFIG)
    take(iterator, taken)
    state = iterator.get_state()
    expected = take(iterator, 5)
    resumed = training_batches(PAIRS, windows, CONFIG)
    take(resumed, 2)
    resumed.set_state(state)
    assert all(same(a, b) for a, b in zip(expected, take(resumed, 5), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_length": 1}, r"data\.student_length=1"),
        ({"batch_size": 0}, r"data\.batch_size=0"),
        ({"train": {}}, r"data\.train: name at least one"),
        ({"validation": {"v": SourceConfig()}}, r"data\.validation\.v\.path"),
    ],
)
def test_settings_without_sense(options, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**({"train": SUMS, "validation": SUMS} | options)).validate()
