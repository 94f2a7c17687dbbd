"""English that the package ships: Python 3.11's documentation, the same on every Python that reads it."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping, Set
from pathlib import Path

_SHORTEST = 40  # characters; a shorter paragraph, such as a heading, can be in two texts by chance
# Texts and licence of Python 3.11.7; experiments/quickstart/freeze_text.py wrote them.
FOLDER = Path(__file__).resolve().parents[2] / "assets" / "python_docs"


def topics() -> dict[str, str]:
    """Name -> text of every topic of `help()`: 79 topics, 465 kB."""
    return _texts("topics.json.gz")


def docstrings() -> dict[str, str]:
    """Module -> its docstrings, of the standard library: 363 modules, 1.4 MB."""
    return _texts("docstrings.json.gz")


def _texts(file: str) -> dict[str, str]:
    return json.loads(gzip.decompress((FOLDER / file).read_bytes()))


def split_of(works: Mapping[str, str], split: str) -> list[str]:
    """Return the texts of one split, in an order unrelated to the names; every tenth is for validation.

    Two names can share a text; it is not trained on if either is held out. One text can repeat paragraphs of
    another, as the topic `compound` repeats `if`: validation leaves out the paragraphs that are trained on,
    and the texts that consist mostly of these.

    Args:
        works: text by name.
        split: "validation"; any other name is for training.
    """
    names = sorted(works, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out = [works[name] for name in names[::10]]
    train = [works[name] for name in names if works[name] not in held_out]
    if split != "validation":
        return train
    seen = {_words(paragraph) for text in train for paragraph in text.split("\n\n")}
    return [text for text in (_without(text, seen) for text in held_out) if text]


def _words(paragraph: str) -> str:
    """Return the words of a paragraph; indentation and line breaks differ between its repetitions."""
    return " ".join(paragraph.split())


def _without(text: str, seen: Set[str]) -> str:
    """Return the text without its paragraphs in `seen`, or nothing if less than half of it remains."""
    paragraphs = [p for p in text.split("\n\n") if len(_words(p)) < _SHORTEST or _words(p) not in seen]
    rest = "\n\n".join(paragraphs)
    return rest if 2 * len(rest) >= len(text) else ""
