"""The one exception that means "the input is wrong", shown to a user as a single line."""


class UserError(ValueError):
    """A mistake in what the user gave: a path, a key, a file, a pair that does not fit.

    The message is one line that says what was wrong, with which value, and what to do.
    The `xtoken` command prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says that is not blank, or else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
