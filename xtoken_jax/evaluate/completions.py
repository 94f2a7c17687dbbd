"""Texts that a model writes behind prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
import numpy as np

from xtoken_jax.alignment.render import render
from xtoken_jax.errors import NonFiniteOutputsError, UserError
from xtoken_jax.models.config import DecoderConfig
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.generate import cut_at_stop, generate
from xtoken_jax.models.hf.types import check_generation
from xtoken_jax.tokens.roles import read_json_object
from xtoken_jax.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

_END_ROLES = ("eos", "document_end", "turn_end")


@dataclass(frozen=True)
class Completion:
    """What a model wrote.

    Attributes:
        text: without the stop string that ended it; bytes that are not UTF-8 show as U+FFFD.
        tokens: the ids that were chosen, EOS excluded, a stop string included.
        finish: why it ends: an EOS token, a stop string, or as many tokens as were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Literal["eos", "stop", "length"]


def complete(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    length_multiple: int = 64,
    console: Console | None = None,
) -> list[Completion]:
    """Completes each prompt, which opens a document.

    Args:
        model, params, tokenizer: which belong together.
        prompts: texts, in which special tokens spelled out are text; or ids, which stand as they are.

    The others are those of `xtoken_jax.models.generate.generate`, which says what is refused. An empty prompt
    is refused where the tokenizer adds no BOS.
    """
    opening = [tokenizer.roles["bos"]] if tokenizer.adds_bos else []
    rows = [
        opening + tokenizer.encode_batch([prompt])[0].tolist() if isinstance(prompt, str) else list(prompt)
        for prompt in prompts
    ]
    try:
        found = generate(
            model,
            params,
            rows,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            temperature=temperature,
            top_p=top_p,
            key=key,
            size=tokenizer.size,
            batch_size=batch_size,
            stop=stop,
            decode=lambda ids: tokenizer.decode(np.array(ids, np.int32)),
            length_multiple=length_multiple,
            console=console,
        )
    except NonFiniteOutputsError as error:
        raise NonFiniteOutputsError(f"{tokenizer.name}: {error}") from error
    completions = []
    for tokens in found:
        whole = tokenizer.decode(np.array(tokens, np.int32))
        text = cut_at_stop(whole, stop)
        finish: Literal["eos", "stop", "length"] = "length" if len(tokens) == max_new_tokens else "eos"
        completions.append(Completion(text, tuple(tokens), "stop" if text != whole else finish))
    return completions


def chat_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a conversation of one user's turn, in the tokenizer's chat template, up to the answer.

    Raises:
        UserError: no template, one that refuses it, or a text that spells a special token.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.name}: no chat template (chat_template.jinja in its folder)")
    ids = tokenizer.markup_backend.encode(text, add_special_tokens=False).ids
    if spelled := tokenizer.token_bytes.special & set(ids):
        token = tokenizer.backend.id_to_token(min(spelled))
        raise UserError(f"the prompt spells {token}, which in a chat is a control token")
    turn = [{"role": "user", "content": text}]
    rendered = render(tokenizer, tokenizer.chat_template, turn, lambda: "the prompt", answer=True)
    return tokenizer.markup_backend.encode(rendered, add_special_tokens=False).ids


def end_tokens(config: DecoderConfig, tokenizer: Tokenizer, folder: Path) -> tuple[int, ...]:
    """Ids that end a text of this model, in rising order.

    By its config.json, by its generation_config.json, where chat models name the end of a turn, and by its
    tokenizer's roles.

    Raises:
        UserError: a generation_config.json that cannot be read.
    """
    found = {tokenizer.roles[role] for role in _END_ROLES if role in tokenizer.roles}
    path = folder / "generation_config.json"
    generation = read_json_object(path)
    check_generation(generation, str(path))
    named = generation.get("eos_token_id")
    for ids in (config.eos_token_id, named):
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return tuple(sorted(found))
