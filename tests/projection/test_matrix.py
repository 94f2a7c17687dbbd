"""`Projection.project` is a product with the dense W."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xtoken_jax.projection.matrix import Partition, Projection

V_S, V_T, WIDTH, K = 9, 12, 14, 4
RNG = np.random.default_rng(0)


def random_projection():
    """Rows of 0 to K entries; a teacher id may serve many of them."""
    indices = np.full((V_S, K), -1, np.int32)
    weights = np.zeros((V_S, K), np.float32)
    for i in range(V_S):
        count = i % (K + 1)
        indices[i, :count] = RNG.choice(V_T, count, replace=False)
        weights[i, :count] = np.sort(RNG.dirichlet(np.ones(count)))[::-1] if count else 0
    return Projection(indices, weights, V_T)


PROJECTION = random_projection()
DENSE = np.zeros((V_S, WIDTH), np.float32)
for i in range(V_S):
    for j, w in zip(PROJECTION.indices[i], PROJECTION.weights[i], strict=True):
        if j >= 0:
            DENSE[i, j] += w
PROBABILITIES = RNG.dirichlet(np.ones(V_S), (2, 3)).astype(np.float32)


@pytest.mark.parametrize("columns", [range(WIDTH), range(V_T), [7], [11, 0, 5, 13, 2]], ids=str)
@pytest.mark.parametrize("jit", [False, True])
def test_project_is_the_dense_product(columns, jit):
    columns = jnp.array(list(columns), jnp.int32)
    weights = jnp.asarray(RNG.normal(size=(2, 3, len(columns))), jnp.float32)

    def ours(p, projection):
        return jnp.sum(projection.project(p, columns, WIDTH) * weights), projection.project(p, columns, WIDTH)

    function = jax.value_and_grad(ours, has_aux=True)
    (_, values), gradient = (jax.jit(function) if jit else function)(PROBABILITIES, PROJECTION)
    dense = DENSE[:, np.asarray(columns)]
    np.testing.assert_allclose(values, PROBABILITIES @ dense, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradient, np.asarray(weights) @ dense.T, rtol=1e-6, atol=1e-6)


def test_one_vector_and_a_batch_of_any_rank():
    columns = jnp.arange(V_T, dtype=jnp.int32)
    batch = PROJECTION.project(PROBABILITIES, columns, V_T)
    for place in np.ndindex(2, 3):
        one = PROJECTION.project(PROBABILITIES[place], columns, V_T)
        np.testing.assert_allclose(one, batch[place], rtol=1e-6)


def test_padding_has_no_effect_even_with_a_weight():
    """-1 is padding whatever stands beside it, and reads no teacher column."""
    columns = jnp.arange(V_T, dtype=jnp.int32)
    expected = PROJECTION.project(PROBABILITIES, columns, V_T)
    loud = Projection(PROJECTION.indices, np.where(PROJECTION.indices < 0, 5.0, PROJECTION.weights), V_T)
    np.testing.assert_array_equal(loud.project(PROBABILITIES, columns, V_T), expected)
    wider = Projection(
        np.pad(PROJECTION.indices, ((0, 0), (0, 2)), constant_values=-1),
        np.pad(PROJECTION.weights, ((0, 0), (0, 2))),
        V_T,
    )
    np.testing.assert_array_equal(wider.project(PROBABILITIES, columns, V_T), expected)


@pytest.mark.parametrize("projection", [PROJECTION, PROJECTION.split()], ids=["whole", "split"])
def test_a_teacher_narrower_than_its_tokenizer_drops_the_rest(projection):
    width = 6
    got = projection.project(PROBABILITIES, jnp.arange(width, dtype=jnp.int32), width)
    np.testing.assert_allclose(got, PROBABILITIES @ DENSE[:, :width], rtol=1e-6, atol=1e-7)


def test_mass_is_kept():
    full = PROJECTION.project(PROBABILITIES, jnp.arange(V_T, dtype=jnp.int32), V_T)
    filled = PROJECTION.indices[:, 0] >= 0
    np.testing.assert_allclose(np.sum(full, -1), PROBABILITIES[..., filled].sum(-1), rtol=1e-6)


def test_partitions_by_hand():
    indices = np.array([[3, -1], [3, -1], [1, 0], [1, -1], [2, 0], [2, 4], [-1, -1]], np.int32)
    weights = np.array([[1, 0], [1, 0], [0.9, 0.1], [1, 0], [0.5, 0.5], [0.7, 0.3], [0, 0]], np.float32)
    projection = Projection(indices, weights, 6)
    strict = Partition.strict(projection)
    assert strict.common_student.tolist() == [0, 3]
    assert strict.common_teacher.tolist() == [3, 1]
    assert strict.uncommon_student.tolist() == [1, 2, 4, 5, 6]
    assert strict.uncommon_teacher.tolist() == [0, 2, 4, 5]
    relaxed = Partition.relaxed(projection)
    # Teacher id 1 goes to the heavier row 3 and not to the lower row 2; 0.5 is below the threshold.
    assert relaxed.common_student.tolist() == [0, 3, 5]
    assert relaxed.common_teacher.tolist() == [3, 1, 2]
    assert Partition.relaxed(projection, threshold=0.5).common_student.tolist() == [0, 3, 5]
    assert Partition.relaxed(projection, teacher_size=9).uncommon_teacher.tolist() == [0, 4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="teacher_size is needed"):
        Partition.strict(Projection(indices, weights))
