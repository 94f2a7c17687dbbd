"""Sources: which files and folders they name, and settings without sense."""

import gzip
import json

import pytest
import zstandard

from xtoken_jax.data.sources import SourceConfig, SourceKind, read_documents
from xtoken_jax.errors import UserError


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(path, kind=SourceKind.auto, **options):
    return list(read_documents(SourceConfig(kind=kind, path=str(path), **options)))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "c.jsonl").write_bytes(jsonl(["c"]))
    (tmp_path / "b" / "x.jsonl.gz").write_bytes(gzip.compress(jsonl(["b"])))
    (tmp_path / "a.ndjson").write_bytes(jsonl(["a"]))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "d.jsonl").write_bytes(jsonl(["hidden"]))
    assert read(tmp_path) == ["a", "b", "c"]


def test_a_pattern_reaches_into_folders(tmp_path):
    for name in ("a/1.jsonl.zst", "a/b/2.jsonl.zst", "c.jsonl.zst", "c.jsonl", "a/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        content = jsonl([name])
        (tmp_path / name).write_bytes(zstandard.compress(content) if name.endswith(".zst") else content)
    assert read(tmp_path / "**/*.jsonl.zst") == ["a/1.jsonl.zst", "a/b/2.jsonl.zst", "c.jsonl.zst"]
    assert read(tmp_path / "*.jsonl*") == ["c.jsonl", "c.jsonl.zst"]
    (tmp_path / "[1].jsonl").write_bytes(jsonl(["a name, not a pattern"]))
    assert read(tmp_path / "[1].jsonl") == ["a name, not a pattern"]


def test_a_kind_that_is_named_decides(tmp_path):
    (tmp_path / "a.txt").write_bytes(jsonl(["in lines"]))
    assert read(tmp_path / "a.txt", SourceKind.jsonl) == ["in lines"]
    assert read(tmp_path / "*.t*", SourceKind.jsonl) == ["in lines"]
    (tmp_path / "b.jsonl").write_bytes(jsonl(["b"]))
    assert read(tmp_path, SourceKind.jsonl) == ["b"]
    assert read(tmp_path, SourceKind.text) == [(tmp_path / "a.txt").read_text()]


def test_paths_that_name_no_data(tmp_path):
    def refused(path, kind=SourceKind.auto, **options):
        with pytest.raises(UserError) as error:
            read(path, kind, **options)
        assert "\n" not in str(error.value)
        return str(error.value).replace(str(tmp_path), "DIR")

    assert refused("org/name") == (
        "org/name: no such file or folder of data; correct the path; a dataset of the hub or of TFDS needs "
        "kind=hub or kind=tfds"
    )
    assert refused(tmp_path / "x", SourceKind.jsonl) == (
        "DIR/x: no such file or folder of jsonl data; correct the path"
    )
    assert refused(tmp_path / "*.x") == (
        "DIR/*.x: no file matches this pattern; ** stands for folders of any depth"
    )
    assert refused(tmp_path, SourceKind.text) == (
        "DIR: holds no file that ends in .txt; name files of another ending by a pattern, with kind="
    )
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
    assert refused(tmp_path / "a.jsonl", split="test") == (
        "DIR/a.jsonl: files have no splits, and split=test; leave it out"
    )
    (tmp_path / "LICENSE.txt").write_text("free")
    assert refused(tmp_path) == "DIR: holds files of several kinds, text and jsonl; name one with kind="
    (tmp_path / "a.dat").write_text("a,b")
    assert refused(tmp_path / "a.dat") == (
        "DIR/a.dat: its ending does not say what it holds; name kind=, one of jsonl, text, lines, csv, "
        "parquet, array_record"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": SourceKind.jsonl}, r"data\.x\.path"),
        ({"kind": SourceKind.text, "path": ""}, r"data\.x\.path"),
        ({"kind": SourceKind.python_docs, "split": "test"}, r"data\.x\.split='test'"),
        ({"kind": SourceKind.arithmetic, "wrong_share": 1.5}, r"data\.x\.wrong_share=1\.5"),
        ({"kind": SourceKind.arithmetic, "documents": 0}, r"data\.x\.documents=0"),
        ({"kind": SourceKind.python_docs, "limit": 0}, r"data\.x\.limit=0"),
        ({"kind": SourceKind.python_docs, "field": "text"}, r"data\.x\.field: .* python_docs reads none"),
        ({"kind": SourceKind.tfds}, r"data\.x\.path: .* needs a name or a prepared folder"),
        ({"kind": SourceKind.hub}, r"data\.x\.path: .* needs a hub id"),
        ({"kind": SourceKind.hub, "path": "a/b", "split": " "}, r"data\.x\.split: name a split"),
        ({"path": "a.jsonl", "subset": "en"}, r"data\.x\.subset: only for kind=hub, here it is auto"),
        ({"path": "a.jsonl", "data_dir": "d"}, r"data\.x\.data_dir: only for kind=tfds"),
        ({"path": "a", "field": "a", "prompt": "b"}, "keep field, or prompt and completion, or messages"),
    ],
)
def test_settings_without_sense(options, message):
    with pytest.raises(UserError, match=message):
        SourceConfig(**options).validate("data.x")


def test_a_limit_takes_the_first_documents():
    config = SourceConfig(kind=SourceKind.python_docs)
    few = read_documents(SourceConfig(kind=SourceKind.python_docs, limit=3))
    assert list(few) == read_documents(config)[:3] == [few[0], few[-2], few[-1]]
    with pytest.raises(IndexError):
        few[3]


def test_the_digest_of_generated_documents(tmp_path):
    digests = [
        read_documents(SourceConfig(kind=SourceKind.arithmetic, documents=3, seed=seed)).digest
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]
    assert digests[0].startswith("3 documents, sha256 ")
