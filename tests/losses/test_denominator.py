"""One denominator: how a batch is cut up or laid out changes neither its terms nor their gradients.

The exception is P-KL's choice of columns, one for each micro-batch by definition, so `top_k` covers
the vocabulary here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import (
    LossConfig,
    LossKind,
    distillation_loss,
    dynamic_scale,
    loss_tables,
    masked_mean,
    next_token_cross_entropy,
    same_vocabulary_kl,
    teacher_scores,
    valid_chunks,
)
from xtoken_jax.losses.config import Direction, Merge
from xtoken_jax.projection.matrix import Projection
from xtoken_jax.projection.prefixes import tables_of_pieces

B, T, V_S, V_T, C = 8, 7, 11, 14, 9
RNG = np.random.default_rng(6)


def some_projection():
    indices = np.stack([RNG.choice(V_T, 2, replace=False) for _ in range(V_S)]).astype(np.int32)
    weights = np.tile(np.float32([0.9, 0.1]), (V_S, 1))
    indices[:6, 1], weights[:6] = -1, [1.0, 0.0]
    return Projection(indices, weights, V_T)


def some_chunks():
    """One to three tokens a chunk, and gaps; the first token of a document has nothing before it."""
    chunks = np.cumsum(RNG.random((B, T)) < 0.6, axis=1) - 1
    chunks = np.where(RNG.random((B, T)) < 0.1, -1, chunks)
    chunks[:, 0] = -1
    return chunks.astype(np.int32)


def some_batch(teacher_width):
    """Rows of very different count: one has no chunk that counts, one has few."""
    valid = (
        (RNG.random((B, C)) < 0.9) & (np.arange(B) != 2)[:, None] & (np.arange(C) <= np.arange(B)[:, None])
    )
    mask = (RNG.random((B, T)) < 0.6) & (np.arange(B) != 5)[:, None]
    mask[:, 0] = False
    ids = RNG.integers(0, V_S, (B, T))
    return {
        "student": RNG.normal(0, 2, (B, T, V_S)).astype(np.float32),
        "teacher": RNG.normal(0, 2, (B, T, teacher_width)).astype(np.float32),
        "student_chunks": some_chunks(),
        "teacher_chunks": some_chunks(),
        "valid": valid,
        "student_ids": ids,
        "teacher_ids": ids if teacher_width == V_S else RNG.integers(0, V_T, (B, T)),
        "mask": mask,
    }


PROJECTION = some_projection()
IDENTITY = Projection(np.arange(V_S, dtype=np.int32)[:, None], np.ones((V_S, 1), np.float32), V_S)
TWO, ONE = some_batch(V_T), some_batch(V_S)
# Even tokens of the student are teacher tokens, odd ones begin with them.
PREFIXES = tables_of_pieces(
    {i: [i // 2] if i % 2 == 0 else [i // 2, i] for i in range(V_S)}, {i: [2 * i] for i in range(V_S // 2)},
    {}, V_S, V_T,
)  # fmt: skip
JSD = Direction.jsd
TERMS = {
    "p_kl": LossConfig(LossKind.p_kl, temperature=2.0),
    "p_kl normalized": LossConfig(LossKind.p_kl, merge=Merge.mean_normalized),
    "p_kl first": LossConfig(LossKind.p_kl, merge=Merge.first, direction=JSD, beta=0.3),
    "h_kl": LossConfig(LossKind.h_kl, direction=Direction.reverse),
    "gold last": LossConfig(LossKind.gold, merge=Merge.last, common_weight=None, uncommon_weight=None),
    "uld": LossConfig(LossKind.uld),
    "alm": LossConfig(LossKind.alm, likelihood_temperature=5.0),
    "prefix_kl": LossConfig(LossKind.prefix_kl, temperature=1.3),
    "same_vocabulary by chunk": LossConfig(LossKind.same_vocabulary),
    "same_vocabulary": None,
    "ce": None,
}


def batch_of(name):
    return ONE if name.startswith("same_vocabulary") else TWO


def values_of(name, batch):
    """Unreduced values and which of them count."""
    if name == "ce":
        return next_token_cross_entropy(batch["student"], batch["student_ids"], batch["mask"])
    if name == "same_vocabulary":
        return same_vocabulary_kl(batch["student"], batch["teacher"], batch["mask"], temperature=2.0)
    config = TERMS[name]
    if config.kind is LossKind.prefix_kl:
        tables = PREFIXES
    else:
        tables = loss_tables(config.kind, IDENTITY if "same_vocabulary" in name else PROJECTION)
    alignment = Alignment(*(batch[n] for n in ("student_chunks", "teacher_chunks", "valid")))
    ids = {n: batch[n] for n in ("student_ids", "teacher_ids")}
    values = distillation_loss(config)(batch["student"], batch["teacher"], alignment, tables, None, **ids)
    return values, valid_chunks(alignment)


@functools.partial(jax.jit, static_argnums=0)
def mean_and_gradient(name, batch, count=None):
    """By the student's logits, of the mean over `count`; and how many count here."""

    def mean(student):
        values, mask = values_of(name, batch | {"student": student})
        return masked_mean(values, mask, count), mask.sum()

    (value, number), gradient = jax.value_and_grad(mean, has_aux=True)(batch["student"])
    return value, gradient, number


@functools.cache
def whole(name):
    value, gradient, number = map(np.asarray, mean_and_gradient(name, batch_of(name)))
    assert number > 8
    assert np.abs(gradient).max() > 1e-3
    return value, gradient, number


def close(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("parts", [[1] * 8, [4, 4]], ids=str)
def test_micro_batches_add_up(name, parts):
    """Each is divided by the count of all, although what it holds itself differs, down to nothing."""
    expected, expected_gradient, count = whole(name)
    ends = np.cumsum(parts)
    pieces = [
        {k: v[end - n : end] for k, v in batch_of(name).items()} for n, end in zip(parts, ends, strict=True)
    ]
    results = [mean_and_gradient(name, piece, jnp.float32(count)) for piece in pieces]
    assert sum(int(number) for *_, number in results) == count
    close(sum(value for value, *_ in results), expected)
    close(np.concatenate([gradient for _, gradient, _ in results]), expected_gradient)


def test_a_denominator_for_each_micro_batch_would_change_the_objective():
    """What the count is for: the mean of means is another number."""
    expected, *_ = whole("p_kl")
    halves = [{k: v[part] for k, v in TWO.items()} for part in (slice(0, 4), slice(4, 8))]
    results = [mean_and_gradient("p_kl", half) for half in halves]
    assert abs(np.mean([value for value, *_ in results]) - expected) > 0.01 * abs(expected)


@pytest.mark.parametrize("name", TERMS)
def test_eight_devices_are_one(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batch = jax.device_put(batch_of(name), NamedSharding(mesh, PartitionSpec("data")))
    value, gradient, count = mean_and_gradient(name, batch)
    assert len(gradient.sharding.device_set) == 8
    for found, expected in zip((value, gradient, count), whole(name), strict=True):
        close(found, expected)


def packed(batch, documents):
    """Every `documents` rows in one, their chunks numbered on."""

    def joined(values):
        return values.reshape(B // documents, documents * values.shape[1], *values.shape[2:])

    first = (np.arange(B) % documents * C)[:, None]
    chunks = {n: batch[n] for n in ("student_chunks", "teacher_chunks")}
    chunks = {n: np.where(c < 0, -1, c + first).astype(np.int32) for n, c in chunks.items()}
    return {name: joined(values) for name, values in (batch | chunks).items()}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("documents", [2, 8])
def test_packed_rows_are_rows_of_their_own(name, documents):
    expected, expected_gradient, count = whole(name)
    value, gradient, number = mean_and_gradient(name, packed(batch_of(name), documents))
    assert number == count
    close(value, expected)
    close(np.reshape(gradient, expected_gradient.shape), expected_gradient)


def test_dynamic_scaling_holds_over_micro_batches_with_the_factor_of_all():
    """The two terms' gradients are accumulated apart: the factor needs both sums first."""
    (kd, kd_gradient, kd_count), (ce, ce_gradient, ce_count) = whole("p_kl normalized"), whole("ce")
    factor = dynamic_scale(ce, kd, 10.0)
    sums = {}
    for name, count in (("p_kl normalized", kd_count), ("ce", ce_count)):
        rows = [{k: v[b : b + 1] for k, v in TWO.items()} for b in range(B)]
        results = [mean_and_gradient(name, row, jnp.float32(count)) for row in rows]
        sums[name] = sum(v for v, *_ in results), np.concatenate([g for _, g, _ in results])
    (kd_sum, kd_parts), (ce_sum, ce_parts) = sums.values()
    close(dynamic_scale(ce_sum, kd_sum, 10.0) * kd_parts + ce_parts, factor * kd_gradient + ce_gradient)


@pytest.mark.parametrize("documents", [2, 8])
def test_scores_of_packed_and_sharded_teachers(documents):
    expected = teacher_scores(TWO["teacher"], TWO["teacher_ids"], TWO["mask"])
    rows = packed(TWO, documents)
    close(teacher_scores(rows["teacher"], rows["teacher_ids"], rows["mask"]), expected)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    names = ("teacher", "teacher_ids", "mask")
    batch = jax.device_put([TWO[n] for n in names], NamedSharding(mesh, PartitionSpec("data")))
    close(jax.jit(teacher_scores)(*batch), expected)
