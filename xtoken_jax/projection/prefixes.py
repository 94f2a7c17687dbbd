"""The events that both tokenizers of a pair can price (host, numpy); no model, no training."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from xtoken_jax.errors import UserError
from xtoken_jax.projection.build import written
from xtoken_jax.projection.events import Components, Continuations, PrefixTables
from xtoken_jax.projection.retokenize import tokenize_bytes
from xtoken_jax.projection.special import role_pairs
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

DEPTH = 8  # pieces of one token that are compared, one by one


def prefix_tables(pair: TokenizerPair, *, depth: int = DEPTH) -> PrefixTables:
    """Build the tables of prefix KL.

    rho(s) is the teacher's tokenization of the student's token s, sigma(x) the student's of the
    teacher's token x; a token whose bytes are one of the other's is that one. s and x belong to one
    event where rho(s) begins with x or sigma(x) with s: the connected components of these edges.
    Special tokens with a common role make an event of their own. A piece that a text can also have
    behind the ended token (`tables_of_pieces`) is no sign of a longer one. Tokens that the other side cannot
    write, unused ids and byte tokens that no text gives are in none.

    Args:
        pair: student's and teacher's tokenizer.
        depth: D, pieces of a token that are compared; of longer ones the rest is not.

    Returns:
        PrefixTables of numpy arrays; the same pair gives the same arrays.

    Raises:
        UserError: no event in common.
    """
    roles = role_pairs(pair)
    by_student = _pieces(pair.student, pair.teacher, set(roles))
    by_teacher = _pieces(pair.teacher, pair.student, set(roles.values()))
    return tables_of_pieces(
        by_student,
        by_teacher,
        roles,
        pair.student.size,
        pair.teacher.size,
        depth=depth,
        student_open=_open_ends(by_student, pair.student, pair.teacher),
        teacher_open=_open_ends(by_teacher, pair.teacher, pair.student),
    )


def tables_of_pieces(
    by_student: dict[int, list[int]],
    by_teacher: dict[int, list[int]],
    roles: dict[int, int],
    student_size: int,
    teacher_size: int,
    *,
    depth: int = DEPTH,
    student_open: Collection[tuple[int, int]] = (),
    teacher_open: Collection[tuple[int, int]] = (),
) -> PrefixTables:
    """`prefix_tables` from rho, sigma and pairs of special tokens; V_s and V_t say how wide they are.

    `student_open` has pairs of a student token and a teacher piece that can come behind it although
    other student tokens go on with it; `teacher_open` the reverse.
    """
    edges = [(s, pieces[0]) for s, pieces in by_student.items()]
    edges += [(pieces[0], x) for x, pieces in by_teacher.items()]
    edges += list(roles.items())
    if not edges:
        raise UserError("prefix_kl: the two tokenizers have no text in common")
    student, teacher = _components(np.array(edges, np.int64), student_size, teacher_size)
    return PrefixTables(
        student,
        teacher,
        _continuations(by_student, student_size, depth, student_open),
        _continuations(by_teacher, teacher_size, depth, teacher_open),
    )


def _open_ends(pieces_of: dict[int, list[int]], source: Tokenizer, target: Tokenizer) -> set[tuple[int, int]]:
    """(token, piece): the source writes the bytes of both as that token and more, not as a longer token.

    "part" and "icular", where the source has "particularly" but not "particular": the piece behind the
    token does not say that the token went on.
    """
    whole = {tuple(pieces): i for i, pieces in reversed(pieces_of.items())}
    pairs = {
        (whole[tuple(pieces[:d])], pieces[d])
        for pieces in pieces_of.values()
        for d in range(1, len(pieces))
        if tuple(pieces[:d]) in whole
    }
    ordered = sorted(pairs)
    contents, others = source.token_bytes.contents, target.token_bytes.contents
    written = tokenize_bytes(source, [contents[token] + others[piece] for token, piece in ordered])
    return {pair for pair, ids in zip(ordered, written, strict=True) if ids and ids[0] == pair[0]}


def _pieces(source: Tokenizer, target: Tokenizer, roles: set[int]) -> dict[int, list[int]]:
    """The target's ids for each token of the source that it can write, by rising id."""
    by_bytes = {content: j for j, content in reversed(written(target).items())}  # the lowest id stays
    contents = {i: content for i, content in written(source).items() if i not in roles}
    pieces = {i: [by_bytes[content]] for i, content in contents.items() if content in by_bytes}
    rest = {i: content for i, content in contents.items() if i not in pieces}
    pieces.update(zip(rest, tokenize_bytes(target, list(rest.values())), strict=True))
    return {i: pieces[i] for i in contents if pieces[i]}


def _components(edges: np.ndarray, student_size: int, teacher_size: int) -> tuple[Components, Components]:
    nodes = student_size + teacher_size
    joined = coo_matrix((np.ones(len(edges)), (edges[:, 0], student_size + edges[:, 1])), (nodes, nodes))
    _, labels = connected_components(joined, directed=False)
    touched = np.zeros(nodes, bool)
    touched[edges[:, 0]] = touched[student_size + edges[:, 1]] = True
    # Every edge joins the two sides, so that each component that has one has tokens on both.
    sides = [np.flatnonzero(touched[:student_size]), np.flatnonzero(touched[student_size:])]
    found = [labels[sides[0]], labels[student_size + sides[1]]]
    counts = [np.bincount(labels_of_side, minlength=labels.max() + 1) for labels_of_side in found]
    single = (counts[0] == 1) & (counts[1] == 1)
    # Events are numbered as the student's first tokens are, those of one token before the others.
    events, first = np.unique(found[0], return_index=True)
    events = events[np.lexsort((first, ~single[events]))]
    number = np.full(labels.max() + 1, -1)
    number[events] = np.arange(len(events))
    alone, count = int(single[events].sum()), len(events)
    made = []
    for tokens, labels_of_side, size in zip(sides, found, (student_size, teacher_size), strict=True):
        event_of = np.full(size, count, np.int32)
        event_of[tokens] = number[labels_of_side]
        order = tokens[np.argsort(event_of[tokens], kind="stable")].astype(np.int32)
        made.append(
            Components(order[:alone], order[alone:], event_of[order[alone:]] - alone, event_of, count)
        )
    return made[0], made[1]


def _continuations(
    pieces_of: dict[int, list[int]], size: int, depth: int, open_ends: Collection[tuple[int, int]]
) -> Continuations:
    whole = {tuple(pieces): i for i, pieces in reversed(pieces_of.items())}
    tokens = np.fromiter(pieces_of, np.int32, len(pieces_of))
    first, following = np.full((2, len(tokens), depth + 1), -1, np.int32)
    for place, pieces in enumerate(pieces_of.values()):
        first[place, : len(pieces)] = following[place, : len(pieces)] = pieces[: depth + 1]
        for d in range(1, min(len(pieces), depth + 1)):
            if (whole.get(tuple(pieces[:d]), -1), pieces[d]) in open_ends:
                following[place, d] = -1
    # What counts as the end comes first of a run, and tokens with the same piece stay together in it.
    keys = [column for d in range(depth + 1) for column in (following[:, d], first[:, d])]
    order = np.lexsort((tokens, *keys[::-1]))
    tokens, first, following = tokens[order], first[order], following[order]
    begin, length = np.zeros((2, size, depth), np.int32)
    same = np.ones(max(0, len(tokens) - 1), bool)
    for d in range(1, depth + 1):
        same &= first[1:, d - 1] == first[:-1, d - 1]
        run = np.concatenate([[0], np.cumsum(~same)])[: len(tokens)]
        _, start, count = np.unique(run, return_index=True, return_counts=True)
        # Tokens of a run that all go on with one piece, or all end here, leave nothing to tell apart.
        differs = following[start, d] != following[start + count - 1, d]
        has = first[:, d - 1] >= 0
        begin[tokens[has], d - 1] = start[run][has]
        length[tokens[has], d - 1] = (count * differs)[run][has]
    tables = np.full((2, size, depth + 1), -1, np.int32)
    tables[:, tokens] = first, following
    return Continuations(tokens, tables[0], tables[1], begin, length, max(1, int(length.max(initial=0))))
