"""Files of text, and what is wrong with them."""

import gzip
import json

import pytest

from xtoken_jax.data import python_docs
from xtoken_jax.data.sources import SourceConfig, SourceKind, read_documents
from xtoken_jax.errors import UserError

DOCUMENTS = ["one", "zwei\n\tZeilen", "三 \u2028 three", "line\r\nfeed"]


def jsonl(documents, field="text"):
    return "".join(json.dumps({field: d, "id": 1}, ensure_ascii=False) + "\n" for d in documents).encode()


def read(path, kind=SourceKind.jsonl, **options):
    return read_documents(SourceConfig(kind=kind, path=str(path), **options))


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_jsonl(tmp_path, ending):
    content = jsonl(DOCUMENTS) + b"\n  \n" + jsonl(["", " \n", "last"])[:-1]
    path = tmp_path / f"data.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert read(path) == [*DOCUMENTS, "last"]


def test_windows_line_ends_and_another_field(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl(["a", "b"], field="content").replace(b"\n", b"\r\n"))
    assert read(path, field="content") == ["a", "b"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "cut',
        b'{"other": "x"}',
        b'["text"]',
        b"3",
        b'{"text": 3}',
        b'{"text": null}',
        b'{"text": "\\ud800"}',
    ],
    ids=["cut", "missing-field", "list", "number", "number-field", "null-field", "half-surrogate"],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl(["one"]) + b"\n" + line + b"\n" + jsonl(["two"]))
    with pytest.raises(UserError) as error:
        read(path)
    assert f"{path}:3:" in str(error.value)
    assert "'text'" in str(error.value)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "c.jsonl").write_bytes(jsonl(["c"]))
    (tmp_path / "b" / "x.jsonl.gz").write_bytes(gzip.compress(jsonl(["b"])))
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path) == ["a", "b", "c"]


def test_text_files_are_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("drei €".encode()))
    (tmp_path / "c.txt").write_bytes(b" \n")
    assert read(tmp_path, SourceKind.text) == ["one\r\n\r\ntwo", "drei €"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "holds no text"),
        ("blank.jsonl", jsonl([" "]), "holds no text"),
        ("latin.txt", "é".encode("latin-1"), "cannot be read as UTF-8"),
        ("plain.jsonl.gz", b"not compressed", "cannot be read"),
        ("cut.jsonl.gz", gzip.compress(jsonl(DOCUMENTS * 50))[:-20], "cannot be read"),
        ("damaged.jsonl.gz", gzip.compress(jsonl(DOCUMENTS))[:10] + b"\xff" * 30, "cannot be read"),
    ],
    # by name alone: gzip writes the time into its bytes, and every process must collect the same tests
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_without_text(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(path, SourceKind.text if ".txt" in name else SourceKind.jsonl)
    assert str(path) in str(error.value)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no such file or folder of jsonl data"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"holds no file that ends in \.jsonl or \.jsonl\.gz"):
        read(tmp_path)


@pytest.mark.parametrize("works", [python_docs.topics(), {f"n{i}": f"text {i // 2}" for i in range(60)}])
def test_no_held_out_documentation_is_trained_on(works):
    """Some topics are one text under two names."""
    train, held_out = (python_docs.split_of(works, split) for split in ("train", "validation"))
    assert len(train) > 5 * len(held_out) > 0
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(works.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": SourceKind.jsonl}, r"data\.x\.path"),
        ({"kind": SourceKind.text, "path": ""}, r"data\.x\.path"),
        ({"kind": SourceKind.python_docs, "split": "test"}, r"data\.x\.split='test'"),
        ({"kind": SourceKind.arithmetic, "wrong_share": 1.5}, r"data\.x\.wrong_share=1\.5"),
        ({"kind": SourceKind.arithmetic, "documents": 0}, r"data\.x\.documents=0"),
        ({"kind": SourceKind.python_docs, "limit": 0}, r"data\.x\.limit=0"),
    ],
)
def test_settings_without_sense(options, message):
    with pytest.raises(UserError, match=message):
        SourceConfig(**options).validate("data.x")


def test_a_limit_takes_the_first_documents():
    config = SourceConfig(kind=SourceKind.python_docs)
    assert read_documents(SourceConfig(kind=SourceKind.python_docs, limit=3)) == read_documents(config)[:3]
