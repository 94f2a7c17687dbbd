"""GOLD and H-KL: one loss, over two partitions of the vocabularies."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.chunks import mean_by_chunk, valid_chunks
from xtoken_jax.losses.divergence import kl_terms
from xtoken_jax.projection.matrix import Array, Partition


class HybridTerms(NamedTuple):
    """The two parts of the loss, float32 [B, C] each, times tau^2."""

    common: jax.Array
    uncommon: jax.Array


def hybrid_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    partition: Partition,
    *,
    temperature: float = 1.0,
    uncommon_top_k: int = 8192,
    direction: str = "forward",
    common_weight: float = 1.0,
    uncommon_weight: float = 1.0,
) -> jax.Array:
    """GOLD with `Partition.strict`, H-KL with `Partition.relaxed`, for every chunk.

    The weighted sum of `hybrid_terms`; see there for arguments and formula.

    Returns:
        float32 [B, C], times tau^2; 0 for chunks outside `valid_chunks(alignment)`.
    """
    terms = hybrid_terms(
        student_logits,
        teacher_logits,
        alignment,
        partition,
        temperature=temperature,
        uncommon_top_k=uncommon_top_k,
        direction=direction,
    )
    return common_weight * terms.common + uncommon_weight * terms.uncommon


def hybrid_terms(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    partition: Partition,
    *,
    temperature: float = 1.0,
    uncommon_top_k: int = 8192,
    direction: str = "forward",
) -> HybridTerms:
    """KL on common pairs and sorted L1 on the rest (GOLD; X-Token, section 4).

    s and t are the chunk means of log_softmax(z / tau) over the full vocabularies.
    common = sum over pairs of exp(t) (t - s), not re-normalized; uncommon = sum of
    |difference| of the u largest uncommon probabilities of each side, sorted,
    u = min(|U_s|, |U_t|, uncommon_top_k).

    Args:
        student_logits: float [B, T_s, >= V_s]; columns past the partition's ids do not count.
        teacher_logits: float [B, T_t, >= V_t].
        alignment: chunk ids of tokens and `valid` [B, C].
        partition: common pairs and the rest, which together are all ids of both tokenizers.
        temperature: tau > 0.
        uncommon_top_k: entries of the sorted comparison at most.
        direction: of the common KL.

    Returns:
        HybridTerms.
    """
    count = alignment.valid.shape[1]
    common_count = partition.common_student.shape[0]

    def chunk_means(logits: jax.Array, size: int, chunks: Array) -> jax.Array:
        logits = jnp.asarray(logits[..., :size], jnp.float32) / temperature
        return mean_by_chunk(jax.nn.log_softmax(logits, axis=-1), jnp.asarray(chunks), count)

    student_size = common_count + partition.uncommon_student.shape[0]
    teacher_size = common_count + partition.uncommon_teacher.shape[0]
    student = chunk_means(student_logits, student_size, alignment.student_chunks)
    teacher = chunk_means(teacher_logits, teacher_size, alignment.teacher_chunks)

    common = kl_terms(
        teacher[..., partition.common_teacher], student[..., partition.common_student], direction
    ).sum(-1)
    largest = min(partition.uncommon_student.shape[0], partition.uncommon_teacher.shape[0], uncommon_top_k)
    sides = ((student, partition.uncommon_student), (teacher, partition.uncommon_teacher))
    tops = [jax.lax.top_k(jnp.exp(side[..., ids]), largest)[0] for side, ids in sides]
    uncommon = jnp.abs(tops[0] - tops[1]).sum(-1)

    valid = valid_chunks(alignment)
    return HybridTerms(*(jnp.where(valid, part * temperature**2, 0.0) for part in (common, uncommon)))
