"""P-KL and the hybrid losses: first and last merges, JSD, TRL's weights and every form of W, against float64.

The twins are loops over Python floats; gradients are compared with their central differences.
"""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from reference import gradient as reference_gradient
from reference import merging as reference
from reference import projection as reference_projection

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import hybrid_kl, hybrid_terms, masked_mean, projection_kl, valid_chunks
from xtoken_jax.projection.matrix import Partition, Projection
from xtoken_jax.projection.sharded import shard_projection

B, T_S, T_T, C = 4, 7, 9, 6
V_S, V_T = 9, 12  # of the tokenizers
WIDTH_S, WIDTH_T = 11, 15  # of the lm_heads

# Rows: chunks of one to three tokens, the first token without a position; gaps, one inside chunk 0 of the
# student; chunks 1 and 2 have tokens on one side only; a masked sample. Chunk 5 is empty everywhere.
STUDENT_CHUNKS = np.array(
    [[0, 0, 1, 1, 1, 2, 3], [-1, 0, 0, -1, 0, 1, 2], [0, 0, 1, 1, 3, 3, 4], [0, 1, 1, 2, 2, 3, -1]],
    np.int32,
)
TEACHER_CHUNKS = np.array(
    [
        [0, 1, 1, 2, 2, 2, 3, -1, -1],
        [-1, 0, 0, 0, 1, 1, -1, 2, 2],
        [-1, 0, 0, 2, 3, 3, 4, 4, -1],
        [0, 1, 2, 2, 2, 3, 3, -1, -1],
    ],
    np.int32,
)
VALID = np.ones((B, C), bool)
VALID[0, 3] = False  # such as a chunk whose bytes differ
VALID[3] = False  # a masked sample
ALIGNMENT = Alignment(STUDENT_CHUNKS, TEACHER_CHUNKS, VALID)
COUNTED = [[1, 2], [0, 1, 2], [0, 3, 4], []]
REAL_TEACHER = np.ones((B, T_T), bool)
REAL_TEACHER[:3, 7:] = False

# Rows of W: exact ones, two of them for one teacher token; two and three pieces; an empty one.
INDICES = np.full((V_S, 3), -1, np.int32)
WEIGHTS = np.zeros((V_S, 3), np.float32)
for i, row in enumerate(
    [
        {4: 1},
        {2: 0.9, 7: 0.1},
        {0: 1},
        {4: 1},
        {9: 0.7, 1: 0.2, 4: 0.1},
        {},
        {11: 1},
        {3: 0.55, 5: 0.45},
        {8: 1},
    ]
):
    INDICES[i, : len(row)], WEIGHTS[i, : len(row)] = list(row), list(row.values())
PROJECTION = Projection(INDICES, WEIGHTS, V_T)


def rows_of(weights):
    """W as dictionaries, the weights as float32 holds them."""
    return [
        {int(j): float(w) for j, w in zip(*both, strict=True) if j >= 0}
        for both in zip(INDICES, weights, strict=True)
    ]


RNG = np.random.default_rng(21)
# In float32 from the start, so that both sides see the same numbers.
STUDENT = RNG.normal(0, 2, (B, T_S, WIDTH_S)).astype(np.float32)
TEACHER = RNG.normal(0, 2, (B, T_T, WIDTH_T)).astype(np.float32)
STUDENT[..., V_S:] += 5  # what lies past the tokenizer would dominate if it were read
TEACHER[..., V_T:] += 5


def likely_ids(logits, size):
    """Tokens that the position before them expects, so that a chunk's factor is not all but 0."""
    first = RNG.integers(0, size, (B, 1))
    best = np.argsort(logits[:, :-1, :size], axis=-1)[..., -1 - RNG.integers(0, 2)]
    return np.concatenate([first, best], axis=1).astype(np.int32)


STUDENT_IDS, TEACHER_IDS = likely_ids(STUDENT, V_S), likely_ids(TEACHER, V_T)
IDS = {"student_ids": STUDENT_IDS, "teacher_ids": TEACHER_IDS}
CHUNK_WEIGHTS = RNG.uniform(0.5, 1.5, (B, C)).astype(np.float32)  # so that no two errors cancel
# Of all rows, most of them where a chunk counts.
COORDINATES = [tuple(int(RNG.integers(n)) for n in (B, T_S, V_S)) for _ in range(20)] + [
    (b, p, int(RNG.integers(V_S)))
    for b, counted in enumerate(COUNTED)
    for p in range(T_S - 1)
    for _ in range(3)
    if STUDENT_CHUNKS[b, p + 1] in counted
]


def weighted(values):
    return sum(
        float(w) * v
        for weights, row in zip(CHUNK_WEIGHTS, values, strict=True)
        for w, v in zip(weights, row, strict=True)
        if v is not None
    )


def compare(found, expected, tolerance, name):
    """To a share of each number or of the largest."""
    atol = tolerance * max(np.abs(expected).max(), 1e-3)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=atol, err_msg=name)


def check(pair, student=STUDENT, teacher=TEACHER, *, tolerance=3e-6, step=1e-5, sizes=(V_S, V_T), flat=False):
    """Values [B, C], their zeros, and the gradient by the student's logits, which may be 0 if `flat`.

    `pair` is ours(student, teacher), an array [B, C], and twin(student, teacher), lists with None.
    """
    ours, twin = pair
    name = ours.__qualname__.partition("_pair")[0]

    def scalar(student_logits):
        values = ours(student_logits, jnp.asarray(teacher))
        return jnp.sum(values * CHUNK_WEIGHTS), values

    (_, values), gradient = jax.jit(jax.value_and_grad(scalar, has_aux=True))(jnp.asarray(student))
    assert values.dtype == jnp.float32
    expected = twin(student.tolist(), teacher.tolist())
    assert [[c for c, v in enumerate(row) if v is not None] for row in expected] == COUNTED
    dense = np.array([[0.0 if v is None else v for v in row] for row in expected])
    compare(np.float64(values), dense, tolerance, f"{name}, value")
    assert np.all(np.asarray(values)[dense == 0] == 0)

    places = [i for i in COORDINATES if i[2] < sizes[0]]
    slope = reference_gradient.differences(
        lambda z: weighted(twin(z, teacher.tolist())), student, places, step
    )
    assert flat or np.abs(slope).max() > 1e-3, "coordinates without a gradient test nothing"
    compare(np.array([gradient[i] for i in places], np.float64), slope, 10 * tolerance, f"{name}, gradient")
    assert np.all(np.asarray(gradient)[..., sizes[0] :] == 0)
    assert np.all(np.asarray(gradient)[3] == 0), "a masked sample has no gradient"
    return slope


def p_kl_pair(projection=PROJECTION, rows=None, **options):
    options = {"temperature": 1.0, "top_k": 8192, "direction": "forward", "merge": "mean"} | options
    mask = options.pop("mask", None)
    rows = rows_of(WEIGHTS) if rows is None else rows

    def ours(student, teacher):
        return projection_kl(
            student, teacher, ALIGNMENT, projection, teacher_mask=mask, teacher_ids=TEACHER_IDS, **options
        )

    def twin(student, teacher):
        return reference.projection_kl(
            student, teacher, STUDENT_CHUNKS, TEACHER_CHUNKS, VALID, rows, V_T,
            mask=mask, teacher_ids=TEACHER_IDS, **options,
        )  # fmt: skip

    return ours, twin


def hybrid_pair(kind="strict", part=None, common_weight=0.7, uncommon_weight=1.0, **options):
    options = {"temperature": 1.0, "uncommon_top_k": 8192, "direction": "forward", "merge": "mean"} | options
    partition = getattr(Partition, kind)(PROJECTION)
    pairs = getattr(reference_projection, f"{kind}_pairs")(rows_of(WEIGHTS))
    weights = {"common_weight": common_weight, "uncommon_weight": uncommon_weight}

    def ours(student, teacher):
        if part is not None:
            return hybrid_terms(student, teacher, ALIGNMENT, partition, **IDS, **options)[part]
        return hybrid_kl(student, teacher, ALIGNMENT, partition, **weights, **IDS, **options)

    def twin(student, teacher):
        terms = reference.hybrid_terms(
            student, teacher, STUDENT_CHUNKS, TEACHER_CHUNKS, VALID, pairs, V_S, V_T, **IDS, **options
        )
        by = reference.hybrid_weights(**weights, pairs=pairs, teacher_size=V_T)
        by = by if part is None else [part == 0, part == 1]
        one = lambda v: None if v is None else by[0] * v[0] + by[1] * v[1]  # noqa: E731
        return [[one(v) for v in row] for row in terms]

    return ours, twin


DIRECTIONS = [{"direction": "forward"}, {"direction": "reverse"}, {"direction": "jsd", "beta": 0.3}]
FEW = {"top_k": 5, "mask": REAL_TEACHER, "temperature": 1.7}


def name_of(value):
    if isinstance(value, dict):
        return "-".join(str(v) for v in value.values() if not isinstance(v, np.ndarray)) or "all"
    return str(value)


@pytest.mark.parametrize("columns", [{}, FEW], ids=name_of)
@pytest.mark.parametrize("direction", DIRECTIONS, ids=name_of)
@pytest.mark.parametrize("merge", ["first", "last"])
def test_projection_kl(merge, direction, columns):
    check(p_kl_pair(merge=merge, **direction, **columns))


@pytest.mark.parametrize("merge", ["mean", "mean_normalized"])
def test_projection_kl_of_a_mean_by_jsd(merge):
    check(p_kl_pair(merge=merge, direction="jsd", beta=0.3, **FEW))


@pytest.mark.parametrize("beta", [0, 1, 0.5])
def test_the_ends_of_beta_are_the_two_kls(beta):
    check(p_kl_pair(merge="first", direction="jsd", beta=beta))
    check(hybrid_pair(merge="first", direction="jsd", beta=beta))


@pytest.mark.parametrize(
    ("merge", "options"), [("mean_normalized", FEW), ("first", FEW), ("last", {})], ids=name_of
)
def test_projection_kl_of_the_split_projection(merge, options):
    check(p_kl_pair(PROJECTION.split(), merge=merge, **options))


def learnable():
    """Trained away from where it started, with other rows than W's."""
    start = PROJECTION.learnable()
    moved = start.logits + np.random.default_rng(5).normal(0, 1, INDICES.shape).astype(np.float32)
    return dataclasses.replace(start, logits=np.asarray(moved, np.float32))


def rows_of_logits(logits):
    return [dict(row) for row in reference_projection.softmax_rows(logits, INDICES)]


@pytest.mark.parametrize("options", [{"direction": "reverse"}, FEW], ids=name_of)
@pytest.mark.parametrize("merge", ["mean", "first", "last"])
def test_projection_kl_of_a_learnable_projection(merge, options):
    """Value and gradient by the student's logits, and the gradient by W's own."""
    w = learnable()
    check(p_kl_pair(w, rows_of_logits(w.logits), merge=merge, **options))

    def ours(logits):
        pair = p_kl_pair(dataclasses.replace(w, logits=logits), [], merge=merge, **options)
        return jnp.sum(pair[0](jnp.asarray(STUDENT), jnp.asarray(TEACHER)) * CHUNK_WEIGHTS)

    def twin(logits):
        pair = p_kl_pair(w, rows_of_logits(logits), merge=merge, **options)
        return weighted(pair[1](STUDENT.tolist(), TEACHER.tolist()))

    gradient = np.asarray(jax.jit(jax.grad(ours))(jnp.asarray(w.logits)), np.float64)
    slope = reference_gradient.differences(twin, w.logits, list(np.ndindex(INDICES.shape)))
    compare(gradient.reshape(-1), slope, 3e-5, "p_kl, gradient by W")
    assert np.abs(slope).max() > 1e-3
    assert np.all(gradient[INDICES < 0] == 0)


@pytest.mark.parametrize("trained", [False, True], ids=["fixed", "learnable"])
@pytest.mark.parametrize("merge", ["mean", "first", "last"])
def test_projection_kl_of_a_projection_split_over_devices(merge, trained):
    mesh = jax.make_mesh((4,), ("vocabulary",), axis_types=(AxisType.Auto,))
    w = shard_projection(PROJECTION, mesh, "vocabulary")
    check(p_kl_pair(w.learnable() if trained else w, merge=merge, **FEW))
    if not trained:
        return

    def loss(logits, w):
        w = dataclasses.replace(w, logits=logits)
        return p_kl_pair(w, merge=merge, **FEW)[0](jnp.asarray(STUDENT), jnp.asarray(TEACHER)).sum()

    one, many = PROJECTION.learnable(), w.learnable()
    expected = jax.jit(lambda z: jax.grad(loss)(z, one))(jnp.asarray(one.logits))
    gradient = jax.jit(lambda z: jax.grad(loss)(z, many))(many.logits)
    np.testing.assert_allclose(gradient[:V_S], expected, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(gradient[V_S:]) == 0), "added rows are empty"


@pytest.mark.parametrize("direction", DIRECTIONS, ids=name_of)
@pytest.mark.parametrize("merge", ["first", "last"])
@pytest.mark.parametrize("kind", ["strict", "relaxed"])
def test_hybrid(kind, merge, direction):
    check(hybrid_pair(kind, merge=merge, temperature=1.7, uncommon_top_k=3, **direction))


@pytest.mark.parametrize("merge", ["mean", "first", "last"])
def test_hybrid_with_trls_weights(merge):
    options = {"direction": "jsd", "beta": 0.5, "merge": merge}
    check(hybrid_pair(common_weight=None, uncommon_weight=None, **options))
    pairs = reference_projection.strict_pairs(rows_of(WEIGHTS))
    assert reference.hybrid_weights(None, None, pairs, V_T) == (len(pairs) / V_T, 1 - len(pairs) / V_T)


def test_one_of_the_weights_given():
    check(hybrid_pair("relaxed", merge="first", common_weight=None, uncommon_weight=0.25))
    check(hybrid_pair("relaxed", merge="last", common_weight=0.25, uncommon_weight=None))


@pytest.mark.parametrize("part", [0, 1], ids=["common", "uncommon"])
@pytest.mark.parametrize("merge", ["first", "last"])
def test_each_part_of_the_hybrid_loss(merge, part):
    check(hybrid_pair(part=part, merge=merge))


@pytest.mark.parametrize("top_k", [8192, 5])
@pytest.mark.parametrize("merge", ["first", "last"])
def test_the_factor_of_the_other_tokens_is_over_the_whole_vocabulary(merge, top_k):
    """exp(t) of a chunk sums to the probability that the teacher gives to its other tokens."""
    identity = Projection(np.arange(V_T, dtype=np.int32)[:, None], np.ones((V_T, 1), np.float32), V_T)
    values = projection_kl(
        jnp.zeros((B, T_S, V_T)), jnp.zeros((B, T_T, V_T)), ALIGNMENT, identity,
        top_k=top_k, merge=merge, teacher_ids=TEACHER_IDS,
    )  # fmt: skip
    # Teacher and student are uniform over the columns: mass * log(mass), whatever the columns.
    for b, counted in enumerate(COUNTED):
        for c in counted:
            mass = V_T ** -float(np.sum(TEACHER_CHUNKS[b, 1:] == c) - 1)
            np.testing.assert_allclose(values[b, c], mass * np.log(mass), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("merge", ["first", "last"])
def test_only_the_chosen_position_and_the_other_tokens_are_read(merge):
    """P-KL gives the student's other positions no gradient; GOLD, through the probability of their tokens."""
    chosen = np.zeros((B, T_S), bool)
    inside = np.zeros((B, T_S), bool)
    for b, counted in enumerate(COUNTED):
        for c in counted:
            positions = [p for p in range(T_S - 1) if STUDENT_CHUNKS[b, p + 1] == c]
            chosen[b, positions[0 if merge == "first" else -1]] = True
            inside[b, positions] = True
    for pair, reached in ((p_kl_pair(merge=merge), chosen), (hybrid_pair(merge=merge), inside)):
        gradient = jax.jit(jax.grad(lambda s, f=pair[0]: f(s, TEACHER).sum()))(jnp.asarray(STUDENT))
        assert np.array_equal(np.abs(np.asarray(gradient)).max(-1) > 0, reached)


def huge(array):
    """Some logits of +-1e4 among ordinary ones."""
    out, rng = array.copy(), np.random.default_rng(3)
    out[rng.random(array.shape) < 0.15] *= 1e4 / 2
    return out


PAIRS = [
    pytest.param(pair, id=name)
    for name, pair in {
        "p_kl-first": p_kl_pair(merge="first"),
        "p_kl-last": p_kl_pair(merge="last", top_k=5),
        "p_kl-split-last": p_kl_pair(PROJECTION.split(), merge="last"),
        "p_kl-first-jsd": p_kl_pair(merge="first", direction="jsd"),
        "gold-first": hybrid_pair(merge="first"),
        "h_kl-last-jsd": hybrid_pair("relaxed", merge="last", direction="jsd"),
    }.items()
]


@pytest.mark.parametrize("pair", PAIRS)
def test_huge_logits(pair):
    # float32 holds a log-probability of -1e4 to 5e-4 only, and a chunk adds those of its tokens.
    check(pair, teacher=huge(TEACHER), tolerance=3e-5, flat=True)
    ours, twin = pair
    value, gradient = jax.jit(jax.value_and_grad(lambda s: ours(s, TEACHER).sum()))(huge(STUDENT))
    expected = sum(v for row in twin(huge(STUDENT).tolist(), TEACHER.tolist()) for v in row if v is not None)
    np.testing.assert_allclose(value, expected, rtol=3e-5)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("merge", ["mean", "first", "last"])
def test_hybrid_jsd_of_huge_logits_on_both_sides(merge):
    check(hybrid_pair(merge=merge, direction="jsd"), huge(STUDENT), huge(TEACHER), tolerance=3e-5, step=1e-3)


def without_columns(array, columns):
    out = array.copy()
    out[..., columns] = -np.inf
    return out


@pytest.mark.parametrize("pair", PAIRS)
def test_excluded_tokens(pair, monkeypatch):
    """-inf on both sides, at a common pair and at uncommon tokens, and nothing is NaN.

    Where an excluded token is one of a chunk's other tokens, the teacher's mass of the chunk is 0.
    """
    pairs = reference_projection.strict_pairs(rows_of(WEIGHTS))
    teacher = without_columns(TEACHER, [0, 1, 10])  # 0 pairs with the student's 2
    assert pairs[0] == 2
    student = without_columns(STUDENT, [2, 5])
    assert np.isin(TEACHER_IDS[:3], [0, 1, 10]).any()
    # Where the student excludes an actual token and the teacher does not, the value is infinite; not here.
    monkeypatch.setitem(IDS, "student_ids", np.where(np.isin(STUDENT_IDS, [2, 5]), 0, STUDENT_IDS))
    check(pair, student, teacher)


@pytest.mark.parametrize("merge", ["first", "last"])
def test_an_actual_token_that_the_teacher_excludes_makes_the_chunk_0(merge):
    teacher = TEACHER.copy()
    for p in range(3):  # those of the chunk, so that the merge does not matter
        teacher[1, p, TEACHER_IDS[1, p + 1]] = -np.inf
    for pair in (p_kl_pair(merge=merge), hybrid_pair(merge=merge, part=0)):
        check(pair, teacher=teacher)
        assert jax.jit(pair[0])(STUDENT, teacher)[1, 0] == 0


@pytest.mark.parametrize(
    ("merge", "size_s", "size_t"),
    [("first", 1, V_T), ("last", V_S, 1), ("mean", V_S, 1), ("mean_normalized", 1, 1), ("last", 1, 1)],
)
def test_vocabularies_of_one_token(merge, size_s, size_t):
    indices = np.minimum(INDICES[:size_s, :1] * 0, size_t - 1)  # every row is the first teacher token
    w = Projection(indices, np.ones(indices.shape, np.float32), size_t)
    rows = [{0: 1.0}] * size_s
    pairs = reference_projection.strict_pairs(rows)
    ids = {"student_ids": STUDENT_IDS % size_s, "teacher_ids": TEACHER_IDS % size_t}
    chunks = (STUDENT_CHUNKS, TEACHER_CHUNKS, VALID)

    def p_kl_of_one(student, teacher):
        return projection_kl(student, teacher, ALIGNMENT, w, merge=merge, **ids)

    def p_kl_twin(student, teacher):
        return reference.projection_kl(
            student, teacher, *chunks, rows, size_t, teacher_ids=ids["teacher_ids"],
            temperature=1.0, top_k=8192, direction="forward", merge=merge,
        )  # fmt: skip

    # All of the student's mass is in one column: nothing is to be learnt.
    slope = check((p_kl_of_one, p_kl_twin), sizes=(size_s, size_t), flat=True)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    if merge == "mean_normalized":
        return

    def hybrid_of_one(student, teacher):
        return hybrid_kl(student, teacher, ALIGNMENT, Partition.strict(w), merge=merge, **ids)

    def hybrid_twin(student, teacher):
        terms = reference.hybrid_terms(
            student, teacher, *chunks, pairs, size_s, size_t,
            temperature=1.0, uncommon_top_k=8192, direction="forward", merge=merge, **ids,
        )  # fmt: skip
        return [[None if v is None else sum(v) for v in row] for row in terms]

    check((hybrid_of_one, hybrid_twin), sizes=(size_s, size_t), flat=size_s == 1)


def test_chunks_of_one_token_do_not_depend_on_the_merge():
    one = np.arange(7, dtype=np.int32)[None].repeat(B, axis=0)
    alignment = Alignment(one, one, np.ones((B, 7), bool))
    teacher, ids = TEACHER[:, :7], {"student_ids": STUDENT_IDS, "teacher_ids": TEACHER_IDS[:, :7]}
    partition = Partition.relaxed(PROJECTION)
    for loss, tables in ((projection_kl, PROJECTION), (hybrid_kl, partition)):
        mean = jax.jit(loss)(STUDENT, teacher, alignment, tables)
        for merge in ("first", "last"):
            found = jax.jit(partial(loss, merge=merge, **ids))(STUDENT, teacher, alignment, tables)
            np.testing.assert_allclose(found, mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("pair", PAIRS)
def test_columns_past_the_tokenizers_are_not_read(pair):
    ours = jax.jit(pair[0])
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[..., V_S:], teacher[..., V_T:] = np.nan, 1e9
    expected = ours(STUDENT[..., :V_S], TEACHER[..., :V_T])
    np.testing.assert_array_equal(ours(student, teacher), expected)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_teacher_gets_no_gradient_and_bfloat16_is_computed_in_float32(pair):
    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def loss(student, teacher):
        values = pair[0](student, teacher)
        assert values.dtype == jnp.float32
        return values.sum()

    sides = (jnp.asarray(STUDENT, jnp.bfloat16), jnp.asarray(TEACHER, jnp.bfloat16))
    value, (gradient, of_teacher) = loss(*sides)
    assert gradient.dtype == jnp.bfloat16
    assert np.all(np.asarray(of_teacher) == 0)
    exact, (in_float32, _) = loss(*(side.astype(jnp.float32) for side in sides))
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    np.testing.assert_allclose(gradient.astype(jnp.float32), in_float32, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("merge", ["first", "last"])
def test_no_chunk_at_all_is_zero_with_a_zero_gradient(merge):
    nothing = Alignment(
        np.full_like(STUDENT_CHUNKS, -1), np.full_like(TEACHER_CHUNKS, -1), np.ones((B, C), bool)
    )
    for loss, tables in (
        *itertools.product([projection_kl], [PROJECTION, PROJECTION.split(), learnable()]),
        (hybrid_kl, Partition.strict(PROJECTION)),
    ):
        value, gradient = jax.jit(
            jax.value_and_grad(
                lambda s, f=loss, w=tables: masked_mean(
                    f(s, TEACHER, nothing, w, merge=merge, **IDS), valid_chunks(nothing)
                )
            )
        )(jnp.asarray(STUDENT))
        assert value == 0
        assert np.all(np.asarray(gradient) == 0)


def test_what_makes_no_sense_is_refused():
    partition = Partition.strict(PROJECTION)

    def traced(loss, tables, **options):
        jax.eval_shape(lambda s, t: loss(s, t, ALIGNMENT, tables, **options), STUDENT, TEACHER)

    with pytest.raises(ValueError, match="merge='middle': choose one of mean, mean_normalized, first, last"):
        traced(projection_kl, PROJECTION, merge="middle")
    with pytest.raises(ValueError, match="merge='last' needs teacher_ids"):
        traced(projection_kl, PROJECTION, merge="last")
    with pytest.raises(ValueError, match="merge='mean_normalized': choose one of mean, first, last"):
        traced(hybrid_kl, partition, merge="mean_normalized")
    for given in ({}, {"student_ids": STUDENT_IDS}, {"teacher_ids": TEACHER_IDS}):
        with pytest.raises(ValueError, match="merge='first' needs student_ids and teacher_ids"):
            traced(hybrid_kl, partition, merge="first", **given)
    for loss, tables in ((projection_kl, PROJECTION), (hybrid_kl, partition)):
        with pytest.raises(ValueError, match="direction='sideways'"):
            traced(loss, tables, direction="sideways")
        with pytest.raises(ValueError, match="beta=2"):
            traced(loss, tables, direction="jsd", beta=2.0)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_large_offset_costs_no_digits(pair):
    """Logits a thousand higher are the same distribution; what float32 leaves of them is compared."""
    ours, _ = pair
    student, teacher = (np.round(z * 64) / 64 for z in (STUDENT, TEACHER))  # exact in float32 with the offset
    evaluate = jax.jit(jax.value_and_grad(lambda s, t: ours(s, t).sum()))
    (value, gradient), (shifted, shifted_gradient) = (
        evaluate(student + offset, teacher + offset) for offset in (np.float32(0), np.float32(1000))
    )
    np.testing.assert_allclose(shifted, value, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(shifted_gradient, gradient, atol=2e-6 * np.abs(gradient).max())
