"""Shell completion: commands and options by argcomplete, settings of `distill` by the config's schema."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from xtoken_jax.run.config_groups import groups, options_of
from xtoken_jax.run.words import continuations

SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    """The script that a shell runs once: eval "$(xtoken --completion bash)"."""
    import argcomplete

    return argcomplete.shellcode(["xtoken"], shell=shell)


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, and exit; return if none asks."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def of_settings(schema: Callable[[], type]) -> Callable[..., list[str]]:
    """A completer of key=value words: a group's options, the next part of a key, or its values.

    Args:
        schema: returns the dataclass of all keys. It takes seconds to import, so that only words that need it
            ask for it.
    """

    def settings(prefix: str, **context: Any) -> list[str]:
        key, equals, _ = prefix.partition("=")
        if equals and key in groups():
            return [f"{key}={option}" for option in options_of(key)]
        named = [] if equals or "." in key else [f"{group}=" for group in groups()]
        return [*named, *continuations(prefix, schema())]

    return settings
