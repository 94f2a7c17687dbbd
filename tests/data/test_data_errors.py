"""Files and datasets that are damaged, missing, or change while they are read: one line each."""

import errno
import gzip
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from xtoken_jax.data.sources import SourceConfig, SourceKind, read_documents
from xtoken_jax.errors import UserError

TEXTS = [f"text {n}, and more of it" for n in range(200)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def read(path, kind=SourceKind.auto, **options):
    return read_documents(SourceConfig(kind=kind, path=str(path), **options))


def refusal(act, folder):
    """The line of a mistake, with the folder's name shortened."""
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(folder), "DIR")


def as_parquet(path):
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=20)


def as_array_record(path):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(LINES)),
    "a.txt": lambda path: path.write_bytes(LINES),
    "a.parquet": as_parquet,
    "a.array_record": as_array_record,
}


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("empty.jsonl", b"", "DIR/empty.jsonl: holds no text"),
        ("empty.txt.gz", b"", "DIR/empty.txt.gz: cannot be read, it ends before its .gz stream does"),
        ("latin.txt", "é".encode("latin-1"), "DIR/latin.txt: not UTF-8 ("),
        ("plain.jsonl.gz", b"not compressed", "DIR/plain.jsonl.gz: cannot be read, it is damaged ("),
        ("plain.jsonl.zst", b"not compressed", "DIR/plain.jsonl.zst: cannot be read, it is damaged ("),
        (
            "cut.txt.gz",
            gzip.compress(LINES, mtime=0)[:-20],
            "cannot be read, it ends before its .gz stream does",
        ),
        (
            "cut.jsonl.zst",
            zstandard.compress(LINES)[:-20],
            "cannot be read, it ends before its .zst stream does",
        ),
        ("damaged.jsonl.gz", gzip.compress(LINES, mtime=0)[:10] + b"\xff" * 30, "it is damaged ("),
        ("no.parquet", b"PAR1 but no more", "DIR/no.parquet: cannot be read as Parquet ("),
        ("no.array_record", b"something else", "DIR/no.array_record: cannot be read as ArrayRecord ("),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_files_that_are_none(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    assert line in refusal(lambda: read(tmp_path / name), tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_vanishes_or_changes(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    found = read(path)
    last = found[len(found) - 1]
    os.utime(path, (1, 1))
    assert f"DIR/{name}: changed since it was opened (" in refusal(lambda: found[0], tmp_path)
    found = read(path)
    assert found[len(found) - 1] == last
    kept = tmp_path / "kept"
    path.rename(kept)
    gone = f"DIR/{name}: gone since it was opened; put it back as it was"
    assert refusal(lambda: found[1 % len(found)], tmp_path) == gone
    kept.rename(path)
    assert found[len(found) - 1] == last  # back again
    path.write_bytes(path.read_bytes()[:30])  # read on, a mapped file would end the process here
    assert f"DIR/{name}: changed since it was opened (" in refusal(lambda: found[0], tmp_path)


def test_damage_inside_of_files(tmp_path):
    path = tmp_path / "a.parquet"
    as_parquet(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = b"\xff" * 200
    path.write_bytes(content)
    assert "DIR/a.parquet: cannot be read as Parquet (" in refusal(lambda: list(read(path)), tmp_path)
    path = tmp_path / "a.array_record"
    as_array_record(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * 500)
    assert "DIR/a.array_record: cannot be read as ArrayRecord (" in refusal(
        lambda: list(read(path)), tmp_path
    )


def test_columns_and_records_that_are_missing(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "b.parquet")
    assert refusal(lambda: read(tmp_path), tmp_path) == (
        "DIR/b.parquet: no column 'text'; it has 'body'; name a column that all files have, or leave the "
        "file out"
    )
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "b.parquet")
    assert refusal(lambda: list(read(tmp_path)), tmp_path) == (
        "DIR/b.parquet, row 1: 'text' holds NoneType, not text; correct the record or leave it out"
    )
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for record in (b'{"text": "a"}', b"b"):
        writer.write(record)
    writer.close()
    assert refusal(lambda: list(read(tmp_path / "a.array_record")), tmp_path) == (
        "DIR/a.array_record, record 1: not a JSON object (Expecting value: line 1 column 1 (char 0)); "
        "correct it or leave it out"
    )
    writer = ArrayRecordWriter(str(tmp_path / "b.array_record"), "group_size:1")
    writer.write(b"\x0a\xff\x01")
    writer.close()
    assert "record 0: neither JSON nor text in UTF-8; records of TensorFlow Datasets are read by" in refusal(
        lambda: read(tmp_path / "b.array_record"), tmp_path
    )


def test_no_room_for_copies(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "file"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    assert refusal(lambda: read(tmp_path / "a.jsonl.gz"), tmp_path) == (
        "DIR/file/data: no copy for random access can be kept there (File exists); XTOKEN_CACHE=FOLDER "
        "names another place"
    )


def test_a_full_disk_leaves_no_copy(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    line = refusal(lambda: read(tmp_path / "a.jsonl.gz"), tmp_path)
    assert line.startswith(
        "DIR/cache/data: no copy for random access can be kept there (No space left on device)"
    )
    assert list((tmp_path / "cache" / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("a.parquet", "pyarrow"),
        ("a.array_record", "array_record"),
        ("a.jsonl.zst", "zstandard"),
        ("tfds", "tensorflow_datasets"),
        ("hub", "datasets"),
    ],
)
def test_a_package_that_is_missing(tmp_path, monkeypatch, name, package):
    for module in [m for m in sys.modules if m == package or m.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails
    if name in WRITERS:
        (tmp_path / name).write_bytes(b"x")
        line = refusal(lambda: read(tmp_path / name), tmp_path)
    else:
        line = refusal(lambda: read("org/name", SourceKind[name]), tmp_path)
    assert f"need {package.replace('_', '-') if name == 'tfds' else package}" in line
    assert line.endswith(": pip install 'xtoken-jax[data]'")
