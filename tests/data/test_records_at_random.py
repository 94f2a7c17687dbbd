"""Any record read by its offset is what the plain library reads from the whole file."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random

import pytest
import zstandard
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from xtoken_jax.data.formats import record_files
from xtoken_jax.data.formats.csv_files import CsvRows
from xtoken_jax.data.formats.jsonl import JsonObjects
from xtoken_jax.data.formats.limits import Limits
from xtoken_jax.data.formats.text import TextLines
from xtoken_jax.data.sources import SourceConfig, SourceKind, read_documents
from xtoken_jax.errors import UserError

BOM = b"\xef\xbb\xbf"
ODD = 'a"\\,;\t\n\r\u2028\u0085\x0b[]{}:é𝒳 \x00'
TEXTS = st.text(st.sampled_from(ODD) | st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    TEXTS | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), max_size=6)
BLANKS = st.sampled_from(["", " ", "\n", "\r\n", "\t \n"])
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=[2, 1 << 22])
def piece(request, monkeypatch):
    """Bytes that are searched at a time: everything lies across a border, or nothing does."""
    monkeypatch.setattr(record_files, "PIECE", request.param)
    for module in ("json_array", "csv_files"):
        monkeypatch.setattr(f"xtoken_jax.data.formats.{module}.PIECE", request.param)


def at_random(records):
    """All records, read in a random order."""
    order = random.Random(0).sample(range(len(records)), len(records))
    found = {number: records.read(number, ()) for number in order}
    return [found[number] for number in range(len(records))]


@FEW
@given(records=RECORDS, data=st.data(), ascii_=st.booleans(), mark=st.booleans(), end=st.booleans())
def test_json_lines(piece, tmp_path, records, data, ascii_, mark, end):
    lines = [json.dumps(record, ensure_ascii=ascii_) for record in records]
    ends = [data.draw(st.sampled_from(["\n", "\r\n", "\n\n", "\r\n \t\r\n"])) for _ in lines]
    if ends and end:
        ends[-1] = ""
    path = tmp_path / "a.jsonl"
    path.write_bytes(BOM * mark + "".join(map("".join, zip(lines, ends, strict=True))).encode())
    if mark and not records:
        return  # a line of a byte-order mark alone
    assert at_random(JsonObjects([path], Limits())) == [json.loads(line) for line in lines]


@FEW
@given(
    records=RECORDS,
    indent=st.sampled_from([None, 0, 2, "\t"]),
    ascii_=st.booleans(),
    blanks=st.tuples(BLANKS, BLANKS),
    mark=st.booleans(),
)
def test_json_lists(piece, tmp_path, records, indent, ascii_, blanks, mark):
    path = tmp_path / "a.json"
    content = json.dumps(records, indent=indent, ensure_ascii=ascii_)
    path.write_bytes(BOM * mark + blanks[0].encode() + content.encode() + blanks[1].encode())
    assert at_random(JsonObjects([path], Limits())) == json.loads(content)


@FEW
@given(
    records=RECORDS,
    others=st.dictionaries(TEXTS, VALUES, max_size=3),
    key=TEXTS,
    indent=st.sampled_from([None, 1]),
)
def test_json_lists_under_a_key(piece, tmp_path, records, others, key, indent):
    whole = {**others, key: records}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(whole, indent=indent))
    assert at_random(JsonObjects([path], Limits(), records=key)) == whole[key]


@FEW
@given(
    rows=st.lists(
        st.lists(TEXTS.filter(lambda t: t not in ("", "\ufeff")), min_size=2, max_size=2), max_size=6
    ),
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    terminator=st.sampled_from(["\n", "\r\n", "\n\n"]),
    mark=st.booleans(),
    end=st.booleans(),
)
def test_csv(piece, tmp_path, rows, delimiter, quoting, terminator, mark, end):
    # Python 3.11 writes a carriage return without the quotes that it needs.
    assume(quoting == csv.QUOTE_ALL or not any("\r" in field for row in rows for field in row))
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=terminator)
    writer.writerows([["first", "the second"], *rows])
    content = file.getvalue()[: -len(terminator) if end else None]
    path = tmp_path / "a.csv"
    path.write_bytes(BOM * mark + content.encode())
    found = at_random(CsvRows([path], Limits(), delimiter=delimiter))
    assert found == list(csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter))
    assert [[*row.values()] for row in found] == rows


@FEW
@given(content=st.text(st.sampled_from('ab",\n\r '), max_size=12))
def test_csv_that_is_not_strict_is_refused_and_never_misread(tmp_path, content):
    """What is read is what the csv module reads strictly; all else is refused by one line."""
    path = tmp_path / "a.csv"
    path.write_text("x,y\n" + content, newline="")
    try:
        found = at_random(CsvRows([path], Limits()))
    except UserError:
        return
    rows = csv.reader(io.StringIO("x,y\n" + content, newline=""), strict=True)
    assert [[*row.values()] for row in found] == [row for row in rows if row][1:]


@FEW
@given(
    lines=st.lists(TEXTS.map(lambda t: t.replace("\n", "").replace("\ufeff", "")), max_size=6),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_lines_of_text(piece, tmp_path, lines, end):
    path = tmp_path / "a.txt"
    path.write_bytes(BOM + "".join(f"{line}{end}" for line in ["first", *lines]).encode())
    found = at_random(TextLines([path], Limits()))
    kept = [line for line in path.read_bytes().removeprefix(BOM).split(b"\n") if line.strip()]
    assert found == [line.removesuffix(b"\r").decode() for line in kept]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
@pytest.mark.parametrize("form", ["list.json", "rows.csv", "rows.tsv", "lines.txt", "lines.jsonl"])
def test_every_form_in_every_compression(tmp_path, monkeypatch, pack, form):
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    texts = [f"text {n}, \u2028 " + "x" * n for n in range(200)]
    if form == "lines.txt":
        content = "".join(f"{text}\n" for text in texts)
    elif form == "list.json":
        content = json.dumps([{"text": text} for text in texts], indent=1)
    elif form == "lines.jsonl":
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    else:
        file = io.StringIO()
        writer = csv.writer(file, delimiter="\t" if form.endswith("tsv") else ",")
        writer.writerows([["text", "n"], *([text, n] for n, text in enumerate(texts))])
        content = file.getvalue()
    ending = {"gzip": "gz", "bz2": "bz2", "lzma": "xz"}.get(pack.__module__, "zst")
    path = tmp_path / f"{form}.{ending}"
    path.write_bytes(pack(content[:999].encode()) + pack(content[999:].encode()))
    kind = SourceKind.lines if form == "lines.txt" else SourceKind.auto
    monkeypatch.setattr(record_files, "_KEPT", 0)
    for _ in range(2):  # the second time with the offsets that were kept
        found = read_documents(SourceConfig(kind=kind, path=str(path)))
        assert list(found) == texts
