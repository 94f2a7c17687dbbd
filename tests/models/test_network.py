"""What the modules' own derivative and their names for remat must keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import tiny
from xtoken_jax.models import Model, network, read_config


@pytest.mark.parametrize(("inputs", "outputs"), [("d", "nh"), ("nh", "d"), ("d", "f")])
def test_a_products_gradients_are_the_derived_ones(inputs, outputs):
    sizes, rng = {"d": 5, "n": 2, "h": 3, "f": 7}, np.random.default_rng(0)

    def draw(letters):
        return rng.normal(size=[sizes[letter] for letter in letters])

    x, weight = rng.normal(size=(2, 4, *draw(inputs).shape)), rng.normal(size=(2, 4, *draw(outputs).shape))
    kernel = draw(inputs + outputs)

    def total(product):
        return jax.grad(lambda x, kernel: jnp.sum(weight * product(x, kernel)), (0, 1))(x, kernel)

    found = total(lambda x, kernel: network._product(inputs, outputs, x, kernel))
    expected = total(lambda x, kernel: jnp.einsum(f"bt{inputs},{inputs}{outputs}->bt{outputs}", x, kernel))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_remat_dots_repeats_no_product_of_a_kernel():
    config = dataclasses.replace(read_config(tiny.DATA / "untied"), num_layers=1)

    def multiplications(remat):
        model = Model(config, remat=remat)
        step = jax.jit(jax.grad(lambda params, tokens: jnp.sum(model(params, tokens)[0])))
        text = step.lower(model.abstract(), jax.ShapeDtypeStruct((2, 8), jnp.int32)).as_text()
        return text.count("stablehlo.dot_general")

    none, dots, full = (multiplications(remat) for remat in ("none", "dots", "full"))
    # of a layer's nine products two are attention's own, which alone are repeated by dots
    assert none < dots <= none + 2
    assert full >= dots + 5
