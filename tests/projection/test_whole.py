"""All columns at once, and W^T: against the twin, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from projection.random_w import random_w, rows_of
from reference import projection as reference

V_S, V_T = 23, 17
W = random_w(0, V_S, V_T)
ROWS = rows_of(W)
RNG = np.random.default_rng(1)
PROBABILITIES = RNG.dirichlet(np.ones(V_S), (2, 3)).astype(np.float32)
VALUES = RNG.normal(size=(2, 3, V_T)).astype(np.float32)
FORMS = {"plain": W, "split": W.split(), "learnable": W.learnable()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [None, [4, 0, 16, 9]], ids=["all", "some"])
def test_project_equals_the_twin(form, columns):
    wanted = range(V_T) if columns is None else columns
    given = None if columns is None else jnp.asarray(columns, jnp.int32)
    found = jax.jit(lambda w, p: w.project(p, given))(FORMS[form], PROBABILITIES)
    assert (found.shape, found.dtype) == ((2, 3, len(wanted)), jnp.float32)
    for place in np.ndindex(2, 3):
        expected = reference.project(PROBABILITIES[place], ROWS, wanted)
        np.testing.assert_allclose(found[place], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_a_width_cuts_or_widens(form):
    w = FORMS[form]
    whole = w.project(PROBABILITIES)
    np.testing.assert_array_equal(w.project(PROBABILITIES, None, 5), whole[..., :5])
    wider = w.project(PROBABILITIES, width=V_T + 3)
    np.testing.assert_array_equal(wider[..., :V_T], whole)
    np.testing.assert_array_equal(wider[..., V_T:], 0)
    one = w.project(PROBABILITIES[0, 0])  # no leading axis
    np.testing.assert_allclose(one, whole[0, 0], rtol=1e-6)


def test_without_a_size_the_width_is_asked_for():
    import dataclasses

    nameless = dataclasses.replace(W, teacher_size=None)
    with pytest.raises(ValueError, match="width is needed"):
        nameless.project(PROBABILITIES)
    np.testing.assert_array_equal(nameless.project(PROBABILITIES, width=V_T), W.project(PROBABILITIES))


def test_the_transpose_equals_the_twin():
    found = jax.jit(lambda w, v: w.project(v))(W.T, VALUES)
    assert (found.shape, found.dtype) == ((2, 3, V_S), jnp.float32)
    for place in np.ndindex(2, 3):
        np.testing.assert_allclose(found[place], reference.project_back(VALUES[place], ROWS), atol=1e-6)
    np.testing.assert_allclose(W.T.project(VALUES[0, 0]), found[0, 0], rtol=1e-6)
    narrow = W.T.project(VALUES[..., :6])  # columns that are not there count as 0
    np.testing.assert_allclose(
        narrow, W.T.project(np.where(np.arange(V_T) < 6, VALUES, np.float32(0))), rtol=1e-6
    )


def test_twice_transposed_is_itself():
    assert W.T.T is W


def test_the_transpose_is_the_adjoint_and_each_is_the_others_gradient():
    projected, forward = jax.vjp(W.project, PROBABILITIES)
    back, backward = jax.vjp(W.T.project, VALUES)
    np.testing.assert_allclose(np.sum(projected * VALUES), np.sum(PROBABILITIES * back), rtol=1e-5)
    np.testing.assert_allclose(forward(jnp.asarray(VALUES))[0], back, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(backward(jnp.asarray(PROBABILITIES))[0], projected, rtol=1e-5, atol=1e-6)
