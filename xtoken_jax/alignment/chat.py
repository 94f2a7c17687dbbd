"""Conversations: each side renders its own chat template, and the contents of the messages are aligned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xtoken_jax.alignment.locate import Located, by_characters, to_bytes
from xtoken_jax.alignment.spans import Spans, align_located
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.auto_tokenizer import quiet_import
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

Conversation = Sequence[dict[str, Any]]

# A template may take a message apart at its thinking, keep it, or drop it from earlier turns.
_THINKING = re.compile(r"(\s*</?think>\s*)")
# What stands for piece i of the contents when it is looked up where a template puts it; private-use
# characters, which no template strips.
_PLACE = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class _Piece:
    """A part of a message's content that templates keep or drop as a whole."""

    message: int
    text: str


@dataclass(frozen=True)
class _Region:
    """Where a piece stands in a rendered conversation, in characters, and how much of it was stripped."""

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
            that ends its turn, or "all".
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
    if targets not in ("assistant", "all"):
        raise ValueError(f"targets={targets!r}: must be 'assistant' or 'all'")
    conversations = [list(conversation) for conversation in conversations]
    pieces = [_pieces(conversation, b) for b, conversation in enumerate(conversations)]
    sides, wanted = [], []
    for tokenizer, template in ((pair.student, student_template), (pair.teacher, teacher_template)):
        side, learnt = _locate(tokenizer, template or tokenizer.chat_template, conversations, pieces, targets)
        sides.append(side)
        wanted.append(learnt)
    rows = []
    for b, spans in enumerate(align_located(pair, *sides)):
        parts = [learnt[s.offsets[b] : s.offsets[b + 1]] for s, learnt in zip(sides, wanted, strict=True)]
        student, teacher = replace(spans.student, targets=parts[0]), replace(spans.teacher, targets=parts[1])
        rows.append(replace(spans, student=student, teacher=teacher))
    return rows


def _pieces(conversation: Conversation, place: int) -> list[_Piece]:
    found = []
    for m, message in enumerate(conversation):
        where = f"conversation {place}, message {m}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}: not an object with a 'role' and a 'content' ({message!r:.80})")
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise UserError(f"{where}: its content is no text ({content!r:.80})")
        if "\ue000" in (content or ""):
            raise UserError(f"{where}: U+E000 is used to find messages in a template; leave it out")
        found += [_Piece(m, part) for part in _THINKING.split(content or "")[::2] if part.strip()]
    return found


def _locate(
    tokenizer: Tokenizer,
    template: str | None,
    conversations: Sequence[Conversation],
    pieces: Sequence[list[_Piece]],
    targets: str,
) -> tuple[Located, np.ndarray]:
    """The tokens of the rendered conversations, placed in the joined pieces, and bool [N], the targets."""
    if template is None:
        raise UserError(
            f"{tokenizer.name}: no chat template; give one (chat_template.jinja in its folder), or plain text"
        )
    ids, spans, faithful, learnt = [], [], [], []
    sizes: list[int] = []
    for b, conversation in enumerate(conversations):
        where = f"conversation {b}"
        text = render(tokenizer, template, conversation, where)
        regions = _regions(tokenizer, template, conversation, pieces[b], text, where)
        row = _encode(tokenizer, text, regions)
        ids.append(row[0])
        faithful.append(row[2])
        place, size = _in_pieces(row[1], text, regions, pieces[b])
        spans.append(place + sum(sizes))
        learnt.append(
            np.ones(len(row[0]), bool)
            if targets == "all"
            else _of_assistant(tokenizer, row[0], row[1], text, regions, pieces[b], conversation)
        )
        sizes.append(size)
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
        np.concatenate([[0], np.cumsum(np.array(sizes, np.int64))]),
    )
    return located, np.concatenate(learnt or [never])


def render(tokenizer: Tokenizer, template: str, conversation: Conversation, where: str) -> str:
    """A conversation in a chat template, as transformers renders it; UserError if the template refuses it."""
    with quiet_import():
        from transformers.utils.chat_template_utils import render_jinja_template

    names: dict[str, Any] = {
        f"{role}_token": tokenizer.backend.id_to_token(tokenizer.roles[role])
        for role in ("bos", "eos", "pad", "unk")
        if role in tokenizer.roles
    }
    try:
        rendered = render_jinja_template(conversations=[list(conversation)], chat_template=template, **names)
    # a template raises what it likes
    except Exception as error:
        raise UserError(f"{where}: the chat template of {tokenizer.name} refuses it: {error}") from error
    return rendered[0][0]


def _regions(
    tokenizer: Tokenizer,
    template: str,
    conversation: Conversation,
    pieces: list[_Piece],
    text: str,
    where: str,
) -> list[_Region]:
    """Where the pieces stand in the rendered text: rendered once more with places in their stead."""
    number = iter(range(len(pieces)))
    marked = []
    for message in conversation:
        parts = _THINKING.split(message.get("content") or "")
        parts[::2] = [f"\ue000{next(number)}\ue001" if part.strip() else part for part in parts[::2]]
        marked.append({**message, "content": "".join(parts)} if message.get("content") else message)
    markup = _PLACE.split(render(tokenizer, template, marked, where))
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


def _lost(tokenizer: Tokenizer, where: str, message: int) -> UserError:
    return UserError(
        f"{where}: the chat template of {tokenizer.name} changes message {message} so that it cannot be "
        "found in what is rendered; simplify the template or give plain text"
    )


def _variants(text: str) -> Iterator[tuple[int, str]]:
    """What templates make of a content, with the number of characters taken off its front."""
    for kept in (text, text.strip(), text.rstrip(), text.lstrip(), text.strip("\n"), text.lstrip("\n")):
        yield text.index(kept), kept


def _encode(
    tokenizer: Tokenizer, text: str, regions: list[_Region]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, byte spans [T, 2] and faithful of a rendered conversation.

    It is encoded as one text, so that markup and content merge as they do in use. A content that
    spells a special token is the exception: there each content is encoded by itself, as text.
    """
    whole = _encoded(tokenizer, text, markup=True)
    special = np.isin(whole[0], list(tokenizer.token_bytes.special))
    offset = _byte_offsets(text)
    inside = np.zeros(len(whole[0]), bool)
    for region in regions:
        # A token without text of its own keeps its place as start = end, behind what it covers.
        inside |= (whole[1][:, 1] > offset[region.start]) & (whole[1][:, 1] <= offset[region.end])
    if not (special & inside).any():
        return whole
    parts, at = [], 0
    for region in regions:
        parts += [(at, text[at : region.start], True), (region.start, text[region.start : region.end], False)]
        at = region.end
    parts.append((at, text[at:], True))
    rows = [(offset[start], _encoded(tokenizer, part, markup=markup)) for start, part, markup in parts]
    return (
        np.concatenate([row[0] for _, row in rows]),
        np.concatenate([row[1] + start for start, row in rows]),
        np.concatenate([row[2] for _, row in rows]),
    )


def _encoded(tokenizer: Tokenizer, text: str, *, markup: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    (raw,) = to_bytes([text])
    backend = tokenizer.markup_backend if markup else tokenizer.backend
    encoding = backend.encode(text, add_special_tokens=False)
    starts, ends, faithful = by_characters(tokenizer, text, raw, encoding)
    return np.array(encoding.ids, np.int32), np.stack([starts, ends], axis=1), faithful


def _byte_offsets(text: str) -> list[int]:
    """Where each character of a text begins in its bytes, and its end."""
    return np.cumsum([0, *(len(c.encode()) for c in text)]).tolist()


def _in_pieces(
    spans: np.ndarray, text: str, regions: list[_Region], pieces: list[_Piece]
) -> tuple[np.ndarray, int]:
    """Spans within the pieces laid end to end, [0, 0] outside of them, and the pieces' total size."""
    offset = _byte_offsets(text)
    # One unit apart, so that no two pieces share a boundary.
    bases = np.cumsum([0, *(len(piece.text.encode()) + 1 for piece in pieces)]).tolist()
    placed = np.zeros_like(spans)
    for region in regions:
        start, end = offset[region.start], offset[region.end]
        here = (spans[:, 0] >= start) & (spans[:, 1] <= end) & (spans[:, 1] > spans[:, 0])
        skipped = len(pieces[region.piece].text[: region.skipped].encode())
        placed[here] = spans[here] - start + bases[region.piece] + skipped
    return placed, bases[-1]


def _of_assistant(
    tokenizer: Tokenizer,
    ids: np.ndarray,
    spans: np.ndarray,
    text: str,
    regions: list[_Region],
    pieces: list[_Piece],
    conversation: Conversation,
) -> np.ndarray:
    """bool [T]: the tokens of the assistant's contents, and the special token that ends each turn."""
    offset = _byte_offsets(text)
    learnt = np.zeros(len(ids), bool)
    for m, message in enumerate(conversation):
        own = [region for region in regions if pieces[region.piece].message == m]
        if message["role"] != "assistant" or not own:
            continue
        start, end = offset[_opening(message["content"], text, own[0].start)], offset[own[-1].end]
        here = np.flatnonzero((spans[:, 0] >= start) & (spans[:, 1] <= end) & (spans[:, 1] > spans[:, 0]))
        learnt[here] = True
        behind = int(here[-1]) + 1 if len(here) else len(ids)
        if behind < len(ids) and int(ids[behind]) in tokenizer.token_bytes.special:
            learnt[behind] = True
    return learnt


def _opening(content: str, text: str, start: int) -> int:
    """Where the assistant's content begins: with what stands in front of its first piece, a `<think>`."""
    before = _THINKING.split(content)[:2]
    opening = "".join(before).lstrip() if not before[0].strip() else ""
    return start - len(opening) if opening and text.endswith(opening, 0, start) else start
