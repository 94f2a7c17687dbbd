"""ULD against its float64 twin, and what sorting must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import gradient as reference_gradient
from reference import losses as reference

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import masked_mean, rank_l1, valid_chunks

B, T_S, T_T, C = 4, 6, 8, 5
V_S, V_T = 11, 14
WIDTH_S, WIDTH_T = 13, 17
# Rows: ordinary, with a chunk that is not valid; gaps; chunks 1 and 2 empty on one side each; masked out.
STUDENT_CHUNKS = np.array(
    [[0, 1, 1, 2, 3, 3], [-1, 0, 1, -1, 2, 3], [0, 0, 1, 3, 3, -1], [0, 0, 1, 2, 2, 3]], np.int32
)
TEACHER_CHUNKS = np.array(
    [
        [0, 0, 1, 2, 2, 2, 3, -1],
        [-1, 0, 1, 1, 2, 3, 3, 3],
        [0, 0, 0, 2, 3, 3, -1, -1],
        [0, 1, 1, 2, 3, 3, -1, -1],
    ],
    np.int32,
)
VALID = np.ones((B, C), bool)
VALID[0, 3] = False
VALID[3] = False
ALIGNMENT = Alignment(STUDENT_CHUNKS, TEACHER_CHUNKS, VALID)
COUNTED = [[1, 2], [0, 1, 2, 3], [0, 3], []]

RNG = np.random.default_rng(1)
STUDENT = RNG.normal(0, 2, (B, T_S, WIDTH_S)).astype(np.float32)
TEACHER = RNG.normal(0, 2, (B, T_T, WIDTH_T)).astype(np.float32)
STUDENT[..., V_S:] += 5  # what lies past the tokenizer would dominate if it were read
TEACHER[..., V_T:] += 5
CHUNK_WEIGHTS = RNG.uniform(0.5, 1.5, (B, C)).astype(np.float32)
COORDINATES = [tuple(int(RNG.integers(n)) for n in (B, T_S, V_S)) for _ in range(60)]


def check(student=STUDENT, teacher=TEACHER, *, sizes=(V_S, V_T), temperature=1.0, tolerance=3e-6, step=1e-5):
    def ours(student):
        values = rank_l1(
            student, jnp.asarray(teacher), ALIGNMENT,
            temperature=temperature, student_size=sizes[0], teacher_size=sizes[1],
        )  # fmt: skip
        return jnp.sum(CHUNK_WEIGHTS * values), values

    def twin(student):
        return reference.rank_l1(
            student, teacher.tolist(), STUDENT_CHUNKS, TEACHER_CHUNKS, VALID, *sizes, temperature=temperature
        )

    def scalar(student):
        return sum(
            float(w) * v
            for weights, row in zip(CHUNK_WEIGHTS, twin(student), strict=True)
            for w, v in zip(weights, row, strict=True)
            if v is not None
        )

    (_, values), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(jnp.asarray(student))
    expected = twin(student.tolist())
    assert [[c for c, v in enumerate(row) if v is not None] for row in expected] == COUNTED
    dense = np.array([[0.0 if v is None else v for v in row] for row in expected])
    np.testing.assert_allclose(values, dense, rtol=tolerance, atol=tolerance * np.abs(dense).max())
    places = [i for i in COORDINATES if i[2] < sizes[0]]
    slope = reference_gradient.differences(scalar, student, places, step)
    at = np.array([gradient[i] for i in places])
    np.testing.assert_allclose(
        at, slope, rtol=10 * tolerance, atol=10 * tolerance * max(np.abs(slope).max(), 1e-3)
    )
    assert np.all(np.asarray(gradient)[..., sizes[0] :] == 0)
    assert np.all(np.asarray(gradient)[3] == 0), "a masked sample has no gradient"
    return slope


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_against_float64(temperature):
    assert np.abs(check(temperature=temperature)).max() > 1e-2


def test_either_side_may_be_the_longer():
    check(RNG.normal(0, 2, (B, T_S, 20)).astype(np.float32), sizes=(20, V_T))


def test_huge_logits():
    def huge(array):
        out = array.copy()
        out[np.random.default_rng(3).random(array.shape) < 0.1] *= 1e4 / 2
        return out

    check(STUDENT, huge(TEACHER), tolerance=3e-5)
    check(huge(STUDENT), huge(TEACHER), tolerance=3e-5, step=1e-3)


def test_excluded_tokens():
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[..., [0, 4]] = teacher[..., [2, 3, 13]] = -np.inf
    check(student, teacher)
    student[0, 2, 5] = -np.inf  # at one of a chunk's positions, so that the chunk's mean is
    check(student, teacher)


def test_vocabularies_of_one_token():
    assert np.all(check(sizes=(1, V_T)) == 0)
    check(sizes=(V_S, 1))
    values = rank_l1(STUDENT, TEACHER, ALIGNMENT, student_size=1, teacher_size=1)
    assert np.all(np.asarray(values) == 0)


def test_columns_past_the_tokenizers_are_not_read():
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[..., V_S:], teacher[..., V_T:] = np.nan, 1e9
    np.testing.assert_array_equal(
        rank_l1(student, teacher, ALIGNMENT, student_size=V_S, teacher_size=V_T),
        rank_l1(STUDENT[..., :V_S], TEACHER[..., :V_T], ALIGNMENT),
    )


def test_no_chunk_at_all_is_zero_with_a_zero_gradient():
    nothing = Alignment(
        np.full_like(STUDENT_CHUNKS, -1), np.full_like(TEACHER_CHUNKS, -1), np.ones((B, C), bool)
    )
    value, gradient = jax.value_and_grad(
        lambda s: masked_mean(rank_l1(s, TEACHER, nothing), valid_chunks(nothing))
    )(jnp.asarray(STUDENT))
    assert value == 0
    assert np.all(np.asarray(gradient) == 0)


def test_the_order_of_either_vocabulary_does_not_matter():
    student = RNG.permutation(STUDENT, axis=-1)
    teacher = RNG.permutation(TEACHER, axis=-1)
    np.testing.assert_allclose(
        rank_l1(student, teacher, ALIGNMENT), rank_l1(STUDENT, TEACHER, ALIGNMENT), rtol=1e-5
    )


def test_equal_distributions_are_a_minimum():
    student = jnp.asarray(STUDENT)
    chunks = Alignment(STUDENT_CHUNKS, STUDENT_CHUNKS, VALID)
    value, gradient = jax.value_and_grad(lambda s: rank_l1(s, STUDENT[..., ::-1], chunks).sum())(student)
    assert abs(value) < 1e-5
    assert np.all(np.isfinite(gradient))


def test_the_teacher_gets_no_gradient_and_bfloat16_is_computed_in_float32():
    assert np.all(np.asarray(jax.grad(lambda t: rank_l1(STUDENT, t, ALIGNMENT).sum())(TEACHER)) == 0)
    student, teacher = jnp.bfloat16(STUDENT), jnp.bfloat16(TEACHER)
    values, gradient = jax.value_and_grad(lambda s: rank_l1(s, teacher, ALIGNMENT).sum())(student)
    assert values.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    exact = rank_l1(student.astype(jnp.float32), teacher.astype(jnp.float32), ALIGNMENT)
    np.testing.assert_allclose(values, exact.sum(), rtol=1e-6)
