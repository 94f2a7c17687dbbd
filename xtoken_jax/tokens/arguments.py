"""Checks of what functions of texts are called with; each names the argument and says what is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

from xtoken_jax.errors import KindError
from xtoken_jax.tokens.tokenizer import TokenizerPair


def check_pair(pair: Any) -> None:
    """Raise unless `pair` is a TokenizerPair."""
    if not isinstance(pair, TokenizerPair):
        raise KindError(
            f"pair: {type(pair).__name__}, but a TokenizerPair is needed; "
            "TokenizerPair.load(student, teacher) makes one"
        )


def check_list(name: str, values: Any, kind: type | tuple[type, ...], noun: str) -> list[Any]:
    """The values as a list; raise unless they are several, in an order, and each of this kind.

    Args:
        name: the argument.
        values: its value.
        kind: what each of them must be.
        noun: what each of them is called.
    """
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise KindError(f"{name}={values!r:.80}: a list is needed, each a {noun}; put a single one in [ ]")
    values = list(values)
    for number, value in enumerate(values):
        if not isinstance(value, kind):
            raise KindError(
                f"{name}[{number}]: {type(value).__name__} ({value!r:.80}), but a {noun} is needed"
            )
    return values


def check_texts(name: str, texts: Any) -> list[str]:
    """The texts as a list; raise where one text is given instead of several, or something else than texts."""
    return check_list(name, texts, str, "text")
