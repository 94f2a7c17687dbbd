"""Chat templates: render a conversation as transformers does."""

from __future__ import annotations

import contextvars
import datetime
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from xtoken_jax.errors import UserError
from xtoken_jax.tokens.auto_tokenizer import quiet_import
from xtoken_jax.tokens.tokenizer import Tokenizer

Conversation = Sequence[dict[str, Any]]

REASONING = ("reasoning_content", "reasoning", "thinking")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_DAY: contextvars.ContextVar[datetime.date] = contextvars.ContextVar("day")


@functools.cache
def _module() -> Any:
    with quiet_import():
        from transformers.utils import chat_template_utils

    return chat_template_utils


def _today(layout: str) -> str:
    """The day of the tokenizer that is being rendered, at midnight."""
    return datetime.datetime.combine(_DAY.get(), datetime.time()).strftime(layout)


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
    return _render(tokenizer, template, conversation, where, add_generation_prompt=answer)[0]


def render_generated(
    tokenizer: Tokenizer, template: str, conversation: Conversation, where: Callable[[], str]
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and return the character ranges of its `{% generation %}` blocks, too.

    Args:
        tokenizer, template, conversation, where: as `render` takes them.

    Raises:
        UserError: the template refuses the conversation.
    """
    return _render(tokenizer, template, conversation, where, return_assistant_tokens_mask=True)


def has_generation(template: str) -> bool:
    """Return whether a template marks what the assistant writes with `{% generation %}`."""
    return _GENERATION.search(template) is not None


def _render(
    tokenizer: Tokenizer,
    template: str,
    conversation: Conversation,
    where: Callable[[], str],
    **options: bool,
) -> tuple[str, list[tuple[int, int]]]:
    names: dict[str, Any] = {
        f"{role}_token": tokenizer.backend.id_to_token(tokenizer.roles[role])
        for role in ("bos", "eos", "pad", "unk")
        if role in tokenizer.roles
    }
    tools = conversation[0].get("tools") if conversation else None
    messages = [_as_templates_read({k: v for k, v in m.items() if k != "tools"}) for m in conversation]
    token = _DAY.set(tokenizer.day)
    try:
        # The compiled template is cached by transformers; its environment belongs to this template alone.
        _module()._compile_jinja_template(template).environment.globals["strftime_now"] = _today
        rendered = _module().render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            **options,
            **names,
        )
    # a template raises what it likes
    except Exception as error:
        raise UserError(f"{where()}: the chat template of {tokenizer.name} refuses it: {error}") from error
    finally:
        _DAY.reset(token)
    (text,), ranges = rendered
    return text, [(start, end) for start, end in ranges[0]] if ranges else []


def reasoning_key(message: dict[str, Any]) -> str | None:
    """The key under which a message holds its reasoning, None where it has none."""
    return next((key for key in REASONING if isinstance(message.get(key), str) and message[key]), None)


def _as_templates_read(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose reasoning has the two names that templates read, and whose content is a text.

    A call of a tool has the content null in OpenAI's format; several templates search in the content.
    """
    if message.get("content", "") is None:
        message = {**message, "content": ""}
    key = reasoning_key(message)
    if key is None:
        return message
    return {**message, "reasoning_content": message[key], "thinking": message[key]}
