"""W with trained weights: where it starts, what it keeps, its gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from projection.random_w import random_w, rows_of
from reference import projection as reference

from xtoken_jax.losses.terms.projection_kl import projected_softmax
from xtoken_jax.projection.matrix import Projection, row_softmax

V_S, V_T = 23, 17
W = random_w(0, V_S, V_T)
RNG = np.random.default_rng(1)
PROBABILITIES = RNG.dirichlet(np.ones(V_S), (2, 3)).astype(np.float32)
FACTORS = RNG.normal(size=(2, 3, V_T)).astype(np.float32)


def loss(logits, learnable):
    w = dataclasses.replace(learnable, logits=logits)
    return jnp.sum(jnp.square(w.project(PROBABILITIES)) * FACTORS)


def twin_loss(logits):
    rows = reference.softmax_rows(logits, W.indices)
    return sum(
        value**2 * float(factor)
        for place in np.ndindex(2, 3)
        for value, factor in zip(
            reference.project(PROBABILITIES[place], rows, range(V_T)), FACTORS[place], strict=True
        )
    )


def test_it_starts_as_the_fixed_w():
    learnable = W.learnable()
    assert (learnable.logits.shape, learnable.logits.dtype) == (W.weights.shape, jnp.float32)
    assert np.isfinite(learnable.logits).all()
    started = learnable.projection()
    np.testing.assert_allclose(started.weights, W.weights, rtol=1e-6)
    np.testing.assert_array_equal(started.indices, W.indices)
    single = (W.indices >= 0).sum(1) == 1
    assert np.all(np.asarray(started.weights)[single, 0] == 1.0)
    np.testing.assert_allclose(learnable.project(PROBABILITIES), W.project(PROBABILITIES), rtol=1e-6)
    assert learnable.student_size == V_S


def test_an_entry_of_weight_0_is_no_support():
    given = Projection(
        np.array([[2, 1], [0, -1]], np.int32), np.array([[1.0, 0.0], [1.0, 0.0]], np.float32), 3
    )
    learnable = given.learnable()
    assert learnable.indices.tolist() == [[2, -1], [0, -1]]
    assert np.isfinite(learnable.logits).all()
    assert learnable.source.tolist() == [1, 2, 0]  # both rows are copied, as what they are


def test_a_row_of_one_entry_is_a_copy_wherever_it_stands():
    """Its softmax is 1. Of two for one teacher token the first is the copy."""
    indices = np.array([[-1, 1], [1, -1], [0, 2], [-1, -1]], np.int32)
    weights = np.array([[0.0, 0.5], [1.0, 0.0], [0.25, 0.75], [0.0, 0.0]], np.float32)
    learnable = Projection(indices, weights, 3).learnable()
    assert learnable.source.tolist() == [4, 0, 4]
    assert learnable.rows.tolist() == [1, 2]
    expected = [[0.1, 0.5, 0.3]]  # 0.4 * (0.25, 0, 0.75) + (0.2 + 0.3) at 1
    np.testing.assert_allclose(learnable.project(jnp.array([[0.2, 0.3, 0.4, 0.1]])), expected, rtol=1e-6)


def test_w_from_outside_begins_to_learn_inside_a_jitted_function():
    inside = jax.jit(lambda x: W.learnable().project(x))(PROBABILITIES)
    np.testing.assert_allclose(inside, W.learnable().project(PROBABILITIES), rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_the_gradient_equals_finite_differences(jit):
    learnable = W.learnable()
    logits = learnable.logits + jnp.asarray(RNG.normal(size=W.weights.shape), jnp.float32)
    gradient = (jax.jit(jax.grad(loss)) if jit else jax.grad(loss))(logits, learnable)
    assert np.isfinite(gradient).all()
    at = np.asarray(logits, np.float64)
    expected, step = np.zeros_like(at), 1e-6
    for place in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        expected[place] = (twin_loss(up) - twin_loss(down)) / (2 * step)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)
    assert np.abs(expected).max() > 1e-3
    padded = W.indices < 0
    assert np.all(np.asarray(gradient)[padded] == 0.0)


@pytest.mark.parametrize("noise", [0.0, 1e30, -1e30, np.inf, -np.inf], ids=str)
def test_padded_places_have_no_effect_whatever_stands_there(noise):
    learnable = W.learnable()
    logits = jnp.where(W.indices < 0, noise, learnable.logits)
    assert loss(logits, learnable) == loss(learnable.logits, learnable)
    gradient = jax.grad(loss)(logits, learnable)
    np.testing.assert_array_equal(gradient, jax.grad(loss)(learnable.logits, learnable))


def test_extreme_logits_stay_finite():
    learnable = W.learnable()
    logits = jnp.where(W.indices >= 0, jnp.asarray(RNG.choice([-1e4, 0, 1e4], W.weights.shape)), 0.0)
    logits = logits.astype(jnp.float32)
    weights = np.asarray(dataclasses.replace(learnable, logits=logits).projection().weights)
    assert np.isfinite(weights).all()
    assert np.isfinite(jax.grad(loss)(logits, learnable)).all()


def test_training_keeps_rows_distributions_and_learns_a_w():
    """From the fixed W to another one on the same entries, which its projections show."""
    goal = dataclasses.replace(
        W.learnable(), logits=jnp.asarray(RNG.normal(size=W.weights.shape), jnp.float32)
    )
    batch = jnp.asarray(RNG.dirichlet(np.ones(V_S) * 0.1, 256), jnp.float32)
    wanted = goal.project(batch)
    learnable = W.learnable()
    optimizer = optax.adam(1e-1)

    @jax.jit
    def step(logits, state):
        def error(logits):
            return jnp.mean(jnp.square(dataclasses.replace(learnable, logits=logits).project(batch) - wanted))

        value, gradient = jax.value_and_grad(error)(logits)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(logits, updates), state, value

    logits, state = learnable.logits, optimizer.init(learnable.logits)
    values = []
    for _ in range(300):
        logits, state, value = step(logits, state)
        values.append(float(value))
    assert values[-1] < 1e-3 * values[0]
    trained = dataclasses.replace(learnable, logits=logits).projection()
    np.testing.assert_allclose(trained.weights, goal.projection().weights, atol=2e-2)
    filled = W.indices[:, 0] >= 0
    sums = np.asarray(trained.weights).sum(1)
    np.testing.assert_allclose(sums[filled], 1.0, atol=1e-6)
    assert np.all(sums[~filled] == 0)
    assert np.all(np.asarray(trained.weights) >= 0)
    assert rows_of(trained)[0] == []  # an empty row stays one


def softmax_gradients(w, logits, z, columns, factors):
    """projected_softmax, and the gradients of its product with factors by the student's logits and by W's."""

    def loss(logits, z):
        projected = projected_softmax(logits, w(z), columns, V_T)
        return jnp.sum(factors * projected), projected

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(logits, z)


@pytest.mark.parametrize("columns", [range(V_T), [4, 0, 16, 9, 7]], ids=["all", "some"])
def test_the_fast_way_equals_the_product_with_all_rows(columns):
    learnable = W.learnable()
    columns = jnp.asarray(columns, jnp.int32)
    logits = jnp.asarray(RNG.normal(0, 2, (6, V_S)), jnp.float32)
    z = learnable.logits + jnp.asarray(RNG.normal(size=W.weights.shape), jnp.float32)
    factors = jnp.asarray(RNG.normal(size=(6, len(columns))), jnp.float32)

    def fast(z):
        return dataclasses.replace(learnable, logits=z)

    def slow(z):
        return Projection(W.indices, row_softmax(z, W.indices), V_T)

    found, projected = softmax_gradients(fast, logits, z, columns, factors)
    expected, expected_projected = softmax_gradients(slow, logits, z, columns, factors)
    np.testing.assert_allclose(projected, expected_projected, rtol=1e-5)
    for gradient, wanted in zip(found, expected, strict=True):
        assert np.abs(wanted).max() > 1e-2
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)
    assert not np.asarray(found[1])[(W.indices >= 0).sum(1) < 2].any()  # exactly


def test_beside_a_fixed_w_it_takes_the_memory_of_its_gradient():
    student, teacher, positions = 20_000, 24_000, 64
    indices = np.full((student, 4), -1, np.int32)
    indices[:, 0] = np.arange(student)
    indices[::7, :3] = RNG.integers(0, teacher, (len(indices[::7]), 3))
    weights = np.where(indices >= 0, 1.0, 0.0).astype(np.float32)
    w = Projection(indices, weights / weights.sum(1, keepdims=True), teacher)
    columns = jnp.arange(0, teacher, 3, dtype=jnp.int32)
    learnable = w.learnable()

    def loss(logits, z, form):
        form = form if z is None else dataclasses.replace(form, logits=z)
        return jnp.sum(jnp.square(projected_softmax(logits, form, columns, teacher)))

    def temporaries(z, form):
        argnums = 0 if z is None else (0, 1)
        of_logits = jax.ShapeDtypeStruct((positions, student), jnp.float32)
        compiled = jax.jit(jax.value_and_grad(loss, argnums)).lower(of_logits, z, form).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    fixed, learned = temporaries(None, w.split()), temporaries(learnable.logits, learnable)
    # jaxlib 0.12 also stores the student's probabilities of the rows whose weights train; 0.10 fuses them.
    stored = 4 * positions * len(learnable.rows) if jax.__version_info__ >= (0, 12) else 0
    assert learned <= fixed + learnable.logits.nbytes + stored
