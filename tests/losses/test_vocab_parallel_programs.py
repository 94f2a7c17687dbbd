"""What the compiled programs of the losses over a split vocabulary hold and send, on each device."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from programs import AS_OUTSIDE
from projection.random_w import random_w

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.losses import hybrid_kl, projection_kl
from xtoken_jax.losses.vocab_parallel.losses import (
    vocab_parallel_cross_entropy,
    vocab_parallel_hybrid_kl,
    vocab_parallel_likelihood_matching,
    vocab_parallel_projection_kl,
)
from xtoken_jax.projection.matrix import Partition
from xtoken_jax.projection.sharded import shard_projection

MESHES = {"2x4": MeshConfig(data=2, tensor=4), "1x8": MeshConfig(data=1, tensor=8)}

# Sizes that no other axis has, for reading programs: 8 rows of 64 positions, blocks of 8 chunks.
ROWS, LENGTH, BLOCK, COLUMNS = 8, 64, 8, 200
SIZES, WIDTHS = (1009, 1201), (1024, 1216)
FULL = {*SIZES, *(size + 1 for size in SIZES), *WIDTHS}
SENDING = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")


def shapes_in(text):
    return [tuple(int(n) for n in found.split(",")) for found in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)]


def sent_in(text):
    """(collective, elements of its result) of every one in a program."""
    lines = re.findall(rf"= (.*?) ({'|'.join(SENDING)})(?:-start)?\(", text)
    return [(name, sum(math.prod(shape) for shape in shapes_in(result))) for result, name in lines]


def program(mesh, loss):
    """Text of the compiled value and gradient of `loss(student, teacher, alignment, w, partition)`."""

    def laid_out(shape, dtype, *axes):
        layout = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, *axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    logits = [laid_out((ROWS, LENGTH, width), jnp.bfloat16, "tensor") for width in WIDTHS]
    chunks = laid_out((ROWS, LENGTH), jnp.int32)
    alignment = Alignment(chunks, chunks, laid_out((ROWS, LENGTH), jnp.bool_))
    w = random_w(0, *SIZES)
    partition = jax.device_put(Partition.strict(w), NamedSharding(mesh, PartitionSpec()))
    sharded = shard_projection(w, mesh, "tensor", rows=WIDTHS[0])

    def scalar(student, *others):
        values = loss(student, *others)
        return values.sum(), values

    with jax.set_mesh(mesh):
        function = jax.jit(jax.value_and_grad(scalar, has_aux=True))
        return function.lower(*logits, alignment, sharded, partition).compile(AS_OUTSIDE).as_text()


@pytest.mark.parametrize("kind", ["p_kl", "p_kl_all", "gold", "alm", "ce"])
@pytest.mark.parametrize("name", ["2x4", "1x8"])
def test_no_device_holds_a_whole_vocabulary_of_its_rows(name, kind):
    mesh = make_mesh(MESHES[name])
    n = mesh.shape["tensor"]
    rows = ROWS * LENGTH // mesh.shape["data"]
    options = {"mesh": mesh, "block": BLOCK}
    losses = {
        "p_kl": lambda s, t, a, w, p: vocab_parallel_projection_kl(s, t, a, w, top_k=COLUMNS, **options),
        "p_kl_all": lambda s, t, a, w, p: vocab_parallel_projection_kl(s, t, a, w, **options),
        "gold": lambda s, t, a, w, p: vocab_parallel_hybrid_kl(s, t, a, p, **options),
        "alm": lambda s, t, a, w, p: vocab_parallel_likelihood_matching(
            s, t, a, student_ids=a.student_chunks, teacher_ids=a.teacher_chunks, mesh=mesh
        ),
        "ce": lambda s, t, a, w, p: vocab_parallel_cross_entropy(
            s, a.student_chunks, a.valid, mesh=mesh, size=SIZES[0]
        )[0],
    }
    text = program(mesh, losses[kind])
    shapes = shapes_in(text)
    at_once = {"p_kl": 1, "p_kl_all": BLOCK, "gold": BLOCK // n, "alm": 1, "ce": 1}[kind]
    whole = {shape for shape in shapes if FULL & set(shape)}
    assert max([math.prod(shape) // max(FULL & set(shape)) for shape in whole], default=1) <= at_once
    # Nothing is larger than a device's own part of the logits.
    assert max(map(math.prod, shapes)) == rows * (WIDTHS[0 if kind == "ce" else 1] // n)

    sent = sent_in(text)
    assert sent
    wide = [(name, size) for name, size in sent if name != "all-reduce"]
    # Sums are of a few numbers a position; XLA may join several.
    assert max(size for name, size in sent if name == "all-reduce") <= 4 * rows
    if kind == "gold":
        assert sorted(wide) == sorted(("all-to-all", BLOCK // n * width) for width in (*WIDTHS, WIDTHS[0]))
    if kind == "p_kl":
        candidates = n * min(COLUMNS, WIDTHS[1] // n)
        assert sorted(wide) == sorted(
            [("reduce-scatter", BLOCK * COLUMNS // n)] * 2
            + [("all-gather", size) for size in (BLOCK * COLUMNS, candidates, candidates, COLUMNS)]
        )
    if kind == "p_kl_all":
        assert sorted(wide) == sorted(
            [
                ("reduce-scatter", BLOCK * WIDTHS[1] // n),
                ("all-gather", BLOCK * WIDTHS[1]),
                ("all-gather", WIDTHS[1]),
            ]
        )
    if kind in ("alm", "ce"):
        assert not wide


def test_the_plain_loss_does_hold_one():
    """The check above sees what it is looking for."""
    mesh = make_mesh(MESHES["1x8"])
    for loss in (
        lambda s, t, a, w, p: hybrid_kl(s, t, a, p),
        lambda s, t, a, w, p: projection_kl(s, t, a, w),
    ):
        shapes = shapes_in(program(mesh, loss))
        assert any(FULL & set(shape) and math.prod(shape) >= ROWS * LENGTH * SIZES[0] for shape in shapes)
