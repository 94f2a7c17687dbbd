"""An index and shards of a teacher cache from anywhere: what does not fit is one line that names it."""

import json
import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save
from teacher_cache.test_teacher_cache import write

from xtoken_jax.errors import UserError
from xtoken_jax.teacher_cache.reader import INDEX_FILE, TeacherCache
from xtoken_jax.teacher_cache.shards import Form, unpacked


@pytest.fixture
def cache(tmp_path):
    held = write(tmp_path / "cache")
    return tmp_path / "cache", held


def changed(folder, path, value):
    """Write the index with one value changed; ... removes it."""
    content = json.loads((folder / INDEX_FILE).read_text())
    *outer, last = path
    part = content
    for key in outer:
        part = part[key]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    (folder / INDEX_FILE).write_text(json.dumps(content))


FAULTS = [
    (["width"], 0, "width=0, but it holds tokens"),
    (["width"], None, "width=null must be a whole number"),
    (["width"], "4", 'width="4" must be a whole number'),
    (["width"], 6, "width=6 is more than the 5 tokens that are kept"),
    (["size"], 10**12, "size=1000000000000 must be a positive whole number"),
    (["size"], 2.0, "size=2.0 must be"),
    (["complete"], 1, "complete=1 must be true or false"),
    (["sources"], "ab", "sources="),
    (["sources"], ["a"], "begins with source 1 of 1"),
    (["made_of"], {"teacher.config": 3}, "made_of="),
    (["keep"], [], "keep=[] must be an object"),
    (["keep", "temperatures"], [], "keep: temperatures=[] must be"),
    (["keep", "temperatures"], [0], "keep: temperatures=[0] must be"),
    (["keep", "top_k"], -1, "keep: top_k=-1"),
    (["keep", "dtype"], ["float32"], "keep: dtype="),
    (["keep", "top_p"], ..., 'keep: lacks "top_p"'),
    (["more"], 1, 'has the unknown key "more"'),
    (["shards", 0, "file"], "../../x.safetensors", "file="),
    (["shards", 0, "bytes"], True, "bytes=true"),
    (["shards", 0, "first"], [0], "first=[0]"),
    (["shards", 1, "first"], [0, 0], "overlap or are not in order"),
    (["shards", 1, "file"], "shard-00000.safetensors", "two shards have the same file"),
    (["shards", 0, "lost"], {"tokens": 1}, 'shards[0].lost: lacks "labels"'),
    (["shards"], {}, "shards={}"),
    (["figures"], {"text": "good"}, "figures="),
]


@pytest.mark.parametrize(("path", "value", "words"), FAULTS)
def test_a_field_that_does_not_fit_is_named(cache, path, value, words):
    folder, _ = cache
    changed(folder, path, value)
    with pytest.raises(UserError) as error:
        TeacherCache(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / INDEX_FILE}: not the index of a teacher cache")
    assert words in message
    assert "\n" not in message


SHARD_FAULTS = [
    ("keys", lambda keys: keys[:, :2], "keys is int64 of shape [2, 2], not int64 of [2, 3]"),
    ("tokens", lambda tokens: tokens[:1], "tokens is int32 of shape [1]"),
    ("tokens", lambda tokens: tokens.astype(np.int64), "tokens is int64"),
    ("offsets", lambda offsets: offsets * 2, "its offsets do not fit its content"),
    ("offsets", lambda offsets: offsets[::-1], "its offsets do not fit its content"),
    ("content", lambda content: content[None], "its offsets do not fit its content"),
]


@pytest.mark.parametrize(("name", "change", "words"), SHARD_FAULTS)
def test_a_shard_whose_tables_do_not_fit_is_damaged(cache, name, change, words):
    """Also where the checksums of the index are those of the file."""
    folder, held = cache
    path = folder / "shard-00000.safetensors"
    tensors = load_file(path)
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    content = save(tensors)
    path.write_bytes(content)
    tables = b"".join(
        tensors[t].tobytes() for t in ("keys", "tokens", "ids_crc32", "content_crc32", "offsets")
    )
    for key, value in (("bytes", len(content)), ("tables_crc32", zlib.crc32(tables))):
        changed(folder, ["shards", 0, key], value)
    ids, _ = held["a", 0]
    with pytest.raises(UserError) as error:
        TeacherCache(folder).part("a", 0, 0, ids)
    assert str(error.value).startswith(f"{path}: damaged (")
    assert words in str(error.value)


def test_rows_are_unpacked_within_a_bound():
    form = Form(40, "float32", (1.0,), False)
    bomb = zlib.compress(bytes(200 << 20))  # zeros: 0 tokens of each distribution, and much behind them
    with pytest.raises(ValueError, match="more bytes than its rows take"):
        unpacked(bomb, 3, form)
    with pytest.raises(ValueError, match="9 tokens of a distribution, more than the index says"):
        unpacked(zlib.compress(np.array([9], np.uint16).tobytes() * 8), 1, form, width=4)
    outside = [np.array([1], np.uint16), np.array([40], np.uint16), np.zeros(3, np.float32)]
    with pytest.raises(ValueError, match="token 40 of a vocabulary of 40"):
        unpacked(zlib.compress(b"".join(part.tobytes() for part in outside)), 1, form)
