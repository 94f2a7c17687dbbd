"""The two-pass W of an ordered tokenizer pair (host, numpy); no model, no training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xtoken_jax.errors import KindError, UserError
from xtoken_jax.projection.matrix import Projection
from xtoken_jax.projection.retokenize import tokenize_bytes
from xtoken_jax.projection.special import role_pairs, similar_pairs
from xtoken_jax.tokens.arguments import check_pair
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

BETA, GAMMA = 0.9, 0.1
_LAST_WEIGHT = 0.2  # the scale trick's


@dataclass(frozen=True)
class ProjectionOptions:
    """How a W is built; by default as in the paper.

    Attributes:
        entries: K, entries a row at most.
        reverse: also re-tokenize the teacher's tokens with the student, and add those weights.
        scale_trick: the last of K entries of a row is set to 0.2 before the row is normalized.
        similar_special: match special tokens without a common role by their spelling.
    """

    entries: int = 4
    reverse: bool = False
    scale_trick: bool = False
    similar_special: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.entries, bool) or not isinstance(self.entries, int | np.integer):
            raise KindError(f"entries={self.entries!r}: an integer is needed")
        for name in ("reverse", "scale_trick", "similar_special"):
            if not isinstance(getattr(self, name), bool):
                raise KindError(f"{name}={getattr(self, name)!r}: True or False is needed")
        if self.entries < 1:
            raise UserError(f"entries={self.entries}: W needs at least one entry a row")


def build_projection(
    pair: TokenizerPair,
    *,
    entries: int = 4,
    reverse: bool = False,
    scale_trick: bool = False,
    similar_special: bool = False,
) -> Projection:
    """Build W [V_s, V_t] (X-Token, section 4; the options are the official tool's).

    1. Special tokens, and added ones with a role, map role to role with weight 1.
    2. A student token whose bytes are a teacher token's gets that one entry, of weight 1
       (several such teacher tokens: the lowest id).
    3. Any other is re-tokenized by the teacher; piece i gets 0.9 * 0.1**i, the first K
       pieces are kept, the weights are normalized, a repeated piece adds up.
    4. `reverse`: a teacher token, re-tokenized by the student in the same way, adds its
       weights to the rows of its pieces, in its own column. `similar_special`: so do special
       tokens spelled alike. Rows of 1 and 2 stay as they are.
    5. A row keeps its K heaviest entries (equal weights: the lowest teacher id) and is
       normalized. `scale_trick`: where all K are there, the last one is first set to 0.2
       and the row sorted again; not in rows of 1 and 2.

    Rows without a mapping stay empty. Unused ids take no part, nor do byte-fallback tokens of
    characters that have a token of their own: no tokenizer gives them, and they would take the
    place of the character's own token.

    Args:
        pair: student's and teacher's tokenizer.
        entries, reverse, scale_trick, similar_special: as in `ProjectionOptions`.

    Returns:
        Projection of numpy arrays; the same pair gives the same arrays, bit for bit.

    Raises:
        UserError: no entry a row.
    """
    check_pair(pair)
    options = ProjectionOptions(entries, reverse, scale_trick, similar_special)
    student, teacher = pair.student, pair.teacher
    single = role_pairs(pair)
    by_bytes = {content: j for j, content in reversed(written(teacher).items())}  # the lowest id stays
    inexact: dict[int, bytes] = {}
    for i, content in written(student).items():
        if i in single:
            continue
        if (j := by_bytes.get(content)) is not None:
            single[i] = j
        else:
            inexact[i] = content

    parts = [_weighted_pieces(teacher, inexact, entries)]
    if reverse:
        columns, rows, weights = _weighted_pieces(student, written(teacher), entries)
        parts.append((rows, columns, weights))
    if similar_special:
        found = list(similar_pairs(pair, single))
        columns_of = [np.array([f[place] for f in found]) for place in range(3)]
        parts.append((columns_of[0].astype(np.int64), columns_of[1].astype(np.int64), columns_of[2]))
    rows, columns, weights = (np.concatenate(column) for column in zip(*parts, strict=True))

    taken = np.zeros(student.size, bool)
    taken[list(single)] = True
    free = ~taken[rows]
    indices = np.full((student.size, entries), -1, np.int32)
    table = np.zeros((student.size, entries), np.float64)
    _fill(indices, table, rows[free], columns[free], weights[free], teacher.size, options)
    indices[list(single), 0], table[list(single), 0] = list(single.values()), 1.0
    return Projection(indices, table.astype(np.float32), teacher.size)


def written(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The bytes of every id that the tokenizer can give for a text, by rising id."""
    tokens = tokenizer.token_bytes
    barred = tokens.shadowed | tokens.unused | tokens.special
    return {i: content for i, content in enumerate(tokens.table) if content and i not in barred}


def _weighted_pieces(
    tokenizer: Tokenizer, contents: dict[int, bytes], entries: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(id, piece, weight) of every one of the first pieces of each content; a content's sum to 1."""
    pieces = [ids[:entries] for ids in tokenize_bytes(tokenizer, list(contents.values()))]
    counts = np.fromiter(map(len, pieces), np.int64, len(pieces))
    flat = np.fromiter((i for ids in pieces for i in ids), np.int64, counts.sum())
    place = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    raw = BETA * GAMMA ** np.arange(entries)
    totals = np.concatenate([[1.0], np.cumsum(raw)])
    owners = np.repeat(np.fromiter(contents, np.int64, len(contents)), counts)
    return owners, flat, raw[place] / np.repeat(totals[counts], counts)


def _fill(
    indices: np.ndarray,
    table: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    weights: np.ndarray,
    teacher_size: int,
    options: ProjectionOptions,
) -> None:
    """Add up what falls on one place of W, and write each row's K heaviest into indices and table."""
    places, inverse = np.unique(rows * teacher_size + columns, return_inverse=True)
    weights = np.bincount(inverse, weights, len(places))
    rows, columns = places // teacher_size, places % teacher_size
    # Sums of the same numbers in another order are equal: the 12th digit is above their rounding.
    order = np.lexsort((columns, -np.round(weights, 12), rows))
    rows, columns, weights = rows[order], columns[order], weights[order]
    _, first, counts = np.unique(rows, return_index=True, return_counts=True)
    place = np.arange(len(rows)) - np.repeat(first, counts)
    kept = place < options.entries
    indices[rows[kept], place[kept]], table[rows[kept], place[kept]] = columns[kept], weights[kept]
    if options.scale_trick:
        full = np.flatnonzero(indices[:, -1] >= 0)
        table[full, -1] = _LAST_WEIGHT
        # The last entry alone may have moved; a stable sort leaves equal ones where they were.
        order = np.argsort(-np.round(table[full], 12), axis=1, kind="stable")
        indices[full] = np.take_along_axis(indices[full], order, 1)
        table[full] = np.take_along_axis(table[full], order, 1)
    sums = table.sum(1, keepdims=True)
    np.divide(table, sums, out=table, where=sums > 0)
