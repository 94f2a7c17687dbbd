"""`tokenizer.json` from outside: types and sizes are checked first, and panics of the library are errors."""

from __future__ import annotations

import base64
import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from xtoken_jax.errors import UserError, first_line, is_panic
from xtoken_jax.files import MAX_JSON_BYTES, parse_json, read_bytes
from xtoken_jax.files.fields import (
    FLAG,
    OBJECT,
    TEXT,
    Check,
    check_fields,
    either,
    listing,
    number,
    optional,
    shown,
    whole,
)

REMEDY = "get the tokenizer's files again"
# Published vocabularies end below 1,100,000. A table has an entry for each id up to the highest.
MAX_ID = 2**23 - 1
_MAX_TOKENS = 2**23

_ID = whole(0, MAX_ID)
_PIECE_AND_SCORE = Check(
    "a pair of a piece and its score",
    lambda v: isinstance(v, list) and len(v) == 2 and isinstance(v[0], str) and type(v[1]) in (int, float),
)
_MERGE = Check(
    "a pair of pieces",
    lambda v: (
        isinstance(v, str) or (isinstance(v, list) and len(v) == 2 and all(isinstance(p, str) for p in v))
    ),
)
_DEFINITION = {
    "model": OBJECT,
    "added_tokens": optional(listing(OBJECT, _MAX_TOKENS)),
    **{
        key: optional(OBJECT)
        for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    },
}
_MODEL = {
    "type": optional(TEXT),
    "vocab": either(OBJECT, listing(_PIECE_AND_SCORE, _MAX_TOKENS)),
    "merges": optional(listing(_MERGE, 2 * _MAX_TOKENS)),
    "unk_token": optional(TEXT),
    "unk_id": optional(_ID),
    "continuing_subword_prefix": optional(TEXT),
    "end_of_word_suffix": optional(TEXT),
    "dropout": optional(number(0, 1)),
    **{key: optional(FLAG) for key in ("fuse_unk", "byte_fallback", "ignore_merges")},
}
_ADDED = {
    "id": _ID,
    "content": Check("a string that is not empty", lambda v: isinstance(v, str) and bool(v)),
    "special": FLAG,
    **{key: optional(FLAG) for key in ("single_word", "lstrip", "rstrip", "normalized")},
}
_NAME = Check(
    "a string or an object with a string as content",
    lambda v: isinstance(v, str) or (isinstance(v, dict) and isinstance(v.get("content"), str)),
)
_SETTINGS = {
    **{f"{role}_token": optional(_NAME) for role in ("bos", "eos", "unk", "pad")},
    "add_bos_token": optional(FLAG),
    "add_eos_token": optional(FLAG),
    "tokenizer_class": optional(TEXT),
    "chat_template": optional(either(TEXT, OBJECT, listing(OBJECT, 1000))),
}

# Texts at which faults of normalizers and pre-tokenizers show.
_TRIAL = (
    "", " ", "a", " The sum of 12+30 is\t42.\r\n\n", "é e\u0301 \u212b ﬁ \ufeff",
    "日本語 한국어 नमस्ते \U0001f469\u200d\U0001f467",
    "##a \u2581b <0x41> </w>", "\0\x1b\u2028", "x" * 1000, " " * 100 + "\n" * 100, "aB" * 100,
)  # fmt: skip

_stderr = threading.Lock()


def read_definition(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the text and the content of a `tokenizer.json`, with the types and sizes that its readers need.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds values of other types or out of proportion.
    """
    what = "a tokenizer that can be read"
    content = read_bytes(path, what=what, remedy=REMEDY, max_bytes=MAX_JSON_BYTES)
    definition = parse_json(content, path, what=what, remedy=REMEDY)
    if (
        "model" not in definition
        or not isinstance(definition["model"], dict)
        or "vocab" not in definition["model"]
    ):
        raise UserError(f"{path}: not {what} (it lacks a model with a vocabulary); {REMEDY}")
    check_fields(definition, _DEFINITION, str(path), remedy=REMEDY)
    check_fields(definition["model"], _MODEL, f"{path}: model", remedy=REMEDY)
    added = definition.get("added_tokens") or []
    for place, token in enumerate(added):
        where = f"{path}: added_tokens[{place}]"
        if missing := [key for key in ("id", "content", "special") if key not in token]:
            raise UserError(f"{where} lacks {missing[0]}; {REMEDY}")
        check_fields(token, _ADDED, where, remedy=REMEDY)
    _check_charsmaps(path, definition.get("normalizer"))
    _check_ids(path, definition["model"]["vocab"], added)
    return content.decode("utf-8-sig"), definition


def _check_charsmaps(path: Path, node: Any) -> None:
    """Refuse a Precompiled map that is shorter than it says: the library reserves memory for all of it."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        _check_charsmaps(path, child)
    encoded = node.get("precompiled_charsmap") if isinstance(node, dict) else None
    if isinstance(encoded, str):
        content = b""
        with contextlib.suppress(ValueError):  # the library says what is wrong with other text
            content = base64.b64decode(encoded)
        size = int.from_bytes(content[:4], "little")
        if len(content) >= 4 and size > len(content) - 4:
            where = f"{path}: normalizer: precompiled_charsmap"
            raise UserError(f"{where} holds {len(content):,} bytes and says {size:,}; {REMEDY}")


def _check_ids(path: Path, vocabulary: Any, added: list[dict[str, Any]]) -> None:
    """Refuse ids that are none or out of proportion, and two pieces with one id."""
    for pieces in (
        vocabulary if isinstance(vocabulary, dict) else {},
        {t["content"]: t["id"] for t in added},
    ):
        owners: dict[int, str] = {}
        for piece, token_id in pieces.items():
            if not _ID.holds(token_id):
                wanted = f"which must be {_ID.wanted}"
                raise UserError(f"{path}: {shown(piece)} has the id {shown(token_id)}, {wanted}; {REMEDY}")
            if (other := owners.setdefault(token_id, piece)) != piece:
                raise UserError(
                    f"{path}: {shown(other)} and {shown(piece)} have the same id {token_id}; {REMEDY}"
                )


def check_settings(content: dict[str, Any], path: Path) -> None:
    """Raise UserError for a setting of `tokenizer_config.json` or `special_tokens_map.json` of another type.

    Args:
        content: of the file.
        path: of the file.
    """
    check_fields(content, _SETTINGS, str(path), remedy=REMEDY)


def make_backend(text: str, path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer that the content of a `tokenizer.json` makes, without padding and truncation.

    It is tried on a few texts, since the library finds some faults only there.

    Args:
        text: the content.
        path: the file, for messages.

    Raises:
        UserError: the library refuses the content, or panics.
    """
    with _without_reports(), panics_are_errors(path):
        try:
            backend = tokenizers.Tokenizer.from_str(text)
            # The file's own padding could ask for rows of any length.
            backend.no_padding()
            backend.no_truncation()
            backend.encode_batch(_TRIAL, add_special_tokens=False)
            backend.encode_batch(_TRIAL[:3], add_special_tokens=True)
        except Exception as error:  # the Rust side raises plain Exception
            raise UserError(
                f"{path}: not a tokenizer that can be read ({first_line(error)}); {REMEDY}"
            ) from error
    return backend


@contextlib.contextmanager
def panics_are_errors(path: str | Path) -> Iterator[None]:
    """Raise UserError where the library's Rust code panics, which is no `Exception` and would end a process.

    Args:
        path: the tokenizer's file or name.
    """
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise UserError(
            f"{path}: the tokenizers library fails on it ({first_line(error)}); {REMEDY}"
        ) from error


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    """Keep the report that Rust prints of a panic off stderr; everything else is printed afterwards."""
    with _stderr, contextlib.ExitStack() as stack:
        try:
            before = os.dup(2)
        except OSError:  # stderr is closed
            yield
            return
        stack.callback(os.close, before)
        file = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            file.seek(0)
            printed = file.read()
            if printed and b"panicked at" not in printed:
                os.write(2, printed)
