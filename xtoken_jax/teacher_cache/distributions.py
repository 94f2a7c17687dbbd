"""What a teacher cache keeps of a model's distributions, and what that loses."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from xtoken_jax.alignment.batch import StoredRows
from xtoken_jax.distributed.mesh import BATCH
from xtoken_jax.losses.blockwise.plan import logits_of, rows_at
from xtoken_jax.losses.blockwise.teacher import stored_logits
from xtoken_jax.losses.math.chunks import next_tokens
from xtoken_jax.losses.math.softmax import soft_capped
from xtoken_jax.losses.math.sorting import largest_with_places
from xtoken_jax.models.decoder import Model, Params


class Keep(NamedTuple):
    """How much is kept of each distribution; hashable.

    Attributes:
        top_k: tokens at most, None for all of them.
        top_p: the fewest likeliest tokens with at least this mass; 1 for no such bound.
        dtype: of the log-probabilities, "float16", "bfloat16" or "float32".
        temperatures: for which the tokens that are not kept are summed up.
    """

    top_k: int | None
    top_p: float
    dtype: str
    temperatures: tuple[float, ...]


class Kept(NamedTuple):
    """What is kept of N positions.

    Attributes:
        ids: int32 [N, k + 1], by falling probability, then the token that comes, where it is not among them;
            V_t where there is none. None where all tokens are kept.
        log_probabilities: [N, k + 1], or [N, V_t] in the order of ids; rounded so that the likeliest token is
            still the only one with the highest.
        tails: float32 [N, M], log of the sum of p^(1 / tau) over the tokens not kept, for each temperature.
        normalizers: float32 [N], logsumexp of the logits.
    """

    ids: jax.Array | None
    log_probabilities: jax.Array
    tails: jax.Array
    normalizers: jax.Array


class Lost(NamedTuple):
    """What that costs, float32 or bool [N].

    Attributes:
        mass: of the tokens that are not kept.
        divergence: KL from the model's distribution to the one that is read back, in nats.
        label: -log p of the token that comes.
        found: whether it is among the likeliest that are kept.
    """

    mass: jax.Array
    divergence: jax.Array
    label: jax.Array
    found: jax.Array


@partial(jax.jit, static_argnames=("model", "keep", "size", "block"))
def distributions(
    model: Model,
    params: Params,
    ids: jax.Array,
    *,
    keep: Keep,
    size: int,
    segments: jax.Array | None = None,
    block: int = 128,
) -> tuple[Kept, Lost]:
    """The model's distributions over the next token, at every position of a batch.

    Args:
        model, params: the teacher.
        ids: int32 [B, T], padded on the right.
        keep: how much of them.
        size: V_t of the tokenizer; the model's logits past it do not count.
        segments: int32 [B, T], the text that a token belongs to; None for one a row.
        block: positions whose logits exist at a time.

    Returns:
        Of the N = B T positions in their order, on a mesh split as the rows are. The last of a row has no
        token that comes.
    """
    hidden, unembedding = model(params, ids, segments=segments)

    def local(hidden: jax.Array, ids: jax.Array, unembedding: jax.Array) -> tuple[Kept, Lost]:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        last = jnp.arange(ids.size, dtype=jnp.int32) % ids.shape[1] == ids.shape[1] - 1
        labels = jnp.where(last, size, next_tokens(ids))

        def of_block(positions: jax.Array) -> tuple[Kept, Lost]:
            logits = logits_of(rows_at(hidden, positions), unembedding)
            logits = soft_capped(logits, model.config.logit_softcap)
            return _of_logits(logits, labels.at[positions].get(mode="clip"), keep)

        blocks = -(-ids.size // block)
        places = jnp.arange(blocks * block, dtype=jnp.int32).reshape(blocks, block)
        kept, lost = jax.lax.map(of_block, places)

        def flat(x: jax.Array) -> jax.Array:
            return x.reshape(blocks * block, *x.shape[2:])[: ids.size]

        return jax.tree.map(flat, (kept, lost))

    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in BATCH if mesh.shape.get(axis, 1) > 1)
    # Cut here: inside, that is an exchange between devices.
    arguments = hidden, ids, unembedding[:size]
    if mesh.empty:
        return local(*arguments)
    rows = PartitionSpec(axes)
    if axes:  # each device its own rows, which blocks of positions would mix
        of_rows = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, rows, PartitionSpec()),
            out_specs=rows,
            axis_names=set(axes),
            check_vma=False,  # nothing is differentiated through it
        )
    else:
        of_rows = local
    return jax.lax.with_sharding_constraint(of_rows(*arguments), rows)


def _of_logits(logits: jax.Array, labels: jax.Array, keep: Keep) -> tuple[Kept, Lost]:
    size = logits.shape[-1]
    highest = logits.max(-1, keepdims=True)
    shifted = logits - highest
    top = logits.argmax(axis=-1, keepdims=True).astype(jnp.int32)
    sums = jax.nn.logsumexp(shifted, axis=-1, keepdims=True)
    log_p, normalizers = shifted - sums, (sums + highest)[:, 0]
    own = -jnp.take_along_axis(log_p, labels[:, None], axis=-1, mode="fill", fill_value=0.0)[:, 0]
    if keep.top_k is None and keep.top_p == 1:
        everything = jnp.full((len(logits), len(keep.temperatures)), -jnp.inf, jnp.float32)
        likeliest = jnp.arange(size, dtype=jnp.int32)[None] == top
        kept = Kept(None, _rounded(log_p, likeliest, keep.dtype), everything, normalizers)
        found = labels < size
        remaining = jnp.zeros(len(logits), jnp.float32)
    else:
        probabilities, ids = largest_with_places(jnp.exp(log_p), min(keep.top_k or size, size))
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        ids = jnp.where((before < keep.top_p) | (keep.top_p == 1), ids, size)
        found = (ids == labels[:, None]).any(-1)
        ids = jnp.concatenate([ids, jnp.where(found, size, labels)[:, None]], axis=1)
        values = jnp.take_along_axis(log_p, ids, axis=-1, mode="fill", fill_value=-jnp.inf)
        values = _rounded(values, ids == top, keep.dtype)
        places = jnp.arange(len(logits), dtype=jnp.int32)[:, None]
        rest = log_p.at[places, ids].set(-jnp.inf, mode="drop")
        tails = jnp.stack([jax.nn.logsumexp(rest / tau, axis=-1) for tau in keep.temperatures], axis=-1)
        kept = Kept(ids, values, tails, normalizers)
        remaining = jnp.exp(rest).sum(-1)
    read = jax.nn.log_softmax(_read_back(kept, size, keep), axis=-1)
    # What is not a number stays so, to be noticed.
    divergence = jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * (log_p - read)).sum(-1)
    return kept, Lost(remaining, divergence, own, found)


def _rounded(log_p: jax.Array, likeliest: jax.Array, dtype: str) -> jax.Array:
    """In fewer bits, the likeliest one step higher where another came out as high.

    Args:
        log_p: float32 [n, m], -inf where there is none.
        likeliest: bool, broadcast to them.
        dtype: of the result.
    """
    values = log_p.astype(dtype)
    others = jnp.where(likeliest, -jnp.inf, values).max(axis=-1, keepdims=True)
    above = jnp.nextafter(others, jnp.zeros_like(others))
    return jnp.where(likeliest & (values <= others), above, values)


def _read_back(kept: Kept, size: int, keep: Keep) -> jax.Array:
    """float32 [n, V_t]: the logits that a loss at temperature 1 gets."""
    tail = kept.tails[:, keep.temperatures.index(1.0)]
    others = tail
    if kept.ids is not None:
        others = tail - jnp.log(jnp.maximum(size - (kept.ids < size).sum(-1), 1).astype(jnp.float32))
    rows = StoredRows(kept.ids, kept.log_probabilities, others, kept.normalizers, size, 1.0)
    one = jax.tree.map(lambda x: x[None], rows)
    return stored_logits(one, 1.0)[0]
