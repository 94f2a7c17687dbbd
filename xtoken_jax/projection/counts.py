"""What the rows of a W are made of."""

from __future__ import annotations

import numpy as np

from xtoken_jax.projection.matrix import Projection
from xtoken_jax.projection.special import role_pairs
from xtoken_jax.tokens.tokenizer import TokenizerPair


def count_rows(pair: TokenizerPair, projection: Projection) -> dict[str, int]:
    """How many rows of W are of each kind; every row is of one.

    Returns:
        "bytes": the entry is the teacher's token of the same bytes; "role": the special or
        added token of the same role; "similar": a special token's, by its spelling;
        "repeated": one entry that is no equal, such as `222` written `2` `2` `2` (it would pass
        for one if only weights were read); "several": more entries; "empty".
    """
    indices = np.asarray(projection.indices)
    table, special = pair.student.token_bytes.table, pair.student.token_bytes.special
    partners = role_pairs(pair)
    kinds = dict.fromkeys(("bytes", "role", "similar", "repeated", "several", "empty"), 0)
    for i, (filled, first) in enumerate(zip((indices >= 0).sum(1), indices[:, 0].tolist(), strict=True)):
        if filled == 0:
            kind = "empty"
        elif partners.get(i) == first:
            kind = "role"
        elif i in special:
            kind = "similar"
        elif filled > 1:
            kind = "several"
        else:
            kind = "bytes" if table[i] == pair.teacher.token_bytes.table[first] else "repeated"
        kinds[kind] += 1
    return kinds
