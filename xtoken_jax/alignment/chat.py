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
from xtoken_jax.alignment.spans import Spans, align_located
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.auto_tokenizer import quiet_import
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

Conversation = Sequence[dict[str, Any]]

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
        found += [_Piece(m, part) for part in _parts(content or "")[1::2] if part]
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
            else _of_assistant(tokenizer, row[0], row[1], raw, regions, pieces[b], conversation)
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


@functools.cache
def _renderer() -> Callable[..., Any]:
    with quiet_import():
        from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template


def render(
    tokenizer: Tokenizer,
    template: str,
    conversation: Conversation,
    where: Callable[[], str],
    *,
    answer: bool = False,
) -> str:
    """A conversation in a chat template, as transformers renders it; UserError if the template refuses it.

    `where` says what the user finds it by. With `answer` it ends where the assistant's next turn begins.
    """
    names: dict[str, Any] = {
        f"{role}_token": tokenizer.backend.id_to_token(tokenizer.roles[role])
        for role in ("bos", "eos", "pad", "unk")
        if role in tokenizer.roles
    }
    try:
        rendered = _renderer()(
            conversations=[list(conversation)], chat_template=template, add_generation_prompt=answer, **names
        )
    # a template raises what it likes
    except Exception as error:
        raise UserError(f"{where()}: the chat template of {tokenizer.name} refuses it: {error}") from error
    return rendered[0][0]


def _regions(
    tokenizer: Tokenizer,
    template: str,
    conversation: Conversation,
    pieces: list[_Piece],
    text: str,
    where: Callable[[], str],
) -> list[_Region]:
    """Where the pieces stand in the rendered text: rendered once more with places in their stead."""
    said = set().union(*(message.get("content") or "" for message in conversation))
    mark = next(chr(point) for point in _MARKS if chr(point) not in said)
    number = iter(range(len(pieces)))
    marked = []
    for message in conversation:
        parts = _parts(message.get("content") or "")
        parts[1::2] = [f"{mark}{next(number)}{mark}" if piece else "" for piece in parts[1::2]]
        marked.append({**message, "content": "".join(parts)} if message.get("content") else message)
    markup = re.split(f"{mark}([0-9]+){mark}", render(tokenizer, template, marked, where))
    regions: list[_Region] = []
    at = len(markup[0])
    if not text.startswith(markup[0]):
        raise _lost(tokenizer, where, 0)
    for piece, after in zip(map(int, markup[1::2]), markup[2::2], strict=True):
        for skipped, kept in _variants(pieces[piece].text):
            end = at + len(kept)
            if text.startswith(kept, at) and (text.startswith(after, end) if after else True):
                # Each piece once and in order: what a template repeats or moves is markup.
                if not regions or piece > regions[-1].piece:
                    regions.append(_Region(piece, at, end, skipped))
                break
        else:
            end = text.find(after, at) if after else -1
            if end < 0:
                raise _lost(tokenizer, where, pieces[piece].message)
        at = end + len(after)
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

    It is encoded as one text, so that markup and content merge as they do in use. A content that
    spells a special token is the exception: there each content is encoded by itself, as text.
    """
    whole = _placed(tokenizer, text, raw, encoding)
    special = tokenizer.token_bytes.lengths[whole[0]] == 0
    ends = whole[1][special, 1]  # a token without text of its own stands at the end of what it covers
    if not any(((ends > region.start) & (ends <= region.end)).any() for region in regions):
        return whole
    borders = [0, *(border for region in regions for border in (region.start, region.end)), len(raw)]
    rows = []
    for place, (start, end) in enumerate(pairwise(borders)):
        part = raw[start:end].decode()
        backend = tokenizer.backend if place % 2 else tokenizer.markup_backend
        row = _placed(tokenizer, part, raw[start:end], backend.encode(part, add_special_tokens=False))
        rows.append((row[0], row[1] + start, row[2]))
    first, second, third = (np.concatenate(column) for column in zip(*rows, strict=True))
    return first, second, third


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
    ids: np.ndarray,
    spans: np.ndarray,
    raw: bytes,
    regions: list[_Region],
    pieces: list[_Piece],
    conversation: Conversation,
) -> np.ndarray:
    """bool [T]: the tokens of the assistant's contents, and the special token that ends each turn."""
    learnt = np.zeros(len(ids), bool)
    for m, message in enumerate(conversation):
        own = [region for region in regions if pieces[region.piece].message == m]
        if message["role"] != "assistant" or message.get("weight") == 0 or not own:
            continue
        start = _opening(message["content"].encode(), raw, own[0].start)
        here = np.flatnonzero(_inside(spans, start, own[-1].end))
        learnt[here] = True
        behind = int(here[-1]) + 1 if len(here) else len(ids)
        if behind < len(ids) and int(ids[behind]) in tokenizer.token_bytes.special:
            learnt[behind] = True
    return learnt


def _opening(content: bytes, raw: bytes, start: int) -> int:
    """Where the assistant's content begins: with what stands in front of its first piece, a `<think>`."""
    parts = _parts(content.decode())
    first = next(i for i in range(1, len(parts), 2) if parts[i])
    opening = "".join(parts[:first]).lstrip().encode()
    return start - len(opening) if opening and raw.endswith(opening, 0, start) else start
