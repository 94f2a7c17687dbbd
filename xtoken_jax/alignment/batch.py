"""The alignment of a batch and a teacher's stored distributions, as arrays of static shape (jax only)."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Alignment:
    """Which chunk every token of a batch belongs to.

    Attributes:
        student_chunks: int32 [B, T_s], chunk ids of *tokens*, -1 for none. The losses make
            the next-token shift themselves.
        teacher_chunks: int32 [B, T_t].
        valid: bool [B, C], chunks that take part; C is at least the highest id + 1.
    """

    student_chunks: jax.Array | np.ndarray
    teacher_chunks: jax.Array | np.ndarray
    valid: jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRows:
    """One side of a batch; numpy arrays until they are put on devices.

    Attributes:
        ids: int32 [B, T].
        mask: bool [B, T], True where there is a token and not padding.
        targets: bool [B, T], the tokens whose prediction is to be learnt: not padding, not a
            prompt, not the first of a document.
        segments: int32 [B, T], the document of the row that a token belongs to, from 1; 0 for padding.
    """

    ids: jax.Array
    mask: jax.Array
    targets: jax.Array
    segments: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoredRows:
    """What a teacher cache holds of a batch: at each position the likeliest tokens, and what is beyond them.

    Attributes:
        ids: int32 [B, T, k], tokens that are kept, in any order, `size` or more where there are fewer; None
            where all are kept, in the order of their ids.
        log_probabilities: float [B, T, k], log_softmax of the teacher's logits; k = V_t without ids.
        others: float32 [B, T], log p^(1 / tau) of each token not kept, as if they were equally likely:
            the sum of their p^(1 / tau) is the teacher's own. Not read without ids.
        normalizers: float32 [B, T], logsumexp of the logits, which log-probabilities have lost.
        size: V_t of the tokenizer.
        temperature: tau.
    """

    ids: jax.Array | None
    log_probabilities: jax.Array
    others: jax.Array
    normalizers: jax.Array
    size: int = field(metadata={"static": True})
    temperature: float = field(metadata={"static": True})


def next_token_chunks(chunks: jax.Array) -> jax.Array:
    """Chunk ids by position: the logits at position p belong to the chunk of token p + 1.

    Args:
        chunks: int32 [B, T], by token.

    Returns:
        int32 [B, T]; the last position predicts nothing and gets -1.
    """
    return jnp.concatenate([chunks[:, 1:], jnp.full_like(chunks[:, :1], -1)], axis=1)
