"""The shapes of records: a text, a prompt with its completion, the messages of a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from xtoken_jax.data.layouts import UNREAD_OF_CONVERSATIONS, UNREAD_OF_PROMPTS, listed, shown
from xtoken_jax.data.values import is_something, plain, refuse_depth, rendered, text_of_value
from xtoken_jax.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_ROLES = dict.fromkeys(ROLES) | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
}
# Keys by which data sets mark an assistant's message that is context only.
_WEIGHTS = ("weight", "train", "training", "loss")


class Targets(Enum):
    """What the loss is on."""

    auto = "auto"
    completion = "completion"
    assistant = "assistant"
    all = "all"


class Marked(str):
    """A text in which special tokens that it spells are these tokens, as in a rendered conversation."""


@dataclass(frozen=True)
class Exchange:
    """A prompt and its completion, which continue one another as they stand.

    Attributes:
        targets: what is to be learnt, "completion" or "all".
    """

    prompt: str
    completion: str
    targets: str = "completion"


@dataclass(frozen=True)
class Conversation:
    """Messages, for each side's own chat template.

    Attributes:
        messages: "role", "content", and what else the record has for the template. A content is a text, or
            None where the message is all markup, as a tool's call. An assistant's message with "weight": 0
            is no target.
        targets: what is to be learnt, "assistant" or "all".
        where: says where it was read, for what only a chat template finds wrong.
    """

    messages: tuple[dict[str, Any], ...]
    targets: str = "assistant"
    where: Callable[[], str] = field(default=lambda: "a conversation", compare=False, repr=False)


Document = str | Exchange | Conversation


def says_nothing(document: Document) -> bool:
    """Whether a document gives no row: it is blank, or there is nothing in it to be learnt."""
    if isinstance(document, str):
        return not document.strip()
    if isinstance(document, Exchange):
        learnt = document.completion if document.targets == "completion" else None
        return not (document.prompt + document.completion if learnt is None else learnt).strip()
    return not any(
        (message.get("content") or "").strip() or message.get("tool_calls")
        for message in document.messages
        if document.targets == "all" or (message["role"] == "assistant" and message.get("weight") != 0)
    )


def text_of(document: Document) -> str:
    """All that a document says, without any template."""
    if isinstance(document, str):
        return document
    if isinstance(document, Exchange):
        return document.prompt + document.completion
    return "\n".join(message.get("content") or "" for message in document.messages)


@dataclass(frozen=True)
class Shape:
    """Which keys of a record hold what; one of `text`, `messages`, or `prompt` and `completion`.

    Attributes:
        text, prompt, completion, messages: keys. All None where records are texts themselves.
        targets: what is to be learnt: "completion", "assistant" or "all".
        input: key of a second part of the prompt, such as Alpaca's; a record may lack it.
        system: key of a system prompt; a record may lack it.
        spaced: whether a blank line separates the parts of a prompt from each other and from the completion.
        chat: whether a prompt and its completion are the turns of a conversation.
        optional: other keys that are read where a record has them.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    targets: str = "all"
    input: str | None = None
    system: str | None = None
    spaced: bool = False
    chat: bool = False
    optional: tuple[str, ...] = ()

    def describe(self) -> str:
        """What of a record is read, and learnt; empty for all of a text under "text" or without a key."""
        if self == Shape(text=self.text) and self.text in (None, "text"):
            return ""
        keys = ("text", "prompt", "completion", "messages", "input", "system")
        parts = [f"{key}={getattr(self, key)}" for key in keys if getattr(self, key) is not None]
        parts += [word for word in ("spaced", "chat") if getattr(self, word)]
        return f", {' '.join(parts)} targets={self.targets}"

    @property
    def required(self) -> tuple[str, ...]:
        """The keys that every record has."""
        return tuple(k for k in (self.text, self.prompt, self.completion, self.messages) if k is not None)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are read."""
        return (*self.required, *self.optional)


def document_of(shape: Shape, record: Mapping[str, Any] | str, where: Callable[[], str]) -> Document:
    """A record as a document.

    Args:
        shape: of its source.
        record: what was read.
        where: says which record it is, for errors.

    Raises:
        UserError: a key that is missing, a value of the wrong type, a message that is none, pictures.
    """
    if isinstance(record, str):
        return record
    for key in shape.required:
        if key not in record:
            raise UserError(
                f"{where()}: no {key!r} in this record, which has {listed([*record])}; add it, or leave the "
                "record out"
            )
    if shape.text is not None:
        return text_of_value(record[shape.text], shape.text, where)
    for key in UNREAD_OF_CONVERSATIONS if shape.messages else UNREAD_OF_PROMPTS:
        if is_something(record.get(key)):
            raise UserError(f"{where()}: has {key!r}, which is not read; leave such records out")
    system = _optional(record, shape.system, where)
    if shape.messages is not None:
        messages = _messages(record[shape.messages], shape.messages, where)
        for number, message in enumerate(messages):
            if shape.targets == "all" and message.get("weight") == 0:
                raise UserError(
                    f"{where()}: {shape.messages}[{number}] is marked as no target, and targets=all learns "
                    "every message; choose targets=assistant"
                )
        return Conversation(
            _with_tools(_with_system(messages, system, where), record, where), shape.targets, where
        )
    return _exchange(shape, record, system, where)


def _exchange(
    shape: Shape, record: Mapping[str, Any], system: str, where: Callable[[], str]
) -> Exchange | Conversation:
    """A prompt and its completion: texts, the turns of a conversation, or lists of messages."""
    prompt_key, completion_key = shape.prompt or "", shape.completion or ""
    lists = [isinstance(plain(record[key]), list | Mapping) for key in (prompt_key, completion_key)]
    if all(lists):
        prompt, completion = (_messages(record[key], key, where) for key in (prompt_key, completion_key))
        if shape.targets != "all":
            prompt = tuple(m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt)
        messages = _with_tools(_with_system((*prompt, *completion), system, where), record, where)
        return Conversation(messages, "all" if shape.targets == "all" else "assistant", where)
    if any(lists):
        one, other = (prompt_key, completion_key) if lists[0] else (completion_key, prompt_key)
        raise UserError(
            f"{where()}: {one!r} holds a list and {other!r} does not; make both texts, or both lists of "
            "messages"
        )
    prompt_text, completion_text = (
        text_of_value(record[key], key, where) for key in (prompt_key, completion_key)
    )
    parts = [part for part in (prompt_text, _optional(record, shape.input, where)) if part.strip()]
    if shape.chat:
        turns = (
            {"role": "user", "content": "\n\n".join(parts)},
            {"role": "assistant", "content": completion_text},
        )
        return Conversation(_with_system(turns, system, where), shape.targets, where)
    if shape.spaced:
        prompt_text = "".join(f"{part}\n\n" for part in parts)
    if system.strip():
        prompt_text = f"{system}\n\n{prompt_text}"
    return Exchange(prompt_text, completion_text, shape.targets)


def _optional(record: Mapping[str, Any], key: str | None, where: Callable[[], str]) -> str:
    """A text that a record may lack; "" where it does."""
    value = None if key is None else record.get(key)
    return "" if value is None else text_of_value(value, str(key), where)


def _with_system(
    messages: tuple[dict[str, Any], ...], system: str, where: Callable[[], str]
) -> tuple[dict[str, Any], ...]:
    """Messages with the system prompt that stands next to them in the record."""
    if not system.strip() or messages[0] == {"role": "system", "content": system}:
        return messages
    if messages[0]["role"] in ("system", "developer"):
        raise UserError(f"{where()}: has two system prompts, in a key and in the first message; keep one")
    return ({"role": "system", "content": system}, *messages)


def _with_tools(
    messages: tuple[dict[str, Any], ...], record: Mapping[str, Any], where: Callable[[], str]
) -> tuple[dict[str, Any], ...]:
    """Messages whose first one carries the functions that the record offers to the assistant."""
    if not record.get("tools"):
        return messages
    return ({**messages[0], "tools": _tools(record["tools"], where)}, *messages[1:])


def _tools(value: Any, where: Callable[[], str]) -> list[Any]:
    """The functions that a record's assistant may call; some data sets hold them as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(
                f"{where()}: 'tools' is not JSON ({error}); correct the record or leave it out"
            ) from error
        except RecursionError:
            refuse_depth("tools", where)
    value = rendered(value, "tools", where)
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise UserError(
            f"{where()}: 'tools' holds {type(value).__name__}, not a list of objects; make it a list of "
            "functions"
        )
    return value


def _messages(value: Any, key: str, where: Callable[[], str]) -> tuple[dict[str, Any], ...]:
    if isinstance(value, Mapping):  # a list of objects, which TFDS keeps as an object of lists
        columns = {name: plain(column) for name, column in value.items()}
        if not all(isinstance(column, list) for column in columns.values()):
            raise UserError(
                f"{where()}: {key!r} holds one object, not a list of messages; put it into a list"
            )
        if len(lengths := {len(column) for column in columns.values()}) > 1:
            raise UserError(
                f"{where()}: {key!r} holds lists of {min(lengths)} to {max(lengths)} values, which give no "
                "list of messages; correct the record or leave it out"
            )
        value = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    value = plain(value)
    if not isinstance(value, list):
        raise UserError(
            f"{where()}: {key!r} holds {type(value).__name__}, not a list of messages; name the "
            "key of the list with messages=, or a text with field="
        )
    if not value:
        raise UserError(f"{where()}: {key!r} holds no message; leave the record out")
    return tuple(_message(m, f"{key}[{n}]", where) for n, m in enumerate(value))


def _message(message: Any, name: str, where: Callable[[], str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(
            f"{where()}: {name} holds {type(message).__name__}, not an object with role and content; make it "
            'one, such as {"role": "user", "content": "..."}'
        )
    keys = ("role", "content")
    if "from" in message and "value" in message and "role" not in message:
        keys = ("from", "value")
    if keys[0] not in message:
        raise UserError(
            f"{where()}: {name} has no 'role', only {listed([*message])}; a message has role and content, or "
            "from and value"
        )
    spelled = text_of_value(message[keys[0]], f"{name}.{keys[0]}", where)
    role = spelled if spelled in _ROLES else spelled.lower()
    if role not in _ROLES:
        raise UserError(
            f"{where()}: {name} is of the unknown role {shown(spelled)}; rename it to one of "
            f"{', '.join(_ROLES)}"
        )
    role = _ROLES[role] or role
    content = plain(message.get(keys[1]))
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}.{keys[1]}[{n}]", where) for n, part in enumerate(content))
    if content is not None:
        content = text_of_value(content, f"{name}.{keys[1]}", where)
    elif keys[1] in message and not message.get("tool_calls"):
        raise UserError(
            f"{where()}: the content of {name} is null, and it calls no tools; give it a text, or leave the "
            "record out"
        )
    elif not message.get("tool_calls"):
        raise UserError(
            f"{where()}: {name} has no {keys[1]!r}, only {listed([*message])}; a message without one needs "
            "tool_calls"
        )
    # Columns give every message all keys, absent ones as None.
    more = {
        text_of_value(k, name, where): rendered(v, f"{name}[{shown(k)}]", where)
        for k, v in message.items()
        if k not in (*keys, *_WEIGHTS) and v is not None
    }
    weight = {} if _is_learnt(message, name, where) else {"weight": 0}
    return {"role": role, "content": content, **more, **weight}


def _part(part: Any, name: str, where: Callable[[], str]) -> str:
    """A part of a content that is a list, as OpenAI writes it: {"type": "text", "text": "..."}."""
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise UserError(
            f"{where()}: {name} is of type {shown(kind)}, and only 'text' is read; leave such records out"
        )
    return text_of_value(part.get("text"), f"{name}.text", where)


def _is_learnt(message: Mapping[str, Any], name: str, where: Callable[[], str]) -> bool:
    """Return whether a message may be a target, by the keys that data sets use to exclude it."""
    for key in _WEIGHTS:
        value = message.get(key)
        if value is None or value == 1:
            continue
        if not isinstance(value, int | float) or value != 0:
            raise UserError(
                f"{where()}: {name}.{key} is {shown(value)}; only 0 and 1 are read, make it one of them"
            )
        return False
    return True
