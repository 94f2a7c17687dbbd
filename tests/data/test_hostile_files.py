"""Files that would fill memory or disk, hang, or end in a traceback: one line each."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from xtoken_jax.data.formats import limits
from xtoken_jax.data.formats.limits import Limits
from xtoken_jax.data.records import Conversation, Targets
from xtoken_jax.data.sources import Markers, SourceConfig, read_documents
from xtoken_jax.errors import UserError

PACKS = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}
_PIECE = b'{"text": "' + b" " * (1 << 24)
BOMBS = {
    "gz": gzip.compress(_PIECE), "zst": zstandard.compress(_PIECE), "bz2": bz2.compress(_PIECE),
    "xz": lzma.compress(_PIECE, preset=0),
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def read(path, **options):
    return read_documents(SourceConfig(path=str(path), **options))


def refusal(path, **options):
    with pytest.raises(UserError) as error:
        list(read(path, **options))
    line = str(error.value)
    assert "\n" not in line
    return line.replace(str(path), "FILE")


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_small_file_that_becomes_a_large_one(tmp_path, cache, pack, name):
    """Some kB that would become 1 GiB; no more than a limit and a piece are in memory or on disk."""
    path = tmp_path / f"{name}.{pack}"
    path.write_bytes(BOMBS[pack] * 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = refusal(path, max_record=8)
    if name == "a.txt":
        assert line.startswith("FILE: a record of ")
        assert "above max_record=8 (MiB); split it or leave it out, or raise max_record of the source" in line
    else:
        assert "above max_ratio=200 for each byte after max_record=8 (MiB)" in line
        assert line.endswith("if the file is what it should be, raise max_ratio of the source")
        assert list(cache.iterdir()) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_a_file_of_high_ratio_is_read_where_it_is_allowed(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps({"text": "x" * 1000}) + "\n").encode() * 3000))
    assert "max_ratio=200" in refusal(path, max_record=1)
    assert read(path, max_record=1, max_ratio=2000)[2999] == "x" * 1000


def test_the_free_disk_space_is_a_limit(tmp_path, monkeypatch, cache):
    real = os.fstatvfs

    def nearly_full(descriptor):
        about = real(descriptor)
        return os.statvfs_result((about.f_bsize, 1000, *tuple(about)[2:4], 2, *tuple(about)[5:]))

    monkeypatch.setattr(os, "fstatvfs", nearly_full)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000))
    assert refusal(tmp_path / "a.jsonl.gz").endswith(
        "the disk of the cache folder has 2,000 free; XTOKEN_CACHE=FOLDER names a folder on another disk"
    )
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_record_that_is_too_large(tmp_path, name):
    large = "x" * (2 << 20)
    content = {
        "a.jsonl": f'{{"text": "a"}}\n{{"text": "{large}"}}\n',
        "a.json": f'[{{"text": "a"}}, {{"text": "{large}"}}]',
        "a.csv": f"text\na\n{large}\n",
        "a.txt": large,
    }[name]
    path = tmp_path / name
    path.write_text(content)
    place = {"a.jsonl": "FILE:2", "a.json": "FILE, record 1", "a.csv": "FILE:3", "a.txt": "FILE"}[name]
    assert refusal(path, max_record=1).startswith(f"{place}: a record of 2,097,1")
    assert len(list(read(path, max_record=3))) == (1 if name == "a.txt" else 2)


def test_limits_in_their_order():
    assert Limits(1, 2).record_bytes == 1 << 20
    Limits(1, 2).check_whole((1 << 20) + 20, 10, None, "FILE")
    with pytest.raises(UserError, match="max_ratio=2 "):
        Limits(1, 2).check_whole((1 << 20) + 21, 10, None, "FILE")
    assert limits.MAX_RECORD << 20 == 64 * 2**20


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz", "a.txt.xz"])
def test_another_encoding_is_named(tmp_path, encoding, name):
    content = '[{"text": "a"}]' if ".json" in name else "text\na\n"
    raw = content.encode(encoding)
    path = tmp_path / name
    path.write_bytes(PACKS[name.split(".")[2]](raw) if name.count(".") == 2 else raw)
    line = refusal(path)
    family = encoding[:6].upper()
    assert line.startswith(f"FILE: its encoding is {family}")
    assert f"iconv -f {family}" in line


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_a_file_of_another_format_is_named(tmp_path, name):
    path = tmp_path / name
    for (ending, pack), word in itertools.product(PACKS.items(), ["hello"]):
        path.write_bytes(pack(word.encode()))
        assert f"add .{ending} to its name" in refusal(path)
    path.write_bytes(b"PK\x03\x04" + bytes(30))
    assert refusal(path) == "FILE: not text but a ZIP archive; unpack it"


DEEP = {
    "lists": "[" * 100_000,
    "closed lists": "[" * 100_000 + "]" * 100_000,
    "objects": '{"a":' * 100_000,
    "a record": '{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": '{"text": "a", "n": ' + "9" * 5000 + "}",
    "a list of it": '[{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}]",
}


@pytest.mark.parametrize("what", DEEP)
def test_json_that_no_parser_reads(tmp_path, what):
    path = tmp_path / "a.json"
    path.write_text(DEEP[what])
    assert "not a JSON object (" in refusal(path) or "ends inside of its JSON" in refusal(path)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        ("NaN", "holds nan, which is not JSON; correct the record or leave it out"),
        ("[1e999]", "holds inf, which is not JSON"),
        ('{"a": {"b": -Infinity}}', "holds -inf, which is not JSON"),
        ('{"a": "\\ud800"}', "is not text ('utf-8' codec can't encode character '\\ud800'"),
        ('{"\\udfff": 1}', "is not text ("),
        ("[" * 101 + "]" * 101, "is nested more than 100 deep; flatten it or leave the record out"),
    ],
)
def test_what_no_template_can_render(tmp_path, call, line):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", '
        f'"tool_calls": [{call}]}}]}}\n'
    )
    assert line in refusal(path)
    path.write_text(f'{{"messages": {json.dumps(MESSAGES)}, "tools": [{{"function": {call}}}]}}\n')
    assert line in refusal(path)


def test_numbers_that_nobody_renders_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "score": NaN}\n{"text": "b", "score": [1e999, {"n": -Infinity}]}\n')
    assert list(read(path)) == ["a", "b"]


def test_columns_of_messages_that_do_not_match(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": {"role": ["user", "assistant"], "content": ["a"]}}\n')
    assert "'messages' holds lists of 1 to 2 values, which give no list of messages" in refusal(path)


def not_utf8(values, kind):
    """An array of strings which hold bytes that are no UTF-8; pyarrow looks into none of them."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(kind, len(raw), raw.buffers())


BAD = not_utf8([b"fine", b"\xff\xfe", b"fine"], pa.string())
COLUMNS = {
    "plain": BAD,
    "dictionary": pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), BAD),
    "list": pa.ListArray.from_arrays([0, 1, 2, 3], BAD),
    "struct": pa.StructArray.from_arrays([BAD], ["content"]),
    "messages": pa.ListArray.from_arrays(
        [0, 1, 2, 3], pa.StructArray.from_arrays([pa.array(["user"] * 3), BAD], ["role", "content"])
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_parquet_strings_that_are_not_utf8(tmp_path, name):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": COLUMNS[name]}), path)
    option = "messages" if name == "messages" else "field"
    expected = {
        "dictionary": "FILE: cannot be read as Parquet (Invalid UTF8 payload); get it again or write it "
        "again",
        "list": "FILE, row 0: 'x' holds list, not text",
        "struct": "FILE, row 0: 'x' holds dict, not text",
    }
    located = "FILE, row 1: 'x' is not UTF-8 (invalid start byte at byte 0); write the file again"
    assert refusal(path, **{option: "x"}).startswith(expected.get(name, located))


def test_optional_columns_are_those_of_each_file(tmp_path):
    """A system prompt, an input, tools or images that the first file lacks are not left out of the others."""
    pq.write_table(pa.table({"messages": [MESSAGES]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"messages": [MESSAGES], "system": ["be brief"]}), tmp_path / "b.parquet")
    found = list(read(tmp_path))
    assert found == [
        Conversation(tuple(MESSAGES)),
        Conversation(({"role": "system", "content": "be brief"}, *MESSAGES)),
    ]
    pq.write_table(pa.table({"messages": [MESSAGES], "images": [["x.png"]]}), tmp_path / "c.parquet")
    assert "c.parquet, row 0: has 'images', which is not read" in refusal(tmp_path)


def test_a_parquet_file_that_says_it_becomes_a_large_one(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["x" * (1 << 20)] * 32})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    assert "above max_ratio=200" in refusal(path, max_record=1)
    assert len(list(read(path))) == 32


def test_the_digest_is_also_that_of_how_records_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "completion": "c", "text": "t", "body": "b", "system": "s"}\n')
    options = [
        {"field": "text"}, {"field": "body"}, {"field": "text", "markers": Markers.tokens},
        {"prompt": "prompt"}, {"prompt": "text"}, {"prompt": "prompt", "targets": Targets.all},
        {"prompt": "prompt", "chat": True}, {"prompt": "prompt", "system": "body"},
        {"prompt": "prompt", "input": "body"},
    ]  # fmt: skip
    digests = [read(path, **option).digest for option in options]
    assert len(set(digests)) == len(options)
    assert digests[0].endswith(read(path, field="text").digest[-16:])
    lists = tmp_path / "b.json"
    lists.write_text('{"examples_1": [{"text": "a"}], "examples_2": [{"text": "b"}]}')
    assert read(lists, records="examples_1").digest != read(lists, records="examples_2").digest
    rows = tmp_path / "c.csv"
    rows.write_text("a;text,a\nb;c,d\n")
    assert read(rows, delimiter=";", field="a").digest != read(rows, delimiter=",", field="a").digest
