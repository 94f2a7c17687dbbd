"""The one exception that means "the input is wrong", shown to a user as a single line."""


class UserError(ValueError):
    """A mistake in what the user gave: a path, a key, a file, a pair that does not fit.

    The message is one line that says what was wrong, with which value, and what to do.
    The `xtoken` command prints it without a traceback and exits with code 2.
    """
