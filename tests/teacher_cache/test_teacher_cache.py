"""The files of a teacher cache: what is written is read, and what is damaged or of other text is refused."""

import json

import numpy as np
import pytest
from kills import killed

from xtoken_jax.alignment.spans import Side, Spans
from xtoken_jax.data.batches import stored_parts
from xtoken_jax.data.encode import Record
from xtoken_jax.data.row_streams import Row
from xtoken_jax.errors import UserError
from xtoken_jax.teacher_cache.reader import INDEX_FILE, Index, TeacherCache, add_shard, is_whole, read_index
from xtoken_jax.teacher_cache.shards import DTYPES, Entry, Form, PartRows, packed, unpacked

SIZE, TAUS = 40, (1.0, 2.0)
RNG = np.random.default_rng(3)
DOCUMENTS = {"a": (5, 3), "b": (7,)}  # source -> tokens of each document, each one part


def random_rows(count, every_token=False, dtype="float32", size=SIZE):
    normalizers = RNG.normal(0, 1, count).astype(np.float32)
    if every_token:
        values = RNG.normal(-3, 1, count * size).astype(DTYPES[dtype])
        return PartRows(None, None, values, np.full((2, count), -np.inf, DTYPES[dtype]), normalizers)
    counts = RNG.integers(1, 5, count)
    ids = np.concatenate([np.sort(RNG.choice(size, n, replace=False)) for n in counts])
    values = RNG.normal(-3, 1, len(ids)).astype(DTYPES[dtype])
    return PartRows(counts, ids, values, RNG.normal(-4, 1, (2, count)).astype(DTYPES[dtype]), normalizers)


def ids_of(count):
    return RNG.integers(0, SIZE, count).astype(np.int32)


def write(folder, form=None):
    """A finished cache of two shards; what is in it by key."""
    form = form or Form(SIZE, "float32", TAUS, False)
    keep = {
        "top_k": None if form.every_token else 4, "top_p": 1.0, "dtype": form.dtype, "temperatures": [*TAUS]
    }  # fmt: skip
    index = Index(
        {"teacher.config": "1", "data.train.a": "x", "data.train.b": "y"}, keep, SIZE, [*DOCUMENTS], 4
    )
    folder.mkdir(parents=True)
    held = {}
    for number, (name, counts) in enumerate(DOCUMENTS.items()):
        entries = []
        for document, count in enumerate(counts):
            ids, rows = ids_of(count), random_rows(count, form.every_token, form.dtype)
            held[name, document] = ids, rows
            entries.append(Entry((number, document, 0), ids, packed(rows, form)[0]))
        add_shard(
            folder, index, number, entries, first=(number, 0), next=(number + 1, 0), raw_bytes=1, lost={}
        )
    index.complete = True
    index.write(folder)
    return held


@pytest.fixture
def cache(tmp_path):
    held = write(tmp_path / "cache")
    return tmp_path / "cache", held


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("size", [40, 2**16 + 5])
def test_rows_come_back_to_the_bit(dtype, every_token, size):
    if every_token and size > 40:
        size = 41
    form = Form(size, dtype, TAUS, every_token)
    rows = random_rows(6, every_token, dtype, size)
    content, raw = packed(rows, form)
    assert len(content) < raw + 64
    for found, expected in zip(unpacked(content, 6, form), rows, strict=True):
        if expected is None:
            assert found is None
        else:
            np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"more bytes than its rows|more than the index says|buffer"):
        unpacked(content, 5, form)


def test_tokens_of_a_position_come_back_by_id():
    rows = PartRows(
        np.array([3, 0, 2]), np.array([9, 2, 30, 7, 1]), np.arange(5, dtype=np.float32),
        np.zeros((2, 3), np.float32), np.zeros(3, np.float32),
    )  # fmt: skip
    form = Form(SIZE, "float32", TAUS, False)
    found = unpacked(packed(rows, form)[0], 3, form)
    assert (found.counts.tolist(), found.ids.tolist()) == ([3, 0, 2], [2, 9, 30, 1, 7])
    assert found.log_probabilities.tolist() == [1, 0, 2, 4, 3]


def test_a_batch_of_packed_rows(cache):
    folder, held = cache
    reader = TeacherCache(folder, 2.0)
    parts = [reader.part(source, document, 0, held[source, document][0]) for source, document in held]
    found = reader.rows([[parts[2], parts[1]], [parts[0]]], 12)
    assert found.ids.shape == (2, 12, 4)
    assert (found.size, found.temperature) == (SIZE, 2.0)
    for row, first, key in ((0, 0, ("b", 0)), (0, 7, ("a", 1)), (1, 0, ("a", 0))):
        rows, place = held[key][1], 0
        for position, count in enumerate(rows.counts, first):
            here = slice(place, place + count)
            np.testing.assert_array_equal(found.ids[row, position, :count], rows.ids[here])
            np.testing.assert_array_equal(
                found.log_probabilities[row, position, :count], rows.log_probabilities[here]
            )
            assert (found.ids[row, position, count:] == SIZE).all()
            tail = np.exp(found.others[row, position]) * (SIZE - count)
            np.testing.assert_allclose(tail, np.exp(rows.tails[1, position - first]), rtol=1e-5)
            assert found.normalizers[row, position] == rows.normalizers[position - first]
            place += count
    assert (found.ids[0, 10:] == SIZE).all()
    assert (found.ids[1, 5:] == SIZE).all()


def test_all_tokens_need_no_ids(tmp_path):
    held = write(tmp_path / "cache", Form(SIZE, "bfloat16", TAUS, True))
    reader = TeacherCache(tmp_path / "cache", 3.0)  # any temperature
    found = reader.rows([[reader.part("b", 0, 0, held["b", 0][0])]], 9)
    assert found.ids is None
    values = held["b", 0][1].log_probabilities.reshape(7, SIZE)
    np.testing.assert_array_equal(found.log_probabilities[0, :7], values)
    assert found.log_probabilities.dtype == DTYPES["bfloat16"]


def test_the_parts_of_a_row_are_found_by_its_records(cache):
    folder, held = cache
    ids = [held["b", 0][0], held["a", 1][0]]
    joined = np.concatenate(ids)
    segments = np.repeat(np.arange(2, dtype=np.int32), [7, 3])
    side = Side(joined, np.zeros_like(joined), np.ones(10, bool), segments)
    row = Row(
        {"teacher": Spans(side, side, np.ones(1, bool), np.ones(1, bool))},
        (Record("b", 0, 0), Record("a", 1, 0)),
    )
    found = stored_parts(TeacherCache(folder), row, "teacher")
    assert [len(part.normalizers) for part in found] == [7, 3]
    np.testing.assert_array_equal(found[1].ids, held["a", 1][1].ids)


def test_other_text_is_refused(cache):
    folder, held = cache
    reader = TeacherCache(folder)
    ids = held["a", 0][0]
    with pytest.raises(UserError, match="a document 0 part 0 has other tokens there than the teacher sees"):
        reader.part("a", 0, 0, (ids + 1) % SIZE)
    with pytest.raises(UserError, match="other tokens"):
        reader.part("a", 0, 0, ids[:-1])
    for source, document, part in (("a", 2, 0), ("a", 0, 1), ("c", 0, 0)):
        with pytest.raises(UserError, match=f"has nothing of {source} document {document} part {part}"):
            reader.part(source, document, part, ids)


def test_what_it_is_made_of_is_compared(cache):
    folder, _ = cache
    reader = TeacherCache(folder, key="teachers.big.cache")
    reader.check({"teacher.config": "1", "data.train.b": "y", "something else": "2"})
    with pytest.raises(
        UserError, match=r"teachers\.big\.cache=.*another teacher\.config \(1 there, 2 here\)"
    ):
        reader.check({"teacher.config": "2"})
    with pytest.raises(UserError, match=r"another data\.train\.a \(x there, z here\)"):
        reader.check({"data.train.a": "z"})
    with pytest.raises(UserError, match="has no 'c' text"):
        reader.check({"data.train.c": "x"})
    # with names on both sides, these instead of fingerprints; lengths as they are
    reader.index.names = {"teacher": "models/old", "data.train.a": "a.jsonl"}
    names = {"teacher": "models/new", "data.train.a": "a.jsonl"}
    for made_of, expected in (
        ({"teacher.config": "2"}, r"another teacher\.config \(models/old there, models/new here\)"),
        ({"data.train.a": "z"}, r"another data\.train\.a \(a\.jsonl has changed since\)"),
    ):
        with pytest.raises(UserError, match=expected):
            reader.check(made_of, names)
    with pytest.raises(UserError, match="made for temperature 1, 2, the loss has 3"):
        TeacherCache(folder, 3.0)


def test_every_damaged_byte_is_found_and_its_shard_named(cache):
    folder, held = cache
    name = "shard-00000.safetensors"
    content = (folder / name).read_bytes()
    places = [0, 9, *range(64, len(content), 97), len(content) - 1]
    silent = []
    for place in places:
        (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert not is_whole(folder, read_index(folder).shards[0])
        found = []
        for document in range(2):
            try:
                found.append(TeacherCache(folder).part("a", document, 0, held["a", document][0]))
            except UserError as error:
                assert name in str(error) and "damaged" in str(error)  # noqa: PT017, PT018
        if len(found) == 2:
            silent.append(place)
            for part, (_, rows) in zip(found, held.values(), strict=False):  # harmless then, as in padding
                np.testing.assert_array_equal(part.log_probabilities, rows.log_probabilities)
    assert len(silent) < len(places) / 4
    (folder / name).write_bytes(content[:-3])
    with pytest.raises(UserError, match=rf"{name}: damaged \(\d+ bytes instead of \d+\)"):
        TeacherCache(folder).part("a", 0, 0, held["a", 0][0])
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: damaged"):
        TeacherCache(folder).part("a", 0, 0, held["a", 0][0])


def test_folders_that_are_no_finished_cache(tmp_path, cache):
    folder, _ = cache
    with pytest.raises(
        UserError, match=r"teacher\.cache=.*no teacher cache there; xtoken cache-teacher makes"
    ):
        TeacherCache(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a teacher cache"):
        read_index(tmp_path / "other")
    index = json.loads((folder / INDEX_FILE).read_text())
    for change, message in (
        ({"complete": False}, "an unfinished teacher cache"),
        ({"format": 2}, "of format 2, which is not 1"),
        ({"keep": {**index["keep"], "dtype": "int4"}}, "not the index of a teacher cache"),
        ({"shards": [{}]}, "not the index of a teacher cache"),
    ):
        (folder / INDEX_FILE).write_text(json.dumps({**index, **change}))
        with pytest.raises(UserError, match=message):
            TeacherCache(folder)
    (folder / INDEX_FILE).write_text("{")
    with pytest.raises(UserError, match="not the index"):
        TeacherCache(folder)


def test_a_kill_while_a_shard_is_added_leaves_it_out_or_in(tmp_path):
    form = Form(SIZE, "float32", TAUS, False)
    keep = {"top_k": 4, "top_p": 1.0, "dtype": "float32", "temperatures": [*TAUS]}
    index = Index({}, keep, SIZE, ["a"])
    index.write(tmp_path)
    entries = [Entry((0, 0, 0), ids_of(5), packed(random_rows(5), form)[0])]
    moment = 0
    while killed(
        moment,
        lambda: add_shard(tmp_path, index, 0, entries, first=(0, 0), next=(1, 0), raw_bytes=1, lost={}),
    ):
        there = read_index(tmp_path)
        assert all(is_whole(tmp_path, shard) for shard in there.shards)
        index.shards = []
        index.write(tmp_path)
        moment += 1
    assert moment >= 4
    assert is_whole(tmp_path, read_index(tmp_path).shards[0])
