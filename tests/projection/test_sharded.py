"""W split over 8 devices is W: values, gradients, and what each device holds and sends."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from programs import AS_OUTSIDE
from projection.random_w import random_w

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.losses.terms.projection_kl import projection_kl
from xtoken_jax.projection.sharded import shard_projection

V_T, COLUMNS = 37, jnp.asarray([5, 0, 36, 11, 20], jnp.int32)
RNG = np.random.default_rng(1)
MESHES = [MeshConfig(data=1, tensor=8), MeshConfig(data=2, fsdp=2, tensor=2)]


def case(mesh, size):
    """W, the same sharded, probabilities laid out as a model's would be where they can, and factors."""
    w = random_w(3, size, V_T)
    sharded = shard_projection(w, mesh, "tensor")
    probabilities = RNG.dirichlet(np.ones(size), (4, 3)).astype(np.float32)
    factors = RNG.normal(size=(4, 3, len(COLUMNS))).astype(np.float32)
    vocabulary = "tensor" if size % mesh.shape["tensor"] == 0 else None
    layout = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, vocabulary))
    return w, sharded, jax.device_put(probabilities, layout), factors


def squares(p, w, factors):
    return jnp.sum(jnp.square(w.project(p, COLUMNS, V_T)) * factors)


CASES = [(0, 64), (0, 61), (1, 61)]
NAMES = ["tensor=8-64", "tensor=8-61", "2x2x2-61"]


@pytest.mark.parametrize(("config", "size"), CASES, ids=NAMES)
def test_values_and_gradients(config, size):
    mesh = make_mesh(MESHES[config])

    @jax.jit
    def all_of_it(w, p, factors):
        return w.project(p, COLUMNS), w.project(p), jax.grad(squares)(p, w, factors)

    with jax.set_mesh(mesh):
        w, sharded, p, factors = case(mesh, size)
        assert sharded.student_size == size
        found = all_of_it(sharded, p, factors)
        for got, expected in zip(found, all_of_it(w, np.asarray(p), factors), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("config", "size"), CASES, ids=NAMES)
def test_a_learnable_w_is_split_too(config, size):
    def through(logits, w, p, factors):
        return squares(p, dataclasses.replace(w, logits=logits), factors)

    def through_sharded(logits, s, p, factors):
        return squares(p, dataclasses.replace(s, logits=logits), factors)

    mesh = make_mesh(MESHES[config])
    with jax.set_mesh(mesh):
        w, sharded, p, factors = case(mesh, size)
        sharded = sharded.learnable()
        logits = sharded.logits
        assert logits.sharding.is_equivalent_to(sharded.projection.indices.sharding, 2)
        assert sharded.learnable() is sharded
        value, gradient = jax.jit(jax.value_and_grad(through_sharded))(logits, sharded, p, factors)
        assert gradient.sharding.is_equivalent_to(logits.sharding, 2)
        learnable = w.learnable()
        expected, expected_gradient = jax.jit(jax.value_and_grad(through))(
            learnable.logits, learnable, np.asarray(p), factors
        )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[:size], expected_gradient, rtol=1e-4, atol=1e-7)
    assert np.all(np.asarray(gradient[size:]) == 0)


def test_a_device_holds_its_rows_and_sends_one_sum():
    size, parts = 64_000, 8
    mesh = make_mesh(MeshConfig(data=1, tensor=parts))
    with jax.set_mesh(mesh):
        sharded = shard_projection(random_w(0, size, V_T), mesh, "tensor")
        for leaf in (sharded.projection.indices, sharded.projection.weights):
            assert {shard.data.shape for shard in leaf.addressable_shards} == {(size // parts, 4)}
        p = jax.device_put(jnp.ones((2, 2, size)), NamedSharding(mesh, PartitionSpec(None, None, "tensor")))
        for function, reduced in (
            (lambda s, p: s.project(p, COLUMNS), 1),
            (lambda s, p: jax.grad(lambda p: jnp.sum(jnp.square(s.project(p, COLUMNS))))(p), 1),
        ):
            compiled = jax.jit(function).lower(sharded, p).compile(AS_OUTSIDE)
            text = compiled.as_text()
            sent = {
                name: len(re.findall(rf" {name}(?:-start)?\(", text))
                for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
            }
            assert sent == {**dict.fromkeys(sent, 0), "all-reduce": reduced}
            memory = compiled.memory_analysis()
            whole = size * 4 * 8 + p.nbytes  # W's indices and weights, and the probabilities
            assert memory.argument_size_in_bytes <= whole / parts + 4096


def test_the_rows_can_be_those_of_padded_logits():
    mesh = make_mesh(MESHES[0])
    w = random_w(3, 61, V_T)
    with jax.set_mesh(mesh):
        sharded = shard_projection(w, mesh, "tensor", rows=80)
        assert sharded.projection.indices.shape == (80, 4)
        p = RNG.dirichlet(np.ones(80), 5).astype(np.float32)
        found = jax.jit(lambda s, p: s.project(p))(sharded, p)
        np.testing.assert_allclose(found, w.project(p[:, :61]), rtol=1e-5, atol=1e-7)
        for rows in (60, 56, 81):
            with pytest.raises(ValueError, match=f"rows={rows}"):
                shard_projection(w, mesh, "tensor", rows=rows)


def test_p_kl_takes_every_form_of_w():
    mesh = make_mesh(MESHES[1])
    w = random_w(3, 61, V_T)
    chunks = np.array([[0, 0, 1, 2, 3, 3], [0, 1, 1, 2, 3, -1]], np.int32)
    alignment = Alignment(chunks, chunks[:, ::-1].copy(), np.ones((2, 4), bool))
    logits = [jnp.asarray(RNG.normal(size=(2, 6, size)), jnp.float32) for size in (64, V_T)]

    @jax.jit
    def value_and_gradient(student, teacher, alignment, w):
        def loss(student):
            return projection_kl(student, teacher, alignment, w, top_k=16).sum()

        return jax.value_and_grad(loss)(student)

    with jax.set_mesh(mesh):
        expected = value_and_gradient(*logits, alignment, w)
        assert np.abs(expected[1]).max() > 1e-3
        sharded = shard_projection(w, mesh, "tensor")
        for form in (w.split(), w.learnable(), sharded, sharded.learnable()):
            found = value_and_gradient(*logits, alignment, form)
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
            np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)
