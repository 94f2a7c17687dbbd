"""Losses from hidden states, block by block, against the plain functions over whole logits."""

import dataclasses
import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs import AS_OUTSIDE

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import (
    LossConfig,
    LossKind,
    loss_tables,
    masked_mean,
    next_token_cross_entropy,
    total_loss,
    valid_chunks,
)
from xtoken_jax.losses.blockwise.loss import blockwise_loss
from xtoken_jax.losses.config import Direction, Merge
from xtoken_jax.losses.total import PARTS, distillation_parts
from xtoken_jax.projection.matrix import Projection
from xtoken_jax.projection.prefixes import tables_of_pieces

B, T_S, T_T, C = 8, 11, 13, 9
V_S, V_T = 13, 17  # of the tokenizers
WIDTH_S, WIDTH_T = 15, 20  # of the lm_heads
D_S, D_T = 6, 7
RNG = np.random.default_rng(5)


def random_chunks(length):
    """Chunks of one to four tokens, with gaps."""
    chunks = np.cumsum(RNG.random((B, length)) < 0.5, axis=1) - 1
    chunks = np.where(RNG.random((B, length)) < 0.1, -1, chunks)
    return np.where(chunks < C, chunks, -1).astype(np.int32)


def make_alignment():
    student, teacher = random_chunks(T_S), random_chunks(T_T)
    valid = RNG.random((B, C)) < 0.9
    student[0, 1:9], teacher[0, 1:] = 0, 0  # one chunk longer than most blocks, on both sides
    student[1], teacher[1] = -1, -1  # an empty row
    valid[2] = False  # a masked sample
    student[3, 6:], teacher[3, 7:] = -1, -1  # padding
    student[4], teacher[4] = np.arange(T_S) % C, np.arange(T_T) % C  # chunks need not be runs
    student[5, 2:], teacher[5, 2:4], teacher[5, 4:] = 1, 1, -1  # long on the student's side only
    valid[[0, 5], [0, 1]] = True
    return Alignment(student, teacher, valid)


def make_projection():
    indices = np.full((V_S, 4), -1, np.int32)
    weights = np.zeros((V_S, 4), np.float32)
    for i in range(V_S):
        count = (1, 1, 3, 1, 0)[i % 5]
        indices[i, :count] = RNG.choice(V_T, count, replace=False)
        weights[i, :count] = np.array([1, 0.1, 0.01])[:count] / np.array([1, 0.1, 0.01])[:count].sum()
    return Projection(indices, weights, V_T)


def make_prefixes():
    """The student's even tokens are the teacher's 0 to 3, the odd ones begin with them; and the reverse."""
    by_student = {
        i: [i // 4] if i % 2 == 0 else [i // 4, *RNG.choice(V_T, i % 3).tolist()] for i in range(V_S)
    }
    by_teacher = {i: [4 * (i % 4)] if i < 4 else [4 * (i % 4), int(RNG.integers(V_S))] for i in range(V_T)}
    return tables_of_pieces(by_student, by_teacher, {}, V_S, V_T)


ALIGNMENT = make_alignment()
PROJECTION = make_projection()
IDENTITY = Projection(np.arange(V_S, dtype=np.int32)[:, None], np.ones((V_S, 1), np.float32), V_S)
HIDDEN = jnp.asarray(RNG.normal(0, 1, (B, T_S, D_S)), jnp.float32)
UNEMBEDDING = jnp.asarray(RNG.normal(0, 1, (WIDTH_S, D_S)), jnp.float32)
TEACHER = (
    jnp.asarray(RNG.normal(0, 1, (B, T_T, D_T)), jnp.float32),
    jnp.asarray(RNG.normal(0, 1, (WIDTH_T, D_T)), jnp.float32),
)
IDS = jnp.asarray(RNG.integers(0, V_S, (B, T_S)), jnp.int32)
TEACHER_IDS = jnp.asarray(RNG.integers(0, V_S, (B, T_T)), jnp.int32)
PREFIXES = make_prefixes()
TARGETS = jnp.asarray(RNG.random((B, T_S)) < 0.7).at[2].set(False)
TEACHER_MASK = jnp.ones((B, T_T), bool).at[3, 7:].set(False)
SCALE = 10.0  # of `total_loss`


def tables_of(kind):
    if kind is LossKind.none:
        return None
    if kind is LossKind.prefix_kl:
        return jax.tree.map(jnp.asarray, PREFIXES)
    projection = IDENTITY if kind is LossKind.same_vocabulary else PROJECTION
    return jax.tree.map(jnp.asarray, loss_tables(kind, projection))


def logits(hidden, unembedding):
    return jnp.einsum("btd,vd->btv", hidden, unembedding, preferred_element_type=jnp.float32)


def capped(logits, cap):
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def plain(*arguments, **options):
    return plain_parts(*arguments, **options)[:2]


def plain_parts(config, tables, hidden, unembedding, teacher=TEACHER, alignment=ALIGNMENT, caps=(None, None)):
    student = capped(logits(hidden, unembedding), caps[0])[..., :V_S]
    ce = masked_mean(*next_token_cross_entropy(student, IDS, TARGETS))
    if config.kind is LossKind.none:
        return ce, jnp.float32(0), {}
    values, parts = distillation_parts(config)(
        student, capped(logits(*teacher), caps[1]), alignment, tables, TEACHER_MASK,
        student_ids=IDS, teacher_ids=TEACHER_IDS,
    )  # fmt: skip
    valid = valid_chunks(alignment)
    means = [masked_mean(part, valid) for part in parts]
    return ce, masked_mean(values, valid), dict(zip(PARTS.get(config.kind, ()), means, strict=True))


def blockwise(*arguments, **options):
    return blockwise_parts(*arguments, **options)[:2]


def blockwise_parts(
    config, tables, hidden, unembedding, teacher=TEACHER, alignment=ALIGNMENT, caps=(None, None), **options
):
    found = blockwise_loss(
        hidden, unembedding, *teacher, alignment, tables, IDS, TARGETS, config,
        teacher_ids=TEACHER_IDS, teacher_mask=TEACHER_MASK, student_size=V_S,
        student_softcap=caps[0], teacher_softcap=caps[1], **options,
    )  # fmt: skip
    return found.ce, found.kd, found.parts


def gradients(function, config, tables, hidden=HIDDEN, unembedding=UNEMBEDDING, **options):
    """(CE, KD, parts), and the gradients of the dynamically scaled total."""
    function = {plain: plain_parts, blockwise: blockwise_parts}[function]

    def total(hidden, unembedding):
        ce, kd, parts = function(config, tables, hidden, unembedding, **options)
        return total_loss(ce, kd, max_scale=SCALE)[0], (ce, kd, parts)

    function_and_slopes = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, values), slopes = jax.jit(function_and_slopes)(hidden, unembedding)
    return values, slopes


def assert_close(found, expected, tolerance=3e-6):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        scale = max(float(jnp.abs(theirs).max()), 1e-6)
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale)


K = LossKind
CASES = {
    "p_kl": LossConfig(K.p_kl, top_k=6, temperature=1.7),
    "p_kl-all-normalized": LossConfig(K.p_kl, top_k=None, merge=Merge.mean_normalized),
    "p_kl-first": LossConfig(K.p_kl, top_k=6, merge=Merge.first, direction=Direction.reverse),
    "p_kl-all-last": LossConfig(K.p_kl, top_k=None, merge=Merge.last, direction=Direction.jsd),
    "gold": LossConfig(K.gold, temperature=1.7, common_weight=None, uncommon_weight=None),
    "h_kl-first": LossConfig(K.h_kl, uncommon_top_k=3, merge=Merge.first),
    "h_kl-last": LossConfig(K.h_kl, merge=Merge.last, direction=Direction.reverse),
    "uld": LossConfig(K.uld, temperature=1.3),
    "alm": LossConfig(K.alm, likelihood_temperature=3.0),
    "prefix_kl": LossConfig(K.prefix_kl, temperature=1.3),
    "prefix_kl-reverse": LossConfig(K.prefix_kl, direction=Direction.reverse),
    "same_vocabulary": LossConfig(K.same_vocabulary, top_k=5, temperature=1.3),
    "same_vocabulary-all": LossConfig(K.same_vocabulary, top_k=None, direction=Direction.reverse),
    "none": LossConfig(K.none),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    """Blocks smaller than the longest chunks, and of which T is no multiple."""
    config = CASES[name]
    tables = tables_of(config.kind)
    expected = expected_of(name)
    assert float(jnp.abs(expected[1][0]).max()) > 1e-3
    assert_close(gradients(blockwise, config, tables, block=5), expected)
    assert np.all(np.asarray(expected[1][1])[V_S:] == 0)


@pytest.mark.parametrize("name", ["p_kl", "gold", "alm"])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 200])
def test_sizes_of_blocks(name, block):
    config = CASES[name]
    tables = tables_of(config.kind)
    assert_close(gradients(blockwise, config, tables, block=block), expected_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all_sizes_of_blocks(name):
    config = CASES[name]
    tables = tables_of(config.kind)
    for block in range(1, T_S + 1):
        assert_close(gradients(blockwise, config, tables, block=block), expected_of(name))


@functools.cache
def expected_of(name):
    return gradients(plain, CASES[name], tables_of(CASES[name].kind))


CAPS = 5.0, 4.0
WIDE, WIDE_TEACHER = 4 * HIDDEN, (4 * TEACHER[0], TEACHER[1])  # logits of about 10


@pytest.mark.parametrize(
    ("name", "caps"),
    [
        *((name, CAPS) for name in ("p_kl", "gold", "uld", "alm", "prefix_kl", "same_vocabulary", "none")),
        ("p_kl-all-last", (None, 4.0)),
        ("h_kl-last", CAPS),
        ("h_kl-first", (5.0, None)),
    ],
)
def test_soft_caps(name, caps):
    """That bite, on both sides or on one, in blocks smaller than the longest chunks."""
    config = CASES[name]
    tables = tables_of(config.kind)
    options = {"hidden": WIDE, "teacher": WIDE_TEACHER, "caps": caps}
    found = gradients(blockwise, config, tables, block=3, teacher_block=4, **options)
    assert_close(found, gradients(plain, config, tables, **options))


def test_soft_caps_with_fixed_weights_and_a_learnable_projection():
    learnable = jax.tree.map(jnp.asarray, PROJECTION.learnable())

    def total(function, **options):
        def of(hidden, unembedding, w):
            tables = dataclasses.replace(learnable, logits=w)
            found = function(CASES["p_kl"], tables, hidden, unembedding, teacher=WIDE_TEACHER, **options)
            return found.total if hasattr(found, "total") else 0.1 * found[0] + 2.0 * found[1]

        gradient = jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2)))
        return gradient(WIDE, UNEMBEDDING, learnable.logits)

    def ours(config, tables, hidden, unembedding, teacher):
        return blockwise_loss(
            hidden, unembedding, *teacher, ALIGNMENT, tables, IDS, TARGETS, config, weights=(0.1, 2.0),
            teacher_mask=TEACHER_MASK, student_softcap=CAPS[0], teacher_softcap=CAPS[1], block=4,
        )  # fmt: skip

    expected = total(plain, caps=CAPS)
    assert float(jnp.abs(expected[1][2]).max()) > 1e-3
    assert_close(total(ours), expected)
    assert_close(total(blockwise, caps=CAPS, block=4), expected)


@pytest.mark.parametrize("cap", [0, -30.0, float("inf"), float("nan")])
def test_a_cap_is_a_number_above_0(cap):
    with pytest.raises(ValueError, match=f"teacher_softcap={cap} must be a number above 0"):
        blockwise(CASES["p_kl"], tables_of(K.p_kl), HIDDEN, UNEMBEDDING, caps=(None, cap))


@pytest.mark.parametrize("name", ["p_kl", "gold", "alm", "prefix_kl"])
def test_a_teacher_block_of_any_size(name):
    config = CASES[name]
    tables = tables_of(config.kind)
    found = gradients(blockwise, config, tables, block=6, teacher_block=2)
    assert_close(found, expected_of(name))


@pytest.mark.parametrize("name", ["p_kl-all-last", "h_kl-first", "alm", "prefix_kl"])
def test_the_term_alone(name):
    """Without labels, as for a second teacher."""
    config = CASES[name]
    tables = tables_of(config.kind)

    def ours(hidden, unembedding):
        return blockwise_loss(
            hidden, unembedding, *TEACHER, ALIGNMENT, tables, IDS, None, config, block=5,
            teacher_ids=TEACHER_IDS, teacher_mask=TEACHER_MASK,
        ).kd  # fmt: skip

    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(HIDDEN, UNEMBEDDING)
        for f in (ours, lambda h, u: plain(config, tables, h, u)[1])
    )
    assert_close(found, expected)


@pytest.mark.parametrize("name", ["p_kl", "h_kl-last", "alm", "prefix_kl"])
def test_fixed_weights(name):
    config = CASES[name]
    tables = tables_of(config.kind)

    def ours(hidden, unembedding):
        found = blockwise_loss(
            hidden, unembedding, *TEACHER, ALIGNMENT, tables, IDS, TARGETS, config, block=5,
            weights=(0.1, 2.0), teacher_ids=TEACHER_IDS, teacher_mask=TEACHER_MASK,
        )  # fmt: skip
        return 3 * found.total + found.ce, found.kd  # a part has no gradient

    def theirs(hidden, unembedding):
        ce, kd = plain(config, tables, hidden, unembedding)
        return 3 * (0.1 * ce + 2.0 * kd) + jax.lax.stop_gradient(ce), kd

    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(HIDDEN, UNEMBEDDING)
        for f in (ours, theirs)
    )
    assert_close(found, expected)


def test_a_learnable_projection_gets_its_gradient():
    learnable = jax.tree.map(jnp.asarray, PROJECTION.learnable())

    def slope(function, **options):
        def kd(w):
            return total_loss(
                *function(
                    CASES["p_kl"], dataclasses.replace(learnable, logits=w), HIDDEN, UNEMBEDDING, **options
                ),
                max_scale=SCALE,
            )[0]

        return jax.jit(jax.grad(kd))(learnable.logits)

    expected = slope(plain)
    assert float(jnp.abs(expected).max()) > 1e-3
    assert_close(slope(blockwise, block=4), expected)


@pytest.mark.parametrize("name", ["p_kl", "gold", "alm", "prefix_kl"])
def test_bfloat16_is_as_exact_as_the_plain_way(name):
    """Both ways against the same numbers in float32, which is exact enough to tell."""
    config = CASES[name]
    tables = tables_of(config.kind)
    low = [x.astype(jnp.bfloat16) for x in (HIDDEN, UNEMBEDDING)]
    teacher = tuple(x.astype(jnp.bfloat16) for x in TEACHER)
    exact = gradients(
        plain, config, tables, *(x.astype(jnp.float32) for x in low),
        teacher=tuple(x.astype(jnp.float32) for x in teacher),
    )  # fmt: skip
    theirs = gradients(plain, config, tables, *low, teacher=teacher)
    ours = gradients(blockwise, config, tables, *low, teacher=teacher, block=4)
    assert_close(ours[0], exact[0], 1e-5)
    for a, b, c in zip(ours[1], theirs[1], exact[1], strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        errors = [float(jnp.linalg.norm(x.astype(jnp.float32) - c)) for x in (a, b)]
        assert errors[0] <= 1.02 * errors[1] + 1e-9


def test_slices_of_a_large_unembedding(monkeypatch):
    """Whole slices and a rest, in both dtypes."""
    monkeypatch.setattr("xtoken_jax.losses.blockwise.plan._SLICE", 4 * D_S)
    config = CASES["p_kl"]
    tables = tables_of(config.kind)
    expected = expected_of("p_kl")
    assert_close(gradients(blockwise, config, tables, block=5), expected)
    low = [x.astype(jnp.bfloat16) for x in (HIDDEN, UNEMBEDDING)]
    assert_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), gradients(blockwise, config, tables, *low, block=5)),
        jax.tree.map(lambda x: x.astype(jnp.float32), gradients(plain, config, tables, *low)),
        2**-7,
    )


def test_micro_batches_with_the_count_of_all_add_up():
    config, tables = CASES["gold"], tables_of(K.gold)
    whole = gradients(blockwise, config, tables, block=5)[0][:2]
    counts = {"ce_count": TARGETS[:, 1:].sum(), "kd_count": valid_chunks(ALIGNMENT).sum()}
    parts = []
    for rows in (slice(0, 3), slice(3, B)):
        alignment = jax.tree.map(lambda x, r=rows: x[r], ALIGNMENT)
        found = blockwise_loss(
            HIDDEN[rows], UNEMBEDDING, TEACHER[0][rows], TEACHER[1], alignment, tables, IDS[rows],
            TARGETS[rows], config, block=5, **counts,
        )  # fmt: skip
        parts.append((found.ce, found.kd))
    np.testing.assert_allclose(np.sum(parts, axis=0), np.array(whole), rtol=1e-6)


def test_rows_that_do_not_count_may_hold_anything():
    config, tables = CASES["p_kl"], tables_of(K.p_kl)
    hidden = HIDDEN.at[2].set(jnp.nan)  # masked in both terms
    values, slopes = gradients(blockwise, config, tables, hidden, block=5)
    assert_close(values, gradients(blockwise, config, tables, block=5)[0])
    assert np.all(np.isfinite(slopes[1]))
    assert np.all(np.asarray(slopes[0][2]) == 0)


@pytest.mark.parametrize("chunks", [C, 0])
def test_no_chunk_at_all(chunks):
    none = np.full_like(ALIGNMENT.student_chunks, -1), np.full_like(ALIGNMENT.teacher_chunks, -1)
    alignment = Alignment(*none, np.ones((B, chunks), bool))
    values, slopes = gradients(blockwise, CASES["p_kl"], tables_of(K.p_kl), block=5, alignment=alignment)
    assert values[1] == 0
    expected = expected_of("none")
    assert_close((values[:2], slopes), (expected[0][:2], expected[1]))


def test_the_teacher_gets_no_gradient():
    def kd(*teacher):
        return blockwise(CASES["gold"], tables_of(K.gold), HIDDEN, UNEMBEDDING, teacher=teacher, block=5)[1]

    assert all(np.all(np.asarray(g) == 0) for g in jax.grad(kd, argnums=(0, 1))(*TEACHER))


def test_what_is_missing_is_told():
    with pytest.raises(ValueError, match="teacher_ids"):
        blockwise_loss(
            HIDDEN, UNEMBEDDING, *TEACHER, ALIGNMENT, tables_of(K.gold), IDS, TARGETS, CASES["h_kl-first"]
        )
    with pytest.raises(ValueError, match="alm with merge='mean' needs teacher_ids"):
        blockwise_loss(HIDDEN, UNEMBEDDING, *TEACHER, ALIGNMENT, tables_of(K.alm), IDS, TARGETS, CASES["alm"])
    with pytest.raises(ValueError, match="needs a teacher"):
        blockwise_loss(HIDDEN, UNEMBEDDING, None, None, None, None, IDS, TARGETS, CASES["p_kl"])
    with pytest.raises(ValueError, match="auto"):
        blockwise_loss(HIDDEN, UNEMBEDDING, None, None, None, None, IDS, TARGETS, LossConfig())


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((8, 1, 1), "p_kl-first"),
        ((4, 2, 1), "gold"),
        pytest.param((4, 2, 1), "p_kl", marks=pytest.mark.slow),
        ((2, 2, 2), "p_kl"),
        pytest.param((8, 1, 1), "alm", marks=pytest.mark.slow),
        ((2, 2, 2), "alm"),
        ((2, 2, 2), "prefix_kl"),
    ],
)
def test_sharded_equals_one_device(shape, name):
    """Laid out as the models are; devices have different numbers of blocks."""
    config = CASES[name]
    tables = tables_of(config.kind)
    expected = gradients(blockwise, config, tables, unembedding=WIDER, block=5)
    mesh, hidden, unembedding, options = on_mesh(shape)
    with jax.set_mesh(mesh):
        tables = jax.device_put(tables, NamedSharding(mesh, PartitionSpec()))
        found = gradients(blockwise, config, tables, hidden, unembedding, block=5, **options)
    assert found[1][0].sharding.is_equivalent_to(hidden.sharding, 3)
    assert_close(found, expected)


WIDER = jnp.pad(UNEMBEDDING, ((0, 1), (0, 0)))  # its 16 rows can be split, V_s = 13 cannot


def on_mesh(shape):
    """The mesh, hidden states, unembedding, and the options that hold the rest."""
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    vocabulary = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    teacher = TEACHER[0], jax.device_put(TEACHER[1], NamedSharding(mesh, PartitionSpec("tensor")))
    options = {
        "teacher": (jax.device_put(teacher[0], rows), teacher[1]),
        "alignment": jax.device_put(jax.tree.map(jnp.asarray, ALIGNMENT), rows),
    }
    return mesh, jax.device_put(HIDDEN, rows), jax.device_put(WIDER, vocabulary), options


@pytest.mark.parametrize("name", ["none", "p_kl", "gold", "uld", "alm", "prefix_kl"])
def test_devices_with_other_blocks_are_not_waited_for(name):
    """Within the loops, whose lengths differ, there is no exchange that all devices take part in."""
    config = CASES[name]
    mesh, hidden, unembedding, options = on_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        tables = jax.device_put(tables_of(config.kind), NamedSharding(mesh, PartitionSpec()))

        def total(hidden, unembedding):
            return total_loss(*blockwise(config, tables, hidden, unembedding, block=5, **options))[0]

        step = jax.jit(jax.grad(total, argnums=(0, 1)))
        text = step.lower(hidden, unembedding).compile(AS_OUTSIDE).as_text()
    inner = text.split("\nENTRY ")[0]
    assert "collective-permute(" not in inner
    together = set(re.findall(r"(?:all-\w+|reduce-scatter)\(.*replica_groups=(\S+), ", inner))
    assert together == {"[4,2]<=[8]"}  # four groups of two neighbours, which share their rows


def test_rows_stay_on_their_devices():
    mesh = jax.make_mesh((8, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        function = jax.jit(lambda h: blockwise(CASES["p_kl"], tables_of(K.p_kl), h, UNEMBEDDING, block=5))
        text = function.lower(jax.device_put(HIDDEN, rows)).compile(AS_OUTSIDE).as_text()
    assert f"f32[{B},{T_S},{D_S}]" not in text


@pytest.mark.parametrize(("name", "rows"), [("alm", 24), ("uld", 24), ("gold", 24)])
def test_no_more_rows_of_a_vocabulary_than_a_block_has(name, rows):
    """None of a chunk either, where ALM keeps one number."""
    batch, length, widths = 8, 64, (1009, 1201)
    hidden = [jnp.zeros((batch, length, d)) for d in (D_S, D_T)]
    unembeddings = [jnp.zeros((v, d)) for v, d in zip(widths, (D_S, D_T), strict=True)]
    ids = jnp.zeros((batch, length), jnp.int32)
    alignment = Alignment(ids, ids, jnp.ones((batch, length), bool))
    one_to_one = np.arange(widths[0], dtype=np.int32)[:, None]
    projection = Projection(one_to_one, np.ones((widths[0], 1), np.float32), widths[1])
    config = replace(CASES[name], uncommon_top_k=3)
    tables = jax.tree.map(jnp.asarray, loss_tables(config.kind, projection))

    def total(hidden_s, unembedding_s):
        found = blockwise_loss(
            hidden_s, unembedding_s, hidden[1], unembeddings[1], alignment, tables, ids,
            jnp.ones(ids.shape, bool), config, teacher_ids=ids, block=16, teacher_block=rows,
        )  # fmt: skip
        return total_loss(found.ce, found.kd)[0]

    program = jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden[0], unembeddings[0])
    shapes = re.findall(r"f32\[(\d+),1201\]", program.compile(AS_OUTSIDE).as_text())
    assert max(map(int, shapes)) == rows
    # Of chunks there are as many as a block of the student has positions.
    assert ("16" in shapes) == (name != "alm")


@pytest.mark.parametrize("name", ["p_kl-first", "h_kl-last", "alm", "prefix_kl"])
def test_a_large_offset_of_the_logits_costs_no_digits(name):
    """One more hidden unit, the same everywhere, moves all logits by 65536; they stay exact beside it."""

    def eighths(x):
        return jnp.round(x * 8) / 8

    def moved(hidden, unembedding, offset):
        more = jnp.ones((*hidden.shape[:-1], 1)), jnp.full((len(unembedding), 1), float(offset))
        return jnp.concatenate([hidden, more[0]], -1), jnp.concatenate([unembedding, more[1]], -1)

    config = replace(CASES[name], temperature=1.0)
    tables = tables_of(config.kind)
    rows = tuple(map(eighths, (HIDDEN, UNEMBEDDING))), tuple(map(eighths, TEACHER))
    results = []
    for offset in (0, 65536):
        (hidden, unembedding), teacher = (moved(*side, offset) for side in rows)
        values, slopes = gradients(blockwise, config, tables, hidden, unembedding, teacher=teacher, block=5)
        results.append((values, slopes[0][..., :-1], slopes[1][..., :-1]))
    assert_close(results[1], results[0])
