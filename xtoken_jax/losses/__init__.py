"""Distillation losses as pure functions of arrays; they need nothing but jax."""

from xtoken_jax.losses.blockwise.loss import BlockwiseLoss, blockwise_loss
from xtoken_jax.losses.config import LossConfig, LossKind, Score, TeachersConfig, TeachersMode
from xtoken_jax.losses.math.chunks import valid_chunks
from xtoken_jax.losses.math.reduce import masked_mean
from xtoken_jax.losses.teachers import (
    TeacherScores,
    TeacherTerm,
    average_logits,
    blockwise_teacher_scores,
    combine_teachers,
    teacher_scores,
)
from xtoken_jax.losses.terms.alm import likelihood_matching
from xtoken_jax.losses.terms.hybrid_kl import HybridTerms, hybrid_kl, hybrid_terms
from xtoken_jax.losses.terms.prefix_kl import prefix_kl
from xtoken_jax.losses.terms.projection_kl import projection_kl
from xtoken_jax.losses.terms.same_vocabulary import (
    next_token_cross_entropy,
    same_vocabulary_kl,
    same_vocabulary_kl_by_chunk,
)
from xtoken_jax.losses.terms.uld import rank_l1
from xtoken_jax.losses.total import (
    distillation_loss,
    dynamic_scale,
    kd_scale_capped,
    loss_tables,
    total_loss,
)
from xtoken_jax.losses.vocab_parallel.losses import (
    vocab_parallel_cross_entropy,
    vocab_parallel_hybrid_kl,
    vocab_parallel_hybrid_terms,
    vocab_parallel_likelihood_matching,
    vocab_parallel_prefix_kl,
    vocab_parallel_projection_kl,
)

__all__ = [
    "BlockwiseLoss",
    "HybridTerms",
    "LossConfig",
    "LossKind",
    "Score",
    "TeacherScores",
    "TeacherTerm",
    "TeachersConfig",
    "TeachersMode",
    "average_logits",
    "blockwise_loss",
    "blockwise_teacher_scores",
    "combine_teachers",
    "distillation_loss",
    "dynamic_scale",
    "hybrid_kl",
    "hybrid_terms",
    "kd_scale_capped",
    "likelihood_matching",
    "loss_tables",
    "masked_mean",
    "next_token_cross_entropy",
    "prefix_kl",
    "projection_kl",
    "rank_l1",
    "same_vocabulary_kl",
    "same_vocabulary_kl_by_chunk",
    "teacher_scores",
    "total_loss",
    "valid_chunks",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_hybrid_kl",
    "vocab_parallel_hybrid_terms",
    "vocab_parallel_likelihood_matching",
    "vocab_parallel_prefix_kl",
    "vocab_parallel_projection_kl",
]


def __dir__() -> list[str]:
    """The public names, for `dir` and completion."""
    return sorted(__all__)
