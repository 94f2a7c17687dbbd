"""P-KL, GOLD, H-KL, ALM, prefix KL and cross-entropy of logits whose vocabulary is split over a mesh axis.

The values and gradients of `projection_kl`, `hybrid_kl`, `likelihood_matching`, `prefix_kl` and
`next_token_cross_entropy`, for a model whose unembedding is split: no device ever holds the whole
vocabulary of its rows.

Forward and backward are programs of their own, with the collectives written out, and a `custom_vjp`
stands around the two: nothing is differentiated through a collective, and what is kept in between is
chosen. `shard_map` still checks by types that what is declared whole on every device is so. All
exchange vectors [N] for log-normalizers; ALM and cross-entropy nothing else. Beyond that, for every chunk:

P-KL: both sides at the k chosen columns are summed by reduce-scatter, so that a device compares k / n
of them; the gradient at the columns is gathered. 3 k numbers, against the V_s + V_t of gathered logits.

GOLD and H-KL: an all-to-all makes a block of chunks with 1/n of the vocabularies into 1/n of the chunks
with the vocabularies whole, there the plain loss is taken, and its slope goes back the same way:
(2 V_s + V_t) / n numbers.

Prefix KL: the same for its events; and for every token inside a chunk after which something is compared,
3 L numbers, L the most tokens that begin alike.

N is a device's own positions, n the devices on the vocabulary's axis.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.distributed.mesh import BATCH
from xtoken_jax.losses.checks import check_mesh, check_settings
from xtoken_jax.losses.math.chunks import next_tokens, valid_chunks
from xtoken_jax.losses.terms.alm import check_likelihood, matched_chunks
from xtoken_jax.losses.terms.hybrid_kl import HybridTerms, check_hybrid, weighed_terms
from xtoken_jax.losses.terms.prefix_kl import check_prefix
from xtoken_jax.losses.terms.projection_kl import check_projection
from xtoken_jax.losses.terms.same_vocabulary import check_labels
from xtoken_jax.losses.vocab_parallel.alm import next_token_log_softmax
from xtoken_jax.losses.vocab_parallel.hybrid_kl import HybridSetting, hybrid
from xtoken_jax.losses.vocab_parallel.prefix_kl import PrefixRows, PrefixSetting, prefix
from xtoken_jax.losses.vocab_parallel.projection_kl import ProjectionSetting, p_kl
from xtoken_jax.losses.vocab_parallel.shards import Layout, Rows, scaled
from xtoken_jax.projection.events import PrefixTables
from xtoken_jax.projection.matrix import LearnableProjection, Partition, Projection
from xtoken_jax.projection.sharded import ShardedProjection


def vocab_parallel_projection_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    projection: ShardedProjection | Projection | LearnableProjection,
    *,
    mesh: Mesh,
    axis: str = "tensor",
    data_axes: tuple[str, ...] = BATCH,
    block: int = 64,
    temperature: float = 1.0,
    top_k: int | None = 8192,
    direction: str = "forward",
    beta: float = 0.5,
    merge: str = "mean",
    student_ids: jax.Array | None = None,
    teacher_ids: jax.Array | None = None,
    teacher_mask: jax.Array | None = None,
) -> jax.Array:
    """`projection_kl` over a split vocabulary (X-Token, arXiv 2605.21699, section 4).

    Args:
        student_logits: float [B, T_s, >= V_s], rows over `data_axes`, the vocabulary over `axis`. A
            width that the axis does not divide is padded.
        teacher_logits: float [B, T_t, >= V_t], likewise. They get no gradient.
        alignment: rows over `data_axes`.
        projection: W, best by `shard_projection(..., rows=` the width of the student's logits `)`; other
            rows are laid out anew. A learnable one gets its gradient.
        mesh: with all of these axes.
        block: chunks of a device's rows that are exchanged at once.
        temperature, top_k, direction, beta, merge, student_ids, teacher_ids, teacher_mask: as in
            `projection_kl`; `top_k` counts over the whole batch here as well.

    Returns:
        float32 [B, C], times tau^2; 0 for chunks outside `valid_chunks(alignment)`.

    Raises:
        ValueError: as `projection_kl`, or rows that the data axes do not divide.
    """
    check_mesh(mesh, axis, data_axes)
    check_projection(
        student_logits, teacher_logits, alignment, projection, merge=merge, student_ids=student_ids,
        teacher_ids=teacher_ids, teacher_mask=teacher_mask, temperature=temperature, top_k=top_k,
        direction=direction, beta=beta, block=block,
    )  # fmt: skip
    learn = isinstance(projection, LearnableProjection)
    if isinstance(projection, ShardedProjection):
        learn = projection.logits is not None
        w = projection.current()
    else:
        w = projection.projection() if isinstance(projection, LearnableProjection) else projection
    layout = Layout(mesh, axis, tuple(data_axes))
    student, teacher = layout.padded(student_logits), layout.padded(teacher_logits)
    teacher_size = teacher_logits.shape[-1] if projection.teacher_size is None else projection.teacher_size
    setting = ProjectionSetting(
        layout,
        alignment.valid.shape[1],
        merge,
        direction,
        beta,
        temperature,
        projection.student_size,
        teacher_size,
        layout.block(block, alignment.valid.size),
        teacher_size if top_k is None else min(top_k, teacher_size),
        learn,
    )
    indices = _with_rows(jnp.asarray(w.indices), student.shape[-1], -1)
    weights = _with_rows(jnp.asarray(w.weights), student.shape[-1], 0)
    rows = Rows.of(alignment, None, teacher_ids if merge in ("first", "last") else None, teacher_mask)
    values = p_kl(setting, student, weights, jax.lax.stop_gradient(teacher), indices, rows)
    return jnp.where(valid_chunks(alignment), values * temperature**2, 0.0)


def vocab_parallel_hybrid_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    partition: Partition,
    *,
    common_weight: float | None = 1.0,
    uncommon_weight: float | None = 1.0,
    **options: Any,
) -> jax.Array:
    """`hybrid_kl` over a split vocabulary: GOLD with `Partition.strict`, H-KL with `Partition.relaxed`.

    Takes what `vocab_parallel_hybrid_terms` takes, and weights as `hybrid_kl`.

    Returns:
        float32 [B, C], times tau^2; 0 for chunks outside `valid_chunks(alignment)`.
    """
    check_settings(common_weight=common_weight, uncommon_weight=uncommon_weight)
    terms = vocab_parallel_hybrid_terms(student_logits, teacher_logits, alignment, partition, **options)
    weighed = weighed_terms(terms, partition, common_weight, uncommon_weight)
    return weighed.common + weighed.uncommon


def vocab_parallel_hybrid_terms(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    partition: Partition,
    *,
    mesh: Mesh,
    axis: str = "tensor",
    data_axes: tuple[str, ...] = BATCH,
    block: int = 64,
    temperature: float = 1.0,
    uncommon_top_k: int = 8192,
    direction: str = "forward",
    beta: float = 0.5,
    merge: str = "mean",
    student_ids: jax.Array | None = None,
    teacher_ids: jax.Array | None = None,
) -> HybridTerms:
    """`hybrid_terms` over a split vocabulary.

    Args:
        student_logits, teacher_logits, alignment, mesh: as in `vocab_parallel_projection_kl`.
        partition: whole on every device; it is as long as the two vocabularies.
        block: chunks of a device's rows that are exchanged at once, rounded up to a multiple of the
            axis's n devices. A device then holds block / n of them with all of V_s and V_t.
        temperature, uncommon_top_k, direction, beta, merge, student_ids, teacher_ids: as in
            `hybrid_terms`.

    Returns:
        HybridTerms.

    Raises:
        ValueError: as `hybrid_terms`, or rows that the data axes do not divide.
    """
    check_mesh(mesh, axis, data_axes)
    check_hybrid(
        student_logits, teacher_logits, alignment, partition, temperature=temperature, merge=merge,
        uncommon_top_k=uncommon_top_k, direction=direction, beta=beta, student_ids=student_ids,
        teacher_ids=teacher_ids, block=block,
    )  # fmt: skip
    layout = Layout(mesh, axis, tuple(data_axes))
    student, teacher = layout.padded(student_logits), layout.padded(teacher_logits)
    setting = HybridSetting(
        layout,
        alignment.valid.shape[1],
        merge,
        direction,
        beta,
        temperature,
        partition.student_size,
        partition.teacher_size,
        layout.block(block, alignment.valid.size),
        uncommon_top_k,
    )
    ids = (None, None) if merge == "mean" else (student_ids, teacher_ids)
    rows = Rows.of(alignment, *ids)
    parts = hybrid(setting, student, jax.lax.stop_gradient(teacher), rows, partition)
    valid = valid_chunks(alignment)
    return HybridTerms(*(jnp.where(valid, part * temperature**2, 0.0) for part in parts))


def vocab_parallel_likelihood_matching(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    *,
    student_ids: jax.Array,
    teacher_ids: jax.Array,
    mesh: Mesh,
    axis: str = "tensor",
    data_axes: tuple[str, ...] = BATCH,
    likelihood_temperature: float = 100.0,
    student_size: int | None = None,
    teacher_size: int | None = None,
) -> jax.Array:
    """`likelihood_matching` over a split vocabulary (ALM, arXiv 2503.20083, section 3).

    Args:
        student_logits, teacher_logits, alignment, mesh: as in `vocab_parallel_projection_kl`.
        student_ids, teacher_ids, likelihood_temperature, student_size, teacher_size: as in
            `likelihood_matching`.

    Returns:
        float32 [B, C]; 0 for chunks outside `valid_chunks(alignment)`.

    Raises:
        ValueError: rows that the data axes do not divide.
    """
    check_mesh(mesh, axis, data_axes)
    check_likelihood(
        student_logits, teacher_logits, alignment, student_ids, teacher_ids, likelihood_temperature,
        (student_size, teacher_size),
    )  # fmt: skip
    layout = Layout(mesh, axis, tuple(data_axes))

    def log_p(logits: jax.Array, ids: jax.Array, size: int | None) -> jax.Array:
        size = logits.shape[-1] if size is None else size
        return next_token_log_softmax(layout, size, layout.padded(logits), jnp.asarray(ids)).reshape(-1)

    student = log_p(student_logits, student_ids, student_size)
    teacher = log_p(jax.lax.stop_gradient(teacher_logits), teacher_ids, teacher_size)
    return matched_chunks(student, teacher, alignment, likelihood_temperature)


def vocab_parallel_prefix_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    alignment: Alignment,
    tables: PrefixTables,
    *,
    student_ids: jax.Array,
    teacher_ids: jax.Array,
    mesh: Mesh,
    axis: str = "tensor",
    data_axes: tuple[str, ...] = BATCH,
    block: int = 64,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
) -> jax.Array:
    """`prefix_kl` over a split vocabulary.

    Args:
        student_logits, teacher_logits, alignment, mesh: as in `vocab_parallel_projection_kl`.
        tables: of `projection.prefixes.prefix_tables`, whole on every device.
        student_ids, teacher_ids: int32 [B, T_s], [B, T_t], rows over `data_axes`.
        block: chunks of a device's rows that are exchanged at once, and tokens inside chunks, rounded up
            to a multiple of the axis's n devices. A device then holds block / n chunks with all of V_s
            and V_t.
        temperature, direction, beta: as in `prefix_kl`.

    Returns:
        float32 [B, C], times tau^2; 0 for chunks outside `valid_chunks(alignment)`.

    Raises:
        ValueError: as `prefix_kl`, or rows that the data axes do not divide.

    Example:
        That of `prefix_kl` with other models, on as many devices as there are.

        >>> import numpy as np
        >>> from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
        >>> from xtoken_jax.projection.prefixes import tables_of_pieces
        >>> tables = tables_of_pieces({0: [0], 1: [1], 2: [0, 1]}, {0: [0], 1: [1]}, {}, 3, 2)
        >>> student = jnp.log(jnp.array([[[0.4, 0.2, 0.4], [1.0, 1.0, 1.0]]]))
        >>> teacher = jnp.log(jnp.array([[[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]]]))
        >>> ids = np.array([[-1, 0]]), np.array([[-1, 0, 0]])
        >>> alignment = Alignment(*ids, jnp.ones((1, 1), bool))
        >>> tokens = dict(student_ids=np.array([[1, 2]]), teacher_ids=np.array([[1, 0, 1]]))
        >>> mesh = make_mesh(MeshConfig(data=1, tensor=jax.device_count()))
        >>> loss = jax.jit(partial(vocab_parallel_prefix_kl, mesh=mesh))
        >>> value = loss(student, teacher, alignment, tables, **tokens)
        >>> print(f"{value.item():.4f}")  # 0.5 log(0.5 / 0.8) + 0.5 log(0.5 / 0.2)
        0.2231
    """
    check_mesh(mesh, axis, data_axes)
    check_prefix(
        student_logits, teacher_logits, alignment, tables, student_ids, teacher_ids,
        temperature=temperature, direction=direction, beta=beta, block=block,
    )  # fmt: skip
    layout = Layout(mesh, axis, tuple(data_axes))
    student, teacher = layout.padded(student_logits), layout.padded(teacher_logits)
    rows = PrefixRows(alignment, jnp.asarray(student_ids), jnp.asarray(teacher_ids))
    setting = PrefixSetting(layout, direction, beta, temperature, block)
    values = prefix(setting, student, jax.lax.stop_gradient(teacher), rows, tables)
    return values * temperature**2


def vocab_parallel_cross_entropy(
    logits: jax.Array,
    token_ids: jax.Array,
    token_mask: jax.Array,
    *,
    mesh: Mesh,
    axis: str = "tensor",
    data_axes: tuple[str, ...] = BATCH,
    size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`next_token_cross_entropy` over a split vocabulary.

    Args:
        logits: float [B, T, >= V], rows over `data_axes`, the vocabulary over `axis`.
        token_ids: int32 [B, T].
        token_mask: bool [B, T], tokens that count as labels.
        mesh: with all of these axes.
        size: V of the tokenizer, past which columns do not count. None: the width of the logits.

    Returns:
        values float32 [B, T - 1] in nats, and the bool [B, T - 1] mask of those that count.
    """
    check_mesh(mesh, axis, data_axes)
    check_labels(logits, token_ids, token_mask, size)
    layout = Layout(mesh, axis, tuple(data_axes))
    size = logits.shape[-1] if size is None else size
    # A slice of the positions would copy the logits; instead the last one gets a gradient of 0.
    values = _cross_entropy(layout, size, layout.padded(logits), jnp.asarray(token_ids))
    return values[:, :-1], jnp.asarray(token_mask[:, 1:], bool)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(layout: Layout, size: int, logits: jax.Array, ids: jax.Array) -> jax.Array:
    """float32 [B, T]: -log softmax(z_p)[x_{p+1}] of logits [B, T, V]; the last position has no next token."""
    return _cross_entropy_forward(layout, size, logits, ids)[0]


def _cross_entropy_forward(
    layout: Layout, size: int, logits: jax.Array, ids: jax.Array
) -> tuple[jax.Array, tuple]:
    def local(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = layout.centred(layout.flat(logits, size))
        normalizer = layout.log_normalizer(z)
        return (normalizer - layout.at(z, next_tokens(ids))).reshape(ids.shape), normalizer

    values, normalizer = layout.run(local, (layout.of_logits, layout.by_row), (layout.by_row, layout.by_row))(
        logits, ids
    )
    return values, (logits, ids, normalizer)


def _cross_entropy_backward(layout: Layout, size: int, residuals: tuple, gradient: jax.Array) -> tuple:
    def local(logits: jax.Array, ids: jax.Array, normalizer: jax.Array, gradient: jax.Array) -> jax.Array:
        z, gradient = layout.centred(layout.flat(logits, size)), gradient.reshape(-1, 1)
        places = layout.places(next_tokens(ids), z.shape[-1])[:, None]
        label = jnp.arange(z.shape[-1], dtype=jnp.int32)[None, :] == places
        slope = scaled(jnp.exp(z - normalizer[:, None]) - label, gradient)
        return slope.reshape(logits.shape).astype(logits.dtype)

    by_row = layout.by_row
    return (
        layout.run(local, (layout.of_logits, by_row, by_row, by_row), layout.of_logits)(*residuals, gradient),
        None,
    )


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _with_rows(table: jax.Array, count: int, fill: int) -> jax.Array:
    """[R, K] -> [count, K]; rows past the tokenizer's are empty ones, cut or added."""
    missing = count - len(table)
    if missing <= 0:
        return table[:count]
    return jnp.pad(table, ((0, missing), (0, 0)), constant_values=fill)
