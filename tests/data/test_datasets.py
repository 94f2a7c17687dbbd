"""TensorFlow Datasets and those of the hub, by name and by folder, made on the spot."""

import logging
import sys

import pytest

from xtoken_jax.data.records import Conversation
from xtoken_jax.data.sources import SourceConfig, SourceKind, read_documents
from xtoken_jax.errors import UserError

TEXTS = [f"text {n} é" for n in range(20)]
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def read(path, kind=SourceKind.auto, **options):
    return read_documents(SourceConfig(kind=kind, path=str(path), **options))


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """A folder with the dataset "notes", prepared without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    logging.getLogger("absl").setLevel(logging.ERROR)

    class Notes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            messages = tfds.features.Sequence({"role": text, "content": text})
            features = tfds.features.FeaturesDict({"text": text, "messages": messages})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(TEXTS[:3])}

        def _generate_examples(self, texts):
            for text in texts:
                yield text, {"text": text, "messages": MESSAGES}

    tfds.disable_progress_bar()
    folder = tmp_path_factory.mktemp("tfds")
    builder = Notes(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder, builder.data_dir


def test_tfds_by_folder_and_by_name(notes):
    data_dir, folder = notes
    whole = read(folder, field="text")
    assert sorted(whole) == sorted(TEXTS)  # TFDS shuffles
    assert list(read("notes", SourceKind.tfds, data_dir=str(data_dir), field="text")) == list(whole)
    assert list(read("notes:1.0.0", SourceKind.tfds, data_dir=str(data_dir), field="text")) == list(whole)
    part = read(folder, split="train[25%:75%]", field="text")
    assert list(part) == whole[5:15]
    assert part.where(2) == f"{folder}, split train[25%:75%], example 2"
    assert len({read(folder, split=f"train[{p}]", field="text").digest for p in (":5", "5:10", ":6")}) == 3
    assert read(folder, split="test", messages="messages")[1] == Conversation(tuple(MESSAGES))
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "could be read in several ways, as text and messages"),
        ({"field": "text", "split": "dev"}, "no split 'dev'; there is test, train, and parts as train[:10%]"),
        ({"field": "text", "split": "train[:x]"}, "no split 'train[:x]'"),
        ({"field": "text", "split": "train[:0%]"}, "holds no text"),
        ({"field": "body"}, "no 'body' in its first record, which has 'messages', 'text'"),
        ({"field": "messages"}, "example 0: 'messages' holds dict, not text"),
        ({"path": "nothing/x", "kind": SourceKind.tfds}, "no dataset of TFDS that is prepared"),
    ],
)
def test_what_is_wrong_with_a_tfds(notes, options, line):
    with pytest.raises(UserError) as error:
        read(**{"path": notes[1]} | options)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tfds_in_another_format_is_refused(notes, tmp_path):
    import shutil

    copy = tmp_path / "notes" / "1.0.0"
    shutil.copytree(notes[1], copy)
    info = (copy / "dataset_info.json").read_text()
    (copy / "dataset_info.json").write_text(info.replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="stored as tfrecord, which needs TensorFlow or has no random access"):
        read(copy, field="text")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders that `save_to_disk` wrote, and one of files that `load_dataset` takes for a dataset."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub")
    rows = datasets.Dataset.from_dict({"text": TEXTS, "messages": [MESSAGES] * len(TEXTS)})
    rows.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(folder / "dict")
    (folder / "files").mkdir()
    rows.to_parquet(folder / "files" / "train-00000-of-00001.parquet")
    return folder


def test_hub_datasets(saved, tmp_path, monkeypatch):
    assert list(read(saved / "one", field="text")) == TEXTS
    assert list(read(saved / "dict", split="test", field="text")) == TEXTS[:3]
    chats = read(saved / "dict", split="test", messages="messages")
    assert chats[2] == Conversation(tuple(MESSAGES))
    assert chats.where(2) == f"{saved / 'dict'}, split test, row 2"
    assert read(saved / "one", field="text").digest == read(saved / "dict", field="text").digest
    import datasets

    asked = []

    def load_dataset(name, subset, **options):
        asked.append((name, subset, options.pop("revision")))
        return hub(str(saved / "files"), cache_dir=str(tmp_path), **options)

    hub = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read("org/name@v2", SourceKind.hub, subset="en", split="train[10%:20%]", field="text")
    assert list(found) == TEXTS[2:4]
    assert asked == [("org/name", "en", "v2")]


def test_what_is_wrong_with_a_hub_dataset(saved, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for path, options, line in (
        (
            saved / "dict",
            {"split": "dev"},
            "no dataset that can be loaded: no split 'dev'; there is train, test",
        ),
        (saved / "one", {"split": "dev"}, "it was saved without splits; leave split out"),
        (saved / "one", {}, "could be read in several ways, as text and messages"),
        (
            "org/name",
            {"kind": SourceKind.hub},
            "org/name: the hub cannot be reached, and no copy is in the cache; check the network",
        ),
    ):
        with pytest.raises(UserError) as error:
            read(path, **options)
        assert line in str(error.value)
        assert "\n" not in str(error.value)


def test_a_mapped_file_that_is_cut_off_is_noticed_before_it_is_read(saved, tmp_path):
    import shutil

    shutil.copytree(saved / "one", tmp_path / "one")
    found = read(tmp_path / "one", field="text")
    (file,) = (tmp_path / "one").glob("*.arrow")
    # Beside the file, not in it: to read a mapped page that is gone ends the process.
    file.rename(tmp_path / "kept")
    with pytest.raises(UserError, match="gone since it was opened"):
        found[0]


def _imports(folder, monkeypatch, change):
    """A copy of a dataset with other features, next to a module that remembers that it was imported."""
    import json
    import shutil

    monkeypatch.syspath_prepend(folder)
    (folder / "planted_features.py").write_text(
        "import builtins; builtins.planted = True\nclass Mine: pass\n"
    )
    copy = folder / "mine" / "1.0.0"
    shutil.copytree(change[0], copy)
    features = json.loads((copy / "features.json").read_text())
    change[1](features)
    (copy / "features.json").write_text(json.dumps(features))
    return copy


PLANTED = "planted_features.Mine"
PLANTS = {
    "the whole": lambda f: f.update(pythonClassName=PLANTED),
    "a feature": lambda f: f["featuresDict"]["features"]["text"].update(pythonClassName=PLANTED),
    "proto's spelling": lambda f: f["featuresDict"]["features"].update(
        text={"python_class_name": PLANTED, "text": {}}
    ),
    "the old spelling": lambda f: f.update(type=PLANTED, content={}),
    "a text within": lambda f: f["featuresDict"]["features"].update(
        text={
            "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
            "jsonFeature": {"json": '{"feature": {"type": "planted_features.Mine", "content": {}}}'},
        }
    ),
    "the package, not its features": lambda f: f.update(pythonClassName="tensorflow_datasets.scripts.x.Y"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_only_the_classes_of_tfds_are_loaded(notes, tmp_path, monkeypatch, plant):
    import builtins

    copy = _imports(tmp_path, monkeypatch, (notes[1], PLANTS[plant]))
    for path, options in ((copy, {}), ("mine", {"kind": SourceKind.tfds, "data_dir": str(tmp_path)})):
        with pytest.raises(UserError, match="and only those of tensorflow_datasets are loaded"):
            read(path, field="text", **options)
    assert not hasattr(builtins, "planted")
    assert "planted_features" not in sys.modules


def test_a_feature_may_be_named_as_the_keys_of_a_class(notes, tmp_path, monkeypatch):
    def rename(features):
        inner = features["featuresDict"]["features"]
        inner["type"] = inner.pop("text")

    copy = _imports(tmp_path, monkeypatch, (notes[1], rename))
    with pytest.raises(UserError, match="no 'text' in its first record, which has 'messages', 'type'"):
        read(copy, field="text")


def test_features_that_are_no_json(notes, tmp_path, monkeypatch):
    copy = _imports(tmp_path, monkeypatch, (notes[1], lambda features: None))
    for content in (b"[" * 100_000, b"{", b"\xff\xfe", b"3", b'{"a": ' + b"9" * 5000 + b"}"):
        (copy / "features.json").write_bytes(content)
        with pytest.raises(UserError, match=r"features\.json: not ") as error:
            read(copy, field="text")
        assert "\n" not in str(error.value)
