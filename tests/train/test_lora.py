"""Adapters in training: they alone move, on every mesh alike, and a run goes on from them."""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import AS_OUTSIDE
from rich.console import Console
from safetensors.numpy import load_file

from xtoken_jax.alignment.batch import TokenRows
from xtoken_jax.data.batches import Batch, training_batches
from xtoken_jax.data.sources import read_sources
from xtoken_jax.distributed.mesh import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    named_sharding,
    single_device_mesh,
)
from xtoken_jax.errors import UserError
from xtoken_jax.losses import LossConfig, masked_mean, next_token_cross_entropy
from xtoken_jax.models import DecoderConfig, LoraConfig, Model, logits, split_lora
from xtoken_jax.models.load import open_model
from xtoken_jax.run.distill import distill
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.run.student import export_checkpoint
from xtoken_jax.tokens.tokenizer import TokenizerPair
from xtoken_jax.train.checkpoint import Checkpoints
from xtoken_jax.train.metrics import MetricsLog, read_metrics
from xtoken_jax.train.optimizer import OptimizerConfig, make_optimizer
from xtoken_jax.train.step import TrainState, abstract_state, init_state, make_step

WEIGHTS = "model.safetensors"
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1), 10)


@pytest.fixture
def words(words):
    """As everywhere, with adapters and a pace for short runs."""
    return [
        *words,
        "student.lora.rank=4",
        "student.lora.targets=query,value,down",
        "optimizer.learning_rate=1e-2",
        "optimizer.warmup_steps=2",
        "train.log_every=1",
    ]


def names(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_steps_move_the_adapters_alone_and_the_same_on_every_mesh(words):
    experiment = load_experiment([*words, "loss=none"])
    pair = TokenizerPair.load(experiment.student.path, experiment.student.path)
    pairs = {"student": pair}
    batch = next(training_batches(pairs, read_sources(experiment.data.train), experiment.data))

    def steps(sizes, devices):
        mesh = make_mesh(MeshConfig(*sizes), devices=devices)
        with jax.set_mesh(mesh):
            student, params = open_model(
                experiment.student, pair.student.size, mesh=mesh, key=jax.random.key(0)
            )
            # B is zero at the start, where A has no gradient
            params = jax.tree.map(lambda x: x if x.any() else jax.device_put(x + 0.05, x.sharding), params)
            step = jax.jit(
                make_step(
                    student,
                    {},
                    LossConfig(block=None),
                    OPTIMIZER,
                    student_size=pair.student.size,
                ),
                donate_argnums=0,
            )
            _, frozen = split_lora(params)
            before = jax.device_get(frozen)
            start = jax.device_get(params)
            state = init_state(student, params, OPTIMIZER, mesh)
            expected = abstract_state(student, OPTIMIZER, mesh)
            layout = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)  # noqa: E731
            assert layout(state) == layout(expected)
            types = jax.tree.map(jax.typeof, state)
            on_mesh = jax.device_put(batch, batch_sharding(mesh))
            traced = []
            for _ in range(3):
                state, metrics = step(state, {}, {}, on_mesh, frozen)
                traced.append(jax.device_get(metrics))
            assert jax.tree.map(jax.typeof, state) == types
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
            return student, start, jax.device_get(state), traced

    student, start, plain, traced = steps((1, 1, 1), jax.devices()[:1])
    moved = names(plain.params)
    kernels = ("attention/query", "attention/value", "feed_forward/down")
    assert set(moved) == {f"layers/{name}_lora_{part}" for name in kernels for part in "ab"}
    for name, value in moved.items():
        assert np.abs(value - names(start)[name]).max() > 1e-3, name
    moments = {name.split("/", 3)[-1] for name, x in names(plain.opt_state).items() if x.ndim}
    assert len(moments) == len(moved)

    # the gradient is that of the whole model, cut down to the adapters
    def objective(params):
        values = logits(*student(params, batch.student.ids, segments=batch.student.segments))[
            ..., : pair.student.size
        ]
        return masked_mean(*next_token_cross_entropy(values, batch.student.ids, batch.student.targets))

    whole = jax.jit(jax.grad(objective))(start)
    norm = optax.tree.norm(split_lora(whole)[0])
    np.testing.assert_allclose(traced[0]["gradient_norm"], norm, rtol=1e-5)
    assert optax.tree.norm(whole) > 1.2 * norm

    for sizes in ((8, 1, 1), (1, 2, 4)):
        _, _, state, there = steps(sizes, jax.devices())
        for mine, theirs in zip(traced, there, strict=True):
            np.testing.assert_allclose(theirs["loss"], mine["loss"], rtol=2e-5)
            np.testing.assert_allclose(theirs["gradient_norm"], mine["gradient_norm"], rtol=2e-4)
        # Adam's first steps are signs times the rate: only the sign of noise may differ
        for name, value in names(state.params).items():
            assert np.isclose(value, moved[name], atol=1e-4).mean() > 0.99, name


def test_gradient_and_moments_of_the_frozen_weights_are_gone():
    config = DecoderConfig(
        vocab_size=16000, hidden_size=256, intermediate_size=512, num_layers=8, num_heads=4, num_kv_heads=2,
        head_dim=64,
    )  # fmt: skip
    numbers, flags = (jax.ShapeDtypeStruct((1, 16), dtype) for dtype in (jnp.int32, jnp.bool))
    side = TokenRows(numbers, flags, flags, numbers)
    batch = Batch(side, {})

    model, mesh = Model(config, lora=LoraConfig(rank=4)), single_device_mesh()
    step = make_step(model, {}, LossConfig(block=16), OPTIMIZER, student_size=16000)
    state, frozen = abstract_state(model, OPTIMIZER, mesh), split_lora(model.abstract(mesh))[1]
    lowered = jax.jit(step, donate_argnums=0).lower(state, {}, {}, batch, frozen)
    memory = lowered.compile(AS_OUTSIDE).memory_analysis()
    weights, adapters = (sum(4 * x.size for x in jax.tree.leaves(part)) for part in (frozen, state.params))
    assert adapters < weights / 50
    slack = 10_000  # the batch, counters and metrics
    assert memory.argument_size_in_bytes < weights + 3 * adapters + slack
    assert memory.output_size_in_bytes < 3 * adapters + slack
    # the least that a gradient of the layers, or of the embedding alone, would take
    embedding = 4 * 16000 * 256
    assert memory.temp_size_in_bytes < min(embedding, weights - embedding) / 2


def test_a_checkpoint_is_restored_beside_the_weights_it_was_trained_on(tmp_path):
    mesh = make_mesh(MeshConfig(1, 2, 4))
    sharding = named_sharding(mesh, "V D", (8, 4))
    weights = np.arange(32, dtype=np.float32).reshape(8, 4)
    state = TrainState(jnp.int32(1), {"a": jnp.ones(2)}, {})
    with Checkpoints(tmp_path, frozen={"w": jnp.asarray(weights)}) as checkpoints:
        checkpoints.save(1, state, {"row": 7})
    others = {"w": jnp.asarray(weights).at[3, 2].multiply(1.001)}
    for frozen in (others, {"w": jnp.asarray(weights, jnp.bfloat16)}, None):
        with (
            Checkpoints(tmp_path, frozen=frozen) as checkpoints,
            pytest.raises(UserError, match=r"/1: its adapters were trained on other weights"),
        ):
            checkpoints.restore(1, state)
    with Checkpoints(tmp_path, frozen={"w": jax.device_put(weights, sharding)}) as checkpoints:
        assert checkpoints.restore(1, state)[1] == {"row": 7}


def test_a_run_goes_on_from_its_adapters_and_ends_in_an_ordinary_folder(words, tmp_path, monkeypatch):
    """With weights in half precision under the adapters, which the file holds in full."""
    words = [
        *words,
        "loss=none",
        "loss.block=null",
        "student.dtype=bfloat16",
        "train.steps=4",
        "train.save_every=2",
    ]
    console = Console(file=io.StringIO(), width=300)

    def experiment(folder):
        return load_experiment([*words, f"run_dir={tmp_path / folder}"])

    def trace(folder):
        rows = read_metrics(tmp_path / folder / "metrics.jsonl")
        return [(row["step"], row["loss"]) for row in rows if "loss" in row]

    result = distill(experiment("whole"), console)
    assert "lora     rank 4 on query, value, down: 896 of " in console.file.getvalue()
    figures = result.figures
    assert figures["trained"]["text bits/byte"] < figures["student, untouched"]["text bits/byte"]
    write = MetricsLog.write

    def stop_at_three(self, step, values):
        write(self, step, values)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsLog, "write", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        distill(experiment("cut"), console)
    monkeypatch.undo()
    distill(experiment("cut"), console)
    assert "goes on from step 2" in console.file.getvalue()
    assert trace("cut") == trace("whole")
    assert [step for step, _ in trace("cut")] == [1, 2, 3, 4]
    assert export_checkpoint(tmp_path / "whole", None, tmp_path / "again")[0] == 4
    files = [tmp_path / name / WEIGHTS for name in ("whole/student", "cut/student", "again")]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()

    # what no adapter is on is what it was, to the bit
    base, trained = load_file(Path(experiment("whole").student.path) / WEIGHTS), load_file(files[0])
    base = {name: x.astype(jnp.bfloat16).astype(np.float32) for name, x in base.items()}
    assert trained.keys() == base.keys()
    changed = {name for name in base if not np.array_equal(base[name], trained[name])}
    kernels = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    assert changed == {f"model.layers.0.{name}.weight" for name in kernels}


@pytest.mark.slow
def test_a_baseline_starts_from_the_same_adapters_and_weights(words, tmp_path):
    figures = []
    for name, options in (("both", ["baseline=true"]), ("alone", ["loss=none"])):
        words_of = [*words, *options, "train.steps=2", f"run_dir={tmp_path / name}"]
        figures.append(distill(load_experiment(words_of), Console(quiet=True)).figures)
    assert figures[0]["trained without a teacher"] == figures[1]["trained"]
    assert figures[0]["distilled"] != figures[1]["trained"]
