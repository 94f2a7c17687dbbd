"""Losses from hidden states, one block of positions at a time."""

from xtoken_jax.losses.blockwise.loss import BlockwiseLoss, blockwise_loss

__all__ = ["BlockwiseLoss", "blockwise_loss"]
