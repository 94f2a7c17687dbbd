"""A NaN or +inf that a vocabulary-parallel loss reads makes its chunk NaN, whichever device has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_vocab_parallel import ALIGNMENT, IDS, LOGITS, PADDED, V_S, V_T, B, W, on
from test_vocab_parallel_prefix import cases

from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.losses import (
    valid_chunks,
    vocab_parallel_cross_entropy,
    vocab_parallel_hybrid_kl,
    vocab_parallel_likelihood_matching,
    vocab_parallel_prefix_kl,
    vocab_parallel_projection_kl,
)
from xtoken_jax.projection.matrix import Partition

IDS = {"student_ids": IDS[0], "teacher_ids": IDS[1]}
PREFIX = cases((16, 24))
P_KL, HYBRID = vocab_parallel_projection_kl, vocab_parallel_hybrid_kl
# Rows and positions that no chunk reads choose no columns either.
READ = np.asarray(valid_chunks(ALIGNMENT)).any(axis=1)[:, None] & (np.arange(9) < 8)
LOSSES = {
    "p_kl": (P_KL, {"top_k": 5, "teacher_mask": READ}),
    "p_kl, first": (P_KL, {"direction": "reverse", "merge": "first"} | IDS),
    "p_kl, last": (P_KL, {"direction": "jsd", "top_k": 5, "merge": "last"} | IDS),
    "p_kl, mean_normalized": (P_KL, {"direction": "jsd", "beta": 0.9, "merge": "mean_normalized"}),
    "gold": (HYBRID, {"uncommon_top_k": 3}),
    "h_kl, first": (HYBRID, {"direction": "reverse", "merge": "first"} | IDS),
    "h_kl, last": (HYBRID, {"direction": "jsd", "merge": "last"} | IDS),
    "alm": (vocab_parallel_likelihood_matching, {"student_size": V_S, "teacher_size": V_T} | IDS),
    "prefix_kl": (vocab_parallel_prefix_kl, {}),
    "prefix_kl, reverse": (vocab_parallel_prefix_kl, {"direction": "reverse"}),
    "prefix_kl, jsd": (vocab_parallel_prefix_kl, {"direction": "jsd"}),
}
WITH_GRADIENT = ("p_kl", "h_kl, first", "alm", "prefix_kl")
FAULTS = {"nan": np.nan, "inf": np.inf}


@functools.cache
def mesh():
    return make_mesh(MeshConfig(data=2, tensor=4))


def batch(name):
    """Logits of both sides, the alignment and the tokenizers' sizes."""
    if name.startswith("prefix"):
        return PREFIX.plain, PREFIX.alignment, PREFIX.sizes
    return LOGITS[PADDED], ALIGNMENT, (V_S, V_T)


@functools.cache
def compiled(name, gradient=False):
    function, options = LOSSES[name]
    if name.startswith("prefix"):
        tables, options = [PREFIX.tables], PREFIX.ids | options
    elif function is P_KL:
        tables = [W]
    else:
        tables = [Partition.strict(W)] if function is HYBRID else []
    alignment = batch(name)[1]

    def values(student, teacher):
        return function(student, teacher, alignment, *tables, mesh=mesh(), **options)

    if gradient:
        return jax.jit(jax.grad(lambda s, t: values(s, t).sum()))
    return jax.jit(values)


def run(name, student, teacher, **options):
    with jax.set_mesh(mesh()):
        placed = (on(mesh(), jnp.asarray(z)) for z in (student, teacher))
        return np.asarray(compiled(name, **options)(*placed))


def read_positions(name, side):
    """(row, position, chunk): in each row the position of a chunk of one token, which every loss reads."""
    alignment = batch(name)[1]
    valid = np.asarray(valid_chunks(alignment))
    sides = [np.asarray(chunks) for chunks in (alignment.student_chunks, alignment.teacher_chunks)]
    for row in range(B):
        for chunk in np.flatnonzero(valid[row]):
            places = [np.flatnonzero(chunks[row] == chunk) for chunks in sides]
            if all(len(place) == 1 and place[0] > 0 for place in places):
                yield row, places[side][0] - 1, chunk
                break


@pytest.mark.parametrize("name", LOSSES)
def test_a_fault_that_is_read_is_seen(name):
    plain, _, sizes = batch(name)
    clean = run(name, *plain)
    assert not np.isnan(clean).any()
    for side, size in enumerate(sizes):
        found = list(read_positions(name, side))
        assert len(found) >= 3
        rows, positions, chunks = map(np.array, zip(*found, strict=True))
        # The first and the last column of the tokenizer, and one of each device.
        for column in (0, size // 3, size // 2, size - 1):
            for fault, value in FAULTS.items():
                spoilt = [np.array(z) for z in plain]
                spoilt[side][rows, positions, column] = value
                values = run(name, *spoilt)
                place = f"{('student', 'teacher')[side]}, column {column}, {fault}"
                assert np.isnan(values[rows, chunks]).all(), place
                untouched = np.setdiff1d(np.arange(B), rows)
                assert not np.isnan(values[untouched]).any(), place
                # Neither do the chunks before the position read it.
                assert (np.isnan(values).sum(axis=1) <= 2).all(), place


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_what_is_not_read_may_be_anything(name):
    """Positions without a chunk and columns past the tokenizer: no value and no gradient changes."""
    plain, alignment, sizes = batch(name)
    spoilt = [np.array(z) for z in plain]
    for z, size in zip(spoilt, sizes, strict=True):
        z[..., size:] = np.nan
        z[:, -1] = np.nan  # nothing comes after it
    dead = np.flatnonzero(~np.asarray(valid_chunks(alignment)).any(axis=1))
    assert len(dead)
    for z in spoilt:
        z[dead] = np.nan
    np.testing.assert_array_equal(run(name, *spoilt), run(name, *plain))
    gradient = run(name, *spoilt, gradient=True)
    assert np.isfinite(gradient).all()
    assert (gradient[dead] == 0).all()
    np.testing.assert_allclose(gradient, run(name, *plain, gradient=True), atol=1e-6)


@pytest.mark.parametrize("fault", FAULTS)
def test_cross_entropy(fault):
    logits, mask = LOGITS[PADDED][0], np.ones((B, 7), bool)
    mask[:, 3] = False

    @jax.jit
    def value_and_gradient(logits):
        def total(logits):
            values, counted = vocab_parallel_cross_entropy(
                logits, IDS["student_ids"], mask, mesh=mesh(), size=V_S
            )
            return jnp.where(counted, values, 0.0).sum(), values

        return jax.grad(total, has_aux=True)(logits)

    for column in (0, V_S // 2, V_S - 1):
        spoilt = np.array(logits)
        spoilt[0, 1, column] = spoilt[1, 2, column] = FAULTS[fault]  # the second one predicts no label
        with jax.set_mesh(mesh()):
            gradient, values = value_and_gradient(on(mesh(), jnp.asarray(spoilt)))
        assert np.isnan(values[0, 1])
        assert np.isnan(values).sum() == 2
        assert np.isfinite(gradient[1:]).all()
        assert (gradient[1, 2] == 0).all()
