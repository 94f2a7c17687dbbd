"""The English that the package ships: the text that its models were trained on, and none of it held out."""

import gzip
import hashlib
import importlib
import sys
from pathlib import Path

import pytest

from xtoken_jax.data.formats import python_docs

EXPERIMENT = Path(__file__).resolve().parents[2] / "experiments" / "quickstart"
SHIPPED = {  # file -> SHA-256 of its JSON, texts
    "topics.json.gz": ("4717ccc51e2e7bd1eed2feddb0bcb5a7da19a1a923fd2f258cf81e4285e31683", 79),
    "docstrings.json.gz": ("470c12337c1712c4f314d6640bdbc04334b18999562ebd82a5825acb694688b1", 363),
}


@pytest.fixture
def script(monkeypatch):
    """Load a script of the experiment, whose folder is no package."""
    monkeypatch.syspath_prepend(str(EXPERIMENT))
    yield importlib.import_module
    for name in ("freeze_text", "make_tokenizers"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("file", SHIPPED)
def test_the_shipped_text_is_that_of_python_3_11_7(file):
    packed = (python_docs.FOLDER / file).read_bytes()
    assert packed[4:8] == bytes(4)  # no date
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == SHIPPED[file][0]
    texts = python_docs.topics() if file.startswith("topics") else python_docs.docstrings()
    assert len(texts) == SHIPPED[file][1]
    assert all(isinstance(text, str) and text for text in texts.values())


def test_the_licence_is_beside_the_text():
    licence = (python_docs.FOLDER / "LICENSE").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence
    assert "Copyright (c) 2001" in licence


def test_the_quickstarts_teacher_has_merges_of_this_training_split(script, tmp_path):
    script("make_tokenizers").make_teacher(tmp_path)
    shipped = python_docs.FOLDER.parent / "quickstart" / "teacher" / "tokenizer.json"
    assert (tmp_path / "tokenizer.json").read_text() == shipped.read_text()


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the text is that of Python 3.11.7")
def test_the_topics_of_this_python_are_the_shipped_ones(script):
    assert script("freeze_text").topics() == python_docs.topics()


def test_the_same_texts_are_written_as_the_same_bytes(script, tmp_path):
    freeze_text = script("freeze_text")
    library = tmp_path / "library"
    library.mkdir()
    text = "Explains for more than eighty characters what this part of a library is made for, at length."
    (library / "part.py").write_text(f'"""{text}"""\nraise SystemExit("imported")\n')
    (library / "broken.py").write_text("def (:\n")
    texts = freeze_text.docstrings(library)
    assert texts == {"part": text}
    for name in ("a.gz", "b.gz"):
        freeze_text.write(texts, tmp_path / name)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def words(text):
    return " ".join(text.split())


def test_no_long_stretch_of_held_out_documentation_is_trained_on():
    """Also where one topic repeats a part of another, in other line breaks."""
    topics, docstrings = python_docs.topics(), python_docs.docstrings()
    length = 130  # characters
    train = [*python_docs.split_of(topics, "train"), *python_docs.split_of(docstrings, "train")]
    stretches = {
        text[i : i + length] for text in map(words, train) for i in range(max(len(text) - length + 1, 0))
    }
    held_out = [words(text) for text in python_docs.split_of(topics, "validation")]
    assert len(held_out) == 5
    assert sum(map(len, held_out)) > 15_000
    for text in held_out:
        assert not any(text[i : i + length] in stretches for i in range(len(text) - length + 1))


def test_texts_under_two_names_and_repeated_paragraphs():
    def text(*numbers):
        return "\n\n".join(f"Paragraph {n} of a text that says nothing but this." for n in numbers)

    works = {f"n{i}": text(i, f"{i}b", f"{i}c") for i in range(60)}
    names = sorted(works, key=lambda name: hashlib.sha256(name.encode()).digest())
    twin, repeated, partly, intact = names[0], names[10], names[20], names[30]
    works[names[1]] = works[twin]
    works[names[2]] += "\n\n" + works[repeated].replace(" ", "\n   ")
    works[names[3]] = works[names[4]] = text("shared") + "\n\n" + works[names[3]]
    works[partly] += "\n\n" + text("shared")
    train, held_out = (python_docs.split_of(works, split) for split in ("train", "validation"))
    assert train == [works[name] for i, name in enumerate(names) if i % 10 and i != 1]
    whole = partly.removeprefix("n")
    assert held_out[:3] == [works[twin], text(whole, f"{whole}b", f"{whole}c"), works[intact]]
    assert len(held_out) == 5  # the repeated one is gone
