"""The split form of W is W: same values, same gradients, on any columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xtoken_jax.projection.matrix import Projection


def random_projection(rng, student, teacher, teacher_size):
    """Rows of every kind: empty, one to one, two students on one teacher id, several pieces."""
    indices = np.full((student, 4), -1, np.int32)
    weights = np.zeros((student, 4), np.float32)
    for row in range(1, student):
        pieces = rng.choice(teacher, rng.integers(1, 5), replace=False) if row % 3 else [row % 7]
        raw = 0.1 ** np.arange(len(pieces))
        indices[row, : len(pieces)], weights[row, : len(pieces)] = pieces, raw / raw.sum()
    return Projection(indices, weights, teacher_size)


@pytest.mark.parametrize("teacher_size", [31, None])
def test_values_and_gradients(teacher_size):
    rng = np.random.default_rng(0)
    plain = random_projection(rng, 40, 31, teacher_size)
    probabilities = jnp.asarray(rng.dirichlet(np.ones(40), (2, 5)), jnp.float32)
    factors = jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.float32)
    columns = jnp.asarray(rng.permutation(31)[:12], jnp.int32)

    def loss(p, w):
        return jnp.sum(w.project(p, columns, 33) * factors), w.project(p, columns, 33)

    (_, expected), expected_gradient = jax.value_and_grad(loss, has_aux=True)(probabilities, plain)
    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(probabilities, plain.split())
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-7)


def test_columns_past_the_teacher_get_nothing():
    plain = random_projection(np.random.default_rng(1), 20, 9, 9)
    found = plain.split().project(jnp.full((3, 20), 0.05), jnp.arange(12, dtype=jnp.int32), 12)
    np.testing.assert_array_equal(found[:, 9:], 0)
    np.testing.assert_allclose(found.sum(-1), 0.95, rtol=1e-6)  # the first row of W is empty
