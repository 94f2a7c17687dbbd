"""What a source holds: texts, prompts with completions, conversations, read when they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol, overload

from xtoken_jax.data.records import Conversation, Document, Marked, Shape, document_of, says_nothing
from xtoken_jax.errors import UserError

# What is read when a source is opened, so that most mistakes end a run before it begins.
_READ_AHEAD = 10_000  # documents
_READ_AHEAD_CHARACTERS = 1 << 26


class Records(Protocol):
    """The records of one source, in a fixed order; threads may read at the same time.

    `keys` are the keys that the reader wants, for formats that store each key by itself, and `optional` are
    those that it wants of the records that have them.
    """

    def __len__(self) -> int:
        """How many there are."""

    def keys(self) -> list[str] | None:
        """Those of the first record, or of all files' columns; None where records are texts without keys."""

    def read(self, number: int, keys: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any] | str:
        """One of them; UserError where it cannot be read any more."""

    def where(self, number: int) -> str:
        """What a user finds it by: file and line."""

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Of the content; see the module that reads the format."""


class Documents(Sequence[Document]):
    """The documents of a source.

    Records are counted, not looked into: a blank one is a document too, with its number, and gives no row
    (`says_nothing`). Reading one raises UserError, with its file and line, where the record is damaged, is
    not of the shape that the source has, or where its file has changed or is gone since the source was
    opened.

    Attributes:
        records: where they come from, perhaps with more than these.
        shape: which keys hold what, and what is to be learnt.
        read_ahead: the number of first records that `look_ahead` read.
    """

    def __init__(
        self, records: Records, shape: Shape, *, name: str, limit: int | None = None, marked: bool = False
    ) -> None:
        """The first `limit` records; `name` is that of the source, for errors.

        With `marked`, special tokens that a text spells are these tokens.
        """
        self.records = records
        self._name = name
        self._count = len(records) if limit is None else min(limit, len(records))
        self._marked = marked
        self.shape = shape
        self.read_ahead = 0

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Document: ...
    @overload
    def __getitem__(self, number: slice) -> list[Document]: ...
    def __getitem__(self, number: int | slice) -> Document | list[Document]:
        if isinstance(number, slice):
            return [self[n] for n in range(self._count)[number]]
        number = range(self._count)[number]
        record = self.records.read(number, self.shape.required, self.shape.optional)
        try:
            document = document_of(self.shape, record, lambda: self.where(number))
        except RecursionError as error:
            raise UserError(
                f"{self.where(number)}: a record nested too deeply; flatten it or leave it out"
            ) from error
        return Marked(document) if self._marked and isinstance(document, str) else document

    def replaced(self, records: Records) -> Documents:
        """The documents of other records of the same source."""
        found = Documents(records, self.shape, name=self._name, marked=self._marked)
        found.read_ahead = min(self.read_ahead, len(found))
        return found

    def where(self, number: int) -> str:
        """File and line of a document, or what its format has in their place."""
        return self.records.where(number)

    @functools.cached_property
    def digest(self) -> str:
        """The number of documents, the SHA-256 of their content, shortened, and how records are read.

        Files of up to 1 GiB together are hashed whole, as they lie on disk, the part behind a limit too.
        Of more, it is their sizes and 2 to 256 blocks of 64 KiB of each, first and last included, at most
        1 GiB: a change of a few bytes in the midst of such files can go unseen. Names and times do not
        count, so that a copy on another machine is the same data; another compression is not.
        """
        marked = ", markers read as tokens" if self._marked else ""
        content = self.records.fingerprint(self.shape.keys)[:16]
        return f"{self._count} documents, sha256 {content}{self.shape.describe()}{marked}"

    def look_ahead(self) -> None:
        """Read the first 10,000 documents, or 64 MiB of them, and on to the first that says anything.

        Raises:
            UserError: one that cannot be read; none that says anything.
        """
        characters, spoke = 0, False
        for number in range(self._count):
            document = self[number]
            self.read_ahead = number + 1
            spoke = spoke or not says_nothing(document)
            characters += _size(document)
            if spoke and (number + 1 >= _READ_AHEAD or characters >= _READ_AHEAD_CHARACTERS):
                return
        if not spoke:
            what = "text" if self.shape.targets == "all" else f"{self.shape.targets} to learn"
            raise UserError(
                f"{self._name}: holds no {what}; name other data or keys, or leave the source out"
            )


def _size(document: Document) -> int:
    if isinstance(document, str):
        return len(document)
    if isinstance(document, Conversation):
        return sum(len(message.get("content") or "") for message in document.messages)
    return len(document.prompt) + len(document.completion)
