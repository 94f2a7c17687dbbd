"""Packed rows are the same texts one a row: cross-entropy, every term, and the gradient of it all."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from xtoken_jax.alignment.rows import join_together
from xtoken_jax.data.batches import make_batch
from xtoken_jax.data.encode import read_parts
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.losses import LossConfig, LossKind, loss_tables
from xtoken_jax.losses.total import Merge, VocabularySizes
from xtoken_jax.models.load import open_model
from xtoken_jax.projection.build import build_projection
from xtoken_jax.projection.prefixes import prefix_tables
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.tokens.tokenizer import TokenizerPair
from xtoken_jax.train.batch_loss import Objective, Teacher
from xtoken_jax.train.gradient import gradient_of

TERMS = {
    # Fewer columns than there are: the best of the whole batch, however it is laid out.
    "p_kl": LossConfig(kind=LossKind.p_kl, top_k=60),
    "p_kl_last": LossConfig(kind=LossKind.p_kl, top_k=60, merge=Merge.last),
    "h_kl": LossConfig(kind=LossKind.h_kl, uncommon_top_k=50),
    "gold": LossConfig(kind=LossKind.gold, merge=Merge.first),
    "uld": LossConfig(kind=LossKind.uld),
    "alm": LossConfig(kind=LossKind.alm),
    "prefix_kl": LossConfig(kind=LossKind.prefix_kl),
    "twin": LossConfig(kind=LossKind.same_vocabulary, top_k=60),
}
TEXTS = ["3+4=7, as", " 12+30=42\n", "1", "99+1=100, everybody", "knows", "7+88=95 is", "the sum", "5+5=10."]
ROWS = [[0, 5, 2], [1, 3], [4], [6, 7]]  # which of them share a row


@pytest.fixture
def case(words):
    """A function (batch, block, dynamic, parts, packed, terms) -> metrics and gradient."""
    experiment = load_experiment(words)
    student_folder, teacher_folder = experiment.student.path, experiment.teacher.path
    of = {name: student_folder if name == "twin" else teacher_folder for name in TERMS}
    pairs = {name: TokenizerPair.load(student_folder, folder) for name, folder in of.items()}
    pair, size = pairs["p_kl"], pairs["twin"].student.size
    config = replace(experiment.data, teacher_lengths={"twin": 32})
    parts = read_parts(pairs, {"texts": TEXTS}, config)["texts"]
    assert len(parts) == len(TEXTS)
    rows = []
    for places in ROWS:
        joined = join_together([[*parts[place].values()] for place in places])
        rows.append(dict(zip(pairs, joined, strict=True)))
    batches = {"packed": make_batch(pairs, rows, config), "alone": make_batch(pairs, parts, config)}
    projection = build_projection(pair)
    tables = {name: loss_tables(term.kind, projection) for name, term in TERMS.items() if term.kind in (
        LossKind.p_kl, LossKind.h_kl, LossKind.gold, LossKind.uld, LossKind.alm)}  # fmt: skip
    tables |= {"prefix_kl": prefix_tables(pair), "twin": VocabularySizes(size, size)}
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])

    def run(batch, block, dynamic, parts=1, *, packed=True, terms=TERMS):
        with jax.set_mesh(mesh):
            key = jax.random.key(0)
            student, params = open_model(experiment.student, 0, mesh=mesh, key=key)
            teachers, teacher_params = {}, {}
            for name in terms:
                folder = replace(experiment.teacher, path=of[name])
                model, teacher_params[name] = open_model(folder, 0, mesh=mesh, key=key)
                teachers[name] = Teacher(model, TERMS[name], 0.3)
            loss = LossConfig(block=block, dynamic_scaling=dynamic, max_scale=None)
            objective = Objective(student, teachers, loss, size, packed)
            (_, metrics), gradient = jax.jit(gradient_of(objective, parts))(
                params, None, teacher_params, tables, batches[batch]
            )
            return jax.device_get((metrics, gradient))

    return run


def same(one, two):
    (metrics, gradient), (expected, expected_gradient) = one, two
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected_gradient))
    for found, wanted in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("block", "dynamic", "terms"),
    [
        (7, False, ("p_kl", "twin")),
        *(
            pytest.param(block, dynamic, tuple(TERMS), marks=pytest.mark.slow)
            for block in (7, None)
            for dynamic in (True, False)
        ),
    ],
)
def test_neighbours_in_a_row_change_nothing(case, block, dynamic, terms):
    alone = case("alone", block, dynamic, terms=terms)
    assert alone[0]["chunks"] > 2 * len(terms) * len(TEXTS)
    same(case("packed", block, dynamic, terms=terms), alone)


@pytest.mark.slow
def test_packed_rows_go_in_parts_as_well(case):
    alone = case("alone", 7, True, packed=False)  # one text a row needs no segments
    same(case("packed", 7, True, 2), alone)
    with pytest.raises(AssertionError):
        same(case("packed", 7, True, packed=False), alone)
