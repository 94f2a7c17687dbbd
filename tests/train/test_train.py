"""The step and the loop: same on every mesh, same after a restart, and it learns."""

import io
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xtoken_jax.data.batches import training_batches
from xtoken_jax.data.sources import read_sources
from xtoken_jax.distributed.mesh import MeshConfig, batch_sharding, make_mesh, replicated
from xtoken_jax.errors import UserError
from xtoken_jax.losses import LossConfig, LossKind, loss_tables, projection_kl, valid_chunks
from xtoken_jax.models.decoder import logits
from xtoken_jax.models.load import open_model
from xtoken_jax.projection.build import build_projection
from xtoken_jax.projection.prefixes import prefix_tables
from xtoken_jax.run.distill import distill
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.tokens.tokenizer import TokenizerPair
from xtoken_jax.train.batch_loss import Teacher
from xtoken_jax.train.metrics import read_metrics
from xtoken_jax.train.optimizer import OptimizerConfig, make_optimizer
from xtoken_jax.train.step import abstract_state, init_state, make_step


@pytest.fixture
def words(words):
    """As everywhere, with a pace for short runs."""
    return [
        *words,
        "optimizer.learning_rate=3e-3",
        "optimizer.warmup_steps=2",
        "train.log_every=1",
        "train.save_every=3",
    ]


@pytest.fixture
def quiet():
    from rich.console import Console

    return Console(quiet=True)


@pytest.mark.parametrize(
    "kind",
    [
        LossKind.p_kl,
        LossKind.none,
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (LossKind.prefix_kl, LossKind.h_kl, LossKind.alm)
        ),
    ],
)
def test_a_step_on_any_mesh_is_the_step_on_one_device(kind, words):
    experiment = load_experiment(words)
    pair = TokenizerPair.load(experiment.student.path, experiment.teacher.path)
    pairs = {"teacher": pair}
    batch = next(training_batches(pairs, read_sources(experiment.data.train), experiment.data))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 10)
    tables = {}
    if kind is LossKind.prefix_kl:
        tables = {"teacher": prefix_tables(pair)}
    elif kind is not LossKind.none:
        tables = {"teacher": loss_tables(kind, build_projection(pair))}

    def one_step(mesh_config, devices):
        mesh = make_mesh(mesh_config, devices=devices)
        with jax.set_mesh(mesh):
            key = jax.random.key(0)
            student, params = open_model(experiment.student, pair.student.size, mesh=mesh, key=key)
            teacher, teacher_params = open_model(experiment.teacher, pair.teacher.size, mesh=mesh, key=key)
            loss = LossConfig(kind=kind, top_k=100)
            teachers = {name: Teacher(teacher, loss) for name in tables}
            step = jax.jit(make_step(student, teachers, loss, optimizer, student_size=pair.student.size))
            state = init_state(student, params, optimizer, mesh)
            new, metrics = step(
                state,
                {"teacher": teacher_params} if tables else {},
                jax.device_put(tables, replicated(mesh)),
                jax.device_put(batch, batch_sharding(mesh)),
            )
            expected = jax.tree.map(
                lambda x: (x.shape, x.dtype, x.sharding), abstract_state(student, optimizer, mesh)
            )
            found = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
            assert jax.tree.leaves(found) == jax.tree.leaves(expected)
            assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
            return jax.device_get(new.params), jax.device_get(metrics)

    plain_params, plain = one_step(MeshConfig(data=1), jax.devices()[:1])
    assert bool(plain["finite"])
    for sizes in ((8, 1, 1), (2, 2, 2)):
        params, metrics = one_step(MeshConfig(*sizes), jax.devices())
        for name, value in plain.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=f"{sizes} {name}")
        # Adam's first step is the gradient's sign times the rate: only the sign of noise may differ.
        changed = [
            np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (params, plain_params)), strict=True)
        ]
        assert max(changed) <= 2.1e-2
        close = [
            np.isclose(a, b, atol=1e-4).mean()
            for a, b in zip(*map(jax.tree.leaves, (params, plain_params)), strict=True)
        ]
        assert min(close) > 0.99


def test_it_learns_and_a_second_run_is_equal_to_the_bit(words, quiet, tmp_path):
    traces = []
    for name in ("first", "second"):
        experiment = load_experiment(
            [*words, "train.steps=20", "optimizer.learning_rate=1e-2", f"run_dir={tmp_path / name}"]
        )
        result = distill(experiment, quiet)
        traces.append([(r["step"], r["loss"], r["kd"]) for r in read_metrics(result.metrics) if "loss" in r])
    assert traces[0] == traces[1]
    assert len(traces[0]) == 20
    assert result.loss is LossKind.p_kl
    figures = result.figures
    assert figures["distilled"]["text bits/byte"] < 0.8 * figures["student, untouched"]["text bits/byte"]


@pytest.mark.parametrize(("bound", "warnings"), [(0.01, 1), pytest.param(1000.0, 0, marks=pytest.mark.slow)])
def test_a_factor_at_its_bound_is_told_once(bound, warnings, words, tmp_path):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=300)
    options = ["train.steps=3", f"loss.max_scale={bound}", "loss=prefix_kl", f"run_dir={tmp_path / 'run'}"]
    distill(load_experiment([*words, *options]), console)
    text = console.file.getvalue()
    assert text.count("its factor is held at 0.01") == text.count("warning  step 1:") == warnings
    assert "prefix_kl: as configured" in text


@pytest.mark.parametrize("kind", ["prefix_kl", "uld", "alm"])
def test_losses_without_w_read_no_projection(kind, words, quiet, tmp_path):
    options = [f"loss={kind}", f"projection={tmp_path / 'w.safetensors'}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=rf"loss\.kind={kind} reads no W"):
        distill(load_experiment([*words, *options]), quiet)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(words, quiet, tmp_path, monkeypatch):
    from xtoken_jax.train.metrics import MetricsLog

    def trace(folder):
        return [(r["step"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]

    whole = load_experiment([*words, "train.steps=8", f"run_dir={tmp_path / 'whole'}"])
    distill(whole, quiet)

    cut = load_experiment([*words, "train.steps=8", f"run_dir={tmp_path / 'cut'}"])
    write = MetricsLog.write

    def stop_at_five(self, step, values):
        write(self, step, values)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsLog, "write", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        distill(cut, quiet)
    monkeypatch.undo()
    assert [step for step, _ in trace(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    distill(cut, quiet)
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert len(trace(tmp_path / "cut")) == 8


def test_a_step_that_is_not_finite_changes_nothing(words):
    experiment = load_experiment(words)
    pair = TokenizerPair.load(experiment.student.path, experiment.student.path)
    pairs = {"student": pair}
    batch = next(training_batches(pairs, read_sources(experiment.data.train), experiment.data))
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        student, params = open_model(experiment.student, pair.student.size, mesh=mesh, key=jax.random.key(0))
        params["final_norm"] = params["final_norm"].at[0].set(np.nan)
        optimizer = make_optimizer(OptimizerConfig(), 10)
        state = init_state(student, params, optimizer, mesh)
        step = make_step(student, {}, LossConfig(), optimizer, student_size=pair.student.size)
        new, metrics = jax.jit(step)(state, {}, {}, batch)
    assert not metrics["finite"]
    assert int(new.step) == 1
    for a, b in zip(
        *map(jax.tree.leaves, ((new.params, new.opt_state), (state.params, state.opt_state))), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("block", "dynamic", "softcaps"),
    [
        (128, True, (None, None)),
        (7, False, (None, None)),
        *((block, True, (1.5, 1.0)) for block in (7, None)),
        *(
            pytest.param(block, dynamic, (None, None), marks=pytest.mark.slow)
            for block, dynamic in ((128, False), (7, True), (None, True), (None, False))
        ),
    ],
)
def test_a_step_is_the_objective_put_together_by_hand(words, block, dynamic, softcaps):
    """Cross-entropy over the tokenizer's columns, P-KL over the valid chunks, scaled to its size."""
    experiment = load_experiment(words)
    pair = TokenizerPair.load(experiment.student.path, experiment.teacher.path)
    pairs = {"teacher": pair}
    batch = next(training_batches(pairs, read_sources(experiment.data.train), experiment.data))
    rows = batch.teachers["teacher"]
    # Half of the tokens are a prompt.
    learnt = batch.student.targets & (np.arange(batch.student.ids.shape[1]) % 2 == 0)
    batch = replace(batch, student=replace(batch.student, targets=learnt))
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    projection = build_projection(pair)
    with jax.set_mesh(mesh):
        key = jax.random.key(0)
        student, params = open_model(experiment.student, pair.student.size, mesh=mesh, key=key)
        teacher, teacher_params = open_model(experiment.teacher, pair.teacher.size, mesh=mesh, key=key)
        student, teacher = (
            replace(model, config=replace(model.config, logit_softcap=cap))
            for model, cap in zip((student, teacher), softcaps, strict=True)
        )
        optimizer = make_optimizer(OptimizerConfig(), 10)
        loss = LossConfig(
            kind=LossKind.p_kl,
            top_k=100,
            temperature=2.0,
            block=block,
            dynamic_scaling=dynamic,
            kd_weight=0.7,
        )
        teachers = {"teacher": Teacher(teacher, loss)}
        step = make_step(student, teachers, loss, optimizer, student_size=pair.student.size)
        state = init_state(student, params, optimizer, mesh)
        tables = {"teacher": loss_tables(LossKind.p_kl, projection)}
        _, metrics = jax.jit(step)(state, {"teacher": teacher_params}, tables, batch)

        def capped(raw, cap):
            return raw if cap is None else cap * jnp.tanh(raw / cap)

        teacher_logits = capped(
            logits(*teacher(teacher_params, rows.rows.ids, segments=rows.rows.segments)), softcaps[1]
        )
        chunks = valid_chunks(rows.alignment)

        def by_hand(params):
            student_logits = logits(*student(params, batch.student.ids, segments=batch.student.segments))[
                ..., : pair.student.size
            ]
            student_logits = capped(student_logits, softcaps[0])
            log_p = jax.nn.log_softmax(student_logits[:, :-1], axis=-1)
            labels, counted = batch.student.ids[:, 1:], learnt[:, 1:]
            ce = -jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
            ce = jnp.where(counted, ce, 0).sum() / counted.sum()
            values = projection_kl(
                student_logits, teacher_logits, rows.alignment, projection,
                temperature=2.0, top_k=100, teacher_mask=rows.rows.mask,
            )  # fmt: skip
            kd = jnp.where(chunks, values, 0).sum() / chunks.sum()
            scale = jax.lax.stop_gradient(jnp.minimum(ce / kd, loss.max_scale)) if dynamic else 0.7
            return (1.0 if dynamic else loss.ce_weight) * ce + scale * kd, {
                "ce": ce,
                "kd": kd,
                "kd_scale": scale,
            }

        (total, parts), gradient = jax.value_and_grad(by_hand, has_aux=True)(params)
    expected = {"loss": total, **parts, "gradient_norm": optax.tree.norm(gradient), "chunks": chunks.sum()}
    assert student.config.vocab_size > pair.student.size
    assert expected["kd"] > 0
    assert 0 < expected["chunks"] < rows.alignment.valid.size
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
