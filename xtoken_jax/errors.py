"""The one exception that means "the input is wrong", and texts that are safe to show."""

import functools
import os
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


class KindError(UserError, TypeError):
    """An argument of another kind, such as a text for a list of texts, or a Projection for a Partition.

    It is a TypeError, and a ValueError for callers that handle every wrong argument alike.
    """


class NonFiniteOutputsError(UserError):
    """A model's outputs are NaN or infinite where they are needed."""


_SECRET = re.compile(r"TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
_NO_SECRET = re.compile(r"XTOKEN_.*|.*_(FILE|PATH|DIR|URL|HOST)", re.IGNORECASE)
_SHORTEST = 6  # characters of a secret: shorter values stand in ordinary text, too
_CERTAIN = 8  # characters of one that settings do not hold by chance
_HEAD = 16  # characters by which a secret is recognised, also where its end was cut off
# Control characters but line end and tab, switches of the direction of writing, halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says that is not blank, or else its type; 200 characters."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line[:201])
    return line if len(line) <= 200 else line[:197] + "..."


def printable(text: str) -> str:
    """Return a text as it may be sent to a terminal or a log.

    Control characters, of which terminals make commands, are shown as escapes such as \\x1b. Values of secret
    environment variables (names with TOKEN, SECRET, PASSWORD, API_KEY and the like) become [HF_TOKEN].
    """
    for name, value in _secrets():
        for line in value.splitlines():
            head = line.strip()
            if len(head) >= _SHORTEST and head[:_HEAD] in text:
                text = re.sub(re.escape(head[:_HEAD]) + r"[^\s'\"]*", f"[{name}]", text)
    return _UNSAFE.sub(lambda found: _escape(ord(found[0])), text)


def secret_in(text: str) -> str | None:
    """Return the name of a secret environment variable whose value is in a text; None without one."""
    return next((name for name, value in _secrets() if len(value) >= _CERTAIN and value in text), None)


def _secrets() -> list[tuple[str, str]]:
    """Secret environment variables, the longest values first: one may be part of another."""
    secrets = [(n, v) for n, v in os.environ.items() if _is_secret(n) and len(v) >= _SHORTEST]
    return sorted(secrets, key=lambda secret: -len(secret[1]))


@functools.cache
def _is_secret(name: str) -> bool:
    return _SECRET.search(name) is not None and _NO_SECRET.fullmatch(name) is None


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
