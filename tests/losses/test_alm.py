"""Likelihood matching against its float64 twin, at certain and at impossible chunks, and what it must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import gradient as reference_gradient
from reference import likelihood as reference

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import likelihood_matching, masked_mean, valid_chunks
from xtoken_jax.losses.math.softmax import actual_log_softmax
from xtoken_jax.losses.terms.alm import FLOOR, likelihood_kl

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
STUDENT_IDS = RNG.integers(0, V_S, (B, T_S)).astype(np.int32)
TEACHER_IDS = RNG.integers(0, V_T, (B, T_T)).astype(np.int32)
CHUNK_WEIGHTS = RNG.uniform(0.5, 1.5, (B, C)).astype(np.float32)
# Random ones, and the token that comes at every position.
COORDINATES = [
    *(tuple(int(RNG.integers(n)) for n in (B, T_S, V_S)) for _ in range(40)),
    *((b, p, int(STUDENT_IDS[b, p + 1])) for b in range(B) for p in range(T_S - 1)),
]


def ours(student, teacher=TEACHER, alignment=ALIGNMENT, temperature=100.0, sizes=(V_S, V_T), ids=None):
    student_ids, teacher_ids = (STUDENT_IDS, TEACHER_IDS) if ids is None else ids
    return likelihood_matching(
        student, jnp.asarray(teacher), alignment, student_ids=student_ids, teacher_ids=teacher_ids,
        likelihood_temperature=temperature, student_size=sizes[0], teacher_size=sizes[1],
    )  # fmt: skip


def twin(student, teacher, temperature, sizes, ids):
    return reference.likelihood_matching(
        student, teacher, STUDENT_CHUNKS, TEACHER_CHUNKS, VALID, *ids, *sizes,
        likelihood_temperature=temperature,
    )  # fmt: skip


def check(
    student=STUDENT, teacher=TEACHER, *, sizes=(V_S, V_T), temperature=100.0, tolerance=3e-6, step=1e-5
):
    """Values, their zeros, and the gradient; returns the values and the gradient at the coordinates."""
    ids = tuple(np.minimum(i, size - 1) for i, size in zip((STUDENT_IDS, TEACHER_IDS), sizes, strict=True))

    def scalar(student):
        values = ours(student, teacher, temperature=temperature, sizes=sizes, ids=ids)
        return jnp.sum(CHUNK_WEIGHTS * values), values

    def exact(student):
        found = twin(student, teacher.tolist(), temperature, sizes, ids)
        pairs = zip(np.ravel(CHUNK_WEIGHTS), [v for row in found for v in row], strict=True)
        return sum(float(weight) * v for weight, v in pairs if v is not None)

    (_, values), gradient = jax.jit(jax.value_and_grad(scalar, has_aux=True))(jnp.asarray(student))
    assert values.dtype == jnp.float32
    expected = twin(student.tolist(), teacher.tolist(), temperature, sizes, ids)
    assert [[c for c, v in enumerate(row) if v is not None] for row in expected] == COUNTED
    dense = np.array([[0.0 if v is None else v for v in row] for row in expected])
    np.testing.assert_allclose(values, dense, rtol=tolerance, atol=tolerance * np.abs(dense).max())
    assert np.array_equal(np.asarray(values) == 0, dense == 0)
    places = [i for i in COORDINATES if i[2] < sizes[0]]
    slope = reference_gradient.differences(exact, student, places, step)
    at = np.array([gradient[i] for i in places])
    np.testing.assert_allclose(at, slope, rtol=1e-5, atol=1e-5 * np.abs(slope).max())
    assert np.all(np.asarray(gradient)[..., sizes[0] :] == 0)
    assert np.all(np.asarray(gradient)[3] == 0), "a masked sample has no gradient"
    return dense, slope


@pytest.mark.parametrize("temperature", [100.0, 10.0, 1.0, 0.5])
def test_against_float64(temperature):
    values, slope = check(temperature=temperature)
    assert values.max() > 1e-3
    assert np.abs(slope).max() > 1e-4


def test_the_root_is_of_the_chunk_and_not_of_its_positions():
    """A temperature of the logits would be another loss."""
    assert not np.allclose(ours(STUDENT, temperature=2.0), ours(STUDENT / 2, TEACHER / 2, temperature=1.0))


def likely(logits, ids, size, lead):
    """The token that comes lies `lead` above the rest."""
    out = logits.copy()
    for b, p in np.ndindex(B, ids.shape[1] - 1):
        out[b, p, ids[b, p + 1]] = out[b, p, :size].max() + np.float32(lead)
    return out


@pytest.mark.parametrize("lead", [4, 12, 20, 60])
@pytest.mark.parametrize("both", [False, True])
def test_chunks_that_are_nearly_certain(lead, both):
    """log_softmax rounds a probability of 1 - 1e-8 to 1; the student's slope there is not small."""
    student = likely(STUDENT, STUDENT_IDS, V_S, lead)
    teacher = likely(TEACHER, TEACHER_IDS, V_T, lead - 1) if both else TEACHER
    values, slope = check(student, teacher, step=1e-3)
    assert values.max() > 0
    if not both:
        assert np.abs(slope).max() > 1e-3


def test_a_nearly_certain_student_keeps_its_relative_digits():
    """Chunk by chunk, not only beside the largest."""
    student = likely(STUDENT, STUDENT_IDS, V_S, 17)
    teacher = likely(TEACHER, TEACHER_IDS, V_T, 16)
    ids = STUDENT_IDS, TEACHER_IDS
    expected = twin(student.tolist(), teacher.tolist(), 100.0, (V_S, V_T), ids)
    found = np.asarray(ours(student, teacher))
    assert 0 < max(v for row in expected for v in row if v is not None) < 1e-7
    for row, other in zip(found, expected, strict=True):
        for v, w in zip(row, other, strict=True):
            np.testing.assert_allclose(v, w or 0.0, rtol=1e-5)


def huge(array):
    out = array.copy()
    out[np.random.default_rng(3).random(array.shape) < 0.1] *= 1e4 / 2
    return out


def test_huge_logits():
    # float32 holds a log-probability of -1e4 to 5e-4 only.
    check(STUDENT, huge(TEACHER), tolerance=3e-5)
    check(huge(STUDENT), huge(TEACHER), tolerance=3e-5, step=1e-3)


@pytest.mark.parametrize("ahead", [1e4, np.inf])
def test_certain_chunks_have_a_floor(ahead):
    """p = 1 exactly: 1 - p^(1/tau) counts as 1e-30, and there is no slope."""
    student, teacher = STUDENT.copy(), TEACHER.copy()
    for logits, ids, size in ((student, STUDENT_IDS, V_S), (teacher, TEACHER_IDS, V_T)):
        following = np.roll(ids, -1, axis=1)[..., None]
        coming = np.arange(logits.shape[-1]) == following
        logits[...] = np.where(coming, 0.0, -ahead)
        logits[..., size:] = 5.0
    values, gradient = jax.value_and_grad(lambda s: ours(s, TEACHER).sum())(jnp.asarray(student))
    assert np.all(np.asarray(gradient) == 0)
    counted = np.asarray(valid_chunks(ALIGNMENT))
    apart = np.asarray(ours(student, TEACHER))[counted]
    expected = twin(student.tolist(), TEACHER.tolist(), 100.0, (V_S, V_T), (STUDENT_IDS, TEACHER_IDS))
    np.testing.assert_allclose(apart, [v for row in expected for v in row if v is not None], rtol=1e-5)
    assert np.isfinite(values)
    assert apart.min() > 0.1
    # A certain teacher leaves the student's share alone, -log b; two certain models agree.
    slope = jax.grad(lambda s: ours(s, teacher).sum())(jnp.asarray(STUDENT))
    assert np.all(np.isfinite(slope))
    check(STUDENT, teacher)
    value, slope = jax.value_and_grad(lambda s: ours(s, teacher).sum())(jnp.asarray(student))
    assert value == 0
    assert np.all(np.asarray(slope) == 0)


def test_excluded_tokens_that_do_not_come():
    student, teacher = STUDENT.copy(), TEACHER.copy()
    for logits, ids, size in ((student, STUDENT_IDS, V_S), (teacher, TEACHER_IDS, V_T)):
        coming = np.roll(ids, -1, axis=1)[..., None]
        excluded = (RNG.random(logits.shape) < 0.3) & (np.arange(logits.shape[-1]) != coming)
        logits[excluded & (np.arange(logits.shape[-1]) < size)] = -np.inf
    assert all(np.isinf(logits).sum() > 50 for logits in (student, teacher))
    check(student, teacher)


def test_a_text_that_the_teacher_excludes():
    """a = 0: what is left is -log(1 - b)."""
    teacher = TEACHER.copy()
    teacher[1, 1, TEACHER_IDS[1, 2]] = -np.inf  # of two positions, one
    check(STUDENT, teacher)
    check(STUDENT, teacher, temperature=1.0)


def test_a_text_that_the_student_excludes_is_infinite_with_a_finite_gradient():
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[1, 1, STUDENT_IDS[1, 2]] = -np.inf
    values, gradient = ours(student), jax.grad(lambda s: ours(s).sum())(jnp.asarray(student))
    assert np.argwhere(np.isinf(values)).tolist() == [[1, 1]]
    assert np.all(np.isfinite(gradient))
    # The slope is that of -a log b: towards the token, by a / tau.
    log_a = np.asarray(likelihood_of(TEACHER, TEACHER_IDS, (1, [1, 2])))
    np.testing.assert_allclose(gradient[1, 1, STUDENT_IDS[1, 2]], -np.exp(log_a / 100) / 100, rtol=1e-5)
    teacher[1, 1, TEACHER_IDS[1, 2]] = -np.inf
    agreed, gradient = ours(student, teacher), jax.grad(lambda s: ours(s, teacher).sum())(student)
    assert agreed[1, 1] == 0
    assert np.all(np.asarray(gradient[1, 1]) == 0)
    assert np.all(np.isfinite(gradient))


def likelihood_of(logits, ids, chunk, size=V_T):
    """log p of the tokens after some positions of a row."""
    b, positions = chunk
    return sum(reference.log_of_next(logits[b, p, :size].tolist(), ids[b, p + 1]) for p in positions)


def test_vocabularies_of_one_token():
    values, _ = check(sizes=(V_S, 1))
    assert values.max() > 1e-3
    ids = np.zeros_like(STUDENT_IDS), np.zeros_like(TEACHER_IDS)
    value, gradient = jax.value_and_grad(lambda s: ours(s, sizes=(1, 1), ids=ids).sum())(STUDENT)
    assert value == 0
    assert np.all(np.asarray(gradient) == 0)
    value, gradient = jax.value_and_grad(lambda s: ours(s, sizes=(1, V_T), ids=(ids[0], TEACHER_IDS)).sum())(
        STUDENT
    )
    assert 0.1 < value < np.inf  # the floor of a certain student
    assert np.all(np.asarray(gradient) == 0)


def test_columns_past_the_tokenizers_are_not_read():
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[..., V_S:], teacher[..., V_T:] = np.nan, 1e9
    np.testing.assert_array_equal(
        ours(student, teacher), ours(STUDENT[..., :V_S], TEACHER[..., :V_T], sizes=(None, None))
    )


def test_no_chunk_at_all_is_zero_with_a_zero_gradient():
    nothing = Alignment(
        np.full_like(STUDENT_CHUNKS, -1), np.full_like(TEACHER_CHUNKS, -1), np.ones((B, C), bool)
    )
    value, gradient = jax.value_and_grad(
        lambda s: masked_mean(ours(s, alignment=nothing), valid_chunks(nothing))
    )(jnp.asarray(STUDENT))
    assert value == 0
    assert np.all(np.asarray(gradient) == 0)


def test_rows_that_do_not_count_may_hold_anything():
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[3], teacher[3] = np.nan, np.nan
    value, gradient = jax.value_and_grad(lambda s: ours(s, teacher).sum())(jnp.asarray(student))
    expected, expected_gradient = jax.value_and_grad(lambda s: ours(s).sum())(jnp.asarray(STUDENT))
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient, expected_gradient)


def test_equal_likelihoods_are_a_minimum_of_zero():
    """Other tokens, other vocabularies; chunk 0 is one token of 3/8 or two of 3/4 and 1/2."""
    one, two = np.array([[-1, 0, -1]], np.int32), np.array([[-1, 0, 0]], np.int32)
    student = np.full((1, 3, 3), 0.25, np.float32)
    student[0, 0] = [3 / 8, 1 / 2, 1 / 8]
    teacher = np.full((1, 3, 4), 0.25, np.float32)
    teacher[0, 0], teacher[0, 1] = [1 / 8, 0, 1 / 8, 3 / 4], [1 / 2, 1 / 4, 1 / 8, 1 / 8]
    ids = (np.array([[2, 0, 1]], np.int32), np.array([[2, 3, 0]], np.int32))
    alignment = Alignment(one, two, np.ones((1, 1), bool))

    def loss(student, temperature):
        return likelihood_matching(
            student, np.log(np.maximum(teacher, 1e-30)), alignment,
            student_ids=ids[0], teacher_ids=ids[1], likelihood_temperature=temperature,
        ).sum()  # fmt: skip

    for temperature in (1.0, 100.0):
        value, gradient = jax.value_and_grad(loss)(jnp.log(student), temperature)
        assert abs(value) < 1e-13
        np.testing.assert_allclose(gradient, 0.0, atol=1e-7)
        moved = jnp.log(student).at[0, 0, 0].add(0.1)
        assert loss(moved, temperature) > 1e-6


def test_how_a_text_is_cut_into_tokens_does_not_matter():
    """The same probability of the same text, as one token or as three, and wherever the others lie."""
    probabilities = [0.9, 0.5, 0.7]
    cut = np.stack([[p, 1 - p] for p in [*probabilities, 0.5]])[None]
    whole = np.array([np.prod(probabilities), 1 - np.prod(probabilities)])
    whole = np.broadcast_to(whole, (1, 4, 2))
    ids = np.zeros((1, 4), np.int32)
    pieces, single = np.array([[-1, 0, 0, 0]], np.int32), np.array([[-1, 0, -1, -1]], np.int32)
    other = np.log(np.array([[[0.3, 0.7]] * 4]))
    found = []
    for student, chunks in ((cut, pieces), (whole, single)):
        for teacher_chunks in (single, pieces):
            alignment = Alignment(chunks, teacher_chunks, np.ones((1, 1), bool))
            options = {"student_ids": ids, "teacher_ids": ids}
            found.append(likelihood_matching(np.log(student), other, alignment, **options)[0, 0])
    np.testing.assert_allclose(found[:2], found[2:], rtol=1e-5)
    assert abs(found[0] - found[1]) > 1e-4  # the teacher's 0.3 and 0.3^3


LOGS = -np.concatenate([[0.0, np.inf], 10.0 ** np.arange(-44, 1.5, 1.5)]).astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_the_value_of_any_two_likelihoods(temperature):
    """Against float64: never negative, 0 only for equal ones, and the slope is (b - a) / (1 - b)."""
    student, teacher = (x.ravel() for x in np.meshgrid(LOGS, LOGS))

    def scalar(student):
        values = likelihood_kl(student, jnp.asarray(teacher), temperature)
        return jnp.where(jnp.isfinite(values), values, 0.0).sum(), values

    (_, values), gradient = jax.jit(jax.value_and_grad(scalar, has_aux=True))(jnp.asarray(student))
    log_b, log_a = (np.minimum(np.float64(x) / temperature, -FLOOR) for x in (student, teacher))
    expected = np.array([exact_kl(b, a) for b, a in zip(log_b, log_a, strict=True)])
    np.testing.assert_allclose(values, expected, rtol=3e-6, atol=1e-36)
    assert np.all(np.asarray(values) >= 0)
    # The difference of a and b, by that of 1 - a and 1 - b where those are small.
    difference = np.where(log_b > -0.1, np.expm1(log_b) - np.expm1(log_a), np.exp(log_b) - np.exp(log_a))
    slope = difference / -np.expm1(log_b)
    # Infinite values were left out of the sum, and have no cotangent.
    slope = np.where((np.float64(student) / temperature < -FLOOR) & np.isfinite(expected), slope, 0.0)
    np.testing.assert_allclose(gradient, slope / temperature, rtol=3e-6, atol=1e-36)


def exact_kl(log_b, log_a):
    """`reference.binary_kl`, also where b is 0."""
    if np.isinf(log_b):
        return 0.0 if np.isinf(log_a) else np.inf
    return reference.binary_kl(log_b, log_a)


def test_equal_numbers_have_no_value_and_no_slope():
    logs = jnp.asarray(LOGS)
    values, pull = jax.vjp(lambda s: likelihood_kl(s, logs, 100.0), logs)
    assert np.all(np.asarray(values) == 0)
    assert np.all(np.asarray(pull(jnp.ones_like(values))[0]) == 0)


def test_neighbours_are_told_apart():
    """log b = log a (1 + 2e-6): the two terms of the KL cancel to 1e-12 of their size."""
    teacher = np.float32([-0.02, -1e-5, -3.0, -40.0])
    student = teacher * np.float32(1 + 2e-6)
    log_b, log_a = np.float64(student), np.float64(teacher)
    a, shift = np.exp(log_a), log_b - log_a
    expected = a * shift**2 / 2 / -np.expm1(log_a)  # the second order, which is all there is
    np.testing.assert_allclose(likelihood_kl(student, teacher, 1.0), expected, rtol=1e-4)


def test_the_teacher_gets_no_gradient_and_bfloat16_is_computed_in_float32():
    assert np.all(np.asarray(jax.grad(lambda t: ours(STUDENT, t).sum())(TEACHER)) == 0)
    student, teacher = jnp.bfloat16(STUDENT), jnp.bfloat16(TEACHER)
    value, gradient = jax.value_and_grad(lambda s: ours(s, teacher).sum())(student)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    exact = ours(student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_allclose(value, exact.sum(), rtol=1e-6)


def test_the_log_probability_of_a_token_that_comes():
    """Against float64 relatively, at every margin, with a common offset, and by log_softmax elsewhere."""
    margins = np.float32([-80, -9, -1, 0, 1, 9, 17, 30, 80])
    logits = np.stack([[m, 0.0, -1.0, -np.inf] for m in margins]).astype(np.float32)
    ids = jnp.zeros(len(margins), jnp.int32)
    expected = [reference.log_of_next(row.tolist(), 0) for row in logits]
    for offset in (0.0, 4096.0):
        found, pull = jax.vjp(lambda z: actual_log_softmax(z, ids), jnp.asarray(logits + np.float32(offset)))
        np.testing.assert_allclose(found, expected, rtol=2e-6)
        slope = pull(jnp.ones_like(found))[0]
        p = np.exp(expected)
        np.testing.assert_allclose(slope[:, 0], -np.expm1(expected), rtol=2e-6)
        others = np.exp(np.float64(logits[:, 1:])) / np.exp(np.float64(logits[:, :1])) * p[:, None]
        np.testing.assert_allclose(slope[:, 1:], -others, rtol=2e-6)
