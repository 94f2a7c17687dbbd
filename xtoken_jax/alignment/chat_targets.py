"""Targets of conversations: the tokens with a byte of what the assistant has to write."""

from __future__ import annotations

import numpy as np

from xtoken_jax.alignment.chat_pieces import Kind
from xtoken_jax.alignment.chat_turns import Markers, Rendered, turns_of
from xtoken_jax.alignment.locate import byte_offsets
from xtoken_jax.alignment.render import has_generation, reasoning_key, render, render_generated
from xtoken_jax.errors import UserError


def targets_of(chat: Rendered, markers: Markers) -> tuple[np.ndarray, int]:
    """Return the tokens with a byte of what the assistant writes, the end of each turn included.

    Returns:
        bool [T], and the number of turns whose last target is no control token: a model does not learn to
        stop there.

    Raises:
        UserError: a turn that cannot be found.
    """
    ranges = _generated(chat) if has_generation(chat.template) else turns_of(chat, markers)
    learnt = np.zeros(len(chat.ids), bool)
    endless = 0
    for start, end in ranges:
        here = _overlapping(chat.spans, start, end)
        learnt[here] = True
        last = chat.ids[here][-1:].tolist()
        endless += bool(last) and last[0] not in markers.control
    return learnt, endless


def _overlapping(spans: np.ndarray, start: int, end: int) -> np.ndarray:
    """Numbers of the tokens with a byte in a range; without text, they stand at their span's end."""
    first = int(np.searchsorted(spans[:, 1], start, side="right"))
    last = int(np.searchsorted(spans[:, 0], end, side="right"))
    starts, ends = spans[first:last].T
    return first + np.flatnonzero((starts < end) | (ends == starts))


def _generated(chat: Rendered) -> list[tuple[int, int]]:
    """Byte ranges of the template's `{% generation %}` blocks, except those of turns that are no target."""
    text, ranges = render_generated(chat.tokenizer, chat.template, chat.conversation, chat.where)
    weights = [message.get("weight") for message in chat.conversation if message["role"] == "assistant"]
    if text.encode() != chat.raw or (0 in weights and len(ranges) != len(weights)):
        raise UserError(
            f"{chat.where()}: the chat template of {chat.tokenizer.name} has {len(ranges)} generation blocks "
            f"for {len(weights)} turns of the assistant, so those marked as no target cannot be found; leave "
            "the marks out or name a template with a block for each turn"
        )
    offset = byte_offsets(text)
    kept = [r for r, weight in zip(ranges, weights, strict=True) if weight != 0] if 0 in weights else ranges
    return [(int(offset[start]), int(offset[end])) for start, end in kept]


def refuse_what_is_left_out(chat: Rendered) -> None:
    """Refuse a conversation whose tools, messages, calls or last reasoning a template leaves out.

    Templates drop the reasoning of turns before the last user's message on purpose. Nothing else may be
    missing.

    Raises:
        UserError: what is left out, and what to do.
    """
    refused = f"{chat.where()}: the chat template of {chat.tokenizer.name}"
    remedy = "name another template with student.chat_template or teacher.chat_template"
    conversation = chat.conversation
    if conversation and conversation[0].get("tools"):
        without = [{k: v for k, v in message.items() if k != "tools"} for message in conversation]
        if render(chat.tokenizer, chat.template, without, chat.where).encode() == chat.raw:
            raise UserError(f"{refused} leaves out the record's tools; {remedy}, or remove the tools")
    last_user = max((m for m, message in enumerate(conversation) if message["role"] == "user"), default=-1)
    present = {region.piece for region in chat.regions}
    for number, piece in enumerate(chat.pieces):
        if number in present or piece.kind == Kind.ARGUMENTS:
            continue
        m, message = piece.message, conversation[piece.message]
        if piece.kind == Kind.NAME:
            raise UserError(f"{refused} leaves out the tool_calls of message {m}; {remedy}")
        if piece.kind == Kind.TEXT:
            raise UserError(
                f"{refused} leaves out or moves message {m}, of the role {message['role']!r}; {remedy}"
            )
        if m > last_user and message["role"] == "assistant":
            key = reasoning_key(message)
            raise UserError(
                f"{refused} leaves out {repr(key) if key else 'the thinking'} of message {m}; {remedy}"
                + (", or write it into the content as <think>...</think>" if key else "")
            )
