"""Conversations: each side renders its own chat template, and the contents of the messages are aligned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import tokenizers

from xtoken_jax.alignment.chat_borders import Border, bases_of, borders_of, in_pieces, join_borders
from xtoken_jax.alignment.chat_pieces import Piece, Region, in_bytes, pieces_of, regions_of
from xtoken_jax.alignment.chat_targets import refuse_what_is_left_out, targets_of
from xtoken_jax.alignment.chat_turns import Markers, Rendered
from xtoken_jax.alignment.locate import Located, by_characters, byte_offsets, to_bytes
from xtoken_jax.alignment.render import Conversation, render
from xtoken_jax.alignment.spans import Spans, align_located
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.arguments import check_list, check_pair
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair


def align_chats(
    pair: TokenizerPair,
    conversations: Sequence[Conversation],
    *,
    targets: str = "assistant",
    student_template: str | None = None,
    teacher_template: str | None = None,
) -> list[Spans]:
    """Render, encode and align conversations.

    The contents of the messages, and the names and JSON arguments of calls, are aligned where both
    templates write the same bytes; a template's markup, the end of a turn included, is in no chunk. A
    token that joins a content with the template is in a chunk where both sides join it with the same
    bytes. What a message says is text, also where it spells a special token. A content that one side's
    template leaves out (the thinking of earlier turns) is in no chunk on the other. `{% generation %}`
    blocks of a template, where it has them, decide what the targets are; else an assistant's turn begins
    after the template's generation prompt and ends with the marker after its content or calls.

    Args:
        pair: student's and teacher's tokenizer.
        conversations: B lists of messages, {"role": "user", "content": "..."} and whatever else
            the templates read. A content is a text; where it is None, the message is all markup.
        targets: what is to be learnt: "assistant", the contents of the assistant and the marker
            that ends its turn, thinking and tool calls, or "all". A message of the assistant with
            "weight": 0 is no target.
        student_template, teacher_template: Jinja source in place of the tokenizer's own; a base
            model has none.

    Returns:
        One Spans a conversation. BOS is what the template makes of it; nothing is added. `to_batch`
        makes ids, masks, targets and the alignment of them.

    Raises:
        UserError: no chat template; a template that refuses the conversation, exceeds the limits of a
            rendering, changes a message beyond recognition or leaves out tools, a message, a tool call or
            the last reasoning;
            a message without role; a content that is no text.

    Example:
        rows = align_chats(pair, [[{"role": "user", "content": "12 + 189?"},
                                   {"role": "assistant", "content": "201"}]])
        batch = to_batch(pair, rows, student_length=64, teacher_length=64)
    """
    check_pair(pair)
    conversations = check_list("conversations", conversations, (list, tuple), "list of messages")
    pair = TokenizerPair(
        _with_template(pair.student, student_template, "student_template"),
        _with_template(pair.teacher, teacher_template, "teacher_template"),
    )
    return [row for (row,) in align_chats_together([pair], conversations, targets=targets)]


def _with_template(tokenizer: Tokenizer, template: str | None, argument: str) -> Tokenizer:
    if not template:
        return tokenizer
    changed = replace(tokenizer, chat_template=template, template_file=argument)
    # Building this backend again takes seconds for a large vocabulary.
    vars(changed)["markup_backend"] = tokenizer.markup_backend
    return changed


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
    pieces = [pieces_of(conversation, b, where) for b, conversation in enumerate(conversations)]
    student = _locate(pairs[0].student, conversations, pieces, targets, where)
    by_pair = []
    for pair in pairs:
        teacher = _locate(pair.teacher, conversations, pieces, targets, where)
        located = join_borders(student.located, teacher.located, student.borders, teacher.borders)
        rows = []
        for b, spans in enumerate(align_located(pair, *located)):
            own, other = (
                replace(tokens, targets=side.targets[b], endless=side.endless[b])
                for side, tokens in ((student, spans.student), (teacher, spans.teacher))
            )
            rows.append(replace(spans, student=own, teacher=other))
        by_pair.append(rows)
    return list(zip(*by_pair, strict=True))


@dataclass(frozen=True)
class _Chats:
    """Rendered conversations of one side: their tokens, placed in the joined pieces.

    Attributes:
        located: the tokens.
        borders: conversation and piece -> the tokens that join the piece with the template.
        targets: bool [T] for each conversation.
        endless: turns that end without a control token, for each conversation.
    """

    located: Located
    borders: dict[tuple[int, int], Border]
    targets: list[np.ndarray]
    endless: list[int]


def _locate(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    pieces: Sequence[list[Piece]],
    targets: str,
    where: Callable[[int], str],
) -> _Chats:
    """Render, encode and place conversations with one tokenizer."""
    template = tokenizer.chat_template
    if template is None:
        raise UserError(
            f"{tokenizer.name}: no chat template for conversations; put a chat_template.jinja into its "
            "folder, or name such a file with student.chat_template or teacher.chat_template"
        )
    ids, spans, faithful, learnt, endless, text_starts = [], [], [], [], [], [0]
    borders: dict[tuple[int, int], Border] = {}
    first = 0
    texts = [render(tokenizer, template, c, functools.partial(where, b)) for b, c in enumerate(conversations)]
    raws = to_bytes(texts)
    encodings = tokenizer.markup_backend.encode_batch(texts, add_special_tokens=False) if texts else []
    markers = Markers.of(tokenizer)
    for b, (conversation, text, raw, encoding) in enumerate(
        zip(conversations, texts, raws, encodings, strict=True)
    ):
        place = functools.partial(where, b)
        offset = byte_offsets(text)
        regions = [
            in_bytes(region, offset, pieces[b])
            for region in regions_of(tokenizer, template, conversation, pieces[b], text, place)
        ]
        row = _encode(tokenizer, text, raw, encoding, regions)
        chat = Rendered(tokenizer, template, conversation, pieces[b], raw, regions, row[0], row[1], place)
        refuse_what_is_left_out(chat)
        ids.append(row[0])
        faithful.append(row[2])
        bases = bases_of(pieces[b])
        placed = in_pieces(row[1], regions, bases)
        for piece, border in borders_of(raw, row[1], row[2], regions, bases).items():
            borders[b, piece] = border.moved(first, text_starts[-1])
        spans.append(placed + text_starts[-1])
        text_starts.append(text_starts[-1] + bases[-1])
        first += len(row[0])
        found = (np.ones(len(row[0]), bool), 0) if targets == "all" else targets_of(chat, markers)
        learnt.append(found[0])
        endless.append(found[1])
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
    return _Chats(located, borders, learnt, endless)


def _encode(
    tokenizer: Tokenizer, text: str, raw: bytes, encoding: tokenizers.Encoding, regions: list[Region]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, byte spans [T, 2] and faithful of a rendered conversation.

    It is encoded as one text: markup and content merge as they do in use. Only a content
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
