"""A NaN or +inf in outputs that a loss reads makes the loss NaN, in the plain form and in blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_blockwise import (
    ALIGNMENT,
    CASES,
    HIDDEN,
    TEACHER,
    UNEMBEDDING,
    blockwise,
    plain,
    tables_of,
)
from test_stored_teacher import from_stored, likeliest

from xtoken_jax.losses import LossKind, valid_chunks
from xtoken_jax.losses.config import Merge

KINDS = [name for name in CASES if name != "none"]
VALID = np.asarray(valid_chunks(ALIGNMENT))
FAULTS = {"nan": np.nan, "inf": np.inf}


def positions(name):
    """(row, student's positions, teacher's positions) of a chunk that counts, which the loss reads.

    The logits of a position are those of the next token. `first` and `last` read one position of a chunk.
    """
    config = CASES[name]
    one_to_one = config.kind in (LossKind.prefix_kl, LossKind.same_vocabulary)
    for row, number in zip(*np.nonzero(VALID), strict=True):
        sides = [
            np.flatnonzero(np.asarray(chunks)[row] == number) - 1
            for chunks in (ALIGNMENT.student_chunks, ALIGNMENT.teacher_chunks)
        ]
        sides = [places[places >= 0] for places in sides]
        sizes = {len(places) for places in sides}
        if (sizes == {1}) if one_to_one else min(sizes) > 1:
            read = {Merge.first: [0], Merge.last: [-1]}.get(config.merge, [0, -1])
            return row, *(places[read] for places in sides)
    raise AssertionError("no such chunk")


@functools.cache
def loss_of(name, function):
    """The distillation loss as a jitted function of the hidden states of both sides."""
    config = CASES[name]
    tables = tables_of(config.kind)
    options = {"block": 5} if function is blockwise else {}

    def kd(hidden, unembedding, teacher):
        return function(config, tables, hidden, unembedding, teacher=teacher, **options)[1]

    return jax.jit(kd)


@pytest.mark.parametrize("function", [plain, blockwise])
@pytest.mark.parametrize("name", KINDS)
def test_a_fault_in_outputs_that_count_is_seen(name, function):
    loss = loss_of(name, function)
    assert np.isfinite(loss(HIDDEN, UNEMBEDDING, TEACHER))
    seen = {}
    for fault, value in FAULTS.items():
        row, student, teacher = positions(name)
        for place in student:
            hidden = HIDDEN.at[row, place].set(value)
            seen[f"student {fault} {place}"] = loss(hidden, UNEMBEDDING, TEACHER)
        for place in teacher:
            hidden = TEACHER[0].at[row, place].set(value)
            seen[f"teacher {fault} {place}"] = loss(HIDDEN, UNEMBEDDING, (hidden, TEACHER[1]))
        # One column of the vocabulary at every position; same_vocabulary has 13 columns.
        column = UNEMBEDDING.at[12].set(value)
        seen[f"student {fault} column"] = loss(HIDDEN, column, TEACHER)
        column = TEACHER[1].at[12].set(value)
        seen[f"teacher {fault} column"] = loss(HIDDEN, UNEMBEDDING, (TEACHER[0], column))
    assert [case for case, value in seen.items() if not np.isnan(value)] == []


ONE_OF_EACH = ("p_kl-first", "gold", "h_kl-last", "uld", "alm", "prefix_kl", "same_vocabulary")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_fault_in_a_teacher_cache_is_seen(name):
    """In one of the tokens that are kept, and in what is kept of all others."""
    config, tables = CASES[name], tables_of(CASES[name].kind)
    stored, _ = likeliest(config, 4)

    @jax.jit
    def loss(stored):
        return from_stored(config, tables, HIDDEN, UNEMBEDDING, stored, block=5)[1]

    assert np.isfinite(loss(stored))
    row, _, teacher = positions(name)
    for field, entry in (("log_probabilities", (0,)), ("others", ())):
        for fault in FAULTS.values():
            for place in teacher:
                spoilt = getattr(stored, field).at[(row, place, *entry)].set(fault)
                value = loss(dataclasses.replace(stored, **{field: spoilt}))
                assert np.isnan(value), (field, fault, place)


@pytest.mark.parametrize("function", [plain, blockwise])
@pytest.mark.parametrize("name", KINDS)
def test_a_nan_in_padding_does_not_matter(name, function):
    """Row 3 has padding on both sides, and its positions are no targets of the cross-entropy."""
    hidden = HIDDEN.at[3, 8:].set(jnp.nan)
    teacher = TEACHER[0].at[3, 9:].set(jnp.nan), TEACHER[1]
    loss = loss_of(name, function)
    clean = loss(HIDDEN, UNEMBEDDING, TEACHER)
    np.testing.assert_allclose(loss(hidden, UNEMBEDDING, teacher), clean, rtol=1e-6)
