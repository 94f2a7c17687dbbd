"""What is wrong with CSV files and JSON lists, and what to do about it."""

import json

import pytest

from xtoken_jax.data.sources import SourceConfig, SourceKind, read_documents
from xtoken_jax.errors import UserError

CSV = {
    "a stray quote": ('text,n\na "b" c,1\n', {}, "FILE:2: a quote inside of a field without quotes; put the"),
    "an open quote": (
        'text,n\n"a,1\nb,2\n',
        {},
        "FILE:2: a quoted field begins here and does not end; add the",
    ),
    "text behind a quote": ('text,n\n"a"b,1\n', {}, "FILE:2: text behind the closing quote of a field; put"),
    "old line ends": ("text,n\ra,1\r", {}, "FILE:1: a carriage return that ends no line; put the field"),
    "too few fields": (
        "text,n\na,1\n\nb\n",
        {},
        "FILE:4: a row of 1 fields, and the first row names 2 columns",
    ),
    "too many fields": ("text,n\na,b,1\n", {}, "a field with ',' in it needs double quotes"),
    "two columns of a name": ("text,text\na,1\n", {}, "FILE: several columns are named 'text'; rename them"),
    "semicolons": ("id;text\n1;a\n", {}, "names one column, 'id;text'; perhaps delimiter=';'"),
    "tabs": ("id\ttext\n1\ta\n", {}, "perhaps delimiter=tab"),
    "nothing": ("", {}, "FILE: empty; its first row must name the columns"),
    "a first row only": ("text,n\n", {}, "FILE: holds no text; name other data"),
    "another column": ("body,n\na,1\n", {}, "which has 'body', 'n'; name the one to read with field="),
    "Latin-1": ("text\na\n\xe9\n", {}, "FILE:3: not UTF-8 (invalid continuation byte at byte 0); convert"),
}


@pytest.mark.parametrize("name", CSV)
def test_csv(tmp_path, name):
    content, options, line = CSV[name]
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        list(read_documents(SourceConfig(path=str(path), **options)))
    assert line in str(error.value).replace(str(path), "FILE")


@pytest.mark.parametrize("delimiter", ["tab", r"\t", "\t", ";"])
def test_a_delimiter_is_named(tmp_path, delimiter):
    path = tmp_path / "a.csv"
    path.write_text("n;text\n1;a,b\n".replace(";", ";" if delimiter == ";" else "\t"))
    source = SourceConfig(path=str(path), delimiter=delimiter)
    source.validate("data.train.x")
    assert list(read_documents(source)) == ["a,b"]


JSON = {
    "cut off": (
        '[{"text": "a"}, {"text"',
        {},
        "FILE: ends inside of its JSON, at 23 bytes; it was cut off or",
    ),
    "an open string": ('[{"text": "a}]', {}, "FILE: ends inside of its JSON"),
    "another bracket": ('[{"text": "a"}}', {}, "FILE: a bracket at byte 14 closes another kind of bracket"),
    "more behind it": (
        '[{"text": "a"}] []',
        {},
        "FILE: holds more behind the list that it begins with; one list",
    ),
    "a comma too many": ('[{"text": "a"},]', {}, "FILE, record 1: not a JSON object (Expecting value"),
    "a list of texts": ('["a"]', {}, "FILE, record 0: not a JSON object but str; give every record its keys"),
    "an empty list": ("[ \n]", {}, "FILE: holds no text; name other data"),
    "an object": (
        '{"data": [{"text": "a"}]}',
        {},
        "; if 'data' is the list of all records of a JSON file, records=data",
    ),
    "over several lines": ('{\n"data": [{"text": "a"}]}', {}, "or name its list with records="),
    "no such key": (
        '{"data": []}',
        {"records": "rows"},
        "FILE: no key 'rows' in its object, which has 'data'; name",
    ),
    "a key of no list": (
        '{"data": {}}',
        {"records": "data"},
        "FILE: 'data' holds no list; name the key of the",
    ),
    "a key twice": ('{"a": [], "a": []}', {"records": "a"}, "FILE: has two keys 'a'; keep one"),
    "a list and a key": (
        "[]",
        {"records": "a"},
        "FILE: records=a names a key of an object, and the file is a list",
    ),
    "lines and a key": (
        '{"a": []}\n{"a": []}',
        {"records": "a"},
        "leave records=a out for one object a line",
    ),
    "many keys": (
        json.dumps(dict.fromkeys(map(str, range(20_000)), 0)),
        {"records": "a"},
        "an object of 20,000 keys",
    ),
}


@pytest.mark.parametrize("name", JSON)
def test_json(tmp_path, name):
    content, options, line = JSON[name]
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        list(read_documents(SourceConfig(path=str(path), **options)))
    assert line in str(error.value).replace(str(path), "FILE")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"records": "a", "kind": SourceKind.text},
            "data.x.records: only for files of kind jsonl, here it is text",
        ),
        (
            {"delimiter": ";", "kind": SourceKind.jsonl},
            "data.x.delimiter: only for files of kind csv, here it is",
        ),
        ({"delimiter": '"'}, "data.x.delimiter='\"': must be one ASCII character, such as ';', or tab"),
        ({"delimiter": "ab"}, "must be one ASCII character"),
        ({"max_record": 0}, "data.x.max_record=0: must be at least 1 (MiB)"),
        ({"max_ratio": float("nan")}, "data.x.max_ratio=nan: must be at least 1"),
    ],
)
def test_settings(options, line):
    with pytest.raises(UserError) as error:
        SourceConfig(path="a", **options).validate("data.x")
    assert line in str(error.value)


def test_settings_of_other_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for setting, kind in (("records", "jsonl"), ("delimiter", "csv")):
        with pytest.raises(UserError, match=f"{setting}=x is for files of kind {kind}, and it holds text"):
            read_documents(SourceConfig(path=str(tmp_path), **{setting: "x"}))
