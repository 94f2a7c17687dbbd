"""The alignment of a batch and a teacher's stored distributions, as arrays of static shape (jax only)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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

    def __repr__(self) -> str:
        student, teacher, valid = (
            getattr(x, "shape", "?") for x in (self.student_chunks, self.teacher_chunks, self.valid)
        )
        return f"Alignment(student_chunks {student}, teacher_chunks {teacher}, valid {valid})"


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

    def __repr__(self) -> str:
        return f"TokenRows({getattr(self.ids, 'shape', '?')}: ids, mask, targets, segments)"


@jax.tree_util.register_pytree_node_class
class AlignedBatch(tuple[Any, Any, Alignment]):
    """Both sides of a batch and their alignment: all that a loss reads besides logits and W.

    It unpacks as (student_ids, teacher_ids, alignment), and is a pytree.

    Attributes:
        student, teacher: TokenRows of each side. `mask` says where there is a token and not padding,
            `targets` which tokens are labels of the cross-entropy.
        alignment: which chunk every token belongs to.
    """

    student: TokenRows
    teacher: TokenRows
    alignment: Alignment

    def __new__(cls, student: TokenRows, teacher: TokenRows, alignment: Alignment) -> AlignedBatch:
        """From both sides and their alignment."""
        batch = super().__new__(cls, (student.ids, teacher.ids, alignment))
        batch.student, batch.teacher, batch.alignment = student, teacher, alignment
        return batch

    def tree_flatten(self) -> tuple[tuple[TokenRows, TokenRows, Alignment], None]:
        """The parts, for jax."""
        return (self.student, self.teacher, self.alignment), None

    @classmethod
    def tree_unflatten(cls, _: None, parts: tuple[Any, Any, Any]) -> AlignedBatch:
        """The batch of these parts; while jax looks at a structure they may be anything."""
        student_ids, teacher_ids = (getattr(side, "ids", None) for side in parts[:2])
        batch = super().__new__(cls, (student_ids, teacher_ids, parts[2]))
        batch.student, batch.teacher, batch.alignment = parts
        return batch

    def __repr__(self) -> str:
        student, teacher = (getattr(ids, "shape", "?") for ids in self[:2])
        return f"AlignedBatch(student ids {student}, teacher ids {teacher}, {self.alignment!r})"


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
