"""The names that other code bases use, as the README shows them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xtoken_jax


@pytest.fixture(scope="module")
def pair(pair_folders):
    return xtoken_jax.TokenizerPair.load(*pair_folders)


def test_every_public_name_loads():
    for name in xtoken_jax.__all__:
        assert getattr(xtoken_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'los'"):
        _ = xtoken_jax.los


def test_from_texts_to_a_gradient(pair):
    assert xtoken_jax.audit(pair).recommended_loss == "p_kl"
    projection = xtoken_jax.build_projection(pair)
    texts = ["12+30=42\n", "The sum of the numbers is 7.\n"]
    batch = xtoken_jax.align(pair, texts, student_length=16, teacher_length=24)
    alignment = batch.alignment
    rng = np.random.default_rng(0)
    student_logits = jnp.asarray(rng.normal(size=(2, 16, pair.student.size + 4)), jnp.float32)
    teacher_logits = jnp.asarray(rng.normal(size=(2, 24, pair.teacher.size)), jnp.float32)
    losses = xtoken_jax.losses

    def loss(student_logits, teacher_logits, student, alignment, w, partition):
        chunks = losses.valid_chunks(alignment)
        values = losses.projection_kl(student_logits, teacher_logits, alignment, w)
        hybrid = losses.hybrid_kl(student_logits, teacher_logits, alignment, partition)
        assert values.shape == hybrid.shape == alignment.valid.shape
        kd = losses.masked_mean(values, chunks) + losses.masked_mean(hybrid, chunks)
        ce = losses.masked_mean(
            *losses.next_token_cross_entropy(student_logits, student.ids, student.targets)
        )
        return losses.total_loss(ce, kd)[0]

    partition = xtoken_jax.Partition.strict(projection, teacher_size=pair.teacher.size)
    values = [
        jax.jit(jax.value_and_grad(loss))(
            student_logits, teacher_logits, batch.student, alignment, w, partition
        )
        for w in (projection, projection.split())
    ]
    for value, gradient in values:
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 1e-4
    np.testing.assert_allclose(values[0][0], values[1][0], rtol=1e-6)
    np.testing.assert_allclose(values[0][1], values[1][1], atol=1e-7)


def test_a_projection_file_goes_back_to_its_pair(pair, tmp_path):
    projection = xtoken_jax.build_projection(pair)
    xtoken_jax.save_projection(tmp_path / "w.safetensors", projection, pair)
    again = xtoken_jax.load_projection(tmp_path / "w.safetensors", pair)
    np.testing.assert_array_equal(again.indices, projection.indices)
    np.testing.assert_array_equal(again.weights, projection.weights)
    assert again.teacher_size == pair.teacher.size
