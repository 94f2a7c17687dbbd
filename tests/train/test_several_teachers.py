"""Several teachers in one step: each with its own tokenizer, W and term, joined as by hand."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from xtoken_jax.config import load_experiment
from xtoken_jax.data.batches import training_batches
from xtoken_jax.data.sources import read_sources
from xtoken_jax.distill import distill
from xtoken_jax.errors import UserError
from xtoken_jax.losses import (
    LossConfig,
    LossKind,
    loss_tables,
    masked_mean,
    next_token_cross_entropy,
    projection_kl,
    same_vocabulary_kl,
    valid_chunks,
)
from xtoken_jax.losses.objective import Direction, VocabularySizes
from xtoken_jax.mesh import MeshConfig, make_mesh
from xtoken_jax.models.decoder import logits
from xtoken_jax.models.load import open_model
from xtoken_jax.projection.build import build_projection
from xtoken_jax.runs import export_checkpoint
from xtoken_jax.tokens.tokenizer import TokenizerPair
from xtoken_jax.train.metrics import read_metrics
from xtoken_jax.train.objective import Objective, Teacher

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
