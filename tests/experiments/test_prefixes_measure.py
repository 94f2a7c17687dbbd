"""experiments/prefixes/measure.py on a tiny pair and on made-up ids, where every figure is known by hand."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.alignment.spans import Side, Spans, align_texts
from xtoken_jax.losses.terms.prefix_steps import PrefixPlan
from xtoken_jax.projection.prefixes import prefix_tables, tables_of_pieces
from xtoken_jax.tokens.tokenizer import TokenizerPair

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "prefixes"


@pytest.fixture(scope="module")
def measure():
    """The module; experiments are no package, and one of the benchmarks is called `alignment`."""
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    sys.modules.pop("alignment", None)  # the folder of tests of that name, if something imported it
    try:
        return importlib.import_module("measure")
    finally:
        sys.path[:] = before
        sys.modules.pop("alignment", None)


@pytest.fixture(scope="module")
def pair(pair_folders):
    return TokenizerPair.load(*pair_folders)


def test_numbers_of_the_tiny_pair(measure, pair):
    """The student has numbers of two digits as one token, the teacher writes digits."""
    tables = prefix_tables(pair)
    (spans,) = align_texts(pair, ["12+30=42"])
    found = measure.text_figures(measure.Events.of(tables), spans)
    counts = found.counts
    # 12 | + | 30 | = | 42 against 1 2 | + | 3 0 | = | 4 2
    assert (counts["boundaries"], counts["1:n"], counts["1:1"], counts["n:1"]) == (5, 3, 2, 0)
    assert counts["steps t"] == 8
    # After "1", "3" and "4", one digit or two; after both digits nothing is left to tell.
    assert counts["taken t"] == counts["chunks with a step"] == 3
    assert not any(counts[name] for name in ("mis-assigned", "departed t", "differs t", "loose t", "taken s"))
    assert counts["prefix expected t"] == counts["prefix came t"] == 0
    assert found.distance("t") == 0
    figures = measure.table_figures(tables)
    assert figures.student_longest == 11  # "1", and "10" to "19"
    assert figures.mixed == 0
    assert figures.one_to_one + figures.student_tokens + figures.teacher_tokens <= sum(
        (pair.student.size, pair.teacher.size)
    )


def test_steps_are_those_of_the_loss(measure, pair):
    tables = prefix_tables(pair)
    (spans,) = align_texts(pair, ["The sum of the numbers 7+5=12 is 201, and 30=42-12.\nThe sum"])
    counts = measure.text_figures(measure.Events.of(tables), spans).counts
    sides = (spans.student, spans.teacher)
    # A mark in front, which predicts the first tokens.
    chunks = [np.concatenate([[-1], side.chunks])[None] for side in sides]
    ids = [np.concatenate([[0], side.ids])[None] for side in sides]
    plan = PrefixPlan.of(Alignment(*chunks, spans.exact[None]), tables, *ids)
    assert counts["taken t"] == int((plan.by_teacher.size > 0).sum()) > 5
    assert counts["taken s"] == int((plan.by_student.size > 0).sum())
    assert counts["boundaries"] == int(plan.counted.sum())


def spans_of(chunks):
    sides = []
    for place in (0, 1):
        ids = np.array([token for chunk in chunks for token in chunk[place]], np.int32)
        of_token = [c for c, chunk in enumerate(chunks) for _ in chunk[place]]
        sides.append(Side.of(ids, np.array(of_token, np.int32)))
    return Spans(*sides, len(chunks), np.ones(len(chunks), bool))


# Student: a, b, c, ab, abc. Teacher: a, b, c, bc. "x", the last of each, cannot be written by the other.
A, B, C, AB, ABC = range(5)
BC = 3
BY_STUDENT = {A: [A], B: [B], C: [C], AB: [A, B], ABC: [A, B, C]}
BY_TEACHER = {A: [A], B: [B], C: [C], BC: [B, C]}


@pytest.mark.parametrize(
    ("chunks", "student_open", "wanted"),
    [
        # "ab" and "c" against "a", "b" and "c": that the teacher goes on with c, the table reads as "abc".
        (
            [((AB,), (A, B)), ((C,), (C,)), ((A,), (A,))],
            (),
            {"excluded teacher": 1, "mis-assigned": 1, "different": 0, "taken t": 3, "differs t": 1},
        ),
        # The same where the student writes "ab" and "c" so: after "b", nothing is left to tell.
        (
            [((AB,), (A, B)), ((C,), (C,)), ((A,), (A,))],
            {(AB, C)},
            {"excluded teacher": 0, "mis-assigned": 0, "different": 0, "taken t": 2, "differs t": 0},
        ),
        # As the tokenizers' own pieces say: nothing is amiss.
        (
            [((ABC,), (A, B, C)), ((C,), (C,))],
            (),
            {"mis-assigned": 0, "1:n": 1, "1:1": 1, "taken t": 2, "differs t": 0, "loose t": 0},
        ),
        # An open end is excluded from nothing, so that the boundary before it is loose; the token's own
        # pieces count as its end on both sides.
        (
            [((ABC,), (A, B, C)), ((C,), (C,))],
            {(A, B)},
            {"mis-assigned": 0, "taken t": 1, "differs t": 0, "loose t": 1, "prefix differs t": 0},
        ),
        # Several on both sides: no step, and all boundaries within are loose.
        ([((AB, C), (A, BC)), ((C,), (C,))], (), {"n:n": 1, "loose t": 1, "loose s": 1, "taken t": 0}),
        # Other events; then a token of none.
        (
            [((B,), (A,)), ((5,), (C,))],
            (),
            {"different": 1, "in none": 1, "mis-assigned": 2, "departed t": 2},
        ),
    ],
)
def test_made_up_chunks(measure, chunks, student_open, wanted):
    tables = tables_of_pieces(BY_STUDENT, BY_TEACHER, {}, 6, 5, student_open=student_open)
    counts = measure.text_figures(measure.Events.of(tables), spans_of(chunks)).counts
    assert {name: counts[name] for name in wanted} == wanted
