"""A parser whose errors are one line that names the wrong word and what to write instead."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from xtoken_jax.run.spelling import advice

_REQUIRED = re.compile(r"the following arguments are required: (.*)")
_ONE_OF = re.compile(r"one of the arguments (.*) is required")
_CHOICE = re.compile(r"argument COMMAND: invalid choice: '?(.*?)'? \(choose from (.*)\)")


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` without usage text in its errors, and with advice on spelling.

    Attributes:
        words: those that it was given last.
    """

    words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as the base class does; `error` later looks at the words."""
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with code 2."""
        self.exit(2, f"xtoken: {self._explained(message)}\n")

    def _explained(self, message: str) -> str:
        if command := _CHOICE.fullmatch(message):
            return self.unknown_command(command[1])
        if self.settings is None and (line := self.advice()):
            return line
        if missing := _REQUIRED.fullmatch(message):
            message = f"{self._command} needs {missing[1].replace(', ', ' and ')}"
        elif missing := _ONE_OF.fullmatch(message):
            message = f"{self._command} needs one of {missing[1].replace(' ', ', ')}"
        return f"{message.removeprefix('argument ')}; see {self.prog} --help"

    @property
    def settings(self) -> argparse.Action | None:
        """The argument that takes key=value words; None if this command has options only."""
        return next((action for action in self._actions if action.dest == "overrides"), None)

    @property
    def _command(self) -> str:
        return self.prog.removeprefix("xtoken ")

    def advice(self, unplaced: Sequence[str] = ()) -> str | None:
        """What to write instead of words that this command does not read; None if none is found.

        Args:
            unplaced: words that parsing left over; without, all words are suspects.
        """
        options = [option for option in self._option_string_actions if option.startswith("--")]
        places = [str(action.metavar) for action in self._get_positional_actions()]
        several = [option for a in self._actions if a.nargs == "+" for option in a.option_strings]
        return advice(self.prog, self.words, options, places, unplaced, several)

    def unknown_command(self, word: str) -> str:
        """Name the nearest command."""
        (commands,) = (a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction))
        if "=" in word:
            return f"{word}: settings follow a command: xtoken distill {word}"
        if word.startswith("-"):
            return f"unknown option {word!r}; see xtoken --help"
        close = difflib.get_close_matches(word, list(commands), n=1)
        nearest = f", did you mean xtoken {close[0]}?" if close else ""
        return f"{word}: no such command{nearest}; there is {', '.join(commands)}"
