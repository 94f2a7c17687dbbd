"""Every format of data: any record, from several threads, and a fingerprint of the content."""

import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from xtoken_jax.data import documents
from xtoken_jax.data.formats import data_file, jsonl, parquet, record_files
from xtoken_jax.data.sources import SourceConfig, read_documents
from xtoken_jax.errors import UserError

TEXTS = ["one", "zwei\n\tZeilen", "三 \u2028 three", "line\r\nfeed", *(f"text {n}" for n in range(40))]


def lines(texts, field="text"):
    return "".join(json.dumps({"id": 1, field: t}, ensure_ascii=False) + "\n" for t in texts).encode()


def write_jsonl(folder, texts):
    (folder / "a.jsonl").write_bytes(lines(texts[:7]))
    (folder / "b.jsonl").write_bytes(lines(texts[7:])[:-1])


def write_gzip(folder, texts):
    # Two streams in one file, and the zeros that fill up a tape's block.
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(texts[:3])) + gzip.compress(lines(texts[3:7])))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(texts[7:])) + b"\0" * 99)


def write_zstandard(folder, texts):
    compress = zstandard.compress
    (folder / "a.jsonl.zst").write_bytes(compress(lines(texts[:5])) + compress(lines(texts[5:])))


def write_text(folder, texts):
    for number, text in enumerate(texts):
        name = f"{number:03}.txt" + ("", ".gz", ".zst")[number % 3]
        pack = (bytes, gzip.compress, zstandard.compress)[number % 3]
        (folder / name).write_bytes(pack(text.encode()))


def write_parquet(folder, texts):
    for name, part in (("a", texts[:7]), ("b", texts[7:])):
        table = pa.table({"n": list(range(len(part))), "text": part})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=5)


def write_binary_parquet(folder, texts):
    pq.write_table(pa.table({"text": [text.encode() for text in texts]}), folder / "a.parquet")


def write_array_record(folder, texts, pack=lambda text: lines([text])):
    for name, part in (("a.array_record-00000-of-00002", texts[:9]), ("b.array_record", texts[9:])):
        writer = ArrayRecordWriter(str(folder / name), "group_size:1")
        for text in part:
            writer.write(pack(text))
        writer.close()


def write_array_record_of_texts(folder, texts):
    write_array_record(folder, texts, str.encode)


WRITERS = [
    write_jsonl, write_gzip, write_zstandard, write_text, write_parquet, write_binary_parquet,
    write_array_record, write_array_record_of_texts,
]  # fmt: skip


def read(path, **options):
    return read_documents(SourceConfig(path=str(path), **options))


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_any_record_of_a_format(tmp_path, write):
    write(tmp_path, TEXTS)
    found = read(tmp_path)
    assert list(found) == TEXTS
    order = [(7 * n) % len(TEXTS) for n in range(3 * len(TEXTS))]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(found.__getitem__, order)) == [TEXTS[n] for n in order]
    assert read(tmp_path, limit=9)[:] == TEXTS[:9]
    places = {found.where(n) for n in range(len(TEXTS))}
    assert len(places) == len(TEXTS)  # each record is found by its own
    assert all(str(tmp_path) in place for place in places)


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
def test_the_digest_is_that_of_the_content(tmp_path, write):
    digests = []
    for name, texts in (("x", TEXTS), ("y", TEXTS), ("z", [*TEXTS[:-1], "text 40"])):
        (tmp_path / name).mkdir()
        write(tmp_path / name, texts)
        digests.append(read(tmp_path / name).digest)
    if write in (write_jsonl, write_zstandard, write_parquet):  # others write times or random marks
        assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    assert read(tmp_path / "x", limit=3).digest.startswith("3 documents, sha256 ")
    again = read(tmp_path / "x").digest
    (tmp_path / "x").rename(tmp_path / "renamed")
    for file in (tmp_path / "renamed").iterdir():
        os.utime(file, (1, 1))
    assert read(tmp_path / "renamed").digest == again == digests[0]


def test_of_large_files_the_digest_is_that_of_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(data_file, "_WHOLE", 1 << 18)
    monkeypatch.setattr(data_file, "_BLOCK", 1 << 12)
    path = tmp_path / "a.jsonl"
    content = lines(["x" * 1000] * 400)
    digests = []
    for place in (None, 10, len(content) - 10):
        changed = bytearray(content)
        if place is not None:
            changed[place : place + 2] = b"y:"
        path.write_bytes(changed)
        digests.append(data_file.fingerprint([data_file.DataFile(path)]))
    assert len(set(digests)) == 3  # the first and the last block are seen


def test_blank_lines_line_ends_and_byte_order_marks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + lines(["a"]).replace(b"\n", b"\r\n") + b"\r\n \t\n  " + lines(["b"]) + b"\n "
    )
    found = read(path)
    assert list(found) == ["a", "b"]
    assert [found.where(n) for n in range(2)] == [f"{path}:1", f"{path}:4"]


def test_lines_across_the_pieces_in_which_a_file_is_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "PIECE", 7)
    write_jsonl(tmp_path, TEXTS)
    (tmp_path / "c.jsonl").write_bytes(b"\n\n   \n" + lines(["last"]) + b"        \n" * 3)
    found = read(tmp_path)
    assert list(found) == [*TEXTS, "last"]
    assert found.where(len(TEXTS)) == f"{tmp_path / 'c.jsonl'}:4"


def test_the_lines_of_large_files_are_found_once(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "_KEPT", 1)
    write_gzip(tmp_path, TEXTS)
    assert list(read(tmp_path)) == TEXTS

    def forbidden(*arguments):
        raise AssertionError("searched again")

    monkeypatch.setattr(jsonl, "line_offsets", forbidden)
    assert list(read(tmp_path)) == TEXTS


@pytest.mark.parametrize("damage", [b"", b"x" * 200, (1 << 60).to_bytes(8, "little"), b"\xff" * 8])
def test_damaged_offsets_are_found_again(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(record_files, "_KEPT", 1)
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    assert list(read(tmp_path / "a.jsonl")) == TEXTS
    (kept,) = (tmp_path / "cache" / "data").glob("*.offsets.npy")
    content = kept.read_bytes()
    kept.write_bytes(content[:140] + damage + content[140 + len(damage) :] if len(damage) == 8 else damage)
    assert list(read(tmp_path / "a.jsonl")) == TEXTS
    assert kept.read_bytes() == content


def test_a_parquet_file_with_large_groups_is_read_through_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_LARGEST_GROUP", 100)
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 4)
    monkeypatch.setattr(parquet, "_IN_MEMORY", 200)  # so that groups are dropped again
    path = tmp_path / "a.parquet"
    nested = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in TEXTS]
    pq.write_table(pa.table({"other/name": TEXTS, "messages": nested}), path)
    found = read(path, field="other/name")
    assert [found[n] for n in (3, 40, 0, 41)] == [TEXTS[n] for n in (3, 40, 0, 41)]
    chats = read(path, messages="messages")
    assert [chats[n].messages[0]["content"] for n in (40, 2)] == [TEXTS[n] for n in (40, 2)]
    group = found.records._columns[("other/name",), ()]._files[0]
    assert group[0].path != path
    assert max(group[2][1:] - group[2][:-1]) == 4


def test_most_of_a_source_is_not_read_when_it_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_READ_AHEAD", 5)
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS) + b'{"text": 3}\n' + lines(["", " \n"]))
    found = read(tmp_path / "a.jsonl")
    assert len(found) == len(TEXTS) + 3
    assert found[-2:] == ["", " \n"]
    with pytest.raises(UserError, match=rf"a\.jsonl:{len(TEXTS) + 1}: 'text' holds int, not text"):
        found[len(TEXTS)]


def test_the_search_for_text_goes_on_behind_what_is_read_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_READ_AHEAD", 2)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([" ", "", "", "x"]))
    assert read(path)[3] == "x"
    path.write_bytes(lines([" ", "", "", ""]))
    with pytest.raises(UserError, match=r"a\.jsonl: holds no text"):
        read(path)
