"""The one exception that means "the input is wrong", shown to a user as a single line."""

import re

_LONGEST = 1500  # characters of a message
_LINE_BREAK = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # and other control characters


class UserError(ValueError):
    """A mistake in what the user gave: a path, a key, a file, a pair that does not fit.

    The message is one line that says what was wrong, with which value, and what to do.
    The `xtoken` command prints it without a traceback and exits with code 2. Control characters in a value,
    such as the name of a tensor, are shown as escapes, and the middle of a very long message is left out.
    """

    def __str__(self) -> str:
        text = _LINE_BREAK.sub(lambda found: repr(found[0])[1:-1], super().__str__())
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 500]} ... {text[-495:]}"


def is_panic(error: BaseException) -> bool:
    """Return whether this is a panic of a Rust library, which is no `Exception`."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says that is not blank, or else its type; 200 characters."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:197] + "..."
