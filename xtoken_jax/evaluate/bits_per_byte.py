"""Bits per byte: the cost of a text under a model, comparable across tokenizers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.alignment.align import pad
from xtoken_jax.distributed.mesh import whole
from xtoken_jax.errors import NonFiniteOutputsError
from xtoken_jax.evaluate.rows import in_batches
from xtoken_jax.losses import next_token_cross_entropy
from xtoken_jax.models.decoder import Model, Params, logits
from xtoken_jax.tokens.tokenizer import Tokenizer


def bits_per_byte(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    rows: Sequence[np.ndarray],
    *,
    batch_size: int,
    length: int,
    targets: Sequence[np.ndarray] | None = None,
    between: Callable[[], None] | None = None,
) -> float:
    """Total -log2 p of the tokens after each row's first, over the bytes that these tokens spell.

    Of prompts with completions and of conversations only what is to be learnt is measured, behind all that
    stands before it: completions, the turns of the assistant and what ends them. Where two tokenizers cut
    such a text differently at the border to the prompt, they differ by that one token's bytes.

    Args:
        model, params: what to measure.
        tokenizer: the model's; special tokens cost bits but spell no bytes.
        rows: ids of each row, int32 [<= length].
        batch_size, length: the shape of what the model is run on.
        targets: bool [<= length] of each row, the tokens that are measured; all of them by default.
        between: called before each batch; what it raises breaks off.

    Returns:
        Bits per byte of text.

    Raises:
        NonFiniteOutputsError: at a token that is measured, logits are NaN or +inf, or all of them -inf.
    """
    nats, count = 0.0, 0
    if targets is None:
        targets = [np.ones(len(row), bool) for row in rows]
    chosen = in_batches(targets, batch_size)
    for batch, measured in zip(in_batches(rows, batch_size), chosen, strict=True):
        if between is not None:
            between()
        ids, mask = pad(batch, length, tokenizer.pad_id), pad(measured, length, False)
        cost, finite = _nats(model, params, ids, mask, tokenizer.size)
        if not finite:
            raise NonFiniteOutputsError(
                f"{tokenizer.name}: the model's outputs are not finite on this text; the checkpoint is "
                f"damaged or needs wider numbers than {model.compute_dtype}"
            )
        nats += float(cost)
        count += int((tokenizer.token_bytes.lengths[ids] * mask)[:, 1:].sum())
    return nats / math.log(2) / max(count, 1)


@functools.partial(jax.jit, static_argnames=("model", "size"))
def _nats(
    model: Model, params: Params, ids: jax.Array, mask: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """The cost of all tokens in `mask`, and whether the logits that it is made of are finite."""
    scores = logits(*model(params, ids), softcap=model.config.logit_softcap)[..., :size]
    values, counted = next_token_cross_entropy(scores, ids, mask)
    # Added up by each device alone: an exchange between processes adds in another order.
    cost = jnp.sum(whole(jnp.where(counted, values, 0.0)))
    finite = jnp.isfinite(scores[:, :-1].max(axis=-1))
    return cost, whole(jnp.all(finite | ~counted))
