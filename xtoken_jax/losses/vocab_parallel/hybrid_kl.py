"""GOLD and H-KL over a split vocabulary: what each device computes and sends, forward and backward.

A pair's student token and its partner are on two devices as a rule. Three ways to bring them together,
in numbers that a device receives for a chunk, with Llama 3.1 and Qwen3 over 8 devices:
- gather the teacher's rows, and each device's candidates for the sorted part: 248,000;
- send exactly the partners, by tables made from the partition, and the candidates to one device a
  chunk: 40,000, or 133,000 if all pairs of devices exchange as much as the largest one;
- make columns into rows, all of both vocabularies for 1/n of the chunks, and send the slope back: 45,000.
The last one, taken here, needs no tables, and every device sorts as much as the others, although the
uncommon ids are mostly the last ones: of 18,687 of Llama's, 17,587 are in the last quarter.

In the comments n is the number of devices on the vocabulary's axis, and lower-case letters are a
device's own share: b rows, v columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from xtoken_jax.losses.math.chunks import Merging, next_tokens
from xtoken_jax.losses.terms.hybrid_kl import slope_of_merged, target_of_merged, terms_of_merged
from xtoken_jax.losses.vocab_parallel.shards import (
    Layout,
    Rows,
    Setting,
    by_blocks,
    counted_positions,
    scaled,
)
from xtoken_jax.projection.matrix import Partition


@dataclass(frozen=True)
class HybridSetting(Setting):
    """Of GOLD and H-KL: `block` is a multiple of n."""

    uncommon_top_k: int


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def hybrid(
    setting: HybridSetting, student: jax.Array, teacher: jax.Array, rows: Rows, partition: Partition
) -> tuple[jax.Array, jax.Array]:
    """The common and the uncommon part, float32 [B, C], not times tau^2, of logits [B, T, V]."""
    return _hybrid_program(setting, student, teacher, rows, partition, with_slope=False)[0]


def _hybrid_forward(
    setting: HybridSetting, student: jax.Array, teacher: jax.Array, rows: Rows, partition: Partition
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    return _hybrid_program(setting, student, teacher, rows, partition, with_slope=True)


def _hybrid_program(
    setting: HybridSetting,
    student: jax.Array,
    teacher: jax.Array,
    rows: Rows,
    partition: Partition,
    *,
    with_slope: bool,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    layout = setting.layout
    direction, beta = setting.direction, setting.beta

    def local(
        student: jax.Array, teacher: jax.Array, rows: Rows, partition: Partition
    ) -> tuple[jax.Array, ...]:
        z = layout.centred(layout.flat(student, setting.student_size, setting.temperature))
        t = layout.centred(layout.flat(teacher, setting.teacher_size, setting.temperature))
        own, normalizer = _merged(layout, z, rows.student_ids, setting.merging(rows.student_chunks))
        target, _ = _merged(layout, t, rows.teacher_ids, setting.merging(rows.teacher_chunks))

        def block(own: jax.Array, target: jax.Array) -> tuple:
            width = own.shape[-1]
            # [K, v] of all devices into [K / n, n v] of each, in the order of the columns.
            own, target = layout.to_rows(own), layout.to_rows(target)
            own = own[:, : setting.student_size]
            wanted = target_of_merged(target[:, : setting.teacher_size], partition, setting.uncommon_top_k)
            terms, ranks = terms_of_merged(own, wanted, direction, beta)
            values = layout.in_its_place(jnp.stack(terms, axis=-1))
            if not with_slope:
                return (values, None), None
            ones = jnp.ones_like(terms[0])
            slope = slope_of_merged(own, wanted, ranks, (ones, ones), direction, beta)
            missing = width * layout.parts - setting.student_size
            return (values, layout.to_columns(jnp.pad(slope, ((0, 0), (0, missing))))), None

        (values, slope), _ = by_blocks(block, setting.block, own, target)
        common, uncommon = layout.sum(values).reshape(-1, setting.count, 2).transpose(2, 0, 1)
        return common, uncommon, normalizer, slope

    by_row = layout.by_row
    common, uncommon, normalizer, slope = layout.run(
        local,
        (layout.of_logits, layout.of_logits, by_row, PartitionSpec()),
        (by_row, by_row, by_row, layout.of_chunks if with_slope else None),
    )(student, teacher, rows, partition)
    pairs = jnp.asarray(partition.common_student)
    kept = (student, normalizer, slope, rows.student_chunks, rows.student_ids, pairs)
    return (common, uncommon), kept


def _merged(
    layout: Layout, logits: jax.Array, ids: jax.Array | None, merging: Merging
) -> tuple[jax.Array, jax.Array]:
    """`merged_log_softmax` of a device's columns; `ids` [b, T] for "first" and "last"."""
    normalizer = layout.log_normalizer(logits)
    offset = merging.merge(normalizer[:, None])
    if ids is not None:
        offset = offset - merging.other_tokens(layout.at(logits, next_tokens(ids)) - normalizer)[:, None]
    return merging.merge_wide(logits) - offset, normalizer


def _hybrid_backward(
    setting: HybridSetting, residuals: tuple, gradients: tuple[jax.Array, jax.Array]
) -> tuple:
    student, normalizer, slope, chunks, ids, pairs = residuals
    layout = setting.layout

    def local(
        student: jax.Array,
        normalizer: jax.Array,
        slope: jax.Array,
        chunks: jax.Array,
        ids: jax.Array | None,
        pairs: jax.Array,
        by_common: jax.Array,
        by_uncommon: jax.Array,
    ) -> jax.Array:
        merging, width = setting.merging(chunks), student.shape[-1]
        # A column belongs to one of the parts.
        paired = jnp.zeros(width, bool).at[layout.places(pairs, width)].set(True, mode="drop")
        by_part = jnp.where(paired[None, :], by_common.reshape(-1, 1), by_uncommon.reshape(-1, 1))
        slope = scaled(slope, by_part)
        counted = (by_common.reshape(-1) != 0) | (by_uncommon.reshape(-1) != 0)
        read = counted_positions(counted, merging, others=ids is not None)
        total = layout.sum(slope.sum(-1))
        z = layout.centred(layout.flat(student, setting.student_size, setting.temperature))
        share = merging.spread(total[:, None])
        if ids is not None:
            others = merging.spread_other(total)
            share = share + others[:, None]
        softmax = jnp.where(read, jnp.exp(z - normalizer[:, None]), 0.0)
        gradient = merging.spread(slope) - softmax * share
        if ids is not None:
            positions = jnp.arange(len(z), dtype=jnp.int32)
            gradient = gradient.at[positions, layout.places(next_tokens(ids), width)].add(others, mode="drop")
        return (gradient / setting.temperature).reshape(student.shape).astype(student.dtype)

    by_row = layout.by_row
    by_student = layout.run(
        local,
        (layout.of_logits, by_row, layout.of_chunks, by_row, by_row, PartitionSpec(), by_row, by_row),
        layout.of_logits,
    )(student, normalizer, slope, chunks, ids, pairs, *gradients)
    return by_student, None, None, None


hybrid.defvjp(_hybrid_forward, _hybrid_backward)
