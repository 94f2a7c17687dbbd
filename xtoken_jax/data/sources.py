"""Where text comes from: files, the documentation that Python carries, generated arithmetic."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from xtoken_jax.data import arithmetic, python_docs
from xtoken_jax.errors import UserError


class SourceKind(Enum):
    """What a source reads."""

    jsonl = "jsonl"
    text = "text"
    python_docs = "python_docs"
    python_docstrings = "python_docstrings"
    arithmetic = "arithmetic"


@dataclass
class SourceConfig:
    """One source of documents.

    Attributes:
        kind: jsonl (one JSON object a line, .gz too), text (a file is a document),
            python_docs (the topics of `help()`), python_docstrings (those of the standard
            library), arithmetic (generated remainders).
        path: the file, or a folder of files with the kind's ending; for jsonl and text.
        field: the key that holds the text; for jsonl.
        split: "train" or "validation"; for all but files.
        limit: documents taken at most, the first ones; null for all.
        documents: for arithmetic, how many to generate, each of 18 lines; in the validation part, how
            many single problems to measure accuracy on.
        wrong_share: share of wrong results in [0, 1]; for arithmetic.
        seed: for arithmetic.
        weight: share of the training tokens that come from here, relative to the other sources'; the
            documents then repeat at their own pace. null: all documents of all sources equally often.
    """

    kind: SourceKind = SourceKind.jsonl
    path: str | None = None
    field: str = "text"
    split: str = "train"
    limit: int | None = None
    documents: int = 1000
    wrong_share: float = 0.0
    seed: int = 0
    weight: float | None = None

    def validate(self, where: str) -> None:
        """Raise UserError for values that make no sense; `where` names the config key."""
        if self.kind in (SourceKind.jsonl, SourceKind.text) and not self.path:
            raise UserError(f"{where}.path: a source of kind {self.kind.value} needs a file or folder")
        if self.split not in ("train", "validation"):
            raise UserError(f"{where}.split={self.split!r}: choose train or validation")
        if not 0 <= self.wrong_share <= 1:
            raise UserError(f"{where}.wrong_share={self.wrong_share}: must be between 0 and 1")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"{where}.limit={self.limit}: must be at least 1, or null for all")
        if self.documents < 1:
            raise UserError(f"{where}.documents={self.documents}: must be at least 1")


def read_documents(config: SourceConfig) -> list[str]:
    """The documents of a source that hold more than blanks, in a fixed order, up to its limit.

    Raises:
        UserError: a missing or unreadable file, a line without the field, no text at all.
    """
    documents = list(itertools.islice(_documents(config), config.limit))
    if not documents:
        raise UserError(f"{config.path}: holds no text")
    return documents


def read_sources(sources: Mapping[str, SourceConfig]) -> dict[str, list[str]]:
    """`read_documents` of each source, by its name."""
    return {name: read_documents(source) for name, source in sources.items()}


def digest(documents: list[str]) -> str:
    """SHA-256 of documents and their borders, shortened, with how many there are."""
    found = hashlib.sha256()
    for text in documents:
        content = text.encode()
        found.update(len(content).to_bytes(8))
        found.update(content)
    return f"{len(documents)} documents, sha256 {found.hexdigest()[:16]}"


def _documents(config: SourceConfig) -> Iterator[str]:
    if config.kind is SourceKind.arithmetic:
        yield from arithmetic.documents(
            config.documents, split=config.split, seed=config.seed, wrong_share=config.wrong_share
        )
    elif config.kind is SourceKind.python_docs:
        yield from python_docs.split_of(python_docs.topics(), config.split)
    elif config.kind is SourceKind.python_docstrings:
        yield from python_docs.split_of(python_docs.docstrings(), config.split)
    else:
        read = _read_jsonl if config.kind is SourceKind.jsonl else _read_text
        for path in _files(config):
            yield from (text for text in read(path, config.field) if text.strip())


def _files(config: SourceConfig) -> list[Path]:
    path = Path(config.path or "").expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder of {config.kind.value} data")
    endings = (".jsonl", ".jsonl.gz") if config.kind is SourceKind.jsonl else (".txt", ".txt.gz")
    files = sorted(f for f in path.rglob("*") if f.name.endswith(endings))
    if not files:
        raise UserError(f"{path}: holds no file that ends in {' or '.join(endings)}")
    return files


def _open(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _read_text(path: Path, field: str) -> Iterator[str]:
    yield _open(path)


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_open(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: no JSON object with a {field!r} ({error!r})") from error
        if not isinstance(text, str):
            raise UserError(f"{path}:{number}: {field!r} holds {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell
            raise UserError(f"{path}:{number}: {field!r} is not text ({error})") from error
        yield text
