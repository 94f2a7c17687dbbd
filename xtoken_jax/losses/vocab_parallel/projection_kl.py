"""P-KL over a split vocabulary: what each device computes and sends, forward and backward.

In the comments n is the number of devices on the vocabulary's axis, and lower-case letters are a
device's own share: b rows, v columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from xtoken_jax.losses.math.chunks import next_tokens
from xtoken_jax.losses.math.divergence import kl_terms
from xtoken_jax.losses.terms.projection_kl import EPSILON, highest
from xtoken_jax.losses.vocab_parallel.shards import Rows, Setting, by_blocks, counted_positions, scaled


@dataclass(frozen=True)
class ProjectionSetting(Setting):
    """Of P-KL: `top_k` is at most `teacher_size`; `learn` asks for the gradient by W's weights."""

    top_k: int
    learn: bool

    @property
    def every_column(self) -> bool:
        """Each device then compares the teacher's columns that it has."""
        return self.top_k == self.teacher_size


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def p_kl(
    setting: ProjectionSetting,
    student: jax.Array,
    weights: jax.Array,
    teacher: jax.Array,
    indices: jax.Array,
    rows: Rows,
) -> jax.Array:
    """float32 [B, C], not times tau^2, of logits [B, T, V] and W's weights and indices [V_s, K]."""
    return _p_kl_forward(setting, student, weights, teacher, indices, rows)[0]


def _p_kl_forward(
    setting: ProjectionSetting,
    student: jax.Array,
    weights: jax.Array,
    teacher: jax.Array,
    indices: jax.Array,
    rows: Rows,
) -> tuple[jax.Array, tuple]:
    layout = setting.layout

    def local(
        student: jax.Array, weights: jax.Array, teacher: jax.Array, indices: jax.Array, rows: Rows
    ) -> tuple[jax.Array, ...]:
        z = layout.centred(layout.flat(student, setting.student_size, setting.temperature))
        t = layout.flat(teacher, setting.teacher_size, setting.temperature)
        width = t.shape[-1]
        raw, t = t, layout.centred(t)
        faulty = jnp.isnan(t[:, :1])  # NaN in all columns then
        columns = _top_columns(setting, jnp.where(faulty, -jnp.inf, raw), rows.teacher_mask)
        slots = _slots(columns, setting.teacher_size)
        places = layout.places(columns, width)

        # log_softmax within the columns; what is subtracted does not depend on the column.
        chosen = jnp.zeros(width, bool).at[places].set(True, mode="drop")
        merging = setting.merging(rows.teacher_chunks)
        compared = jnp.where(chosen[None, :] | faulty, t, -jnp.inf)
        normalizer = layout.log_normalizer(compared)
        # A row without mass in the columns stays one of -inf.
        normalizer = jnp.where(normalizer == -jnp.inf, 0.0, normalizer)
        offset = merging.merge(normalizer[:, None])[:, 0]
        if rows.teacher_ids is not None:
            actual = layout.at(t, next_tokens(rows.teacher_ids)) - layout.log_normalizer(t)
            offset = offset - merging.other_tokens(actual)
        merged = merging.merge_wide(t)

        normalizer = layout.log_normalizer(z)
        # The projection is linear: of merged probabilities it is that of fewer rows.
        own = setting.merging(rows.student_chunks).merge_wide(jnp.exp(z - normalizer[:, None]))
        first = jax.lax.axis_index(layout.axis) * (len(columns) // layout.parts)
        mine = jax.lax.dynamic_slice_in_dim(columns, first, len(columns) // layout.parts)
        real = mine < setting.teacher_size

        def block(own: jax.Array, merged: jax.Array, offset: jax.Array) -> tuple:
            projected = layout.sum_scatter(_project(own, weights, indices, slots, len(columns)))
            if setting.every_column:
                target = merged
            else:
                target = layout.sum_scatter(merged.at[:, places].get(mode="fill", fill_value=0.0))
            return _compare(setting, projected, target - offset[:, None], real), None

        (values, slope), _ = by_blocks(block, setting.block, own, merged, offset)
        return values.reshape(-1, setting.count), normalizer, slope, mine

    by_row, vocabulary = layout.by_row, layout.of_vocabulary
    values, *kept = layout.run(
        local,
        (layout.of_logits, vocabulary, layout.of_logits, vocabulary, by_row),
        (by_row, by_row, layout.of_chunks, vocabulary),
    )(student, weights, teacher, indices, rows)
    return values, (student, weights, indices, rows.student_chunks, *kept)


def _p_kl_backward(setting: ProjectionSetting, residuals: tuple, gradient: jax.Array) -> tuple:
    student, weights, indices, chunks, normalizer, slope, columns = residuals
    layout = setting.layout

    def local(
        student: jax.Array,
        weights: jax.Array,
        indices: jax.Array,
        chunks: jax.Array,
        normalizer: jax.Array,
        slope: jax.Array,
        columns: jax.Array,
        gradient: jax.Array,
    ) -> tuple[jax.Array, jax.Array | None]:
        slots = _slots(jax.lax.all_gather(columns, layout.axis, tiled=True), setting.teacher_size)
        merging = setting.merging(chunks)
        z = layout.centred(layout.flat(student, setting.student_size, setting.temperature))
        counted = gradient.reshape(-1) != 0
        read = counted_positions(counted, merging)
        probabilities = jnp.where(read, jnp.exp(z - normalizer[:, None]), 0.0)
        slope = scaled(slope, gradient.reshape(-1, 1))

        def block(slope: jax.Array, own: jax.Array | None = None) -> tuple:
            everywhere = jax.lax.all_gather(slope, layout.axis, axis=1, tiled=True)
            return _pull_back(everywhere, weights, indices, slots, own)

        if setting.learn:
            own = merging.merge_wide(probabilities)
            nothing = jax.lax.pcast(jnp.zeros_like(weights), layout.data, to="varying")
            pulled, by_weight = by_blocks(block, setting.block, slope, own, total=nothing)
            by_weight = jax.lax.psum(by_weight, layout.data)
        else:
            pulled, by_weight = by_blocks(block, setting.block, slope)
        pulled = merging.spread(pulled)
        # d/dz_i of sum_v g_v q_v = p_i ((W g)_i - sum_i p_i (W g)_i).
        mean = layout.sum((probabilities * pulled).sum(-1))
        by_student = probabilities * (pulled - mean[:, None]) / setting.temperature
        return by_student.reshape(student.shape).astype(student.dtype), by_weight

    by_row, vocabulary = layout.by_row, layout.of_vocabulary
    by_student, by_weight = layout.run(
        local,
        (
            layout.of_logits, vocabulary, vocabulary, by_row, by_row, layout.of_chunks, vocabulary, by_row,
        ),
        (layout.of_logits, vocabulary if setting.learn else None),
    )(student, weights, indices, chunks, normalizer, slope, columns, gradient)  # fmt: skip
    return by_student, by_weight, None, None, None


def _top_columns(setting: ProjectionSetting, t: jax.Array, mask: jax.Array | None) -> jax.Array:
    """int32 [m], the chosen columns of the whole batch, the same on every device; m is a multiple of n.

    What is added to make it one has ids past all of the teacher's columns.
    """
    layout, width = setting.layout, t.shape[-1]
    if setting.every_column:
        return jnp.arange(width * layout.parts, dtype=jnp.int32)
    if mask is not None:
        t = jnp.where(jnp.asarray(mask).reshape(-1, 1), t, -jnp.inf)
    best = jax.lax.pmax(highest(t), layout.data) if layout.data else highest(t)
    # The k best of all are among the k best of each device, and equal ones keep their order.
    top, places = jax.lax.top_k(best, min(setting.top_k, width))
    ids = places.astype(jnp.int32) + layout.start(width)
    top, ids = (jax.lax.all_gather(x, layout.axis, tiled=True) for x in (top, ids))
    columns = ids[jax.lax.top_k(top, setting.top_k)[1]]
    missing = -setting.top_k % layout.parts
    return jnp.pad(columns, (0, missing), constant_values=width * layout.parts)


def _slots(columns: jax.Array, size: int) -> jax.Array:
    """int32 [V_t + 1]: where each teacher id stands among the columns [m]; m for others and for id -1."""
    count = len(columns)
    slots = jnp.full(size + 1, count, jnp.int32)
    places = jnp.where(columns < size, columns, size + 1)
    return slots.at[places].set(jnp.arange(count, dtype=jnp.int32), mode="drop")


def _compare(
    setting: ProjectionSetting, projected: jax.Array, target: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`chunk_values` of columns that are split: float32 [K], and its slope by `projected` [K, m / n]."""
    layout, real = setting.layout, real[None, :]
    if setting.merge == "mean_normalized":
        target = target - layout.log_normalizer(jnp.where(real, target, -jnp.inf))[:, None]
    target = jnp.where(real, target, 0.0)  # a column that is none: finite, and left out below
    total = layout.sum(projected.sum(-1))[:, None] + EPSILON
    share = projected / total
    terms, pull = jax.vjp(
        lambda s: kl_terms(target, s, setting.direction, beta=setting.beta), jnp.log(share + EPSILON)
    )
    (by_log,) = pull(jnp.ones_like(terms))
    by_share = jnp.where(real, by_log, 0.0) / (share + EPSILON)
    values, mean = layout.sum(jnp.stack([jnp.where(real, terms, 0.0).sum(-1), (by_share * share).sum(-1)]))
    return values, (by_share - mean[:, None]) / total


def _project(
    own: jax.Array, weights: jax.Array, indices: jax.Array, slots: jax.Array, count: int
) -> jax.Array:
    """A device's part of probabilities @ W at the columns: [K, v] -> [K, m]."""
    own = own.T
    total = jnp.zeros((count, own.shape[1]), own.dtype)
    for k in range(indices.shape[1]):
        total = total.at[slots[indices[:, k]]].add(weights[:, k, None] * own, mode="drop")
    return total.T


def _pull_back(
    values: jax.Array, weights: jax.Array, indices: jax.Array, slots: jax.Array, own: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The transpose of `_project`, [K, m] -> [K, v], and with `own` the gradient by each weight [v, K]."""
    pulled = jnp.zeros((len(values), len(weights)), values.dtype)
    by_weight = []
    for k in range(indices.shape[1]):
        read = values.at[:, slots[indices[:, k]]].get(mode="fill", fill_value=0.0)
        pulled = pulled + weights[None, :, k] * read
        if own is not None:
            by_weight.append((own * read).sum(0))
    return pulled, jnp.stack(by_weight, axis=-1) if by_weight else None


p_kl.defvjp(_p_kl_forward, _p_kl_backward)
