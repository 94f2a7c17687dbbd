"""Pieces of messages: what templates keep or drop as a whole, and where a template puts them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from xtoken_jax.alignment.render import Conversation, reasoning_key, render
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import Tokenizer

# A template may take a message apart at its thinking, keep it, or drop it from earlier turns.
_THINKING = re.compile(r"(</?think>)")
# Characters of private use, which no template strips: a number between two of them stands for a piece
# when it is looked up where a template puts it.
_MARKS = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True)
class Piece:
    """A part of a message's content that templates keep or drop as a whole."""

    message: int
    text: str


@dataclass(frozen=True)
class Region:
    """Where a piece stands in a rendered conversation (characters, then bytes), and the number of
    characters that the template took off its front."""

    piece: int
    start: int
    end: int
    skipped: int


def pieces_of(conversation: Conversation, place: int, where: Callable[[int], str]) -> list[Piece]:
    found = []
    for m, message in enumerate(conversation):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(
                f"{where(place)}, message {m}: not an object with a 'role' and a 'content' ({message!r:.80})"
            )
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise UserError(f"{where(place)}, message {m}: its content is no text ({content!r:.80})")
        key = reasoning_key(message)
        reasoning = message[key].strip() if key else ""
        found += [Piece(m, part) for part in [reasoning, *parts_of(content or "")[1::2]] if part]
    return found


def parts_of(content: str) -> list[str]:
    """A content cut up: between pieces, piece, between pieces, ..., between pieces.

    With thinking marked in it, the blanks around the markers stand between the pieces; else it is
    one piece with its blanks. A piece of blanks alone is empty.
    """
    texts = _THINKING.split(content)
    if len(texts) == 1:
        return ["", content, ""] if content.strip() else [content, "", ""]
    parts = [""]
    for place, text in enumerate(texts):
        if place % 2:
            parts[-1] += text
        else:
            piece = text.strip()
            before, after = text.split(piece, 1) if piece else (text, "")
            parts[-1] += before
            parts += [piece, after]
    return parts


def regions_of(
    tokenizer: Tokenizer,
    template: str,
    conversation: Conversation,
    pieces: list[Piece],
    text: str,
    where: Callable[[], str],
) -> list[Region]:
    """Where the pieces stand in the rendered text: rendered once more with places in their stead."""
    said = set().union(*(p.text for p in pieces), *(m.get("content") or "" for m in conversation))
    mark = next(chr(point) for point in _MARKS if chr(point) not in said)
    # Marks in place of the pieces serve most templates. One that looks at a content needs to see it.
    missing = 0
    for place in (None, 0.5, 1.0, 0.0):
        marked = _marked(conversation, pieces, mark, place)
        rendered = render(tokenizer, template, marked, where)
        regions = _match(re.split(f"{mark}([0-9]+){mark}", rendered), pieces, text, place)
        if not isinstance(regions, int):
            return regions
        missing = regions if place is None else missing
    raise lost(tokenizer, where, pieces[missing].message if pieces else 0)


def _marked(
    conversation: Conversation, pieces: list[Piece], mark: str, place: float | None
) -> list[dict[str, Any]]:
    """The conversation with a numbered mark for each piece, or with the mark inside of the piece."""
    number = iter(range(len(pieces)))

    def mark_of(piece: str) -> str:
        if not piece:
            return ""
        written = f"{mark}{next(number)}{mark}"
        if place is None:
            return written
        middle = int(place * len(piece))
        return piece[:middle] + written + piece[middle:]

    marked = []
    for message in conversation:
        key = reasoning_key(message)
        changed: dict[str, Any] = {}
        if key:
            piece = message[key].strip()
            changed[key] = message[key].replace(piece, mark_of(piece), 1) if piece else message[key]
        if message.get("content"):
            parts = parts_of(message["content"])
            parts[1::2] = [mark_of(piece) for piece in parts[1::2]]
            changed["content"] = "".join(parts)
        marked.append({**message, **changed})
    return marked


def _match(markup: list[str], pieces: list[Piece], text: str, place: float | None) -> list[Region] | int:
    """The regions, or the number of the piece at which the marked rendering is another than the text."""
    numbers = [int(number) for number in markup[1::2]]
    found: list[tuple[int, int, int, int]] = []
    if place is not None:
        if "".join(markup[0::2]) != text:
            return numbers[0] if numbers else 0
        at = 0
        for number, before in zip(numbers, markup[0::2], strict=False):
            at += len(before)
            middle = int(place * len(pieces[number].text))
            for skipped, kept in _variants(pieces[number].text):
                start = at - middle + skipped
                if 0 <= start <= at <= start + len(kept) and text.startswith(kept, start):
                    found.append((number, start, start + len(kept), skipped))
                    break
            else:
                return number
    else:
        at = len(markup[0])
        if not text.startswith(markup[0]):
            return numbers[0] if numbers else 0
        for number, after in zip(numbers, markup[2::2], strict=True):
            for skipped, kept in _variants(pieces[number].text):
                end = at + len(kept)
                if text.startswith(kept, at) and text.startswith(after, end):
                    found.append((number, at, end, skipped))
                    break
            else:
                return number
            at = end + len(after)
        if at != len(text):
            return numbers[-1] if numbers else 0
    regions: list[Region] = []
    for number, start, end, skipped in found:
        # Each piece once and in order: what a template repeats or moves is markup.
        if not regions or number > regions[-1].piece:
            regions.append(Region(number, start, end, skipped))
    return regions


def lost(tokenizer: Tokenizer, where: Callable[[], str], message: int) -> UserError:
    return UserError(
        f"{where()}: the chat template of {tokenizer.name} changes message {message}, which cannot be "
        "found in the rendered text; simplify the template or give plain text"
    )


def _variants(text: str) -> Iterator[tuple[int, str]]:
    """Yield the forms of a content that templates write, and how many characters each lost at its front."""
    for kept in (text, text.strip(), text.rstrip(), text.lstrip(), text.strip("\n"), text.lstrip("\n")):
        yield text.index(kept), kept
