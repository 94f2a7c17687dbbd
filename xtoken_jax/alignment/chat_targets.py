"""Targets of conversations: the tokens with a byte of what the assistant has to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xtoken_jax.alignment.chat_pieces import Piece, Region, lost, parts_of
from xtoken_jax.alignment.locate import byte_offsets
from xtoken_jax.alignment.render import (
    Conversation,
    has_generation,
    reasoning_key,
    render,
    render_generated,
)
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import Tokenizer


def targets_of(
    tokenizer: Tokenizer,
    template: str,
    text: str,
    row: tuple[np.ndarray, np.ndarray],
    regions: list[Region],
    pieces: list[Piece],
    conversation: Conversation,
    where: Callable[[], str],
) -> np.ndarray:
    """bool [T]: the tokens with a byte of what the assistant writes, the end of each turn included."""
    ids, spans = row
    if has_generation(template):
        return _overlapping(spans, _generated(tokenizer, template, text, conversation, where))
    raw = text.encode()
    written = []
    for m, message in enumerate(conversation):
        own = [region for region in regions if pieces[region.piece].message == m]
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        if not (own or message.get("tool_calls")):
            continue
        start = _turn_start(tokenizer, template, conversation[:m], raw, own, message, where)
        if start is None:
            raise lost(tokenizer, where, m)
        end = _turn_end(tokenizer, ids, spans, raw, own[-1].end if own else start, message)
        if end is None:
            shorter = _rendered_or_none(tokenizer, template, conversation[: m + 1], where)
            whole = (shorter or "").rstrip().encode()
            end = len(whole) if whole and raw.startswith(whole) else own[-1].end if own else None
        if end is None:
            raise lost(tokenizer, where, m)
        written.append((start, end))
    return _overlapping(spans, written)


def _overlapping(spans: np.ndarray, written: list[tuple[int, int]]) -> np.ndarray:
    """bool [T]: the tokens with a byte in one of the ranges; without text, they stand at their span's end."""
    learnt = np.zeros(len(spans), bool)
    for start, end in written:
        learnt |= (spans[:, 1] > start) & (spans[:, 0] < end) & (spans[:, 1] > spans[:, 0])
        learnt |= (spans[:, 1] == spans[:, 0]) & (spans[:, 1] > start) & (spans[:, 1] <= end)
    return learnt


def _generated(
    tokenizer: Tokenizer, template: str, text: str, conversation: Conversation, where: Callable[[], str]
) -> list[tuple[int, int]]:
    """Byte ranges of the template's `{% generation %}` blocks, but for turns that are no target."""
    rendered, ranges = render_generated(tokenizer, template, conversation, where)
    weights = [message.get("weight") for message in conversation if message["role"] == "assistant"]
    if rendered != text or (0 in weights and len(ranges) != len(weights)):
        raise UserError(
            f"{where()}: the chat template of {tokenizer.name} has {len(ranges)} generation blocks for "
            f"{len(weights)} turns of the assistant, so those marked as no target cannot be found; leave the "
            "marks out or name a template with a block for each turn"
        )
    offset = byte_offsets(text)
    kept = [r for r, weight in zip(ranges, weights, strict=True) if weight != 0] if 0 in weights else ranges
    return [(int(offset[start]), int(offset[end])) for start, end in kept]


def refuse_what_is_left_out(
    tokenizer: Tokenizer,
    template: str,
    text: str,
    conversation: Conversation,
    found: set[str],
    where: Callable[[], str],
) -> None:
    """Refuse a conversation of which a template leaves out the functions, a call or the last reasoning.

    Templates drop the reasoning of turns before the last user's message on purpose. Nothing else may be
    missing.

    Args:
        tokenizer, template: of one side.
        text: the rendered conversation.
        conversation: its messages.
        found: the texts of the pieces that stand in `text`.
        where: describes the conversation in errors.

    Raises:
        UserError: what is left out, and what to do.
    """

    def without(key: str, at: int) -> Conversation:
        return [
            {k: v for k, v in message.items() if k != key} if m == at else message
            for m, message in enumerate(conversation)
        ]

    refused = f"{where()}: the chat template of {tokenizer.name}"
    remedy = "name another template with student.chat_template or teacher.chat_template"

    def is_ignored(key: str, at: int) -> bool:
        if not conversation[at].get(key):
            return False
        return _rendered_or_none(tokenizer, template, without(key, at), where) == text

    if conversation and is_ignored("tools", 0):
        raise UserError(f"{refused} leaves out the record's tools; {remedy}, or remove the tools")
    last_user = max((m for m, message in enumerate(conversation) if message["role"] == "user"), default=-1)
    for m, message in enumerate(conversation):
        if is_ignored("tool_calls", m):
            raise UserError(f"{refused} leaves out the tool_calls of message {m}; {remedy}")
        key = reasoning_key(message)
        if key and m > last_user and message[key].strip() not in found:
            raise UserError(
                f"{refused} leaves out {key!r} of message {m}; {remedy}, or write it into the content as "
                "<think>...</think>"
            )


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
    own: list[Region],
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
    parts = parts_of(content.decode())
    first = next((i for i in range(1, len(parts), 2) if parts[i]), 0)
    opening = "".join(parts[:first]).lstrip().encode()
    return start - len(opening) if opening and raw.endswith(opening, 0, start) else start
