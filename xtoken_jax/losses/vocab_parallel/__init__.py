"""Losses for logits whose vocabulary is split over a mesh axis: a library for models that keep it split.

The training step of this package does not use them: it reads hidden states block by block instead.
"""

from xtoken_jax.losses.vocab_parallel.losses import (
    vocab_parallel_cross_entropy,
    vocab_parallel_hybrid_kl,
    vocab_parallel_hybrid_terms,
    vocab_parallel_likelihood_matching,
    vocab_parallel_prefix_kl,
    vocab_parallel_projection_kl,
)

__all__ = [
    "vocab_parallel_cross_entropy",
    "vocab_parallel_hybrid_kl",
    "vocab_parallel_hybrid_terms",
    "vocab_parallel_likelihood_matching",
    "vocab_parallel_prefix_kl",
    "vocab_parallel_projection_kl",
]
