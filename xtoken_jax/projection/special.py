"""Which special tokens of two tokenizers stand for each other."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from xtoken_jax.tokens.roles import CONFIGURED
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

SIMILARITY_THRESHOLD, SIMILARITY_WEIGHT = 0.3, 0.8


def role_pairs(pair: TokenizerPair) -> dict[int, int]:
    """Student id -> teacher id of tokens with the same role on both sides (X-Token, section 4).

    A role counts where its token is special or was added to the vocabulary. An ordinary word
    that a folder names as its EOS stays text, which both sides write and read as such.
    """
    partners: dict[int, int] = {}
    student, teacher = _markers(pair.student), _markers(pair.teacher)
    shared = pair.student.roles.keys() & pair.teacher.roles.keys()
    # Where one id plays several roles the last one decides: EOS, the one that is predicted.
    for role in (*sorted(shared - {*CONFIGURED}), *(role for role in CONFIGURED if role in shared)):
        i, j = pair.student.roles[role], pair.teacher.roles[role]
        if i in student and j in teacher:
            partners[i] = j
    return partners


def similar_pairs(pair: TokenizerPair, matched: dict[int, int]) -> Iterator[tuple[int, int, float]]:
    """(student id, teacher id, weight) of special tokens spelled alike (official tool, an option).

    similarity = 0.6 * ratio of the letters in common + 0.4 * Jaccard index of the words longer
    than 2 letters; from 0.3 on it gives an entry of weight 0.8 * similarity.

    Args:
        pair: student's and teacher's tokenizer.
        matched: student ids that have a partner by role; they are left out.
    """
    teacher = [(j, spelling, _words(spelling)) for j, spelling in _special(pair.teacher)]
    for i, spelling in _special(pair.student):
        if i in matched:
            continue
        words = _words(spelling)
        for j, other, others in teacher:
            either = words | others
            jaccard = len(words & others) / len(either) if either else 0.0
            similarity = 0.6 * difflib.SequenceMatcher(None, spelling, other).ratio() + 0.4 * jaccard
            if similarity >= SIMILARITY_THRESHOLD:
                yield i, j, SIMILARITY_WEIGHT * similarity


def _markers(tokenizer: Tokenizer) -> set[int]:
    """Ids that may play a role: special tokens and added ones, without those that are unused."""
    tokens = tokenizer.token_bytes
    return {*tokens.special, *tokenizer.backend.get_added_tokens_decoder()} - tokens.unused


def _special(tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    tokens = tokenizer.token_bytes
    for token_id in sorted(tokens.special - tokens.unused):
        yield token_id, tokenizer.backend.id_to_token(token_id) or ""


def _words(spelling: str) -> set[str]:
    return {word for word in re.sub(r"[<>|_]", " ", spelling.lower()).split() if len(word) > 2}
