"""The shapes of records: a text, a prompt with its completion, the messages of a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from xtoken_jax.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SHARE_GPT = {"human": "user", "gpt": "assistant", "observation": "tool"}  # beside the names of ROLES
_CONVERSATIONS = "conversations"  # ShareGPT's name for messages
_NAMED = 12  # keys that an error lists


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
            None where the message is all markup, as a tool's call.
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
        if document.targets == "all" or message["role"] == "assistant"
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
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    targets: str = "all"

    @property
    def keys(self) -> tuple[str, ...]:
        """Those that are read."""
        return tuple(k for k in (self.text, self.prompt, self.completion, self.messages) if k is not None)


def find_shape(keys: Sequence[str] | None, asked: Shape, targets: Targets, where: str) -> Shape:
    """The shape of a source.

    A key that is asked for decides; else the record does: "messages" or "conversations" hold a
    conversation, "prompt" with "completion" an exchange, "text" a text.

    Args:
        keys: of its first record; None where records are texts without keys.
        asked: the keys that the config names.
        targets: of the config.
        where: the source, for errors.

    Raises:
        UserError: none of them, more than one, a key that is missing, targets of another shape.
    """
    if keys is None:
        if asked.keys:
            raise UserError(f"{where}: its records are plain text, without a key {asked.keys[0]!r}")
        found = Shape()
    else:
        found = asked if asked.keys else _told_by(keys, where)
        if found.prompt or found.completion:
            found = Shape(prompt=found.prompt or "prompt", completion=found.completion or "completion")
        missing = [key for key in found.keys if key not in keys]
        if missing:
            raise UserError(f"{where}: no {missing[0]!r} in its first record, which has {_listed(keys)}")
    own = "assistant" if found.messages else "completion" if found.prompt else "all"
    if targets.value not in ("auto", "all", own):
        what = "conversations" if found.messages else "prompts and completions" if found.prompt else "texts"
        fitting = f"{own} or all" if own != "all" else "all"
        raise UserError(f"{where}: targets={targets.value}, but it holds {what}; choose {fitting}")
    chosen = own if targets is Targets.auto else targets.value
    return Shape(found.text, found.prompt, found.completion, found.messages, chosen)


def _told_by(keys: Sequence[str], where: str) -> Shape:
    shapes = []
    if "text" in keys:
        shapes.append(Shape(text="text"))
    if "prompt" in keys and "completion" in keys:
        shapes.append(Shape(prompt="prompt", completion="completion"))
    shapes += [Shape(messages=key) for key in ("messages", _CONVERSATIONS) if key in keys]
    if len(shapes) == 1:
        return shapes[0]
    how = "name the one to read with field=, prompt= and completion=, or messages="
    if shapes:
        names = " and ".join(" + ".join(shape.keys) for shape in shapes)
        raise UserError(f"{where}: could be read in several ways, as {names}; {how}")
    raise UserError(
        f"{where}: no 'text', 'prompt' with 'completion', or 'messages' in its first record, which has "
        f"{_listed(keys)}; {how}"
    )


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return (", ".join(map(repr, keys[:_NAMED])) or "no key") + more


def document_of(shape: Shape, record: Mapping[str, Any] | str, where: Callable[[], str]) -> Document:
    """A record as a document.

    Args:
        shape: of its source.
        record: what was read.
        where: says which record it is, for errors.

    Raises:
        UserError: a key that is missing, a value of the wrong type, a message that is none.
    """
    if isinstance(record, str):
        return record
    values = []
    for key in shape.keys:
        if key not in record:
            raise UserError(f"{where()}: no {key!r} in this record, which has {_listed([*record])}")
        values.append(record[key])
    if shape.messages is not None:
        messages = _messages(values[0], shape.messages, where)
        if record.get("tools"):
            messages = ({**messages[0], "tools": _tools(record["tools"], where)}, *messages[1:])
        return Conversation(messages, shape.targets, where)
    texts = [_text(value, key, where) for value, key in zip(values, shape.keys, strict=True)]
    return texts[0] if shape.text is not None else Exchange(texts[0], texts[1], shape.targets)


def _tools(value: Any, where: Callable[[], str]) -> list[Any]:
    """The functions that a record's assistant may call; some data sets hold them as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{where()}: 'tools' is not JSON ({error})") from error
    value = _without_nulls(value)
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise UserError(f"{where()}: 'tools' holds {type(value).__name__}, not a list of objects")
    return value


def _text(value: Any, key: str, where: Callable[[], str]) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where()}: {key!r} is not UTF-8 ({error})") from error
    if not isinstance(value, str):
        raise UserError(f"{where()}: {key!r} holds {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell
        raise UserError(f"{where()}: {key!r} is not text ({error})") from error
    return value


def _messages(value: Any, key: str, where: Callable[[], str]) -> tuple[dict[str, Any], ...]:
    if isinstance(value, Mapping):  # a list of objects, which TFDS keeps as an object of lists
        columns = {name: _plain(column) for name, column in value.items()}
        if not all(isinstance(column, list) for column in columns.values()):
            raise UserError(f"{where()}: {key!r} holds one object, not a list of messages")
        value = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    value = _plain(value)
    if not isinstance(value, list):
        raise UserError(f"{where()}: {key!r} holds {type(value).__name__}, not a list of messages")
    if not value:
        raise UserError(f"{where()}: {key!r} holds no message")
    return tuple(_message(m, f"{key}[{n}]", where) for n, m in enumerate(value))


def _message(message: Any, name: str, where: Callable[[], str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(
            f"{where()}: {name} holds {type(message).__name__}, not an object with role and content"
        )
    keys = ("role", "content")
    if "from" in message and "value" in message and "role" not in message:
        keys = ("from", "value")
    if keys[0] not in message:
        raise UserError(f"{where()}: {name} has no 'role', only {_listed([*message])}")
    role = _text(message[keys[0]], f"{name}.{keys[0]}", where)
    role = _SHARE_GPT.get(role, role) if keys[0] == "from" else role
    if role not in ROLES:
        known = ", ".join([*ROLES, *(_SHARE_GPT if keys[0] == "from" else ())])
        raise UserError(f"{where()}: {name} is of the unknown role {role!r}; there is {known}")
    content = _plain(message.get(keys[1]))
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(_text(part.get("text"), f"{name}.{keys[1]}", where) for part in content)
    if content is not None:
        content = _text(content, f"{name}.{keys[1]}", where)
    elif not message.get("tool_calls"):
        raise UserError(f"{where()}: {name} has no {keys[1]!r}, only {_listed([*message])}")
    # Columns give every message all keys, absent ones as None.
    more = {k: _without_nulls(v) for k, v in message.items() if k not in keys and v is not None}
    return {"role": role, "content": content, **more}


def _without_nulls(value: Any) -> Any:
    """Plain lists and objects without the keys that hold null, which columns give to every object."""
    value = _plain(value)
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """A list where it is a numpy array or a tuple."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, tuple) else value
