"""Chat templates: render a conversation as transformers does, within limits."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xtoken_jax.alignment.template_process import TemplateError, render_in_process
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import Tokenizer

Conversation = Sequence[dict[str, Any]]

REASONING = ("reasoning_content", "reasoning", "thinking")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# How a template asks whether a message has a content, and in which form a call's arguments are.
_TESTS_NONE = re.compile(r"(?<![A-Za-z_])content['\"]?\]?\s+is\s+(not\s+)?none")
_TESTS_ARGUMENTS = re.compile(r"arguments['\"]?\]?\s+is\s+(not\s+)?(string|mapping)")


def render(
    tokenizer: Tokenizer,
    template: str,
    conversation: Conversation,
    where: Callable[[], str],
    *,
    answer: bool = False,
) -> str:
    """Render a conversation in a chat template, as transformers renders it.

    `tools` in the first message are the functions that the assistant may call.

    Args:
        tokenizer: names the special tokens and the day that `strftime_now` writes.
        template: Jinja source.
        conversation: messages.
        where: describes the conversation in errors.
        answer: end where the assistant's next turn begins.

    Raises:
        UserError: the template refuses the conversation.
    """
    return _render(tokenizer, template, conversation, where, answer=answer)[0]


def render_generated(
    tokenizer: Tokenizer, template: str, conversation: Conversation, where: Callable[[], str]
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and return the character ranges of its `{% generation %}` blocks, too.

    Args:
        tokenizer, template, conversation, where: as `render` takes them.

    Raises:
        UserError: the template refuses the conversation.
    """
    return _render(tokenizer, template, conversation, where)


def has_generation(template: str) -> bool:
    """Return whether a template marks what the assistant writes with `{% generation %}`."""
    return _GENERATION.search(template) is not None


def _render(
    tokenizer: Tokenizer,
    template: str,
    conversation: Conversation,
    where: Callable[[], str],
    *,
    answer: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    names: dict[str, Any] = {
        f"{role}_token": tokenizer.backend.id_to_token(tokenizer.roles[role])
        for role in ("bos", "eos", "pad", "unk")
        if role in tokenizer.roles
    }
    tools = conversation[0].get("tools") if conversation else None
    messages = [
        _as_templates_read({k: v for k, v in m.items() if k != "tools"}, template) for m in conversation
    ]
    values = {
        "messages": messages,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": answer,
        **names,
    }
    try:
        return render_in_process(template, values, tokenizer.day.isoformat())
    except TemplateError as error:
        file = f" ({tokenizer.template_file})" if tokenizer.template_file else ""
        raise UserError(f"{where()}: the chat template of {tokenizer.name}{file} {error}") from error


def reasoning_key(message: dict[str, Any]) -> str | None:
    """The key under which a message holds its reasoning, None where it has none."""
    return next((key for key in REASONING if isinstance(message.get(key), str) and message[key]), None)


def _as_templates_read(message: dict[str, Any], template: str) -> dict[str, Any]:
    """Return a message in the form that a template reads.

    A call of a tool has no content: null for the templates that test for it, else a blank text, as several
    templates search in the content. The arguments of a call are JSON text in OpenAI's format and an object in
    transformers'. They stay as they are for a template that tests which they are; one that writes JSON itself
    gets an object, any other gets text.
    """
    calls = message.get("tool_calls")
    if not message.get("content", True) and (calls or message["content"] is None):
        message = {**message, "content": None if calls and _TESTS_NONE.search(template) else ""}
    if calls and not _TESTS_ARGUMENTS.search(template):
        message = {**message, "tool_calls": [_with_arguments(call, "tojson" in template) for call in calls]}
    key = reasoning_key(message)
    if key is None:
        return message
    return {**message, "reasoning_content": message[key], "thinking": message[key]}


def _with_arguments(call: Any, as_object: bool) -> Any:
    """A call with its arguments as an object or as JSON text; unchanged where they are no JSON object."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], as_object)}
    arguments = call.get("arguments")
    if as_object and isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            parsed = json.loads(arguments)
            return {**call, "arguments": parsed} if isinstance(parsed, dict) else call
    elif not as_object and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return call
