"""The shape of a source: named by the config or inferred from the keys of its first record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xtoken_jax.data.layouts import (
    ALPACA,
    CONVERSATIONS,
    DOLLY,
    SYSTEM,
    UNREAD_OF_CONVERSATIONS,
    UNREAD_OF_PROMPTS,
    hint,
    listed,
)
from xtoken_jax.data.records import Shape, Targets
from xtoken_jax.errors import UserError


def find_shape(keys: Sequence[str] | None, asked: Shape, targets: Targets, where: str) -> Shape:
    """The shape of a source.

    A key that is asked for decides; else the record does: "messages", "conversations" or "conversation"
    hold a conversation, "prompt" with "completion" an exchange, "instruction" with "output" (Alpaca) or with
    "response" (Dolly) an instruction and its answer, "text" a text.

    Args:
        keys: of its first record; None where records are texts without keys.
        asked: the keys that the config names.
        targets: of the config.
        where: the source, for errors.

    Raises:
        UserError: none of them, more than one, a key that is missing, targets of another shape.
    """
    if keys is None:
        named = [*asked.required, *(key for key in (asked.input, asked.system) if key)]
        if named or asked.chat:
            what = (
                f"without a key {named[0]!r}; name no key" if named else "without turns; leave chat=true out"
            )
            raise UserError(f"{where}: its records are plain text, {what}")
        shape = Shape()
    else:
        shape = _with_defaults(asked if asked.required else _inferred(keys, where), asked, where)
        needed = [*shape.required, *(key for key in (asked.input, asked.system) if key)]
        if missing := [key for key in needed if key not in keys]:
            raise UserError(
                f"{where}: no {missing[0]!r} in its first record, which has {listed(keys)}; name a key that "
                f"every record has{hint(keys)}"
            )
        unread = UNREAD_OF_CONVERSATIONS if shape.messages else UNREAD_OF_PROMPTS if shape.prompt else ()
        tools = "tools" if shape.messages or shape.prompt else None
        optional = (shape.input, shape.system, tools, *unread)
        shape = replace(shape, optional=tuple(key for key in optional if key in keys and key is not None))
    own = "assistant" if shape.messages or shape.chat else "completion" if shape.prompt else "all"
    if targets.value not in ("auto", "all", own):
        what = {"assistant": "conversations", "completion": "prompts and completions", "all": "texts"}[own]
        fitting = f"{own} or all" if own != "all" else "all"
        raise UserError(f"{where}: targets={targets.value}, but it holds {what}; choose {fitting}")
    return replace(shape, targets=own if targets is Targets.auto else targets.value)


def _with_defaults(shape: Shape, asked: Shape, where: str) -> Shape:
    """A shape with its optional keys, as the config names them or by default."""
    if shape.prompt or shape.completion:
        prompt, completion = shape.prompt or "prompt", shape.completion or "completion"
        layout = next((known for known in (ALPACA, DOLLY) if (prompt, completion) == known[::2]), None)
        return replace(
            shape,
            prompt=prompt,
            completion=completion,
            input=asked.input or (layout[1] if layout else None),
            system=asked.system or SYSTEM,
            spaced=bool(asked.input or layout),
            chat=asked.chat,
        )
    if asked.input or asked.chat:
        setting = "chat=true" if asked.chat else f"input={asked.input}"
        what = "conversations" if shape.messages else "texts"
        raise UserError(
            f"{where}: {setting} is for prompts with completions, and it holds {what}; leave it out"
        )
    if shape.messages:
        return replace(shape, system=asked.system or SYSTEM)
    if asked.system:
        raise UserError(f"{where}: system={asked.system}, and it holds texts; leave it out")
    return shape


def _inferred(keys: Sequence[str], where: str) -> Shape:
    shapes = []
    if "text" in keys:
        shapes.append(Shape(text="text"))
    for prompt, completion in (("prompt", "completion"), ALPACA[::2], DOLLY[::2]):
        if prompt in keys and completion in keys:
            shapes.append(Shape(prompt=prompt, completion=completion))
    shapes += [Shape(messages=key) for key in CONVERSATIONS if key in keys]
    how = "name the one to read with field=, prompt= and completion=, or messages="
    if len(shapes) == 1:
        if shapes[0].prompt == "prompt" and "label" in keys:
            raise UserError(
                f"{where}: has prompts with completions and a 'label', which may mark completions that must "
                "not be learnt; take those out, then name prompt=prompt completion=completion"
            )
        return shapes[0]
    if shapes:
        names = " and ".join(" + ".join(shape.keys) for shape in shapes)
        raise UserError(f"{where}: could be read in several ways, as {names}; {how}")
    raise UserError(
        f"{where}: no 'text', 'prompt' with 'completion', or 'messages' in its first record, which has "
        f"{listed(keys)}; {how}{hint(keys)}"
    )
