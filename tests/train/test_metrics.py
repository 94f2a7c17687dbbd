"""What a step reports, beside the same by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xtoken_jax.alignment.batch import Alignment, TokenRows
from xtoken_jax.data.batches import Batch, TeacherBatch
from xtoken_jax.distributed.mesh import single_device_mesh
from xtoken_jax.losses import LossConfig, LossKind
from xtoken_jax.models import DecoderConfig, LoraConfig, Model
from xtoken_jax.train import flops
from xtoken_jax.train.batch_loss import Means, Objective, Teacher
from xtoken_jax.train.optimizer import OptimizerConfig, OptimizerKind, make_optimizer, make_schedule
from xtoken_jax.train.step import init_state, make_step

MODEL = Model(
    DecoderConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
    )
)


def rows(ids):
    ids = jnp.asarray(ids, jnp.int32)
    mask = ids >= 0
    targets = mask.at[:, 0].set(False)
    return TokenRows(jnp.maximum(ids, 0), mask, targets, mask.astype(jnp.int32))


def test_metrics_of_a_batch_by_hand():
    student = rows([[1, 2, 3, 4], [5, 6, -1, -1]])
    alignments = {
        # three chunks, the first of which opens its row; one is not valid
        "one": Alignment(
            jnp.array([[0, 1, 1, 2], [0, 1, -1, -1]]),
            jnp.array([[0, 1, 2], [0, 1, -1]]),
            jnp.array([[False, True, False], [False, True, False]]),
        ),
        "two": Alignment(
            jnp.array([[-1, 0, 1, 2], [-1, -1, -1, -1]]),
            jnp.array([[-1, 0, 1, 2], [-1, -1, -1, -1]]),
            jnp.ones((2, 4), bool),
        ),
    }
    teacher = Teacher(MODEL, LossConfig(kind=LossKind.p_kl))
    teachers = {"one": replace(teacher, weight=0.5), "two": replace(teacher, weight=2.0)}
    batch = Batch(student, {name: TeacherBatch(student, a) for name, a in alignments.items()})
    means = Means(jnp.float32(6.0), {"one": jnp.float32(1.0), "two": jnp.float32(0.25)}, None)
    objective = Objective(MODEL, teachers, LossConfig(max_scale=5.0), 11)
    total, metrics = objective.join(means, batch)
    expected = {
        "loss": 6 + 5, "ce": 6, "kd": 1, "kd_scale": 5, "kd_scale_capped": True, "kd/one": 1, "kd/two": 0.25,
        "tokens": 4, "chunks": 5, "chunks/one": 2, "chunks/two": 3,
        "aligned_share/one": 3 / 6, "aligned_share/two": 3 / 6,
    }  # fmt: skip
    assert {name: float(value) for name, value in metrics.items()} == expected
    assert total == 11
    assert {*Objective(MODEL, {}, LossConfig(), 11).join(means, batch)[1]} == {"loss", "ce", "tokens"}


def test_rate_and_size_of_updates():
    config = OptimizerConfig(
        kind=OptimizerKind.adamw, learning_rate=0.1, warmup_steps=4, weight_decay=0.3, clip_norm=0.01
    )
    schedule, optimizer, mesh = make_schedule(config, 10), make_optimizer(config, 10), single_device_mesh()
    with jax.set_mesh(mesh):
        params = jax.jit(MODEL.init, out_shardings=MODEL.param_shardings(mesh))(jax.random.key(0))
        state = init_state(MODEL, params, optimizer, mesh)
        batch = Batch(rows([[1, 2, 3, 4]]), {})
        step = jax.jit(
            make_step(MODEL, {}, LossConfig(block=None), optimizer, student_size=11, schedule=schedule)
        )
        for number in range(2):
            new, metrics = step(state, {}, {}, batch)
            moved = optax.tree.norm(jax.tree.map(jnp.subtract, new.params, state.params))
            np.testing.assert_allclose(metrics["learning_rate"], schedule(number), rtol=1e-6)
            np.testing.assert_allclose(metrics["update_norm"], moved, rtol=1e-3)
            assert metrics["gradient_norm"] > config.clip_norm
            state = new
        # a step that changes nothing is not one of the schedule's
        broken = replace(state, params={**state.params, "final_norm": state.params["final_norm"] * jnp.nan})
        for _ in range(2):
            broken, metrics = step(broken, {}, {}, batch)
            assert metrics["update_norm"] == 0
            np.testing.assert_allclose(metrics["learning_rate"], schedule(2), rtol=1e-6)


def test_operations_of_a_step():
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
    forward = 2 * (3 * layer + 11 * 8) + 3 * 4 * 8 * 5
    assert flops.forward_flops(MODEL.config, 5) == forward
    sliding = replace(
        MODEL.config,
        sliding_window=2,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    )
    assert flops.forward_flops(sliding, 5) == forward - 2 * 4 * 8 * 3
    of_teacher = 7 * flops.forward_flops(MODEL.config, 7)
    assert flops.step_flops(MODEL, [(MODEL, 7)], 2, 5) == 2 * (3 * 5 * forward + of_teacher)
    adapted = replace(MODEL, lora=LoraConfig(2))
    assert flops.step_flops(adapted, [], 2, 5) == 2 * 2 * 5 * forward


class Device:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kinds", "peak"),
    [(["NVIDIA H200"] * 2, 1978e12), (["cpu"], None), (["NVIDIA H200", "cpu"], None), ([], None)],
)
def test_peaks_are_known_or_not_given(kinds, peak):
    assert flops.peak_flops([Device(kind) for kind in kinds]) == peak
