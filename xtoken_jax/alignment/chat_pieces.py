"""Pieces of messages: what templates keep or drop as a whole, and where a template puts them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import zip_longest
from typing import Any

import numpy as np

from xtoken_jax.alignment.render import REASONING, Conversation, reasoning_key, render
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import Tokenizer

# A template may take a message apart at its thinking, keep it, or drop it from earlier turns.
_THINKING = re.compile(r"(</?think>)")
# Characters of private use, which no template strips: a number between two of them stands for a piece
# when it is looked up where a template puts it.
_MARKS = range(0xF0000, 0xFFFFE)


class Kind(Enum):
    """What a piece is of its message."""

    TEXT = "text"
    THINKING = "thinking"
    NAME = "name"  # of the function that a call names
    ARGUMENTS = "arguments"  # of a call, one JSON form that templates write


@dataclass(frozen=True)
class Piece:
    """A part of a message that templates keep or drop as a whole."""

    message: int
    text: str
    kind: Kind = Kind.TEXT


@dataclass(frozen=True)
class Region:
    """Where a piece stands in a rendered conversation.

    Attributes:
        piece: its number.
        start, end: in characters at first, then in bytes.
        skipped: what the template took off the front of the piece, in the same unit.
        changed: whether the template wrote the piece in another form, as JSON.
    """

    piece: int
    start: int
    end: int
    skipped: int
    changed: bool = False


def pieces_of(conversation: Conversation, place: int, where: Callable[[int], str]) -> list[Piece]:
    """The pieces of all messages, in order: reasoning, content, then name and arguments of each call.

    Raises:
        UserError: a message without role, a content or reasoning that is no text, a call without a
            function's name.
    """
    pieces = []
    for m, message in enumerate(conversation):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(
                f"{where(place)}, message {m}: not an object with a 'role' and a 'content' ({message!r:.80})"
            )
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise UserError(f"{where(place)}, message {m}: its content is no text ({content!r:.80})")
        for key in REASONING:
            if isinstance(message.get(key), list | Mapping):
                raise UserError(f"{where(place)}, message {m}: its {key!r} is no text ({message[key]!r:.80})")
        named = reasoning_key(message)
        if named and (reasoning := message[named].strip()):
            pieces.append(Piece(m, reasoning, Kind.THINKING))
        parts = parts_of(content or "")
        for i in range(1, len(parts), 2):
            thinking = "<think>" in parts[i - 1] or "</think>" in parts[i + 1]
            if parts[i]:
                pieces.append(Piece(m, parts[i], Kind.THINKING if thinking else Kind.TEXT))
        for call in message.get("tool_calls") or ():
            pieces += _pieces_of_call(call, m, f"{where(place)}, message {m}")
    return pieces


def _pieces_of_call(call: Any, message: int, where: str) -> Iterator[Piece]:
    function = _function(call)
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: a tool call without the name of a function ({call!r:.80})")
    yield Piece(message, name, Kind.NAME)
    arguments = function.get("arguments")
    forms = []
    if isinstance(arguments, str):
        forms.append(arguments)
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if isinstance(arguments, Mapping):
        forms.append(json.dumps(arguments, ensure_ascii=False, default=str))
    yield from (Piece(message, form, Kind.ARGUMENTS) for form in dict.fromkeys(forms) if form.strip())


def _function(call: Any) -> Mapping[str, Any]:
    """The name and arguments of a call, which OpenAI's format keeps in an object of its own."""
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        call = call["function"]
    return call if isinstance(call, Mapping) else {}


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
    """Where the pieces stand in the rendered text: rendered once more with marks in their place."""
    # Marks in place of the pieces serve most templates. One that looks at a content needs to see it.
    missing = 0
    for place in (None, 0.5, 1.0, 0.0):
        markup = markup_of(tokenizer, template, conversation, pieces, where, place)
        regions = _match(markup, conversation, pieces, text, place)
        if not isinstance(regions, int):
            return _with_arguments(regions, pieces, text)
        missing = regions if place is None else missing
    raise lost(tokenizer, where, pieces[missing].message if pieces else 0)


def markup_of(
    tokenizer: Tokenizer,
    template: str,
    conversation: Conversation,
    pieces: Sequence[Piece],
    where: Callable[[], str],
    place: float | None = None,
    *,
    answer: bool = False,
) -> list[str]:
    """Render a conversation with marks and cut it up there.

    Args:
        tokenizer, template: of one side.
        conversation: messages, all that the pieces come from or the first ones.
        pieces: of all messages.
        where: describes the conversation in errors.
        place: None for a mark in place of each piece, else where in the piece the mark stands, 0 to 1.
        answer: end where the assistant's next turn begins.

    Returns:
        Text, number of a piece, text, number, ..., text.
    """
    said = set().union(*(piece.text for piece in pieces), *(m.get("content") or "" for m in conversation))
    mark = next(chr(point) for point in _MARKS if chr(point) not in said)
    marked = _marked(conversation, pieces, mark, place)
    rendered = render(tokenizer, template, marked, where, answer=answer)
    return re.split(f"{mark}([0-9]+){mark}", rendered)


def _marked(
    conversation: Conversation, pieces: Sequence[Piece], mark: str, place: float | None
) -> list[dict[str, Any]]:
    """The conversation with a numbered mark for each piece, or with the mark inside of the piece."""
    numbers = iter([number for number, piece in enumerate(pieces) if piece.kind != Kind.ARGUMENTS])

    def mark_of(piece: str) -> str:
        if not piece:
            return ""
        written = f"{mark}{next(numbers)}{mark}"
        if place is None:
            return written
        middle = int(place * len(piece))
        return piece[:middle] + written + piece[middle:]

    marked = []
    for message in conversation:
        key = reasoning_key(message)
        changed: dict[str, Any] = {}
        if key and (piece := message[key].strip()):
            changed[key] = message[key].replace(piece, mark_of(piece), 1)
        if message.get("content"):
            parts = parts_of(message["content"])
            parts[1::2] = [mark_of(piece) for piece in parts[1::2]]
            changed["content"] = "".join(parts)
        if message.get("tool_calls"):
            changed["tool_calls"] = [_renamed(call, mark_of) for call in message["tool_calls"]]
        marked.append({**message, **changed})
    return marked


def _renamed(call: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _renamed(call["function"], rename)}
    return {**call, "name": rename(call["name"])}


def _match(
    markup: list[str], conversation: Conversation, pieces: list[Piece], text: str, place: float | None
) -> list[Region] | int:
    """The regions, or the number of the piece at which the marked rendering differs from the text."""
    numbers = [int(number) for number in markup[1::2]]
    found: list[Region] = []
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
                    found.append(Region(number, start, start + len(kept), skipped))
                    break
            else:
                return number
    else:
        at = len(markup[0])
        if not text.startswith(markup[0]):
            return numbers[0] if numbers else 0
        for number, after in zip(numbers, markup[2::2], strict=True):
            context = conversation[pieces[number].message]["role"] != "assistant"
            for skipped, kept, changed in _forms(pieces[number].text, context):
                end = at + len(kept)
                if text.startswith(kept, at) and text.startswith(after, end):
                    found.append(Region(number, at, end, skipped, changed))
                    break
            else:
                return number
            at = end + len(after)
        if at != len(text):
            return numbers[-1] if numbers else 0
    regions: list[Region] = []
    for region in found:
        # Each piece once and in order: what a template repeats or moves is markup.
        if not regions or region.piece > regions[-1].piece:
            regions.append(region)
    return regions


def _with_arguments(regions: list[Region], pieces: list[Piece], text: str) -> list[Region]:
    """Add the arguments of calls where a template writes them, as one JSON object, after the name."""
    every: list[Region] = []
    for region, following in zip_longest(regions, regions[1:]):
        every.append(region)
        limit = following.start if following else len(text)
        number = region.piece + 1
        while pieces[region.piece].kind == Kind.NAME and number < len(pieces):
            if pieces[number].kind != Kind.ARGUMENTS:
                break
            start = text.find(pieces[number].text, region.end, limit)
            if start >= 0:
                every.append(Region(number, start, start + len(pieces[number].text), 0))
                break
            number += 1
    return every


def lost(tokenizer: Tokenizer, where: Callable[[], str], message: int) -> UserError:
    return UserError(
        f"{where()}: the chat template of {tokenizer.name} changes message {message}, which cannot be "
        "found in the rendered text; simplify the template or give plain text"
    )


def in_bytes(region: Region, offset: np.ndarray, pieces: Sequence[Piece]) -> Region:
    """A region in bytes; `offset` says where each character of the rendered text begins."""
    skipped = len(pieces[region.piece].text[: region.skipped].encode())
    return replace(region, start=int(offset[region.start]), end=int(offset[region.end]), skipped=skipped)


def _variants(text: str) -> Iterator[tuple[int, str]]:
    """Yield the forms of a content that templates write, and how many characters each lost at its front."""
    for kept in (text, text.strip(), text.rstrip(), text.lstrip(), text.strip("\n"), text.lstrip("\n")):
        yield text.index(kept), kept


def _forms(text: str, context: bool) -> Iterator[tuple[int, str, bool]]:
    """`_variants`, and whether they are changed: what nobody learns may be written as JSON (Llama 3.1)."""
    for skipped, kept in _variants(text):
        yield skipped, kept, False
    if context:
        escaped = json.dumps(text, ensure_ascii=False)[1:-1]
        yield 0, escaped, True
