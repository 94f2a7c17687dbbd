"""Share of prompts that a model completes with the right answer."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.alignment.align import pad
from xtoken_jax.data.arithmetic import Problem
from xtoken_jax.evaluate.rows import in_batches
from xtoken_jax.models.decoder import Model, Params, logits
from xtoken_jax.tokens.tokenizer import Tokenizer


def exact_match(
    model: Model, params: Params, tokenizer: Tokenizer, problems: Sequence[Problem], *, batch_size: int
) -> float:
    """Greedy completion up to the end of the line, equal to the answer.

    Args:
        problems: prompts and right answers; a prompt opens a document.
        batch_size: prompts completed together.

    Returns:
        Share in [0, 1].
    """
    opening = [tokenizer.roles["bos"]] if tokenizer.adds_bos else []
    prompts = [np.concatenate([opening, tokenizer.encode(p.prompt)]).astype(np.int32) for p in problems]
    # One token more than the longest answer has, for the line's end.
    new = 1 + max(len(tokenizer.encode(p.answer)) for p in problems)
    length = max(map(len, prompts)) + new
    completed: list[str] = []
    for batch in in_batches(prompts, batch_size):
        starts = np.array([max(len(row), 1) for row in batch], np.int32)
        padded = pad(batch, length, tokenizer.pad_id)
        ids = np.asarray(_complete(model, params, padded, starts, new, tokenizer.size))
        completed += [tokenizer.decode(row[s : s + new]) for row, s in zip(ids, starts.tolist(), strict=True)]
    right = [text.split("\n")[0] == p.answer for text, p in zip(completed, problems, strict=False)]
    return sum(right) / len(problems)


@functools.partial(jax.jit, static_argnames=("model", "new", "size"))
def _complete(
    model: Model, params: Params, ids: jax.Array, starts: jax.Array, new: int, size: int
) -> jax.Array:
    """Write `new` most likely tokens behind each row's prompt; ids int32 [B, T], starts int32 [B]."""
    rows = jnp.arange(ids.shape[0])

    def one(place: int, ids: jax.Array) -> jax.Array:
        hidden, unembedding = model(params, ids)
        last = hidden[rows, starts + place - 1][:, None, :]
        scores = logits(last, unembedding, softcap=model.config.logit_softcap)[:, 0, :size]
        chosen = jnp.argmax(scores, axis=-1)
        return ids.at[rows, starts + place].set(chosen.astype(ids.dtype))

    return jax.lax.fori_loop(0, new, one, ids)
