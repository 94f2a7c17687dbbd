"""Tokens that end a text or an assistant's turn in the training text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from xtoken_jax.data.encode import Document, encode, student_of
from xtoken_jax.data.records import Marked
from xtoken_jax.tokens.roles import TURN_ENDS
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

_SAMPLE = 64  # documents of each source
# Markers inside a turn: where a target stops at one of these, the turn was not over.
_INSIDE = (
    "think_open", "think_close", "tool_calls_open", "tool_calls_close", "tool_call_open", "tool_call_close",
)  # fmt: skip


def learnt_ends(tokenizer: Tokenizer, texts: Mapping[str, Sequence[Document]]) -> list[int]:
    """Ids of the added tokens at which targets stop, in rising order: EOS, the end of a turn.

    Args:
        tokenizer: the student's.
        texts: training documents by source; the first 64 of each are encoded.
    """
    pairs = {"student": TokenizerPair(tokenizer, tokenizer)}
    added = set(tokenizer.backend.get_added_tokens_decoder())
    added -= {tokenizer.roles[role] for role in _INSIDE if role in tokenizer.roles}
    turn_ends = {i for i in added if tokenizer.backend.id_to_token(i) in TURN_ENDS}
    ends: set[int] = set()
    for documents in texts.values():
        sample = documents[:_SAMPLE]
        for document, row in zip(sample, encode(pairs, sample), strict=True):
            side = student_of(row)
            if isinstance(document, Marked):  # all of it is a target, so turns end within
                ends |= turn_ends.intersection(side.ids.tolist())
            stops = side.targets & ~np.append(side.targets[1:], False)
            ends.update(side.ids[stops].tolist())
    return sorted(ends & added)
