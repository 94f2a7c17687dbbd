"""Distillation over one vocabulary against its float64 twin, and as P-KL with W = 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import gradient as reference_gradient
from reference import losses as reference

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import (
    masked_mean,
    next_token_cross_entropy,
    projection_kl,
    same_vocabulary_kl,
    same_vocabulary_kl_by_chunk,
)
from xtoken_jax.projection.matrix import Projection

B, T, V = 3, 6, 12
WIDTH_S, WIDTH_T = 15, 14  # of the lm_heads, each padded in its own way

RNG = np.random.default_rng(2)
STUDENT = RNG.normal(0, 2, (B, T, WIDTH_S)).astype(np.float32)
TEACHER = RNG.normal(0, 2, (B, T, WIDTH_T)).astype(np.float32)
STUDENT[..., V:] += 5  # what lies past the tokenizer would dominate if it were read
TEACHER[..., V:] += 5
MASK = RNG.random((B, T)) < 0.7
MASK[1] = False  # a masked sample
REAL = np.ones((B, T), bool)
REAL[0, 4:] = False
WEIGHTS = RNG.uniform(0.5, 1.5, (B, T - 1)).astype(np.float32)
COORDINATES = [tuple(int(RNG.integers(n)) for n in (B, T, V)) for _ in range(60)]
OPTIONS = {"temperature": 1.0, "top_k": None, "direction": "forward"}


def check(student=STUDENT, teacher=TEACHER, *, size=V, tolerance=3e-6, step=1e-5, **options):
    options = OPTIONS | options

    def ours(student):
        values, mask = same_vocabulary_kl(student, jnp.asarray(teacher), MASK, size=size, **options)
        return jnp.sum(WEIGHTS * values), (values, mask)

    def twin(student):
        return reference.same_vocabulary_kl(student, teacher.tolist(), MASK, size, **options)

    def scalar(student):
        return sum(
            float(w) * v
            for weights, row in zip(WEIGHTS, twin(student), strict=True)
            for w, v in zip(weights, row, strict=True)
            if v is not None
        )

    (_, (values, mask)), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(jnp.asarray(student))
    np.testing.assert_array_equal(mask, MASK[:, 1:])
    dense = np.array([[0.0 if v is None else v for v in row] for row in twin(student.tolist())])
    np.testing.assert_allclose(values, dense, rtol=tolerance, atol=tolerance * np.abs(dense).max())
    places = [i for i in COORDINATES if i[2] < size]
    slope = reference_gradient.differences(scalar, student, places, step)
    at = np.array([gradient[i] for i in places])
    assert size == 1 or np.abs(slope).max() > 1e-3, "coordinates without a gradient test nothing"
    np.testing.assert_allclose(
        at, slope, rtol=10 * tolerance, atol=10 * tolerance * max(np.abs(slope).max(), 1e-3)
    )
    assert np.all(np.asarray(gradient)[..., size:] == 0)
    assert np.all(np.asarray(gradient)[1] == 0), "a masked sample has no gradient"
    return values


WAYS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]


@pytest.mark.parametrize(("direction", "beta"), WAYS)
@pytest.mark.parametrize("top_k", [None, 5])
def test_against_float64(direction, beta, top_k):
    check(direction=direction, beta=beta, top_k=top_k, temperature=1.7, teacher_mask=REAL)


def test_padding_does_not_choose_columns():
    teacher = TEACHER.copy()
    teacher[0, 4:, 3] = 50.0
    masked = check(teacher=teacher, top_k=5, teacher_mask=REAL)
    assert not np.allclose(masked, check(teacher=teacher, top_k=5))


def test_huge_logits():
    def huge(array):
        out = array.copy()
        out[np.random.default_rng(3).random(array.shape) < 0.04] *= 1e4 / 2
        return out

    for direction in ("forward", "reverse", "jsd"):
        check(huge(STUDENT), huge(TEACHER), direction=direction, step=1e-3, tolerance=3e-5)


def test_excluded_tokens():
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[..., [0, 4]] = teacher[..., [0, 4]] = -np.inf
    for direction in ("forward", "reverse", "jsd"):
        check(student, teacher, direction=direction)
    teacher[..., 2] = -np.inf
    check(student, teacher)
    student[..., 5] = -np.inf
    check(student, teacher, direction="jsd")
    values, mask = same_vocabulary_kl(student, teacher, MASK, size=V)
    assert np.all(np.isposinf(values) == np.asarray(mask))


def test_a_vocabulary_of_one_token():
    assert np.all(np.asarray(check(size=1)) == 0)


def test_columns_past_the_tokenizer_are_not_read():
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[..., V:], teacher[..., V:] = np.nan, 1e9
    cut = (STUDENT[..., :V], TEACHER[..., :V])
    for top_k in (None, 5):
        np.testing.assert_array_equal(
            same_vocabulary_kl(student, teacher, MASK, size=V, top_k=top_k)[0],
            same_vocabulary_kl(*cut, MASK, top_k=top_k)[0],
        )


@pytest.mark.parametrize(("direction", "beta"), WAYS)
@pytest.mark.parametrize("top_k", [V, 5])
def test_it_is_projection_kl_under_the_identity(direction, beta, top_k):
    """Values and gradients; chunk k holds token k, which position k - 1 predicts."""
    identity = Projection(np.arange(V, dtype=np.int32)[:, None], np.ones((V, 1), np.float32), V)
    chunks = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    options = {"temperature": 2.0, "top_k": top_k, "direction": direction, "beta": beta, "teacher_mask": REAL}

    def by_position(student):
        values, mask = same_vocabulary_kl(student, TEACHER, MASK, size=V, **options)
        return masked_mean(values, mask), values

    def by_chunk(student):
        values = projection_kl(student, TEACHER, Alignment(chunks, chunks, MASK), identity, **options)[:, 1:]
        return masked_mean(values, MASK[:, 1:]), values

    (mean, values), slope = jax.value_and_grad(by_position, has_aux=True)(STUDENT)
    (expected_mean, expected), expected_slope = jax.value_and_grad(by_chunk, has_aux=True)(STUDENT)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-5, atol=1e-6)


def test_equal_logits_are_a_minimum_and_nothing_is_a_zero():
    for direction in ("forward", "reverse", "jsd"):
        value, slope = jax.value_and_grad(
            lambda s, d=direction: masked_mean(*same_vocabulary_kl(s, STUDENT, MASK, direction=d))
        )(jnp.asarray(STUDENT))
        assert abs(value) < 1e-6
        assert np.abs(slope).max() < 1e-6
        value, slope = jax.value_and_grad(
            lambda s, d=direction: masked_mean(
                *same_vocabulary_kl(s, TEACHER, MASK & False, size=V, direction=d)
            )
        )(jnp.asarray(STUDENT))
        assert value == 0
        assert np.all(np.asarray(slope) == 0)


def test_one_token_a_row_has_no_next_one():
    values, mask = same_vocabulary_kl(STUDENT[:, :1], TEACHER[:, :1], MASK[:, :1], size=V)
    assert values.shape == mask.shape == (B, 0)
    assert masked_mean(values, mask) == 0


@pytest.mark.parametrize("teacher", [TEACHER, TEACHER[:, :-1, :WIDTH_S]])
def test_logits_of_different_shapes_are_refused(teacher):
    with pytest.raises(ValueError, match="differ in shape"):
        same_vocabulary_kl(STUDENT, teacher, MASK)


def test_the_teacher_gets_no_gradient_and_bfloat16_is_computed_in_float32():
    def loss(student, teacher):
        return masked_mean(*same_vocabulary_kl(student, teacher, MASK, size=V))

    assert np.all(np.asarray(jax.grad(loss, 1)(STUDENT, TEACHER)) == 0)
    student, teacher = jnp.bfloat16(STUDENT), jnp.bfloat16(TEACHER)
    value, slope = jax.value_and_grad(loss)(student, teacher)
    assert value.dtype == jnp.float32
    assert slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        value, loss(student.astype(jnp.float32), teacher.astype(jnp.float32)), rtol=1e-6
    )


def test_of_a_chunk_of_several_tokens_the_first_is_compared():
    several = np.array([[-1, 0, 0, 1, -1, 2]] * B, np.int32)
    single = np.array([[-1, 0, -1, 1, -1, 2]] * B, np.int32)
    one, other = (
        same_vocabulary_kl_by_chunk(
            STUDENT, TEACHER, Alignment(chunks, chunks, np.ones((B, 3), bool)), size=V
        )
        for chunks in (several, single)
    )
    np.testing.assert_allclose(one, other, rtol=1e-6)
    last = np.array([[-1, -1, 0, 1, -1, 2]] * B, np.int32)
    wrong = same_vocabulary_kl_by_chunk(
        STUDENT, TEACHER, Alignment(last, last, np.ones((B, 3), bool)), size=V
    )
    assert not np.allclose(one[:, 0], wrong[:, 0], rtol=1e-2)


def test_a_large_offset_costs_cross_entropy_no_digits():
    logits = (np.round(STUDENT * 64) / 64).astype(np.float32)
    ids = np.random.default_rng(3).integers(0, V, (B, T))
    evaluate = jax.value_and_grad(lambda z: next_token_cross_entropy(z, ids, MASK)[0].sum())
    (value, gradient), (moved, moved_gradient) = (evaluate(logits + np.float32(o)) for o in (0, 4096))
    np.testing.assert_allclose(moved, value, rtol=1e-6)
    np.testing.assert_allclose(moved_gradient, gradient, atol=1e-6)
