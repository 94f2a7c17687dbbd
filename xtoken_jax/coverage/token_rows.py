"""Tokens and their rows of W as text to read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from xtoken_jax.projection.matrix import Projection
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair


@dataclass(frozen=True)
class TokenRow:
    """One student token and where W sends it.

    Attributes:
        token: the student id.
        text: what it stands for, see `token_text`.
        pieces: (text of a teacher token, weight) by falling weight; none for an empty row.
    """

    token: int
    text: str
    pieces: tuple[tuple[str, float], ...]


def row_of(pair: TokenizerPair, projection: Projection, token_id: int) -> TokenRow:
    """The row of W [V_s, V_t] of one student id."""
    ids = np.asarray(projection.indices)[token_id].tolist()
    weights = np.asarray(projection.weights)[token_id].tolist()
    pieces = tuple((token_text(pair.teacher, i), w) for i, w in zip(ids, weights, strict=True) if i >= 0)
    return TokenRow(token_id, token_text(pair.student, token_id), pieces)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """What a token stands for; the spelling of a special one; `\\xNN` for bytes that are not UTF-8 alone."""
    content = tokenizer.bytes_of(token_id)
    if content is None:
        spelling = tokenizer.backend.id_to_token(token_id)
        return f"<id {token_id}>" if spelling is None else spelling
    return content.decode("utf-8", errors="backslashreplace")


def find_token(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of the single token for a text: by its bytes, or a special token by its spelling."""
    table = tokenizer.token_bytes
    found = table.ids_by_bytes().get(text.encode())
    if found is None and tokenizer.backend.token_to_id(text) in table.special - table.unused:
        found = tokenizer.backend.token_to_id(text)
    return found


def visible(text: str, longest: int | None = None) -> str:
    """A text with `·` for each blank and escapes for what does not print, cut to `longest` characters."""
    shown = "".join("·" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if longest is None or len(shown) <= longest else shown[: longest - 1] + "…"


def short_name(name: str) -> str:
    """The last part of a tokenizer's folder or hub id."""
    return PurePath(name).name or name


def describe_row(row: TokenRow, longest: int | None = None) -> str:
    """A row as `201 → 2 0.90 + 0 0.09 + 1 0.01`; each token cut to `longest` characters."""
    pieces = " + ".join(f"{visible(piece, longest)} {weight:.2f}" for piece, weight in row.pieces)
    return f"{visible(row.text, longest)} → {pieces or 'nothing'}"
