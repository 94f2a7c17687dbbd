"""A W that trains: its gradient, its own optimizer, checkpoints, and what is refused."""

import io
import math
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import losses as reference
from rich.console import Console

from xtoken_jax.data.batches import training_batches
from xtoken_jax.data.sources import read_sources
from xtoken_jax.distributed.mesh import MeshConfig, batch_sharding, make_mesh, replicated, single_device_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.losses import LossConfig, LossKind, loss_tables
from xtoken_jax.models.decoder import logits
from xtoken_jax.models.load import open_model
from xtoken_jax.projection.build import build_projection
from xtoken_jax.projection.files import load_projection
from xtoken_jax.run.distill import distill
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.run.student import export_checkpoint
from xtoken_jax.tokens.tokenizer import TokenizerPair
from xtoken_jax.train.batch_loss import Objective, Teacher
from xtoken_jax.train.gradient import gradient_of
from xtoken_jax.train.metrics import read_metrics
from xtoken_jax.train.optimizer import OptimizerConfig, make_optimizer
from xtoken_jax.train.step import abstract_state, init_state, make_step
from xtoken_jax.train.trained_projection import make_projection_optimizer, projection_of, start_learning

RATE = 1e-2
WORDS = ["loss=p_kl", "loss.top_k=100", "loss.learn_projection=true"]


@pytest.fixture
def case(words):
    """A function (mesh sizes, micro-batches, poison) -> start and end of a step's state, and its metrics."""
    experiment = load_experiment(words)
    pair = TokenizerPair.load(experiment.student.path, experiment.teacher.path)
    batch = next(training_batches({"teacher": pair}, read_sources(experiment.data.train), experiment.data))
    tables = {"teacher": loss_tables(LossKind.p_kl, build_projection(pair).learnable())}
    config = OptimizerConfig(warmup_steps=0, clip_norm=1e-3, projection_learning_rate=RATE)
    optimizer, of_w = make_optimizer(config, 10), make_projection_optimizer(config)

    def run(sizes=(1, 1, 1), parts=1, block=16, poison=False, steps=1):
        mesh = make_mesh(MeshConfig(*sizes), devices=jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(mesh):
            key = jax.random.key(0)
            student, params = open_model(experiment.student, pair.student.size, mesh=mesh, key=key)
            teacher, teacher_params = open_model(experiment.teacher, pair.teacher.size, mesh=mesh, key=key)
            if poison:
                params["final_norm"] = params["final_norm"] * jnp.nan
            teachers = {"teacher": Teacher(teacher, LossConfig(kind=LossKind.p_kl, top_k=100))}
            step = make_step(
                student, teachers, LossConfig(block=block), optimizer, student_size=pair.student.size,
                micro_batches=parts, projection_optimizer=of_w,
            )  # fmt: skip
            placed = jax.device_put(tables, replicated(mesh))
            state = init_state(student, params, optimizer, mesh, start_learning(placed, of_w, mesh))
            expected = abstract_state(student, optimizer, mesh, state.projections)
            for mine, said in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
                assert (mine.shape, mine.dtype, mine.sharding) == (said.shape, said.dtype, said.sharding)
            arguments = {"teacher": teacher_params}, placed, jax.device_put(batch, batch_sharding(mesh))
            start = jax.device_get(state)
            step = jax.jit(step, donate_argnums=0)
            for _ in range(steps):
                state, metrics = step(state, *arguments)
            return start, *jax.device_get((state, metrics)), arguments[1]["teacher"]

    return run


def moments(state):
    """Adam's first moment is 0.1 times the gradient after one step."""
    return 10 * np.asarray(optax.tree.get(state.projections["teacher"].opt_state, "mu"))


def test_one_step_moves_w_by_its_own_rate_whatever_the_student_is_clipped_to(case):
    start, end, metrics, table = case()
    before, after = start.projections["teacher"].logits, end.projections["teacher"].logits
    gradient = moments(end)
    moving = np.abs(gradient) > 1e-6
    several = (np.asarray(table.indices) >= 0).sum(1) > 1
    assert moving.any()
    assert not moving[~several].any()
    # Adam's first step is the gradient's sign times the rate.
    np.testing.assert_allclose((after - before)[moving], -RATE * np.sign(gradient)[moving], rtol=1e-2)
    assert np.abs(after - before)[~several].max() < 1e-6
    assert 0 < metrics["projection_moved/teacher"] < RATE
    w = projection_of(table, end.projections["teacher"])
    np.testing.assert_allclose(w.weights.sum(1)[several], 1.0, rtol=1e-5)
    # the student's step is that of a run with a fixed W: one gradient has no part in the other's clipping
    assert metrics["gradient_norm"] > 1e-3


@pytest.mark.parametrize("block", [16, pytest.param(None, marks=pytest.mark.slow)])
def test_the_gradient_is_the_slope_of_the_term_in_float64(words, block):
    """Central differences of the slow twin in the entries of W that matter most, and in three others."""
    experiment = load_experiment(words)
    pair = TokenizerPair.load(experiment.student.path, experiment.teacher.path)
    batch = next(training_batches({"teacher": pair}, read_sources(experiment.data.train), experiment.data))
    # One row is enough, the twin is slow.
    rows = batch.teachers["teacher"]
    valid = rows.alignment.valid & (np.arange(8)[:, None] == 0)
    rows = replace(rows, alignment=replace(rows.alignment, valid=valid))
    batch.teachers["teacher"] = rows
    w, mesh, key = build_projection(pair), single_device_mesh(), jax.random.key(0)
    rng = np.random.default_rng(0)
    noise = np.where(w.indices >= 0, rng.normal(size=w.indices.shape), 0).astype(np.float32)
    table = w.learnable()
    start = np.asarray(table.logits) + noise  # so that no softmax is near its end
    loss = LossConfig(kind=LossKind.p_kl, top_k=100, block=block, dynamic_scaling=False, kd_weight=0.7)
    with jax.set_mesh(mesh):
        student, params = open_model(experiment.student, pair.student.size, mesh=mesh, key=key)
        teacher, teacher_params = open_model(experiment.teacher, pair.teacher.size, mesh=mesh, key=key)
        objective = Objective(student, {"teacher": Teacher(teacher, loss)}, loss, pair.student.size)
        arguments = {"teacher": teacher_params}, {"teacher": table}, batch, {"teacher": jnp.asarray(start)}
        (_, metrics), (_, by_projection) = jax.jit(gradient_of(objective))(params, None, *arguments)
        of_student = logits(*student(params, batch.student.ids, segments=batch.student.segments))
        of_teacher = logits(*teacher(teacher_params, rows.rows.ids, segments=rows.rows.segments))
    given = [np.asarray(x, np.float64).tolist() for x in (of_student, of_teacher)]
    chunks = [np.asarray(x).tolist() for x in (rows.alignment.student_chunks, rows.alignment.teacher_chunks)]
    rows_of = [[(k, j) for k, j in enumerate(row) if j >= 0] for row in np.asarray(table.indices).tolist()]

    def term(log_weights):
        weights = []
        for row, z in zip(rows_of, log_weights, strict=True):
            raw = {j: math.exp(z[k]) for k, j in row}
            weights.append({j: x / sum(raw.values()) for j, x in raw.items()})
        found = reference.projection_kl(
            *given, *chunks, np.asarray(rows.alignment.valid).tolist(), weights, pair.teacher.size,
            temperature=1.0, top_k=100, direction="forward", merge="mean", mask=np.asarray(rows.rows.mask),
        )  # fmt: skip
        counted = [value for row in found for value in row if value is not None]
        return sum(counted) / len(counted)

    exact = start.astype(np.float64)
    np.testing.assert_allclose(metrics["kd"], term(exact.tolist()), rtol=1e-5)
    gradient = np.asarray(by_projection["teacher"], np.float64)
    order = np.argsort(-np.abs(gradient), axis=None)
    assert not gradient[(np.asarray(table.indices) >= 0).sum(1) < 2].any()
    for place in [*order[:2], order[20]]:
        ends = []
        for change in (1e-4, -1e-4):
            moved = exact.copy()
            moved.flat[place] += change
            ends.append(term(moved.tolist()))
        slope = 0.7 * (ends[0] - ends[1]) / 2e-4
        assert abs(slope) > 1e-7
        np.testing.assert_allclose(gradient.flat[place], slope, rtol=1e-4)


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 8, 1), (1, 1, 8)))]
)
def test_meshes_and_micro_batches_train_the_same_w(case, sizes):
    _, plain, expected, _ = case()
    wanted = moments(plain)
    for options in ({"sizes": sizes}, {"parts": 2}):
        _, end, metrics, _ = case(**options)
        assert np.abs(moments(end) - wanted).max() < 2e-5 * np.abs(wanted).max(), options
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=f"{options} {name}")


def test_a_step_that_is_not_finite_leaves_w_and_its_moments(case):
    start, end, metrics, _ = case(poison=True)
    assert not metrics["finite"]
    for before, after in zip(*map(jax.tree.leaves, (start.projections, end.projections)), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_run_with_two_learnt_w_goes_on_to_the_bit_and_leaves_them_in_its_folder(
    words, pair_folders, tmp_path
):
    student, teacher = pair_folders
    words = [
        *words, *WORDS, f"teachers.other.path={teacher}", "teachers.other.init=random",
        "teachers.other.loss.kind=p_kl", "teachers.other.loss.learn_projection=true",
        "data.teacher_lengths.other=48", "train.steps=6", "train.save_every=2", "train.log_every=1",
        "optimizer.projection_learning_rate=0.05",
        "loss.block=null",
    ]  # fmt: skip

    def run(name, *more):
        return distill(load_experiment([*words, f"run_dir={tmp_path / name}", *more]), Console(quiet=True))

    whole = run("whole")
    # what a kill behind step 4 leaves
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "6")
    for name in ("projection.safetensors", "projection-other.safetensors", "result.json"):
        (tmp_path / "cut" / name).unlink()
    run("cut")
    traces = []
    for name in ("whole", "cut"):
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        traces.append([{k: v for k, v in r.items() if k != "tokens_per_second"} for r in rows])
    assert traces[0] == traces[1]
    pair = TokenizerPair.load(student, teacher)
    built = build_projection(pair)
    found = {}
    for name in ("projection", "projection-other"):
        files = [(tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("whole", "cut")]
        assert files[0] == files[1]
        found[name] = load_projection(tmp_path / "whole" / f"{name}.safetensors", pair)
        assert np.abs(found[name].weights - built.weights).max() > 0.01
        assert np.array_equal(found[name].weights > 0, built.weights > 0)
    assert np.abs(found["projection"].weights - found["projection-other"].weights).max() > 1e-4
    assert traces[0][-2]["projection_moved/other"] > 0
    fixed = ["loss.learn_projection=false", "teachers.other.loss.learn_projection=false"]
    fixed += ["optimizer.projection_learning_rate=0.01"]
    with pytest.raises(UserError, match=r"loss\.learn_projection=True there, False here"):
        run("cut", *fixed)
    assert export_checkpoint(tmp_path / "whole", 4, tmp_path / "exported")[0] == 4
    assert whole.student.is_dir()


@pytest.mark.slow
def test_w_can_begin_to_train_in_a_run_under_way_but_not_end(words, pair_folders, tmp_path):
    words = [*words, "loss=p_kl", "loss.top_k=100", "train.save_every=2", "train.log_every=1"]
    words += [f"run_dir={tmp_path / 'run'}", "resume.allow=[loss,train]"]

    def run(*more):
        said = io.StringIO()
        distill(load_experiment([*words, *more]), Console(file=said, width=400))
        return said.getvalue()

    run("train.steps=2")
    said = run("train.steps=4", "loss.learn_projection=true")
    assert "2: W of teacher did not train yet; it starts as it was built" in said
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    moved = {
        row["step"]: row["projection_moved/teacher"] for row in rows if "projection_moved/teacher" in row
    }
    assert list(moved) == [3, 4]
    assert 0 < moved[3] < moved[4]
    pair = TokenizerPair.load(*pair_folders)
    found = load_projection(tmp_path / "run" / "projection.safetensors", pair)
    assert np.abs(found.weights - build_projection(pair).weights).max() > 1e-4
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(UserError, match=r"for which loss\.learn_projection=false has no place"):
        run("train.steps=6")
    assert (tmp_path / "run" / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["loss=h_kl"], "loss.learn_projection=true: loss.kind=h_kl does not read it; p_kl would"),
        (["loss=prefix_kl"], "loss.kind=prefix_kl does not read it"),
        (["optimizer.projection_learning_rate=0"], "optimizer.projection_learning_rate=0.0: must be above 0"),
        (
            ["loss.learn_projection=false", "optimizer.projection_learning_rate=0.1"],
            "optimizer.projection_learning_rate=0.1: no W trains; loss.learn_projection=true would",
        ),
    ],
)
def test_what_reads_no_learnt_w_is_refused(words, more, expected):
    loss = [] if any(word.startswith("loss=") for word in more) else ["loss=p_kl"]
    with pytest.raises(UserError, match=re.escape(expected)) as refusal:
        load_experiment([*words, "loss.learn_projection=true", *loss, *more])
    assert "\n" not in str(refusal.value)


def test_auto_that_takes_another_loss_is_refused(words, pair_folders, tmp_path):
    student = pair_folders[0]
    options = [f"teacher.path={student}", "loss.learn_projection=true", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"^loss.learn_projection=true: auto takes same_vocabulary"):
        distill(load_experiment([*words, *options]), Console(quiet=True))
    assert not (tmp_path / "run").exists()
