"""Which tokens of two vocabularies are the same (host, numpy)."""

from __future__ import annotations

import numpy as np

from xtoken_jax.projection.build import written
from xtoken_jax.projection.special import role_pairs
from xtoken_jax.tokens.tokenizer import TokenizerPair


def partners_of_teacher(pair: TokenizerPair) -> np.ndarray:
    """int32 [V_t]: the student's token of the same role, else (lowest id) of the same bytes; -1 for none."""
    by_bytes = {content: i for i, content in reversed(written(pair.student).items())}
    found = np.full(pair.teacher.size, -1, np.int32)
    for j, content in written(pair.teacher).items():
        found[j] = by_bytes.get(content, -1)
    for i, j in sorted(role_pairs(pair).items(), reverse=True):
        found[j] = i
    return found
