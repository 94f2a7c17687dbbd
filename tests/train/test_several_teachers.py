"""Several teachers in one step: each with its own tokenizer, W and term, joined as by hand."""

import io
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from rich.console import Console

from xtoken_jax.data.batches import Batch, training_batches
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.sources import SourceConfig, read_sources
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.losses import (
    LossConfig,
    LossKind,
    TeachersConfig,
    TeacherTerm,
    average_logits,
    combine_teachers,
    loss_tables,
    masked_mean,
    next_token_cross_entropy,
    projection_kl,
    same_vocabulary_kl,
    teacher_scores,
    valid_chunks,
)
from xtoken_jax.losses.config import Score, TeachersMode
from xtoken_jax.losses.total import Direction, VocabularySizes
from xtoken_jax.models.decoder import logits
from xtoken_jax.models.load import ModelConfig, Start, open_model
from xtoken_jax.projection.build import build_projection
from xtoken_jax.run.distill import distill
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.run.student import export_checkpoint
from xtoken_jax.tokens.tokenizer import TokenizerPair
from xtoken_jax.train.batch_loss import Objective, Teacher
from xtoken_jax.train.metrics import read_metrics

WEIGHTS = {"teacher": 0.8, "twin": 0.2}


@pytest.fixture
def words(words, pair_folders):
    """As everywhere, with a second teacher that has the student's tokenizer."""
    student, _ = pair_folders
    return [
        *words,
        "teacher.weight=0.8",
        f"teachers.twin.path={student}",
        "teachers.twin.init=random",
        "teachers.twin.weight=0.2",
        "data.teacher_lengths.twin=32",
    ]


@pytest.mark.parametrize(
    ("block", "dynamic"),
    [
        (16, True),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in ((16, False), (None, True), (None, False))
        ),
    ],
)
def test_two_teachers_are_the_objective_put_together_by_hand(words, block, dynamic):
    experiment = load_experiment(words)
    student_folder = experiment.student.path
    pairs = {
        "teacher": TokenizerPair.load(student_folder, experiment.teacher.path),
        "twin": TokenizerPair.load(student_folder, student_folder),
    }
    size = pairs["twin"].student.size
    batch = next(training_batches(pairs, read_sources(experiment.data.train), experiment.data))
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    projection = build_projection(pairs["teacher"])
    tables = {"teacher": loss_tables(LossKind.p_kl, projection), "twin": VocabularySizes(size, size)}
    with jax.set_mesh(mesh):
        models, params = {}, {}
        configs = {"student": experiment.student, **experiment.every_teacher()}
        for seed, (name, config) in enumerate(configs.items()):
            key = jax.random.key(seed)
            models[name], params[name] = open_model(config, 0, mesh=mesh, key=key)
        terms = {
            "teacher": LossConfig(kind=LossKind.p_kl, top_k=100, temperature=2.0),
            "twin": LossConfig(kind=LossKind.same_vocabulary, direction=Direction.reverse, top_k=None),
        }
        teachers = {name: Teacher(models[name], terms[name], WEIGHTS[name]) for name in terms}
        loss = LossConfig(block=block, dynamic_scaling=dynamic, kd_weight=0.7, ce_weight=0.4)
        objective = Objective(models["student"], teachers, loss, size)
        rows = {name: batch.teachers[name].rows for name in teachers}
        read = {name: models[name](params[name], r.ids, segments=r.segments) for name, r in rows.items()}

        def found(params):
            of_student = models["student"](params, batch.student.ids, segments=batch.student.segments)
            return objective.join(objective.means(of_student, read, tables, batch), batch)

        def by_hand(params):
            student_logits = logits(
                *models["student"](params, batch.student.ids, segments=batch.student.segments)
            )[..., :size]
            ce = masked_mean(
                *next_token_cross_entropy(student_logits, batch.student.ids, batch.student.targets)
            )
            rows = batch.teachers["teacher"]
            values = projection_kl(
                student_logits, logits(*read["teacher"]), rows.alignment, projection,
                temperature=2.0, top_k=100, teacher_mask=rows.rows.mask,
            )  # fmt: skip
            kd = {"teacher": masked_mean(values, valid_chunks(rows.alignment))}
            # One tokenizer: the same rows, position by position.
            kd["twin"] = masked_mean(
                *same_vocabulary_kl(
                    student_logits, logits(*read["twin"]), batch.student.targets,
                    direction="reverse", size=size,
                )
            )  # fmt: skip
            both = 0.8 * kd["teacher"] + 0.2 * kd["twin"]
            scale = jax.lax.stop_gradient(jnp.minimum(ce / both, 10.0)) if dynamic else 0.7
            total = (1.0 if dynamic else 0.4) * ce + scale * both
            return total, {"ce": ce, "kd": both, "kd_scale": scale, **{f"kd/{n}": v for n, v in kd.items()}}

        (total, metrics), gradient = jax.jit(jax.value_and_grad(found, has_aux=True))(params["student"])
        (expected, parts), expected_gradient = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(
            params["student"]
        )
    np.testing.assert_array_equal(batch.teachers["twin"].rows.ids, batch.student.ids)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert min(parts["kd/teacher"], parts["kd/twin"]) > 0.01
    for name, value in parts.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    counts = {name: valid_chunks(batch.teachers[name].alignment).sum() for name in teachers}
    assert {name: metrics[f"chunks/{name}"] for name in counts} == counts
    assert metrics["chunks"] == sum(counts.values())
    scale = optax.tree.norm(expected_gradient)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, expected_gradient))
    assert difference < 1e-5 * scale


def test_a_run_with_two_teachers_ends_in_figures_of_both_and_goes_on(words, tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=300)
    words = [*words, "loss.block=null", "train.log_every=1", "train.save_every=1"]
    words += ["data.batch_size=16", "train.accumulate=2"]

    def experiment(*more):
        return load_experiment([*words, *more, f"run_dir={tmp_path / 'run'}"])

    result = distill(experiment("train.steps=2"), console)
    assert list(result.figures) == ["teacher", "teacher twin", "student, untouched", "distilled"]
    said = json.loads((tmp_path / "run" / "result.json").read_text())
    assert said["losses"] == {"teacher": "p_kl", "twin": "same_vocabulary"}
    assert "loss     same_vocabulary, weight 0.2: the teacher has the student's tokenizer" in out.getvalue()
    rows = [row for row in read_metrics(result.metrics) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        np.testing.assert_allclose(row["kd"], 0.8 * row["kd/teacher"] + 0.2 * row["kd/twin"], rtol=1e-5)
    assert export_checkpoint(tmp_path / "run", 1, tmp_path / "first")[0] == 1
    assert distill(experiment("train.steps=2"), console).figures == result.figures
    with pytest.raises(UserError, match=r"teachers\.twin\.weight=0\.2 there, 0\.3 here"):
        distill(experiment("train.steps=2", "teachers.twin.weight=0.3"), console)


class Setting(NamedTuple):
    """A student and two teachers of one tokenizer, and a batch of their text."""

    models: dict
    params: dict
    batch: Batch
    size: int
    mesh: Mesh


@pytest.fixture(scope="module")
def shared(pair_folders, tmp_path_factory):
    """Two teachers that have the student's tokenizer."""
    student, _ = pair_folders
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{a}+{a}={a + a}, say all.\n" * 3}) + "\n" for a in range(40))
    )
    names = ("teacher", "twin")
    pairs = dict.fromkeys(names, TokenizerPair.load(student, student))
    data = DataConfig(
        {"text": SourceConfig(path=str(path))}, {}, student_length=32, teacher_length=32, batch_size=4
    )
    batch = next(training_batches(pairs, read_sources(data.train), data))
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    models, params = {}, {}
    with jax.set_mesh(mesh):
        for seed, name in enumerate(("student", *names)):
            config = ModelConfig(path=str(student), init=Start.random)
            models[name], params[name] = open_model(config, 0, mesh=mesh, key=jax.random.key(seed))
    return Setting(models, params, batch, pairs["twin"].student.size, mesh)


MODES = {
    "adaptive": TeachersConfig(TeachersMode.adaptive, Score.negative_entropy, 30.0),
    "select": TeachersConfig(TeachersMode.select),
    "averaged_logits": TeachersConfig(TeachersMode.averaged_logits),
    "sum": TeachersConfig(scale_by_vocabulary=True),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("block", [16, None])
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_the_objective_put_together_by_hand(shared, mode, block, dynamic):
    models, params, batch, size, mesh = shared
    combine = MODES[mode]
    weights = {"teacher": 0.75, "twin": 0.25} if combine.measured is None else {"teacher": 1.0, "twin": 1.0}
    term = LossConfig(kind=LossKind.same_vocabulary, top_k=None)
    sizes = {"teacher": size, "twin": 2 * size}  # as if: only the factors read them, and the columns
    teachers = {
        name: Teacher(models[name], term, weights[name], sizes[name] if combine.measured is None else size)
        for name in weights
    }
    tables = dict.fromkeys(weights, VocabularySizes(size, size))
    loss = LossConfig(block=block, dynamic_scaling=dynamic, kd_weight=0.7, ce_weight=0.4)
    own = batch.student
    with jax.set_mesh(mesh):
        objective = Objective(models["student"], teachers, loss, size, combine=combine)
        read = {name: models[name](params[name], own.ids, segments=own.segments) for name in weights}

        def found(params):
            of_student = models["student"](params, own.ids, segments=own.segments)
            return objective.join(objective.means(of_student, read, tables, batch), batch)

        def by_hand(params):
            student = logits(*models["student"](params, own.ids, segments=own.segments))[..., :size]
            ce = masked_mean(*next_token_cross_entropy(student, own.ids, own.targets))
            of_teachers = [logits(*read[name])[..., :size] for name in weights]

            def kd_of(teacher):
                return masked_mean(*same_vocabulary_kl(student, teacher, own.targets, size=size))

            if mode == "averaged_logits":
                kd, alphas = kd_of(average_logits(of_teachers, [0.75, 0.25])), [1.0]
            else:
                scores = [teacher_scores(each, own.ids, own.mask) for each in of_teachers]
                terms = [
                    TeacherTerm(kd_of(each), weight, score, sizes[name])
                    for each, (name, weight), score in zip(of_teachers, weights.items(), scores, strict=True)
                ]
                how = {
                    "adaptive": {"score": "negative_entropy", "sharpness": 30.0},
                    "select": {"combine": "select_teacher"},
                    "sum": {"scale_by_vocabulary": True},
                }
                kd, alphas = combine_teachers(terms, **how[mode])
            scale = jax.lax.stop_gradient(jnp.minimum(ce / kd, 10.0)) if dynamic else 0.7
            return (1.0 if dynamic else 0.4) * ce + scale * kd, (ce, kd, alphas)

        one, other = (
            jax.jit(jax.value_and_grad(f, has_aux=True))(params["student"]) for f in (found, by_hand)
        )
    (total, metrics), gradient = one
    (expected, (ce, kd, alphas)), expected_gradient = other
    np.testing.assert_allclose([total, metrics["ce"], metrics["kd"]], [expected, ce, kd], rtol=1e-5)
    said = [float(metrics[f"weight/{name}"]) for name in weights if f"weight/{name}" in metrics]
    if combine.measured is None:
        assert said == []
    else:
        np.testing.assert_allclose(said, alphas, rtol=1e-4)
        assert mode == "select" or 0.05 < min(said) < max(said) < 0.95
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, expected_gradient))
    assert difference < 1e-5 * optax.tree.norm(expected_gradient)


def test_adaptive_weights_are_in_the_metrics_of_a_run(words, tmp_path):
    words = [word for word in words if ".weight=" not in word]
    words += ["teachers_mode=adaptive", "teachers_sharpness=3", "train.log_every=1", "train.accumulate=2"]
    words += ["data.batch_size=16", "train.steps=2", f"run_dir={tmp_path / 'run'}"]
    result = distill(load_experiment(words), Console(file=io.StringIO(), width=300))
    rows = [row for row in read_metrics(result.metrics) if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        weights = row["weight/teacher"], row["weight/twin"]
        np.testing.assert_allclose(sum(weights), 1.0, rtol=1e-5)
        assert min(weights) > 0.001
        both = weights[0] * row["kd/teacher"] + weights[1] * row["kd/twin"]
        np.testing.assert_allclose(row["kd"], both, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["teachers_mode=adaptive"], r"teacher\.weight=0\.8: teachers_mode=adaptive computes the weights"),
        (["teachers_score=max_probability"], "teachers_score=max_probability: only teachers_mode=adaptive"),
        (
            ["teachers_mode=select", "teachers_sharpness=2"],
            "teachers_sharpness=2: only teachers_mode=adaptive",
        ),
        (["teachers_mode=adaptive", "teachers_sharpness=0"], "teachers_sharpness=0: must be above 0"),
        (["teachers_mode=averaged_logits", "teachers_scale_by_vocabulary=true"], "leave it out"),
        (["teachers_mode=best"], "teachers_mode"),
    ],
)
def test_settings_of_a_mode_that_make_no_sense_are_refused(words, changes, said):
    with pytest.raises(UserError, match=said):
        load_experiment([*words, *changes])


def test_a_mode_for_one_teacher_is_refused(words):
    words = [word for word in words if ".weight=" not in word and not word.startswith("teachers.")]
    words = [word for word in words if not word.startswith("data.teacher_lengths")]
    for change in ("teachers_mode=select", "teachers_scale_by_vocabulary=true"):
        with pytest.raises(UserError, match=f"{change}: there is one teacher; add another"):
            load_experiment([*words, change])


def test_only_teachers_with_the_tokenizer_of_the_student_are_averaged(words, tmp_path):
    experiment = load_experiment([*words, "teachers_mode=averaged_logits", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"teachers_mode=averaged_logits: teacher has loss\.kind=p_kl; only"):
        distill(experiment, Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()
