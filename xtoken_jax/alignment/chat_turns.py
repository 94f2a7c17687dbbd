"""Turns of the assistant in a rendered conversation: where each begins and ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from xtoken_jax.alignment.chat_pieces import Kind, Piece, Region, lost, markup_of, parts_of
from xtoken_jax.alignment.render import Conversation, render
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.roles import TURN_ENDS, TURN_MARKERS
from xtoken_jax.tokens.tokenizer import Tokenizer

_ENDS = (*TURN_ENDS, "<|call|>", "<|eom_id|>", "<|return|>", "<|END_OF_TURN_TOKEN|>", "<|eom|>", "<turn|>")
_END_ROLES = ("eos", "turn_end", "document_end")
# Markers inside a turn: the turn is not over there.
_INSIDE_ROLES = (
    "think_open", "think_close", "tool_calls_open", "tool_calls_close", "tool_call_open", "tool_call_close",
)  # fmt: skip
_ATTEMPTS = 3  # prefixes of a conversation that are tried for the generation prompt


@dataclass(frozen=True)
class Markers:
    """Ids of a tokenizer's control tokens, by what they mean after the content of a turn.

    Attributes:
        control: special tokens and the known markers of turns, except those inside a turn. Other added
            tokens, such as Gemma's line ends and tags of HTML, are text.
        ends: those that end a turn or a text.
        inside: markers of thinking and calls.
    """

    control: frozenset[int]
    ends: frozenset[int]
    inside: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Markers:
        """The markers of one tokenizer."""
        id_of = tokenizer.backend.token_to_id
        spelled, turns = (
            {token for token in map(id_of, texts) if token is not None} for texts in (_ENDS, TURN_MARKERS)
        )
        roles = tokenizer.roles
        inside = frozenset(roles[role] for role in _INSIDE_ROLES if role in roles)
        ends = frozenset(spelled | {roles[role] for role in _END_ROLES if role in roles}) - inside
        return cls((tokenizer.token_bytes.special | turns | ends) - inside, ends, inside)


@dataclass(frozen=True)
class Rendered:
    """A conversation as one side renders and encodes it.

    Attributes:
        tokenizer, template: of the side.
        conversation, pieces: messages, and the pieces of all.
        raw: UTF-8 of the rendered text.
        regions: where the pieces stand in `raw`, rising.
        ids: int32 [T].
        spans: int64 [T, 2], start and end of each token in `raw`.
        where: describes the conversation in errors.
    """

    tokenizer: Tokenizer
    template: str
    conversation: Conversation
    pieces: list[Piece]
    raw: bytes
    regions: list[Region]
    ids: np.ndarray
    spans: np.ndarray
    where: Callable[[], str]

    def markup(self, messages: int, *, answer: bool = False) -> list[str]:
        """`markup_of` the first messages; [] where the template refuses them."""
        try:
            return markup_of(
                self.tokenizer,
                self.template,
                self.conversation[:messages],
                self.pieces,
                self.where,
                answer=answer,
            )
        except UserError:
            return []


@dataclass(frozen=True)
class _Turn:
    """One turn of the assistant: its message, its regions, and where those before and after end and begin."""

    message: int
    regions: list[Region]
    before: int
    following: int


def turns_of(chat: Rendered, markers: Markers) -> list[tuple[int, int]]:
    """Byte ranges of what the assistant has to write: one for each turn with something in it.

    A turn begins after the template's generation prompt. What the template puts between that prompt and the
    content, such as an empty `<think>` block or the name of a channel, the model has to write. The turn ends
    with the marker that follows the content or the calls; where the next turn's marker follows at once, that
    one ends it.

    The rendered text is searched, and the template asked again only where that leaves doubt: a conversation
    takes a number of renderings that does not grow with its turns, for templates that render all turns alike.

    Raises:
        UserError: a turn of calls whose beginning cannot be found.
    """
    prompts = _generation_prompts(chat)
    openings: dict[tuple[bytes, int], int] = {}
    closings: dict[bytes, int] = {}
    ranges = []
    for turn in _turns(chat):
        gap = chat.raw[turn.before : turn.regions[0].start]
        key = gap, _content_opening(chat.conversation[turn.message].get("content") or "", gap)
        if key not in openings:
            openings[key] = _opening(chat, turn, *key, prompts)
        start = turn.regions[0].start - openings[key]
        end = _marked_end(chat, turn, markers)
        if end is None:
            base = _last_marked(chat, turn).end
            rest = chat.raw[base : turn.following]
            if rest not in closings:
                closings[rest] = _closing(chat, turn, rest)
            stop = max(turn.regions[-1].end, base + closings[rest])
            end = _next_marker(chat, markers, stop, turn.following) or stop
        ranges.append((start, end))
    return ranges


def _turns(chat: Rendered) -> Iterator[_Turn]:
    """The assistant's turns that are to be learnt and hold something."""
    messages = [chat.pieces[region.piece].message for region in chat.regions]
    for m, message in enumerate(chat.conversation):
        first, last = np.searchsorted(messages, [m, m + 1]).tolist()
        if message["role"] != "assistant" or message.get("weight") == 0 or first == last:
            continue
        before = chat.regions[first - 1].end if first else 0
        following = chat.regions[last].start if last < len(messages) else len(chat.raw)
        yield _Turn(m, chat.regions[first:last], before, following)


def _generation_prompts(chat: Rendered) -> list[bytes]:
    """What the template puts before an answer, also without the `<think>` that some templates add to it."""
    answers = [m for m, message in enumerate(chat.conversation) if m and message["role"] == "assistant"]
    for m in answers[:_ATTEMPTS]:
        try:
            plain, prompt = (
                render(chat.tokenizer, chat.template, chat.conversation[:m], chat.where, answer=answer)
                for answer in (False, True)
            )
        except UserError:
            continue
        if prompt.startswith(plain) and prompt != plain:
            whole = prompt[len(plain) :]
            return [part.encode() for part in dict.fromkeys([whole, whole.split("<think>")[0]]) if part]
    return []


def _opening(chat: Rendered, turn: _Turn, gap: bytes, of_content: int, prompts: list[bytes]) -> int:
    """How many bytes of the gap before a turn's first region belong to the turn; of the content at least."""
    for prompt in prompts:
        if gap.count(prompt) == 1:
            return len(gap) - gap.index(prompt) - len(prompt)
    # In doubt, the template is asked what an answer to the messages so far begins with.
    first = turn.regions[0]
    whole, before = chat.markup(turn.message + 1), chat.markup(turn.message, answer=bool(prompts))
    if before and before[:-1] == whole[: len(before) - 1] and len(whole) > len(before):
        text, number = whole[len(before) - 1 : len(before) + 1]
        head = text.removeprefix(before[-1]).encode()
        # A template without a generation prompt says nothing about where an answer begins, only a call.
        known = bool(prompts) or chat.pieces[first.piece].kind == Kind.NAME
        if known and int(number) == first.piece and text.startswith(before[-1]) and gap.endswith(head):
            return len(head)
    for prompt in prompts:
        if prompt in gap:
            return len(gap) - gap.rindex(prompt) - len(prompt)
    match chat.pieces[first.piece].kind:
        case Kind.NAME:
            raise lost(chat.tokenizer, chat.where, turn.message)
        case Kind.THINKING if marker := re.search(rb"<think>\s*\Z", gap):
            return len(gap) - marker.start()
        case _:
            return of_content


def _content_opening(content: str, gap: bytes) -> int:
    """The length of what stands in front of a content's first piece, such as an empty `<think>` block."""
    parts = parts_of(content)
    first = next((i for i in range(1, len(parts), 2) if parts[i]), 0)
    opening = "".join(parts[:first]).lstrip().encode()
    return len(opening) if gap.endswith(opening) else 0


def _marked_end(chat: Rendered, turn: _Turn, markers: Markers) -> int | None:
    """Where the marker ends that follows the last content, or the calls after it."""
    calls = bool(chat.conversation[turn.message].get("tool_calls"))
    after = turn.regions[-1].end
    for token, start, end in _tokens(chat, after, turn.following):
        if token in markers.ends or (token in markers.control and not calls):
            return end
        if token not in markers.inside and not calls and chat.raw[max(after, start) : end].strip():
            return None
    return None


def _next_marker(chat: Rendered, markers: Markers, after: int, limit: int) -> int | None:
    """Where the marker of the next turn ends, if nothing but blanks stands before it."""
    for token, start, end in _tokens(chat, after, limit):
        if token in markers.control:
            return end
        if chat.raw[max(after, start) : end].strip():
            return None
    return None


def _tokens(chat: Rendered, after: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """Id, start and end of the tokens that end after a place and begin before a limit."""
    first = int(np.searchsorted(chat.spans[:, 1], after, side="right"))
    for i in range(first, len(chat.ids)):
        start, end = chat.spans[i].tolist()
        if start >= limit and end > limit:
            return
        yield int(chat.ids[i]), start, end


def _last_marked(chat: Rendered, turn: _Turn) -> Region:
    """A turn's last region that has a mark of its own: arguments are found by their text."""
    return [r for r in turn.regions if chat.pieces[r.piece].kind != Kind.ARGUMENTS][-1]


def _closing(chat: Rendered, turn: _Turn, rest: bytes) -> int:
    """How many bytes after a turn's last mark belong to it, by a rendering that ends with the turn."""
    markup = chat.markup(turn.message + 1)
    if len(markup) < 2 or int(markup[-2]) != _last_marked(chat, turn).piece:
        return 0
    arguments = turn.regions[-1].end - _last_marked(chat, turn).end
    common = _common(markup[-1].rstrip().encode(), rest)
    return common if common >= arguments else 0


def _common(one: bytes, other: bytes) -> int:
    """The length of the longest common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
