"""P-KL, GOLD, H-KL and cross-entropy: every chunk's value and the gradient, against the float64 twins."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import gradient as reference_gradient
from reference import losses as reference
from reference import projection as reference_projection

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import (
    hybrid_kl,
    hybrid_terms,
    masked_mean,
    next_token_cross_entropy,
    projection_kl,
    total_loss,
    valid_chunks,
)
from xtoken_jax.projection.matrix import Partition, Projection

B, T_S, T_T, C = 4, 8, 10, 8
V_S, V_T = 13, 17  # of the tokenizers
WIDTH_S, WIDTH_T = 15, 20  # of the lm_heads

# Rows: ordinary; one-token chunks and gaps; chunks 1 and 2 have tokens on one side only; masked out.
# Chunk 0 of row 0 loses the position before its first token; ids 5 to 7 are empty everywhere but in row 1.
STUDENT_CHUNKS = np.array(
    [
        [0, 1, 1, 2, 3, 3, 3, 4],
        [-1, 0, 1, 2, 3, 4, 5, 6],
        [0, 0, 1, 1, 3, -1, 4, -1],
        [0, 0, 1, 1, 2, 2, 3, -1],
    ],
    np.int32,
)
TEACHER_CHUNKS = np.array(
    [
        [0, 1, 2, 2, 2, 3, 3, 4, -1, -1],
        [0, -1, 1, 2, 3, 4, 5, 6, 7, -1],
        [-1, 0, 2, 3, 3, 3, 3, 4, 4, -1],
        [0, 1, 1, 1, 2, 3, 3, -1, -1, -1],
    ],
    np.int32,
)
VALID = np.ones((B, C), bool)
VALID[0, 3] = False  # such as a chunk whose bytes differ
VALID[3] = False  # a masked sample
ALIGNMENT = Alignment(STUDENT_CHUNKS, TEACHER_CHUNKS, VALID)
# Row 0: 1, 2 and 4 (0 has no position, 3 is not valid); row 1: 1 to 6 (0 has no teacher position);
# row 2: 0, 3 and 4.
COUNTED = [[1, 2, 4], [1, 2, 3, 4, 5, 6], [0, 3, 4], []]

REAL_TEACHER = np.ones((B, T_T), bool)
REAL_TEACHER[0, 8:] = False
REAL_TEACHER[3, 7:] = False


def random_rows(rng):
    """W by rows: exact ones with collisions, two and three pieces, weights under the threshold, empty."""
    rows = []
    for i in range(V_S):
        count = [1, 1, 2, 3, 0, 4, 1][i % 7]
        ids = rng.choice(V_T, count, replace=False).tolist()
        weights = 0.9 * 0.1 ** np.arange(count) if i % 2 else rng.uniform(0.5, 1.0, count)
        weights = np.sort(weights)[::-1]
        rows.append(dict(zip(ids, (weights / weights.sum()).tolist(), strict=True)) if count else {})
    rows[6] = dict(rows[0])  # two exact rows for one teacher id
    rows[8] = {next(iter(rows[1])): 0.7, (next(iter(rows[1])) + 1) % V_T: 0.3}
    return rows


def packed(rows, entries=4):
    indices = np.full((len(rows), entries), -1, np.int32)
    weights = np.zeros((len(rows), entries), np.float32)
    for i, row in enumerate(rows):
        for k, (j, weight) in enumerate(row.items()):
            indices[i, k], weights[i, k] = j, weight
    return Projection(indices, weights, V_T)


RNG = np.random.default_rng(7)
ROWS = random_rows(RNG)
PROJECTION = packed(ROWS)
ROWS = [  # the weights as float32 holds them
    {int(j): float(w) for j, w in zip(js, ws, strict=True) if j >= 0}
    for js, ws in zip(PROJECTION.indices, PROJECTION.weights, strict=True)
]
# In float32 from the start, so that both sides see the same numbers.
STUDENT = RNG.normal(0, 2, (B, T_S, WIDTH_S)).astype(np.float32)
TEACHER = RNG.normal(0, 2, (B, T_T, WIDTH_T)).astype(np.float32)
STUDENT[..., V_S:] += 5  # what lies past the tokenizer would dominate if it were read
TEACHER[..., V_T:] += 5
CHUNK_WEIGHTS = RNG.uniform(0.5, 1.5, (B, C)).astype(np.float32)
COORDINATES = [tuple(int(RNG.integers(n)) for n in (B, T_S, V_S)) for _ in range(36)]


def weighted(values):
    """A scalar in which every chunk has its own weight, so that no two errors cancel."""
    return sum(
        float(CHUNK_WEIGHTS[b, c]) * v
        for b, row in enumerate(values)
        for c, v in enumerate(row)
        if v is not None
    )


def check(ours, twin, student=STUDENT, teacher=TEACHER, *, tolerance=3e-6, step=1e-5):
    """Values [B, C], their zeros, and the gradient by the student's logits.

    `ours(student, teacher)` returns an array [B, C]; `twin(student, teacher)` nested lists with None.
    """

    def scalar(student_logits):
        values = ours(student_logits, jnp.asarray(teacher))
        return jnp.sum(values * CHUNK_WEIGHTS), values

    (_, values), gradient = jax.jit(jax.value_and_grad(scalar, has_aux=True))(jnp.asarray(student))
    expected = twin(student.tolist(), teacher.tolist())
    counted = [[c for c, v in enumerate(row) if v is not None] for row in expected]
    assert counted == COUNTED
    dense = np.array([[0.0 if v is None else v for v in row] for row in expected])
    np.testing.assert_allclose(values, dense, rtol=tolerance, atol=tolerance * np.abs(dense).max())
    assert np.array_equal(np.asarray(values) == 0, dense == 0)

    slope = reference_gradient.differences(
        lambda z: weighted(twin(z, teacher.tolist())), student, COORDINATES, step
    )
    ours_at = np.array([gradient[i] for i in COORDINATES])
    assert np.abs(slope).max() > 1e-3, "coordinates without a gradient test nothing"
    np.testing.assert_allclose(ours_at, slope, rtol=10 * tolerance, atol=10 * tolerance * np.abs(slope).max())
    assert np.all(np.asarray(gradient)[..., V_S:] == 0)
    assert np.all(np.asarray(gradient)[3] == 0), "a masked sample has no gradient"


def p_kl_pair(**options):
    options = {"temperature": 1.0, "top_k": 8192, "direction": "forward", "merge": "mean"} | options
    mask = options.pop("mask", None)
    projection = PROJECTION.split() if options.pop("split", False) else PROJECTION

    def ours(student, teacher):
        return projection_kl(student, teacher, ALIGNMENT, projection, teacher_mask=mask, **options)

    def twin(student, teacher):
        return reference.projection_kl(
            student, teacher, STUDENT_CHUNKS, TEACHER_CHUNKS, VALID, ROWS, V_T, mask=mask, **options
        )

    return ours, twin


def hybrid_pair(kind, part=None, **options):
    options = {"temperature": 1.0, "uncommon_top_k": 8192, "direction": "forward"} | options
    partition = getattr(Partition, kind)(PROJECTION)
    pairs = getattr(reference_projection, f"{kind}_pairs")(ROWS)

    def ours(student, teacher):
        if part is not None:
            return hybrid_terms(student, teacher, ALIGNMENT, partition, **options)[part]
        return hybrid_kl(student, teacher, ALIGNMENT, partition, common_weight=0.7, **options)

    def twin(student, teacher):
        terms = reference.hybrid_terms(
            student, teacher, STUDENT_CHUNKS, TEACHER_CHUNKS, VALID, pairs, V_S, V_T, **options
        )
        one = (lambda t: t[part]) if part is not None else (lambda t: 0.7 * t[0] + t[1])
        return [[None if v is None else one(v) for v in row] for row in terms]

    return ours, twin


P_KL_OPTIONS = [
    {"direction": direction, "merge": merge, **columns}
    for direction, merge, columns in itertools.product(
        ("forward", "reverse"),
        ("mean", "mean_normalized"),
        ({}, {"top_k": 6, "mask": REAL_TEACHER, "temperature": 1.7}),
    )
]


@pytest.mark.parametrize(
    "options", P_KL_OPTIONS, ids=lambda o: f"{o['direction']}-{o['merge']}-{o.get('top_k', 'all')}"
)
def test_projection_kl(options):
    check(*p_kl_pair(**options))


@pytest.mark.parametrize("options", [{}, {"top_k": 6, "mask": REAL_TEACHER}], ids=["all", "6"])
def test_projection_kl_of_the_split_projection(options):
    check(*p_kl_pair(split=True, **options))


@pytest.mark.parametrize("kind", ["strict", "relaxed"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_hybrid(kind, direction):
    check(*hybrid_pair(kind, direction=direction, temperature=1.7, uncommon_top_k=3))


def test_uncommon_terms_to_the_end_of_the_shorter_side():
    check(*hybrid_pair("strict", part=1))


def test_partitions():
    for kind in ("strict", "relaxed"):
        partition = getattr(Partition, kind)(PROJECTION)
        pairs = getattr(reference_projection, f"{kind}_pairs")(ROWS)
        ours = dict(zip(partition.common_teacher.tolist(), partition.common_student.tolist(), strict=True))
        assert ours == pairs
        assert partition.uncommon_student.tolist() == sorted(set(range(V_S)) - set(pairs.values()))
        assert partition.uncommon_teacher.tolist() == sorted(set(range(V_T)) - set(pairs))
    assert reference_projection.strict_pairs(ROWS) != reference_projection.relaxed_pairs(ROWS)


def test_padding_does_not_choose_columns():
    """A column that leads only at padded positions is chosen without the mask and not with it."""
    teacher = TEACHER.copy()
    teacher[0, 8:, 3] = 50.0
    masked, twin = p_kl_pair(top_k=6, mask=REAL_TEACHER)
    unmasked, _ = p_kl_pair(top_k=6)
    check(masked, twin, teacher=teacher)
    assert not np.allclose(masked(STUDENT, teacher), unmasked(STUDENT, teacher))


LOGITS_PAST_THE_TOKENIZER = [p_kl_pair(top_k=6)[0], hybrid_pair("strict")[0]]


@pytest.mark.parametrize("ours", LOGITS_PAST_THE_TOKENIZER, ids=["p_kl", "gold"])
def test_columns_past_the_tokenizers_are_not_read(ours):
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[..., V_S:], teacher[..., V_T:] = np.nan, 1e9
    expected = ours(STUDENT[..., :V_S], TEACHER[..., :V_T])
    np.testing.assert_array_equal(ours(student, teacher), expected)


def huge(array):
    """Some logits of +-1e4 among ordinary ones."""
    out, rng = array.copy(), np.random.default_rng(3)
    out[rng.random(array.shape) < 0.2] *= 1e4 / 2
    return out


@pytest.mark.parametrize("merge", ["mean", "mean_normalized"])
def test_projection_kl_of_huge_logits(merge):
    # float32 holds a log-probability of -1e4 to 5e-4 only.
    check(*p_kl_pair(merge=merge), teacher=huge(TEACHER), tolerance=3e-5)
    ours, twin = p_kl_pair(merge=merge)
    student = huge(STUDENT)
    value, gradient = jax.jit(jax.value_and_grad(lambda s: ours(s, TEACHER).sum()))(student)
    expected = sum(v for row in twin(student.tolist(), TEACHER.tolist()) for v in row if v is not None)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_hybrid_of_huge_logits():
    check(*hybrid_pair("relaxed"), huge(STUDENT), huge(TEACHER), step=1e-3, tolerance=3e-5)


def without_columns(array, columns):
    out = array.copy()
    out[..., columns] = -np.inf
    return out


@pytest.mark.parametrize("merge", ["mean", "mean_normalized"])
def test_projection_kl_of_excluded_tokens(merge):
    """-inf on either side, as masked vocabularies have it."""
    student, teacher = without_columns(STUDENT, [0, 2, 5]), without_columns(TEACHER, [1, 4, 16])
    check(*p_kl_pair(merge=merge), student, teacher)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_hybrid_of_excluded_tokens(direction):
    """A common pair that both sides exclude, and uncommon tokens of either side."""
    pairs = reference_projection.strict_pairs(ROWS)
    common_teacher, common_student = next(iter(pairs.items()))
    lone_student = next(i for i in range(V_S) if i not in pairs.values())
    lone_teacher = next(j for j in range(V_T) if j not in pairs)
    student = without_columns(STUDENT, [common_student, lone_student])
    teacher = without_columns(TEACHER, [common_teacher, lone_teacher])
    check(*hybrid_pair("strict", direction=direction), student, teacher)
    # Excluded on the side that leads: no term, no gradient. On the other side the KL is infinite.
    student, teacher = (student, TEACHER) if direction == "reverse" else (STUDENT, teacher)
    check(*hybrid_pair("strict", direction=direction), student, teacher)
    ours, _ = hybrid_pair("strict", direction=direction)
    student, teacher = (
        (STUDENT, without_columns(TEACHER, [common_teacher]))
        if direction == "reverse"
        else (without_columns(STUDENT, [common_student]), TEACHER)
    )
    assert np.all(np.isposinf(ours(student, teacher)) == np.asarray(valid_chunks(ALIGNMENT)))


@pytest.mark.parametrize("ours", [p_kl_pair()[0], hybrid_pair("strict")[0]], ids=["p_kl", "gold"])
def test_bfloat16_is_computed_in_float32(ours):
    student, teacher = jnp.asarray(STUDENT, jnp.bfloat16), jnp.asarray(TEACHER, jnp.bfloat16)
    values, gradient = jax.value_and_grad(lambda s: ours(s, teacher).sum())(student)
    assert ours(student, teacher).dtype == values.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    exact = (student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_allclose(values, ours(*exact).sum(), rtol=1e-6)
    in_float32 = jax.grad(lambda s: ours(s, exact[1]).sum())(exact[0])
    np.testing.assert_allclose(gradient.astype(jnp.float32), in_float32, rtol=2**-8, atol=1e-7)


def test_rows_of_one_token_hold_no_chunk():
    one = np.zeros((2, 1), np.int32)
    alignment = Alignment(one, one, np.ones((2, 1), bool))
    assert not np.any(valid_chunks(alignment))
    logits = jnp.ones((2, 1, V_S))
    teacher = jnp.ones((2, 1, V_T))
    for kd in (
        projection_kl(logits, teacher, alignment, PROJECTION),
        hybrid_kl(logits, teacher, alignment, Partition.strict(PROJECTION)),
    ):
        assert np.all(np.asarray(kd) == 0)
    values, mask = next_token_cross_entropy(logits, one, np.ones((2, 1), bool))
    assert values.shape == mask.shape == (2, 0)
    assert masked_mean(values, mask) == 0


def test_no_chunk_at_all_is_zero_with_a_zero_gradient():
    nothing = Alignment(
        np.full_like(STUDENT_CHUNKS, -1), np.full_like(TEACHER_CHUNKS, -1), np.ones((B, C), bool)
    )
    for loss in (
        lambda s: projection_kl(s, TEACHER, nothing, PROJECTION),
        lambda s: hybrid_kl(s, TEACHER, nothing, Partition.strict(PROJECTION)),
    ):
        value, gradient = jax.value_and_grad(lambda s, f=loss: masked_mean(f(s), valid_chunks(nothing)))(
            jnp.asarray(STUDENT)
        )
        assert value == 0
        assert np.all(np.asarray(gradient) == 0)


def test_cross_entropy_and_total():
    rng = np.random.default_rng(11)
    ids = rng.integers(0, V_S, (B, T_S)).astype(np.int32)
    mask = rng.random((B, T_S)) < 0.7
    mask[3] = False
    p_kl, twin = p_kl_pair(merge="mean_normalized")

    def ours(student):
        ce = masked_mean(*next_token_cross_entropy(student, ids, mask))
        kd = masked_mean(p_kl(student, TEACHER), valid_chunks(ALIGNMENT))
        total, scale = total_loss(ce, kd)
        return total, (ce, kd, scale)

    (total, (ce, kd, scale)), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(jnp.asarray(STUDENT))
    kd_expected = reference.mean_of(twin(STUDENT.tolist(), TEACHER.tolist()))
    ce_expected = reference.cross_entropy(STUDENT.tolist(), ids.tolist(), mask)
    total_expected, scale_expected = reference.dynamic_total(ce_expected, kd_expected)
    np.testing.assert_allclose(
        [ce, kd, scale, total], [ce_expected, kd_expected, scale_expected, total_expected], rtol=3e-6
    )

    # The factor has no gradient of its own: it is held at its value.
    def held(z):
        kd = reference.mean_of(twin(z, TEACHER.tolist()))
        return scale_expected * kd + reference.cross_entropy(z, ids.tolist(), mask)

    slope = reference_gradient.differences(held, STUDENT, COORDINATES)
    ours_at = np.array([gradient[i] for i in COORDINATES])
    np.testing.assert_allclose(ours_at, slope, rtol=3e-5, atol=3e-5 * np.abs(slope).max())
