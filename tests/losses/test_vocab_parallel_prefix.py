"""Prefix KL over a split vocabulary is the plain one; what its compiled programs hold and send."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs import AS_OUTSIDE
from reference import gradient as reference_gradient
from test_prefix_kl import BY_STUDENT, BY_TEACHER, ROLES, ROWS, V_S, V_T, batch, canonical, twin
from test_vocab_parallel import FACTORS, MESHES, on, value_and_gradient
from test_vocab_parallel_programs import SIZES, WIDTHS, sent_in

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.losses import prefix_kl, valid_chunks
from xtoken_jax.losses.terms.prefix_steps import PrefixPlan, Slots
from xtoken_jax.losses.vocab_parallel.losses import vocab_parallel_prefix_kl
from xtoken_jax.projection.prefixes import tables_of_pieces


class Case:
    """Logits, ids, alignment and tables; `widths` of lm_heads wider than the tokenizers."""

    def __init__(self, rows, sizes, tables, widths, moved=False):
        ids, self.alignment, self.places, logits = batch(rows, *widths, seed=len(rows))
        self.tables, self.sizes = tables, sizes
        self.alignment.valid[1, 2] = self.alignment.valid[3] = False
        self.ids = {"student_ids": ids[0], "teacher_ids": ids[1]}
        logits = [np.round(z * 64) / 64 for z in logits]
        for z, size in zip(logits, sizes, strict=True):
            z[..., size:] = 9.0  # they would lead if they were read
            z[..., [5, 7]] = -np.inf
            z[2, 1] = -np.inf  # nothing is possible at all
            z[4, ::2, 4:] = -np.inf  # few tokens are
        plan = self.plan()
        for z, steps, table in (
            (logits[0], plan.by_student, tables.teacher_pieces),
            (logits[1], plan.by_teacher, tables.student_pieces),
        ):
            # In one row what comes inside a chunk goes on with it: its end is -inf.
            slots = Slots.of(steps, table)
            begin = 6 * z.shape[1]
            inside = begin + np.flatnonzero(steps.size[begin : begin + z.shape[1]])
            assert len(inside)
            for position in inside:
                following = slots.pieces[position][slots.leads[position] & (slots.pieces[position] >= 0)]
                others = np.setdiff1d(np.arange(z.shape[2]), following)
                z.reshape(-1, z.shape[2])[position, others] = -np.inf
        self.plain = [jnp.asarray(z) for z in logits]
        # Exact in float32 beside the offset, so that what they stand for is the same.
        self.logits = [z + 65536 for z in self.plain] if moved else self.plain

    def dense(self, student, **options):
        return prefix_kl(student, self.plain[1], self.alignment, self.tables, **self.ids, **options)

    def split(self, student, teacher, **options):
        return vocab_parallel_prefix_kl(student, teacher, self.alignment, self.tables, **self.ids, **options)

    def plan(self):
        return PrefixPlan.of(self.alignment, self.tables, *self.ids.values())


def cases(widths, **options):
    """Rows of every kind of chunk, 8 of them."""
    rows = list(itertools.islice(itertools.cycle(ROWS), 8))
    tables = tables_of_pieces(BY_STUDENT, BY_TEACHER, ROLES, V_S, V_T)
    return Case(rows, (V_S, V_T), tables, widths, **options)


def texts(widths, **options):
    """Random texts in two random vocabularies of the letters a to d, whose runs are long."""
    rng = np.random.default_rng(7)
    vocabularies = []
    for size in (41, 53):
        words = ["".join(w) for n in (2, 3, 4) for w in itertools.product("abcd", repeat=n)]
        drawn = rng.choice(len(words), size - 4, replace=False)
        vocabularies.append([*"abcd", *(words[i] for i in drawn)])
    student, teacher = vocabularies
    pieces = (
        {i: canonical(t, own) for i, t in enumerate(other)}
        for own, other in ((teacher, student), (student, teacher))
    )
    rows = []
    for _ in range(8):
        text, row = "".join(rng.choice(list("abcd"), 16)), []
        sides = [[v[i] for i in canonical(text, v)] for v in vocabularies]
        ends = [np.cumsum([len(t) for t in side]) for side in sides]
        common = sorted(set(ends[0]) & set(ends[1]))
        for begin, end in itertools.pairwise([0, *common]):
            inside = [(e > begin) & (e <= end) for e in ends]
            row.append(
                tuple(
                    [v.index(t) for t, is_in in zip(side, which, strict=True) if is_in]
                    for v, side, which in zip(vocabularies, sides, inside, strict=True)
                )
            )
        rows.append(row[:7])
    return Case(rows, (41, 53), tables_of_pieces(*pieces, {}, 41, 53), widths, **options)


PADDED, ODD = (16, 24), (13, 15)
PADDED_TEXTS, ODD_TEXTS = (48, 64), (43, 53)


def check(meshes, case, block=3, **options):
    expected, slope = value_and_gradient(lambda s: case.dense(s, **options), case.plain[0])
    largest = np.abs(slope).max()
    assert largest > 1e-2
    assert np.all(np.isfinite(slope))
    assert (np.asarray(expected) > 1e-3).sum() > 20
    for mesh in meshes:
        placed, other = (on(mesh, z) for z in case.logits)
        with jax.set_mesh(mesh):
            values, found = value_and_gradient(
                lambda s, m=mesh, t=other: case.split(s, t, mesh=m, block=block, **options), placed
            )
        shape = f"mesh {mesh.shape}"
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=3e-6, err_msg=shape)
        np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-6 * largest, err_msg=shape)
        assert np.array_equal(np.asarray(values) == 0, np.asarray(expected) == 0)
        assert jax.typeof(found) == jax.typeof(placed)
        assert found.sharding.is_equivalent_to(placed.sharding, 3)


@pytest.fixture
def meshes():
    return [make_mesh(config) for config in MESHES.values()]


@pytest.fixture
def one_mesh():
    return make_mesh(MESHES["2x4"])


@pytest.mark.slow
def test_texts(meshes):
    """Rows over 8, 4, 2 and 1 devices, the vocabulary over 1, 2, 4 and 8."""
    case = texts(PADDED_TEXTS)
    plan = case.plan()
    for steps, table in (
        (plan.by_teacher, case.tables.student_pieces),
        (plan.by_student, case.tables.teacher_pieces),
    ):
        assert (steps.size > 0).sum() > 10
        assert table.longest > 8
    check(meshes, case, temperature=1.7)


def test_every_kind_of_chunk_and_odd_widths(meshes):
    check(meshes, cases(ODD))


@pytest.mark.parametrize(
    "options",
    [
        {"direction": "jsd", "beta": 0.3},
        pytest.param({"direction": "reverse", "block": 1000}, marks=pytest.mark.slow),
    ],
)
def test_directions(one_mesh, options):
    check([one_mesh], texts(ODD_TEXTS), **options)


@pytest.mark.slow
@pytest.mark.parametrize("make", [functools.partial(cases, PADDED), functools.partial(texts, ODD_TEXTS)])
def test_a_large_offset_costs_no_digits(one_mesh, make):
    check([one_mesh], make(moved=True))


def test_values_alone(one_mesh):
    """Without a gradient another program runs."""
    case = texts(ODD_TEXTS)
    with jax.set_mesh(one_mesh):
        found = jax.jit(lambda *z: case.split(*z, mesh=one_mesh))(*case.logits)
    np.testing.assert_allclose(found, jax.jit(case.dense)(case.logits[0]), rtol=1e-5, atol=3e-6)


@pytest.mark.slow
def test_axes_of_other_names_and_rows_that_are_not_split():
    mesh = jax.make_mesh((2, 4), ("rows", "vocabulary"), axis_types=(AxisType.Auto,) * 2)
    case = cases(ODD)
    expected, slope = value_and_gradient(case.dense, case.logits[0])
    for data_axes in (("rows",), ()):
        found, by_student = value_and_gradient(
            lambda s, axes=data_axes: case.split(
                s, case.logits[1], mesh=mesh, axis="vocabulary", data_axes=axes
            ),
            case.logits[0],
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=3e-6)
        np.testing.assert_allclose(by_student, slope, rtol=1e-5, atol=1e-6 * np.abs(slope).max())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_no_further_from_float64_than_the_plain_loss(one_mesh, dtype):
    case = cases(PADDED)
    rng = np.random.default_rng(2)
    student, teacher = (jnp.asarray(rng.normal(0, 2, z.shape), dtype) for z in case.plain)
    case.plain[1] = teacher
    counted = np.asarray(valid_chunks(case.alignment))
    exact_student, exact_teacher = (np.asarray(z, np.float64).tolist() for z in (student, teacher))

    def values_of(student):
        return twin(list(case.ids.values()), case.places, [student, exact_teacher], counted, 8, 1.0)

    exact = values_of(exact_student)
    coordinates = list(itertools.product(range(8), range(student.shape[1]), range(V_S)))[::23]
    exact_slope = np.array(
        reference_gradient.differences(
            lambda z: float((values_of(z) * FACTORS[:, : exact.shape[1]]).sum()), exact_student, coordinates
        )
    )
    assert (np.abs(exact_slope) > 1e-3).sum() > 10

    def errors(loss, student):
        values, gradient = value_and_gradient(loss, student)
        assert values.dtype == jnp.float32
        assert gradient.dtype == dtype
        at = np.array([gradient[i] for i in coordinates], np.float64)
        return np.abs(values - exact).max() / exact.max(), np.abs(at - exact_slope).max()

    expected = errors(case.dense, student)
    with jax.set_mesh(one_mesh):
        placed, other = on(one_mesh, student), on(one_mesh, teacher)
        found = errors(lambda s: case.split(s, other, mesh=one_mesh, block=4), placed)
    # A float32 rounding or two are a matter of the order of sums.
    assert found[0] <= expected[0] + 4e-7
    assert found[1] <= expected[1] + 1e-6 * np.abs(exact_slope).max()


def test_nothing_aligned_is_zero_with_a_zero_gradient(one_mesh):
    case = cases(PADDED)
    case.alignment.student_chunks[:] = -1
    with jax.set_mesh(one_mesh):
        values, gradient = value_and_gradient(
            lambda s: case.split(s, case.logits[1], mesh=one_mesh), case.logits[0]
        )
    assert np.all(np.asarray(values) == 0)
    assert np.all(np.asarray(gradient) == 0)


def test_what_is_refused(one_mesh):
    case = cases(PADDED)
    student, teacher = case.logits
    with pytest.raises(ValueError, match="direction='up'"):
        jax.eval_shape(lambda *z: case.split(*z, mesh=one_mesh, direction="up"), student, teacher)
    case.alignment, case.ids = jax.tree.map(lambda x: x[:7], (case.alignment, case.ids))
    with pytest.raises(ValueError, match=r"7 rows do not divide over data\*fsdp=2"):
        case.split(student[:7], teacher[:7], mesh=one_mesh)


# Sizes that no other axis has, as in `test_vocab_parallel_programs`.
LENGTH, BLOCK = 64, 8


def program_tables():
    """900 tokens are the same on both sides; the others begin with one of 2 or 3 tokens each."""
    by_student = {i: [i] if i < 900 else [i % 3, i % 89, i % 97] for i in range(SIZES[0])}
    by_teacher = {i: [i] if i < 900 else [3 + i % 3, i % 83] for i in range(SIZES[1])}
    return tables_of_pieces(by_student, by_teacher, {}, *SIZES)


def program(mesh, loss, tables):
    """Text of the compiled value and gradient of `loss(student, teacher, alignment, ids, ids, tables)`."""

    def laid_out(shape, dtype, *axes):
        layout = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, *axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    logits = [laid_out((8, LENGTH, width), jnp.bfloat16, "tensor") for width in WIDTHS]
    tokens = laid_out((8, LENGTH), jnp.int32)
    alignment = Alignment(tokens, tokens, laid_out((8, LENGTH), jnp.bool_))
    whole = jax.device_put(tables, NamedSharding(mesh, PartitionSpec()))

    def scalar(student, *others):
        return loss(student, *others).sum()

    with jax.set_mesh(mesh):
        function = jax.jit(jax.value_and_grad(scalar))
        return function.lower(*logits, alignment, tokens, tokens, whole).compile(AS_OUTSIDE).as_text()


def floats_in(text):
    found = re.findall(r"\b(?:f|bf)\d+\[([\d,]+)\]", text)
    return {tuple(int(n) for n in shape.split(",")) for shape in found}


@pytest.mark.parametrize(
    "config",
    [MeshConfig(data=2, tensor=4), pytest.param(MeshConfig(data=1, tensor=8), marks=pytest.mark.slow)],
)
def test_no_device_holds_a_whole_vocabulary_of_its_rows(config):
    mesh, tables = make_mesh(config), program_tables()
    n = mesh.shape["tensor"]
    rows = 8 * LENGTH // mesh.shape["data"]
    events, longest = tables.student.count, (tables.student_pieces.longest, tables.teacher_pieces.longest)
    assert (events, *longest) == (900, 38, 102)

    def loss(student, teacher, alignment, student_ids, teacher_ids, tables):
        ids = {"student_ids": student_ids, "teacher_ids": teacher_ids}
        return vocab_parallel_prefix_kl(student, teacher, alignment, tables, mesh=mesh, block=BLOCK, **ids)

    text = program(mesh, loss, tables)
    shapes = floats_in(text)
    # Whole vocabularies, all events, and those that begin a text as several tokens do.
    full = {*SIZES, *WIDTHS, events}
    whole = [shape for shape in shapes if full & set(shape)]
    assert max(math.prod(shape) // max(full & set(shape)) for shape in whole) == BLOCK // n
    assert max(math.prod(shape) for shape in shapes) == rows * (WIDTHS[1] // n)
    # The slopes of the steps are spread over the devices until they are asked for.
    for size in (*longest, longest[1] + 2, 2 * longest[0], 2 * longest[1]):
        at_once = [math.prod(shape) // size for shape in shapes if size in shape]
        assert max(at_once, default=0) <= max(BLOCK, rows // n)

    sent = sent_in(text)
    wide = [(name, size) for name, size in sent if name != "all-reduce"]
    assert max(size for name, size in sent if name == "all-reduce") <= 4 * rows
    assert sorted(wide) == sorted(
        [("all-to-all", BLOCK // n * width) for width in (*WIDTHS, WIDTHS[0])]
        + [("reduce-scatter", BLOCK // n * 2 * size) for size in longest]
        + [("all-gather", BLOCK * size) for size in (longest[0], longest[1] + 2)]
    )


def test_the_plain_loss_does_hold_one():
    """The check above sees what it is looking for."""
    mesh = make_mesh(MeshConfig(data=1, tensor=8))

    def loss(student, teacher, alignment, student_ids, teacher_ids, tables):
        return prefix_kl(
            student, teacher, alignment, tables, student_ids=student_ids, teacher_ids=teacher_ids
        )

    shapes = floats_in(program(mesh, loss, program_tables()))
    assert max(math.prod(s) // 900 for s in shapes if 900 in s) >= 8 * LENGTH
