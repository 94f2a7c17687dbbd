"""Layouts of published records: which keys hold what, and hints for records that fit no layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Instruction data: keys of the instruction, its optional context, and the answer.
ALPACA = ("instruction", "input", "output")
DOLLY = ("instruction", "context", "response")
CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEM = "system"  # key of a system prompt next to a conversation or a prompt

# A record with something under one of these keys says more than its text.
UNREAD = ("image", "images", "video", "videos", "audio", "audios")
UNREAD_OF_PROMPTS = (*UNREAD, "history")
UNREAD_OF_CONVERSATIONS = (*UNREAD, "functions")

_PROMPTS = ("prompt", "question", "query", "problem", "instruction", "input", "inputs", "source")
_COMPLETIONS = (
    "completion", "answer", "response", "output", "solution", "generation", "targets", "target", "chosen",
)  # fmt: skip
_TEXTS = ("content", "contents", "body", "document", "article", "story", "code", "raw_content", "raw_text")
_RECORDS = ("data", "records", "examples", "instances", "rows", "items", "train")
_SHOWN = 12  # keys that an error lists
_LONGEST = 60  # characters of a key or value in an error


def listed(keys: Sequence[str]) -> str:
    """The keys of a record for an error message, at most 12 of them."""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return (", ".join(map(shown, keys[:_SHOWN])) or "no key") + more


def shown(value: Any) -> str:
    """A value of a record for an error message, in quotes and in one line, its end left out if it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def hint(keys: Sequence[str]) -> str:
    """The settings that probably read records of these keys, such as `; perhaps field=content`."""
    if "chosen" in keys and "rejected" in keys:
        return (
            "; these are preference pairs: messages=chosen reads the preferred conversations, field=chosen "
            "the preferred texts, prompt=prompt completion=chosen the answers to separate prompts"
        )
    prompt = next((key for key in _PROMPTS if key in keys), None)
    completion = next((key for key in _COMPLETIONS if key in keys), None)
    text = next((key for key in _TEXTS if key in keys), None)
    if prompt and completion:
        return f"; perhaps prompt={prompt} completion={completion}"
    if text:
        return f"; perhaps field={text}"
    if records := next((key for key in _RECORDS if key in keys), None):
        return f"; if {records!r} is the list of all records of a JSON file, records={records}"
    return ""
