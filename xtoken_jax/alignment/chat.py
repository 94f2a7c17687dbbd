"""Conversations: each side renders its own chat template, and the contents of the messages are aligned."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import tokenizers

from xtoken_jax.alignment.locate import Located, by_characters, byte_offsets, to_bytes
from xtoken_jax.alignment.render import Conversation, reasoning_key, render
from xtoken_jax.alignment.spans import Spans, align_located
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

# A template may take a message apart at its thinking, keep it, or drop it from earlier turns.
_THINKING = re.compile(r"(</?think>)")
# Characters of private use, which no template strips: a number between two of them stands for a piece
# when it is looked up where a template puts it.
_MARKS = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True)
class _Piece:
    """A part of a message's content that templates keep or drop as a whole."""

    message: int
    text: str


@dataclass(frozen=True)
class _Region:
    """Where a piece stands in a rendered conversation (characters, then bytes), and the number of
    characters that the template took off its front."""

    piece: int
    start: int
    end: int
    skipped: int


def align_chats(
    pair: TokenizerPair,
    conversations: Sequence[Conversation],
    *,
    targets: str = "assistant",
    student_template: str | None = None,
    teacher_template: str | None = None,
) -> list[Spans]:
    """Render, encode and align conversations.

    The contents of the messages are aligned; a template's markup is in no chunk. What a message
    says is text, also where it spells a special token. A content that one side's template
    leaves out (the thinking of earlier turns) is in no chunk on the other.

    Args:
        pair: student's and teacher's tokenizer.
        conversations: B lists of messages, {"role": "user", "content": "..."} and whatever else
            the templates read. A content is a text; where it is None, the message is all markup.
        targets: what is to be learnt: "assistant", the contents of the assistant and the marker
            that ends its turn, or "all". A message of the assistant with "weight": 0 is no target.
        student_template, teacher_template: Jinja source in place of the tokenizer's own; a base
            model has none.

    Returns:
        One Spans a conversation. BOS is what the template makes of it; nothing is added.

    Raises:
        UserError: no chat template; a template that refuses the conversation or changes a
            message beyond recognition; a message without role; a content that is no text.

    Example:
        rows = align_chats(pair, [[{"role": "user", "content": "12 + 189?"},
                                   {"role": "assistant", "content": "201"}]])
    """
    pair = TokenizerPair(
        replace(pair.student, chat_template=student_template or pair.student.chat_template),
        replace(pair.teacher, chat_template=teacher_template or pair.teacher.chat_template),
    )
    return [row for (row,) in align_chats_together([pair], conversations, targets=targets)]


def align_chats_together(
    pairs: Sequence[TokenizerPair],
    conversations: Sequence[Conversation],
    *,
    targets: str = "assistant",
    where: Callable[[int], str] = "conversation {}".format,
) -> list[tuple[Spans, ...]]:
    """`align_chats` with several teachers of one student, which renders each conversation once.

    Args:
        pairs: with each teacher; each tokenizer has its chat template.
        conversations: as `align_chats` takes them.
        targets: as `align_chats` takes them.
        where: what an error calls the conversation of a number.

    Returns:
        For each conversation, a Spans for every pair; the student's tokens are the same in all.
    """
    if targets not in ("assistant", "all"):
        raise ValueError(f"targets={targets!r}: must be 'assistant' or 'all'")
    conversations = [list(conversation) for conversation in conversations]
    pieces = [_pieces(conversation, b, where) for b, conversation in enumerate(conversations)]
    student, learnt = _locate(pairs[0].student, conversations, pieces, targets, where)
    by_pair = []
    for pair in pairs:
        teacher, taught = _locate(pair.teacher, conversations, pieces, targets, where)
        rows = []
        for b, spans in enumerate(align_located(pair, student, teacher)):
            own, other = (
                part[side.offsets[b] : side.offsets[b + 1]]
                for side, part in ((student, learnt), (teacher, taught))
            )
            sides = replace(spans.student, targets=own), replace(spans.teacher, targets=other)
            rows.append(replace(spans, student=sides[0], teacher=sides[1]))
        by_pair.append(rows)
    return list(zip(*by_pair, strict=True))


def _pieces(conversation: Conversation, place: int, where: Callable[[int], str]) -> list[_Piece]:
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
        found += [_Piece(m, part) for part in [reasoning, *_parts(content or "")[1::2]] if part]
    return found


def _parts(content: str) -> list[str]:
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


def _locate(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    pieces: Sequence[list[_Piece]],
    targets: str,
    where: Callable[[int], str],
) -> tuple[Located, np.ndarray]:
    """The tokens of the rendered conversations, placed in the joined pieces, and bool [N], the targets."""
    template = tokenizer.chat_template
    if template is None:
        raise UserError(
            f"{tokenizer.name}: no chat template for conversations; put a chat_template.jinja into its "
            "folder, or name such a file with student.chat_template or teacher.chat_template"
        )
    ids, spans, faithful, learnt, text_starts = [], [], [], [], [0]
    texts = [render(tokenizer, template, c, functools.partial(where, b)) for b, c in enumerate(conversations)]
    raws = to_bytes(texts)
    encodings = tokenizer.markup_backend.encode_batch(texts, add_special_tokens=False) if texts else []
    for b, (conversation, text, raw, encoding) in enumerate(
        zip(conversations, texts, raws, encodings, strict=True)
    ):
        found = _regions(tokenizer, template, conversation, pieces[b], text, functools.partial(where, b))
        offset = byte_offsets(text)
        regions = [replace(r, start=int(offset[r.start]), end=int(offset[r.end])) for r in found]
        row = _encode(tokenizer, text, raw, encoding, regions)
        ids.append(row[0])
        faithful.append(row[2])
        place, size = _in_pieces(row[1], regions, pieces[b])
        spans.append(place + text_starts[-1])
        text_starts.append(text_starts[-1] + size)
        learnt.append(
            np.ones(len(row[0]), bool)
            if targets == "all"
            else _of_assistant(
                tokenizer,
                template,
                text,
                row[:2],
                regions,
                pieces[b],
                conversation,
                functools.partial(where, b),
            )
        )
    counts = np.array([len(row) for row in ids], np.int64)
    starts, ends = np.concatenate(spans or [np.zeros((0, 2), np.int64)]).T
    never = np.zeros(len(ids), bool)
    located = Located(
        np.concatenate(ids or [np.zeros(0, np.int32)]),
        np.concatenate([[0], np.cumsum(counts)]),
        starts,
        ends,
        np.concatenate(faithful or [never]),
        never,
        never,
        np.array(text_starts, np.int64),
    )
    return located, np.concatenate(learnt or [never])


def _regions(
    tokenizer: Tokenizer,
    template: str,
    conversation: Conversation,
    pieces: list[_Piece],
    text: str,
    where: Callable[[], str],
) -> list[_Region]:
    """Where the pieces stand in the rendered text: rendered once more with places in their stead."""
    said = set().union(*(p.text for p in pieces), *(m.get("content") or "" for m in conversation))
    mark = next(chr(point) for point in _MARKS if chr(point) not in said)
    # Marks in place of the pieces serve most templates. One that looks at a content needs to see it.
    lost = 0
    for place in (None, 0.5, 1.0, 0.0):
        marked = _marked(conversation, pieces, mark, place)
        rendered = render(tokenizer, template, marked, where)
        regions = _match(re.split(f"{mark}([0-9]+){mark}", rendered), pieces, text, place)
        if not isinstance(regions, int):
            return regions
        lost = regions if place is None else lost
    raise _lost(tokenizer, where, pieces[lost].message if pieces else 0)


def _marked(
    conversation: Conversation, pieces: list[_Piece], mark: str, place: float | None
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
            parts = _parts(message["content"])
            parts[1::2] = [mark_of(piece) for piece in parts[1::2]]
            changed["content"] = "".join(parts)
        marked.append({**message, **changed})
    return marked


def _match(markup: list[str], pieces: list[_Piece], text: str, place: float | None) -> list[_Region] | int:
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
    regions: list[_Region] = []
    for number, start, end, skipped in found:
        # Each piece once and in order: what a template repeats or moves is markup.
        if not regions or number > regions[-1].piece:
            regions.append(_Region(number, start, end, skipped))
    return regions


def _lost(tokenizer: Tokenizer, where: Callable[[], str], message: int) -> UserError:
    return UserError(
        f"{where()}: the chat template of {tokenizer.name} changes message {message} so that it cannot be "
        "found in what is rendered; simplify the template or give plain text"
    )


def _variants(text: str) -> Iterator[tuple[int, str]]:
    """What templates make of a content, with the number of characters taken off its front."""
    for kept in (text, text.strip(), text.rstrip(), text.lstrip(), text.strip("\n"), text.lstrip("\n")):
        yield text.index(kept), kept


def _encode(
    tokenizer: Tokenizer, text: str, raw: bytes, encoding: tokenizers.Encoding, regions: list[_Region]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, byte spans [T, 2] and faithful of a rendered conversation.

    It is encoded as one text, so that markup and content merge as they do in use. Only a content
    that spells a special token is encoded by itself, as text.
    """
    whole = _placed(tokenizer, text, raw, encoding)
    special = tokenizer.token_bytes.lengths[whole[0]] == 0
    ends = whole[1][special, 1]  # a token without text of its own stands at the end of what it covers
    spelled = [r for r in regions if ((ends > r.start) & (ends <= r.end)).any()]
    if not spelled:
        return whole
    borders = [0, *(border for region in spelled for border in (region.start, region.end)), len(raw)]
    rows = []
    for place, (start, end) in enumerate(pairwise(borders)):
        backend = tokenizer.backend if place % 2 else tokenizer.markup_backend
        row = _encode_part(tokenizer, backend, raw[start:end].decode(), first=start == 0)
        rows.append((row[0], row[1] + start, row[2]))
    first, second, third = (np.concatenate(column) for column in zip(*rows, strict=True))
    return first, second, third


def _encode_part(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, part: str, *, first: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode a part of a text. Only the first one gets the blank that SentencePiece puts before a text."""
    if not first and part and tokenizer.token_bytes.kind == "sentencepiece":
        for context in ("\n", "a", "."):
            text = context + part
            encoding = backend.encode(text, add_special_tokens=False)
            ids, spans, faithful = _placed(tokenizer, text, text.encode(), encoding)
            kept = spans[:, 1] > 1
            if (spans[kept, 0] >= 1).all():
                return ids[kept], spans[kept] - 1, faithful[kept]
    encoding = backend.encode(part, add_special_tokens=False)
    return _placed(tokenizer, part, part.encode(), encoding)


def _placed(
    tokenizer: Tokenizer, text: str, raw: bytes, encoding: tokenizers.Encoding
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    starts, ends, faithful = by_characters(tokenizer, text, raw, encoding)
    return np.array(encoding.ids, np.int32), np.stack([starts, ends], axis=1), faithful


def _in_pieces(spans: np.ndarray, regions: list[_Region], pieces: list[_Piece]) -> tuple[np.ndarray, int]:
    """Spans within the pieces laid end to end, [0, 0] outside of them, and the pieces' total size."""
    # One unit apart, so that no two pieces share a boundary.
    bases = np.cumsum([0, *(len(piece.text.encode()) + 1 for piece in pieces)]).tolist()
    placed = np.zeros_like(spans)
    for region in regions:
        here = _inside(spans, region.start, region.end)
        skipped = len(pieces[region.piece].text[: region.skipped].encode())
        placed[here] = spans[here] - region.start + bases[region.piece] + skipped
    return placed, bases[-1]


def _inside(spans: np.ndarray, start: int, end: int) -> np.ndarray:
    """bool [T]: the tokens whose text lies between two places."""
    return (spans[:, 0] >= start) & (spans[:, 1] <= end) & (spans[:, 1] > spans[:, 0])


def _of_assistant(
    tokenizer: Tokenizer,
    template: str,
    text: str,
    row: tuple[np.ndarray, np.ndarray],
    regions: list[_Region],
    pieces: list[_Piece],
    conversation: Conversation,
    where: Callable[[], str],
) -> np.ndarray:
    """bool [T]: the tokens with a byte of what the assistant writes, the end of each turn included."""
    ids, spans = row
    raw = text.encode()
    learnt = np.zeros(len(ids), bool)
    for m, message in enumerate(conversation):
        own = [region for region in regions if pieces[region.piece].message == m]
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        if not (own or message.get("tool_calls")):
            continue
        start = _turn_start(tokenizer, template, conversation[:m], raw, own, message, where)
        if start is None:
            raise _lost(tokenizer, where, m)
        end = _turn_end(tokenizer, ids, spans, raw, own[-1].end if own else start, message)
        if end is None:
            shorter = _rendered_or_none(tokenizer, template, conversation[: m + 1], where)
            whole = (shorter or "").rstrip().encode()
            end = len(whole) if whole and raw.startswith(whole) else own[-1].end if own else None
        if end is None:
            raise _lost(tokenizer, where, m)
        learnt |= (spans[:, 1] > start) & (spans[:, 0] < end) & (spans[:, 1] > spans[:, 0])
        learnt |= (spans[:, 1] == spans[:, 0]) & (spans[:, 1] > start) & (spans[:, 1] <= end)
    return learnt


def _rendered_or_none(
    tokenizer: Tokenizer, template: str, messages: Conversation, where: Callable[[], str], **more: bool
) -> str | None:
    """The rendering, None where the template refuses so few messages."""
    try:
        return render(tokenizer, template, messages, where, **more) if messages else None
    except UserError:
        return None


def _turn_start(
    tokenizer: Tokenizer,
    template: str,
    before: Conversation,
    raw: bytes,
    own: list[_Region],
    message: dict[str, Any],
    where: Callable[[], str],
) -> int | None:
    """Where the prompt for an answer ends; where that is not in the row, where the first piece begins."""
    prompt = _rendered_or_none(tokenizer, template, before, where, answer=True)
    if prompt and raw.startswith(prompt.encode()) and (not own or len(prompt.encode()) <= own[0].start):
        plain = _rendered_or_none(tokenizer, template, before, where)
        # A template without a generation prompt says nothing about where the answer begins.
        if plain != prompt or not own:
            return len(prompt.encode())
    if not own:
        return None
    return _opening((message.get("content") or "").encode(), raw, own[0].start)


def _turn_end(
    tokenizer: Tokenizer,
    ids: np.ndarray,
    spans: np.ndarray,
    raw: bytes,
    after: int,
    message: dict[str, Any],
) -> int | None:
    """Where the marker ends that follows the last content, or the tool calls after it."""
    ends = {tokenizer.roles[r] for r in ("eos", "turn_end", "document_end") if r in tokenizer.roles}
    for i in np.flatnonzero(spans[:, 1] > after).tolist():
        token = int(ids[i])
        if token in ends or (token in tokenizer.token_bytes.special and not message.get("tool_calls")):
            return int(spans[i, 1])
        if not message.get("tool_calls") and raw[max(after, int(spans[i, 0])) : int(spans[i, 1])].strip():
            return None
    return None


def _opening(content: bytes, raw: bytes, start: int) -> int:
    """Where the assistant's content begins: with what stands in front of its first piece, a `<think>`."""
    parts = _parts(content.decode())
    first = next((i for i in range(1, len(parts), 2) if parts[i]), 0)
    opening = "".join(parts[:first]).lstrip().encode()
    return start - len(opening) if opening and raw.endswith(opening, 0, start) else start
