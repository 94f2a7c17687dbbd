"""Schedules at the steps where they turn, and each optimizer on one parameter by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xtoken_jax.distributed.mesh import single_device_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.models import DecoderConfig, Model
from xtoken_jax.train.optimizer import (
    OptimizerConfig,
    OptimizerKind,
    Schedule,
    make_optimizer,
    make_schedule,
)
from xtoken_jax.train.step import abstract_state, init_state


@pytest.mark.parametrize(
    ("schedule", "end", "rates"),
    [
        # at the start, end of warm-up, half of what follows, ten steps before the end, the end
        (Schedule.cosine, 0.0, (0.02, 1, 0.5, 0.0244717, 0)),
        (Schedule.cosine, 0.5, (0.02, 1, 0.75, 0.5122359, 0.5)),
        (Schedule.linear, 0.0, (0.02, 1, 0.5, 0.1, 0)),
        (Schedule.linear, 0.2, (0.02, 1, 0.6, 0.28, 0.2)),
        (Schedule.constant, 0.0, (0.02, 1, 1, 1, 1)),
        (Schedule.wsd, 0.0, (0.02, 1, 1, 0.5, 0)),
        (Schedule.wsd, 0.2, (0.02, 1, 1, 0.6, 0.2)),
    ],
)
def test_schedules(schedule, end, rates):
    config = OptimizerConfig(
        learning_rate=1.0, schedule=schedule, warmup_steps=10, end_scale=end, decay_share=20 / 110
    )
    found = make_schedule(config, 110)
    np.testing.assert_allclose([found(step) for step in (0, 10, 60, 100, 110)], rates, atol=1e-6)


def test_a_run_shorter_than_its_warm_up_or_decay():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=50)
    np.testing.assert_allclose(make_schedule(config, 10)(9), 0.02 + 0.98 * 0.9, atol=1e-6)
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=6, schedule=Schedule.wsd, decay_share=0.9)
    np.testing.assert_allclose([make_schedule(config, 10)(s) for s in (6, 8, 10)], [1, 0.5, 0], atol=1e-6)


@pytest.mark.parametrize("kind", OptimizerKind)
def test_the_first_update_by_hand(kind):
    config = OptimizerConfig(
        kind=kind, learning_rate=0.1, schedule=Schedule.constant, warmup_steps=0, weight_decay=0.5,
        clip_norm=1.0,
    )  # fmt: skip
    params, gradient = jnp.array([2.0, 1.0]), jnp.array([3.0, -4.0])
    clipped = gradient / 5
    optimizer = make_optimizer(config, 10)
    update, _ = optimizer.update(gradient, optimizer.init(params), params)
    signed = jnp.sign(gradient) + 0.5 * params
    if kind is OptimizerKind.sgd:
        signed = clipped + 0.5 * params
    elif kind is OptimizerKind.lamb:  # the step is as long as the parameters are
        signed = signed * optax.tree.norm(params) / optax.tree.norm(signed)
    np.testing.assert_allclose(update, -0.1 * signed, rtol=1e-4)


def test_without_clipping():
    config = OptimizerConfig(
        kind=OptimizerKind.sgd, learning_rate=0.1, warmup_steps=0, weight_decay=0.0, clip_norm=None,
        schedule=Schedule.constant,
    )  # fmt: skip
    optimizer = make_optimizer(config, 10)
    params = jnp.zeros(2)
    update, _ = optimizer.update(jnp.array([30.0, -40.0]), optimizer.init(params), params)
    np.testing.assert_allclose(update, [-3, 4], rtol=1e-6)


@pytest.mark.parametrize("kind", OptimizerKind)
def test_states_are_laid_out_as_they_are_restored(kind):
    config = DecoderConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
    )
    model, mesh = Model(config), single_device_mesh()
    optimizer = make_optimizer(OptimizerConfig(kind=kind), 10)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), model.abstract(mesh))
    state, expected = init_state(model, params, optimizer, mesh), abstract_state(model, optimizer, mesh)
    layout = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)  # noqa: E731
    assert layout(state) == layout(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0}, r"optimizer\.learning_rate=0: must be above 0"),
        ({"weight_decay": -1}, r"optimizer\.weight_decay=-1: must not be negative"),
        ({"clip_norm": 0.0}, r"optimizer\.clip_norm=0\.0: must be above 0, or null"),
        ({"end_scale": 2.0}, r"optimizer\.end_scale=2\.0: must be between 0 and 1"),
        ({"decay_share": 0.0}, r"optimizer\.decay_share=0\.0: must be above 0"),
        ({"decay_share": 0.3}, r"optimizer\.decay_share=0\.3: optimizer\.schedule=cosine does not"),
        ({"end_scale": 0.3, "schedule": Schedule.constant}, r"end_scale=0\.3: optimizer\.schedule=constant"),
        ({"beta2": 0.99, "kind": OptimizerKind.sgd}, r"optimizer\.beta2=0\.99: optimizer\.kind=sgd"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**options).validate()
