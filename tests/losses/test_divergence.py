"""Divergences of log-probabilities that need not sum to 1, with zeros on either or both sides."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import gradient as reference_gradient
from reference import losses as reference

from xtoken_jax.losses.math.divergence import kl_terms

RNG = np.random.default_rng(0)
TEACHER = (RNG.normal(-2, 1.5, (6, 9)) - 0.5).astype(np.float32)
STUDENT = (RNG.normal(-2, 1.5, (6, 9)) - 0.5).astype(np.float32)
WEIGHTS = RNG.uniform(0.5, 1.5, (6, 9)).astype(np.float32)  # so that no two errors cancel
BETAS = (0.1, 0.5, 0.9)


def with_zeros():
    """A zero of the teacher, of the student and of both in every row."""
    teacher, student = TEACHER.copy(), STUDENT.copy()
    teacher[:, 0] = student[:, 1] = teacher[:, 2] = student[:, 2] = -np.inf
    return teacher, student


def twin(teacher, student, direction, beta=0.5):
    """float64 [rows, columns], every term by itself."""

    def term(t, s):
        return reference.jsd([t], [s], beta) if direction == "jsd" else reference.kl([t], [s], direction)

    return np.array(
        [[term(t, s) for t, s in zip(*rows, strict=True)] for rows in zip(teacher, student, strict=True)]
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("zeros", [False, True])
def test_jsd_against_float64(beta, zeros):
    teacher, student = with_zeros() if zeros else (TEACHER, STUDENT)

    def ours(teacher, student):
        terms = kl_terms(teacher, student, "jsd", beta=beta)
        return jnp.sum(WEIGHTS * terms), terms

    (_, terms), slopes = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(teacher, student)
    expected = twin(teacher, student, "jsd", beta)
    np.testing.assert_allclose(terms, expected, rtol=2e-6, atol=1e-8)
    sides = [np.float64(teacher), np.float64(student)]
    for which, slope in enumerate(slopes):
        assert np.all(np.isfinite(slope))
        there = sides[which] > -np.inf
        assert np.all(np.asarray(slope)[~there] == 0)

        def scalar(z, which=which):
            return (
                WEIGHTS * twin(*(z if i == which else side for i, side in enumerate(sides)), "jsd", beta)
            ).sum()

        places = [tuple(i) for i in np.argwhere(there)]
        expected = reference_gradient.differences(scalar, sides[which], places, 1e-4)
        np.testing.assert_allclose(np.asarray(slope)[there], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_against_float64(direction):
    np.testing.assert_allclose(
        kl_terms(TEACHER, STUDENT, direction), twin(TEACHER, STUDENT, direction), rtol=2e-6, atol=1e-6
    )
    teacher, student = with_zeros()
    terms = np.asarray(kl_terms(teacher, student, direction))
    alone, both = (1, 2) if direction == "forward" else (0, 2)  # where only the other side is 0
    assert np.all(np.isposinf(terms[:, alone]))
    assert np.all(terms[:, both] == 0)
    finite = [column for column in range(9) if column != alone]
    slope = jax.grad(lambda s: kl_terms(teacher, s, direction)[:, finite].sum())(student)
    assert np.all(np.isfinite(np.asarray(slope)[:, finite]))


def test_jsd_of_far_and_near_log_probabilities():
    """No overflow where the two are 1e4 apart, and all digits where they almost agree."""
    far, beta = jnp.float32([-1e4, -1.0, -3e38]), 0.3
    near = jnp.float32([-1.0, -1e4, -1.0])
    terms, slope = kl_terms(far, near, "jsd", beta=beta), jax.grad(
        lambda s: kl_terms(far, s, "jsd", beta=beta).sum()
    )(near)  # fmt: skip
    p = np.exp(-1.0)
    expected = [-0.7 * p * np.log(0.7), -0.3 * p * np.log(0.3), -0.7 * p * np.log(0.7)]
    np.testing.assert_allclose(terms, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, [expected[0], 0.0, expected[2]], rtol=1e-6)
    one, other = jnp.float32([-4.0, -20.0]), jnp.float32([-4.0 + 2**-12, -20.0 - 2**-12])
    terms = kl_terms(one, other, "jsd", beta=beta)
    np.testing.assert_allclose(terms, twin([one], [other], "jsd", beta)[0], rtol=5e-3)
    assert np.all(np.asarray(kl_terms(one, one, "jsd")) == 0)


@pytest.mark.parametrize("beta", BETAS)
def test_no_term_of_the_jsd_is_negative(beta):
    """Also where the two sides sum to different numbers, which makes a KL negative."""
    teacher, student = TEACHER - 3, STUDENT
    assert kl_terms(teacher, student).sum() < 0
    assert np.all(np.asarray(kl_terms(teacher, student, "jsd", beta=beta)) >= 0)


def test_the_ends_of_beta_are_the_two_kls():
    for beta, direction in ((0, "forward"), (1, "reverse")):
        np.testing.assert_array_equal(
            kl_terms(TEACHER, STUDENT, "jsd", beta=beta), kl_terms(TEACHER, STUDENT, direction)
        )
    # Scaled, the terms of distributions go there.
    teacher, student = (jax.nn.log_softmax(z) for z in (TEACHER, STUDENT))
    for beta, share, direction in ((1e-4, 1e-4, "forward"), (1 - 1e-4, 1e-4, "reverse")):
        scaled = kl_terms(teacher, student, "jsd", beta=beta).sum(-1) / share
        np.testing.assert_allclose(scaled, kl_terms(teacher, student, direction).sum(-1), rtol=5e-3)


def test_the_jsd_is_symmetric():
    np.testing.assert_allclose(
        kl_terms(TEACHER, STUDENT, "jsd", beta=0.3), kl_terms(STUDENT, TEACHER, "jsd", beta=0.7), rtol=1e-6
    )


def test_both_modes_of_differentiation():
    teacher, student = map(jnp.asarray, with_zeros())

    def loss(student):
        return kl_terms(teacher, student, "jsd", beta=0.3).sum()

    step = jnp.where(jnp.isfinite(student), 1.0, 0.0)
    slope = jax.jvp(loss, (student,), (step,))[1]
    np.testing.assert_allclose(slope, jnp.sum(jax.grad(loss)(student)), rtol=1e-6)


@pytest.mark.parametrize(
    ("direction", "beta"), [("sideways", 0.5), ("jsd", -0.1), ("jsd", 1.5), ("jsd", np.nan)]
)
def test_what_makes_no_sense_is_refused(direction, beta):
    with pytest.raises(ValueError, match=r"direction=|beta="):
        kl_terms(TEACHER, STUDENT, direction, beta=beta)


def test_bfloat16_stays_bfloat16():
    for direction, beta in itertools.product(("forward", "reverse", "jsd"), BETAS):
        terms = kl_terms(jnp.bfloat16(TEACHER), jnp.bfloat16(STUDENT), direction, beta=beta)
        assert terms.dtype == jnp.bfloat16


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_what_underflows_is_no_nan_against_an_excluded_token(direction):
    lead, other = jnp.array([0.0, -5000.0]), jnp.array([0.0, -jnp.inf])
    pair = (lead, other) if direction == "forward" else (other, lead)
    assert kl_terms(lead, other, "forward").tolist() == [0.0, 0.0]
    gradient = jax.grad(lambda t, s: kl_terms(t, s, direction).sum(), argnums=(0, 1))(*pair)
    assert all(np.isfinite(g).all() for g in gradient)
