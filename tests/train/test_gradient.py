"""A batch in parts is the batch at once: loss, metrics and gradient, whatever joins CE and KD."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import AS_OUTSIDE

from xtoken_jax.alignment.batch import TokenRows
from xtoken_jax.data.batches import Batch, training_batches
from xtoken_jax.data.sources import read_sources
from xtoken_jax.distributed.mesh import MeshConfig, batch_sharding, make_mesh, replicated
from xtoken_jax.errors import UserError
from xtoken_jax.losses import LossConfig, LossKind, loss_tables, valid_chunks
from xtoken_jax.losses.total import VocabularySizes
from xtoken_jax.models import DecoderConfig, Model
from xtoken_jax.models.load import open_model
from xtoken_jax.projection.build import build_projection
from xtoken_jax.run.distill import distill
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.tokens.tokenizer import TokenizerPair
from xtoken_jax.train.batch_loss import Objective, Teacher
from xtoken_jax.train.gradient import gradient_of, split

ONE, FOUR = (1, 1, 1), (2, 2, 1)


@pytest.fixture
def case(words):
    """A function (teachers, parts, mesh sizes, dynamic scaling) -> metrics and gradient."""
    experiment = load_experiment(words)
    folders = {"teacher": experiment.teacher.path, "twin": experiment.student.path}
    pairs = {name: TokenizerPair.load(experiment.student.path, folder) for name, folder in folders.items()}
    size = pairs["twin"].student.size
    batch = next(training_batches(pairs, read_sources(experiment.data.train), experiment.data))
    # Rows of unequal length, so that the parts count differently.
    short = np.arange(32)[None, :] < 4 * np.arange(1, 9)[:, None]
    batch = replace(batch, student=replace(batch.student, targets=batch.student.targets & short))
    rows = batch.teachers["teacher"]
    valid = rows.alignment.valid & short
    batch.teachers["teacher"] = replace(rows, alignment=replace(rows.alignment, valid=valid))
    for part in (2, 4):
        counts = valid_chunks(batch.teachers["teacher"].alignment)
        assert len(set(split(counts, part).sum((1, 2)).tolist())) > 1
    tables = {
        "teacher": loss_tables(LossKind.p_kl, build_projection(pairs["teacher"])),
        "twin": VocabularySizes(size, size),
    }
    # Fewer columns than there are: they are to be those of the whole batch.
    terms = {
        "teacher": LossConfig(kind=LossKind.p_kl, top_k=100),
        "twin": LossConfig(kind=LossKind.same_vocabulary, top_k=100),
    }

    def run(names, parts, sizes, dynamic):
        devices = jax.devices()[: int(np.prod(sizes))]
        mesh = make_mesh(MeshConfig(*sizes), devices=devices)
        with jax.set_mesh(mesh):
            models, params = {}, {}
            configs = {
                "student": experiment.student,
                "teacher": experiment.teacher,
                "twin": replace(experiment.student, init=type(experiment.student.init).random),
            }
            for name, config in configs.items():
                models[name], params[name] = open_model(config, 0, mesh=mesh, key=jax.random.key(3))
            teachers = {name: Teacher(models[name], terms[name], 0.5) for name in names}
            loss = LossConfig(block=16, dynamic_scaling=dynamic, max_scale=None)
            objective = Objective(models["student"], teachers, loss, size)
            (_, metrics), gradient = jax.jit(gradient_of(objective, parts))(
                params.pop("student"),
                None,
                params,
                jax.device_put(tables, replicated(mesh)),
                jax.device_put(batch, batch_sharding(mesh)),
            )
            return jax.device_get((metrics, gradient))

    return run


@pytest.mark.parametrize(
    ("names", "dynamic", "others"),
    [
        (("teacher",), True, [(2, FOUR)]),
        *(
            pytest.param(
                ("teacher", "twin"), dynamic, [(2, ONE), (4, ONE), (2, FOUR)], marks=pytest.mark.slow
            )
            for dynamic in (True, False)
        ),
    ],
)
def test_parts_are_the_whole(case, names, dynamic, others):
    metrics, gradient = case(names, 1, ONE, dynamic)
    assert min(metrics[f"kd/{name}"] for name in names) > 0.01
    for parts, sizes in others:
        found, by_parts = case(names, parts, sizes, dynamic)
        assert found.keys() == metrics.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=f"{parts} {sizes} {name}")
        for (path, value), mine in zip(
            jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(by_parts), strict=True
        ):
            difference = optax.tree.norm(value - mine)
            assert difference < 1e-5 * optax.tree.norm(value), (parts, sizes, path)


def test_every_device_splits_its_own_rows():
    mesh = make_mesh(MeshConfig(4, 2, 1))
    with jax.set_mesh(mesh):
        rows = jax.device_put(jnp.arange(64).reshape(32, 2), batch_sharding(mesh))
        program = jax.jit(lambda x: split(x, 4) * 2).lower(rows).compile(AS_OUTSIDE)
    assert not [word for word in ("all-to-all", "all-gather", "permute") if word in program.as_text()]
    parts = program(rows)
    assert sorted(parts[:, :, 0].ravel().tolist()) == list(range(0, 128, 4))
    assert parts.shape == (4, 8, 2)


def test_activations_are_those_of_a_part():
    config = DecoderConfig(
        vocab_size=64, hidden_size=64, intermediate_size=512, num_layers=8, num_heads=4, num_kv_heads=2,
        head_dim=16,
    )  # fmt: skip
    numbers, flags = (jax.ShapeDtypeStruct((16, 64), dtype) for dtype in (jnp.int32, jnp.bool))
    batch = Batch(TokenRows(numbers, flags, flags, numbers), {})
    model = Model(config)
    objective = Objective(model, {}, LossConfig(block=None), 64)
    temporaries = []
    for parts in (1, 8):
        program = jax.jit(gradient_of(objective, parts)).lower(model.abstract(), None, {}, {}, batch)
        temporaries.append(program.compile(AS_OUTSIDE).memory_analysis().temp_size_in_bytes)
    assert temporaries[1] < temporaries[0] / 4, temporaries


def test_a_batch_that_does_not_split_is_refused(words, tmp_path):
    from rich.console import Console

    options = ["train.accumulate=3", "mesh.data=1", "mesh.fsdp=8", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(
        UserError, match=r"batch_size=8: not a multiple of the 8 .* train\.accumulate=3 parts"
    ):
        distill(load_experiment([*words, *options]), Console(quiet=True))
    with pytest.raises(UserError, match=r"train\.accumulate=0: must be at least 1"):
        load_experiment([*words, "train.accumulate=0"])
