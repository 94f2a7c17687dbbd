"""Two rows of token strings -> chunks by the paper's dynamic program (host, numpy).

For token ids without their text, or tokens whose bytes do not spell it. It compares strings alone
and takes time and memory with the product of the two lengths; where both tokenizers give a text back
byte by byte, `spans.walk` is linear and looks at the place in the text as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

UNIT = 1.5  # every score is a multiple of it, so that the program runs in integers and ties are exact
LONGEST = 32
# What the last step of a path was. From 3 on: the rule that matched.
TEACHER_GAP, STUDENT_GAP, MISMATCH = range(3)
_STEPS = [(0, 1), (1, 0), (1, 1)]
# They stand for no text, or for any.
_NO_COUNTERPART = ("pad", "fim_pad", "unk")


@dataclass(frozen=True)
class TokenAlignment:
    """Two rows of tokens, aligned.

    Attributes:
        student_chunks, teacher_chunks: int32 [T_s], [T_t], the chunk of each token, rising from 0,
            or -1 for a gap.
        chunk_count: C.
        exact: bool [C], both sides of the chunk are the same bytes, or special tokens of one role.
        score: of the whole alignment, gaps included.
    """

    student_chunks: np.ndarray
    teacher_chunks: np.ndarray
    chunk_count: int
    exact: np.ndarray
    score: float


class _Rule(NamedTuple):
    """Runs of `steps` tokens match where they end at i and j with equal keys.

    `student_keys` int32 [T_s + 1] is indexed by the end of a run and is -1 where no run can match,
    `teacher_keys` [T_t + 1] likewise with -2.
    """

    steps: tuple[int, int]
    student_keys: np.ndarray
    teacher_keys: np.ndarray

    @property
    def gain(self) -> int:
        """What a match is worth in units, over gaps of the same tokens."""
        longer = max(self.steps)
        return 4 if longer == 1 else 2 * longer + 1


def align_tokens(
    student: Sequence[bytes | None], teacher: Sequence[bytes | None], *, longest: int = 4
) -> TokenAlignment:
    """The best global alignment of two rows of token strings (X-Token, section 3).

    The score is a sum over equal tokens (+3), a token against k tokens that join to it on either
    side (+1.5 k, 2 <= k <= longest), two different tokens (-3) and gaps (-1.5); the boundary is
    D(i, 0) = -1.5 i, D(0, j) = -1.5 j. A token that is None (special, no bytes) or b"" is a gap.

    Several paths can have the best score. From the end, a match is taken before two different
    tokens, these before a gap, a gap of the student's before one of the teacher's. A cell allows one
    match at most: runs that end at one place and join to the same bytes are the same run. So where
    the chunks of `spans.walk` have the best score, they are the ones found. Two different tokens
    always score as their two gaps do; as a chunk that is not `exact` they keep their place.

    Of runs of one repeated string the best score need not be the walk's: [aaaa a a a a] three times,
    against [a a a a aaaa], scores more shifted by one `aaaa`, which leaves a gap on each side.

    Cost: O(T_s T_t longest), by anti-diagonals, and one byte for each of the (T_s + 1)(T_t + 1)
    cells: about 0.3 s and 20 MB for 4,000 x 5,000 tokens.

    Args:
        student: T_s byte strings or None.
        teacher: T_t byte strings or None.
        longest: tokens that may join, 1 to 32; 1 allows no combination.

    Returns:
        TokenAlignment.

    Raises:
        UserError: `longest` is out of range.

    Example:
        >>> align_tokens([b"201", b"+"], [b"2", b"0", b"1", b"+"]).teacher_chunks.tolist()
        [0, 0, 0, 1]
    """
    return _best_path(student, teacher, _text_rules(student, teacher, longest))


def chunks_of_ids(
    pair: TokenizerPair, student_ids: np.ndarray, teacher_ids: np.ndarray, *, longest: int = 4
) -> TokenAlignment:
    """Align two rows of ids without any text, such as data that was tokenized elsewhere.

    A special token matches the other side's of the same role, whatever they are called: BOS matches
    BOS, EOS matches EOS. Unknown tokens and padding are gaps, and so is a special token without a
    counterpart. Where padding has a second role, such as EOS, cut it off first.

    Args:
        pair: student's and teacher's tokenizer.
        student_ids: int [T_s].
        teacher_ids: int [T_t].
        longest: as for `align_tokens`, which says what is computed and what it costs.

    Raises:
        UserError: an id that its tokenizer does not have, or `longest` is out of range.
    """
    student, student_marks = _pieces(pair.student, student_ids, "student")
    teacher, teacher_marks = _pieces(pair.teacher, teacher_ids, "teacher")
    rules = _text_rules(student, teacher, longest)
    # One rule a role: where one id is both BOS and EOS, it matches either. A marker that is an ordinary
    # added token has bytes, and matches as text as well.
    for role in sorted(student_marks.keys() & teacher_marks.keys()):
        keys = np.where(student_marks[role], 0, -1), np.where(teacher_marks[role], 0, -2)
        rules.append(_Rule((1, 1), *(np.insert(k, 0, -1 - side) for side, k in enumerate(keys))))
    return _best_path(student, teacher, rules)


def _pieces(
    tokenizer: Tokenizer, ids: np.ndarray, side: str
) -> tuple[list[bytes | None], dict[str, np.ndarray]]:
    """The bytes of each token, and for each role that occurs where it does, bool [T]."""
    ids = np.asarray(ids)
    unknown = ids[(ids < 0) | (ids >= tokenizer.size)]
    if len(unknown):
        raise UserError(
            f"{side} id {unknown[0]}: the tokenizer {tokenizer.name} has ids 0 to {tokenizer.size - 1}; "
            "align ids with the tokenizer that made them"
        )
    roles = {role: ids == i for role, i in tokenizer.roles.items() if role not in _NO_COUNTERPART}
    pieces = [tokenizer.token_bytes.table[i] for i in ids.tolist()]
    return pieces, {role: where for role, where in roles.items() if where.any()}


def _text_rules(
    student: Sequence[bytes | None], teacher: Sequence[bytes | None], longest: int
) -> list[_Rule]:
    """Equal tokens and combinations; a rule that matches nowhere is left out."""
    if not 1 <= longest <= LONGEST:
        raise UserError(f"longest={longest}: tokens that may join are 1 to {LONGEST}")
    sides = (student, teacher)
    codes = [{piece: code for code, piece in enumerate(dict.fromkeys(filter(None, side)))} for side in sides]
    rules = []
    for steps in [(1, 1), *((1, k) for k in range(2, longest + 1)), *((k, 1) for k in range(2, longest + 1))]:
        # A run is known by the code of the single token that it may stand for.
        known = codes[0] if steps[0] == 1 else codes[1]
        keys = [
            _run_keys(side, step, known, -1 - s)
            for s, (side, step) in enumerate(zip(sides, steps, strict=True))
        ]
        if len(np.intersect1d(keys[0], keys[1])):
            rules.append(_Rule(steps, *keys))
    return rules


def _run_keys(pieces: Sequence[bytes | None], step: int, codes: dict[bytes, int], none: int) -> np.ndarray:
    """int32 [T + 1]: the code of the `step` pieces that end at each place, `none` where there is none."""
    keys = np.full(len(pieces) + 1, none, np.int32)
    for end in range(step, len(pieces) + 1):
        run = [piece for piece in pieces[end - step : end] if piece]
        if len(run) == step:
            keys[end] = codes.get(b"".join(run), none)
    return keys


def _best_path(
    student: Sequence[bytes | None], teacher: Sequence[bytes | None], rules: list[_Rule]
) -> TokenAlignment:
    rows, columns = len(student), len(teacher)
    gained, moves = _fill(_has_text(student), _has_text(teacher), rules)
    steps = _STEPS + [rule.steps for rule in rules]
    chunks = np.full(rows, -1, np.int32), np.full(columns, -1, np.int32)
    exact: list[bool] = []
    i, j = rows, columns
    while i and j:
        move = moves[i + j][i - max(0, i + j - columns)]
        up, left = steps[move]
        if up and left:
            # Numbered from the end; turned round below.
            chunks[0][i - up : i] = chunks[1][j - left : j] = len(exact)
            exact.append(move != MISMATCH)
        i, j = i - up, j - left
    for side in chunks:
        side[side >= 0] = len(exact) - 1 - side[side >= 0]
    score = UNIT * (gained - rows - columns)
    return TokenAlignment(*chunks, len(exact), np.array(exact[::-1], bool), score)


def _has_text(pieces: Iterable[bytes | None]) -> np.ndarray:
    """bool [T + 1], by the end of each token."""
    return np.array([False, *(bool(piece) for piece in pieces)])


def _fill(
    student_text: np.ndarray, teacher_text: np.ndarray, rules: list[_Rule]
) -> tuple[int, list[np.ndarray]]:
    """The best score and the last move of every cell, diagonal by diagonal.

    Scores are E = D / 1.5 + i + j: what is gained over nothing but gaps. Then the boundary is 0, a gap
    or two different tokens add 0, equal tokens 4, and a combination of k adds 2 k + 1.

    Returns:
        E(T_s, T_t), and for each i + j the int8 moves of its cells, by i from max(0, i + j - T_t).
    """
    rows, columns = len(student_text) - 1, len(teacher_text) - 1
    # Cell (i, d - i) needs the teacher's keys backwards.
    backwards = [rule.teacher_keys[::-1].copy() for rule in rules]
    teacher_text = teacher_text[::-1].copy()
    depth = 1 + max([2, *(sum(rule.steps) for rule in rules)])
    # Past diagonals, by i; what lies outside the table is never read, since no key allows it.
    scores = [np.zeros(rows + 1, np.int32) for _ in range(depth)]
    moves = []
    for d in range(rows + columns + 1):
        past = [scores[(d - back) % depth] for back in range(depth)]
        score = past[0]
        low, high = max(0, d - columns), min(rows, d)
        move = np.full(high - low + 1, TEACHER_GAP, np.int8)
        # Off the boundary, where the score stays 0.
        first, last = max(low, 1), min(high, d - 1)
        score[low : high + 1] = 0
        moves.append(move)
        if first > last:
            continue
        inner = slice(first, last + 1)
        above = slice(first - 1, last)
        mirrored = slice(columns - d + first, columns - d + last + 1)
        best = score[inner]
        here = move[first - low : last - low + 1]
        np.maximum(past[1][above], past[1][inner], out=best)
        here[past[1][above] == best] = STUDENT_GAP
        here[(past[2][above] == best) & student_text[inner] & teacher_text[mirrored]] = MISMATCH
        for number, (rule, teacher_keys) in enumerate(zip(rules, backwards, strict=True), start=len(_STEPS)):
            hits = np.flatnonzero(rule.student_keys[inner] == teacher_keys[mirrored])
            if not len(hits):
                continue
            up, left = rule.steps
            candidate = past[up + left][hits + (first - up)] + rule.gain
            kept = candidate >= best[hits]
            hits = hits[kept]
            best[hits] = candidate[kept]
            here[hits] = number
    return int(scores[(rows + columns) % depth][rows]), moves
