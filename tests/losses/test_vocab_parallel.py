"""Losses over a split vocabulary are the plain ones: values and gradients, on several meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from projection.random_w import random_w, rows_of
from reference import gradient as reference_gradient
from reference import likelihood as reference_likelihood
from reference import losses as reference
from reference import projection as reference_projection

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.losses import (
    hybrid_kl,
    hybrid_terms,
    likelihood_matching,
    next_token_cross_entropy,
    projection_kl,
)
from xtoken_jax.losses.vocab_parallel.losses import (
    vocab_parallel_cross_entropy,
    vocab_parallel_hybrid_kl,
    vocab_parallel_hybrid_terms,
    vocab_parallel_likelihood_matching,
    vocab_parallel_projection_kl,
)
from xtoken_jax.projection.matrix import Partition
from xtoken_jax.projection.sharded import shard_projection

B, T_S, T_T, C = 8, 7, 9, 7
V_S, V_T = 61, 83  # of the tokenizers
PADDED, ODD = (64, 96), (63, 89)  # lm_heads whose width every axis divides, and none
MESHES = {
    f"{data * fsdp}x{tensor}": MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    for data, fsdp, tensor in ((8, 1, 1), (2, 2, 2), (2, 1, 4), (1, 1, 8))
}
W = random_w(5, V_S, V_T)  # with collisions and empty rows


def random_batch(rng):
    """Chunks of one to four tokens, gaps, ids without positions, invalid ones, and a masked sample."""
    sides = []
    for length in (T_S, T_T):
        chunks = np.cumsum(rng.random((B, length)) < 0.6, axis=1) - 1
        sides.append(np.where(rng.random((B, length)) < 0.15, -1, chunks).astype(np.int32))
    valid = rng.random((B, C)) < 0.9
    valid[3] = False
    sides[0][5] = -1
    return Alignment(*sides, valid)


def random_logits(rng, widths, dtype=np.float32):
    """Columns past the tokenizers that would lead if they were read, and excluded tokens."""
    student, teacher = (
        rng.normal(0, 2, (B, length, width)).astype(np.float32)
        for length, width in zip((T_S, T_T), widths, strict=True)
    )
    student[..., V_S:], teacher[..., V_T:] = 9.0, 9.0
    student[..., [2, 50]], teacher[..., [4, 80]] = -np.inf, -np.inf
    return jnp.asarray(student, dtype), jnp.asarray(teacher, dtype)


RNG = np.random.default_rng(11)
ALIGNMENT = random_batch(RNG)
IDS = [RNG.choice([i for i in range(V) if i not in (2, 4, 50, 80)], (B, T)).astype(np.int32)
       for V, T in ((V_S, T_S), (V_T, T_T))]  # fmt: skip
REAL_TEACHER = np.arange(T_T)[None, :] < RNG.integers(T_T - 3, T_T + 1, (B, 1))
FACTORS = RNG.uniform(0.5, 1.5, (B, C)).astype(np.float32)
LOGITS = {widths: random_logits(RNG, widths) for widths in (PADDED, ODD)}
# Exact in float32 beside the offset, so that what they stand for is the same.
LOGITS["moved"] = tuple(jnp.round(z * 64) / 64 + 65536 for z in random_logits(RNG, PADDED))


def on(mesh, x):
    """Laid out as a model with a split unembedding leaves its logits, as far as the axes divide them."""
    last = "tensor" if x.shape[-1] % mesh.shape["tensor"] == 0 else None
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, last)))


def value_and_gradient(loss, student):
    """Values [B, ...], and the gradient of their weighted sum."""

    def scalar(student):
        values = loss(student)
        return jnp.sum(values * FACTORS[:, : values.shape[1]]), values

    (_, values), gradient = jax.jit(jax.value_and_grad(scalar, has_aux=True))(student)
    return values, gradient


def check(meshes, loss, dense, widths=PADDED):
    """`loss(mesh, student, teacher)` over the meshes against `dense(student, teacher)` on one device."""
    student, teacher = LOGITS[widths]
    expected, expected_gradient = value_and_gradient(lambda s: dense(s, teacher), student)
    largest = np.abs(expected_gradient).max()
    assert largest > 1e-2
    for mesh in meshes:
        placed, placed_teacher = on(mesh, student), on(mesh, teacher)
        with jax.set_mesh(mesh):
            values, gradient = value_and_gradient(lambda s, m=mesh, t=placed_teacher: loss(m, s, t), placed)
        shape = f"mesh {mesh.shape}"
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=3e-6, err_msg=shape)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6 * largest, err_msg=shape)
        assert np.array_equal(np.asarray(values) == 0, np.asarray(expected) == 0)
        assert jax.typeof(gradient) == jax.typeof(placed)
        assert gradient.sharding.is_equivalent_to(placed.sharding, 3)


def check_p_kl(meshes, widths=PADDED, block=3, w=None, **options):
    def loss(mesh, student, teacher):
        sharded = shard_projection(W, mesh, "tensor") if w is None else w
        return vocab_parallel_projection_kl(
            student, teacher, ALIGNMENT, sharded, mesh=mesh, block=block, **options
        )

    check(meshes, loss, lambda s, t: projection_kl(s, t, ALIGNMENT, W, **options), widths)


def check_hybrid(meshes, kind="strict", widths=PADDED, block=3, **options):
    partition = getattr(Partition, kind)(W)

    def loss(mesh, student, teacher):
        return vocab_parallel_hybrid_kl(
            student, teacher, ALIGNMENT, partition, mesh=mesh, block=block, **options
        )

    check(meshes, loss, lambda s, t: hybrid_kl(s, t, ALIGNMENT, partition, **options), widths)


def check_likelihood(meshes, widths=PADDED, **options):
    options = {"student_ids": IDS[0], "teacher_ids": IDS[1], "likelihood_temperature": 3.0} | options
    options |= {"student_size": V_S, "teacher_size": V_T}

    def loss(mesh, student, teacher):
        return vocab_parallel_likelihood_matching(student, teacher, ALIGNMENT, mesh=mesh, **options)

    check(meshes, loss, lambda s, t: likelihood_matching(s, t, ALIGNMENT, **options), widths)


@pytest.fixture
def meshes():
    return [make_mesh(config) for config in MESHES.values()]


@pytest.fixture
def one_mesh():
    return make_mesh(MESHES["2x4"])


def test_p_kl(meshes):
    check_p_kl(meshes, top_k=10, temperature=1.7, teacher_mask=REAL_TEACHER)


def test_p_kl_of_all_columns_and_odd_widths(meshes):
    check_p_kl(meshes, ODD, merge="mean_normalized")


def test_hybrid(meshes):
    check_hybrid(meshes, temperature=1.7, uncommon_top_k=9, common_weight=0.7)


@pytest.mark.parametrize("widths", [PADDED, ODD], ids=["padded", "odd"])
def test_likelihood_matching(meshes, widths):
    """Rows over 8, 4, 2 and 1 devices, the vocabulary over 1, 2, 4 and 8."""
    check_likelihood(meshes, widths)


def test_likelihood_matching_of_nearly_certain_and_of_excluded_chunks(one_mesh):
    """What log_softmax would round, and a student's token of -inf, which is infinite on both ways."""
    student, teacher = LOGITS[PADDED]
    coming = np.arange(PADDED[0]) == np.roll(IDS[0], -1, axis=1)[..., None]
    student = jnp.where(coming, jnp.max(student[..., :V_S], -1, keepdims=True) + 14.0, student)
    student = student.at[0, 2, IDS[0][0, 3]].set(-jnp.inf)
    options = {"student_ids": IDS[0], "teacher_ids": IDS[1], "student_size": V_S, "teacher_size": V_T}
    expected, slope = value_and_gradient(
        lambda s: likelihood_matching(s, teacher, ALIGNMENT, **options), student
    )
    assert np.isinf(expected[0]).sum() == 1
    placed, other = on(one_mesh, student), on(one_mesh, teacher)
    with jax.set_mesh(one_mesh):
        found, found_slope = value_and_gradient(
            lambda s: vocab_parallel_likelihood_matching(s, other, ALIGNMENT, mesh=one_mesh, **options),
            placed,
        )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.all(np.isfinite(slope))
    np.testing.assert_allclose(found_slope, slope, rtol=1e-5, atol=1e-6 * np.abs(slope).max())


@pytest.mark.parametrize("merge", ["mean", "first"])
def test_a_large_offset_costs_no_digits(one_mesh, merge):
    ids = {"student_ids": IDS[0], "teacher_ids": IDS[1]}
    check_p_kl([one_mesh], "moved", merge=merge, **ids)
    check_hybrid([one_mesh], widths="moved", merge=merge, **ids)
    check_likelihood([one_mesh], "moved")
    mask = np.ones((B, T_S), bool)
    check(
        [one_mesh],
        lambda mesh, s, t: vocab_parallel_cross_entropy(s, IDS[0], mask, mesh=mesh, size=V_S)[0],
        lambda s, t: next_token_cross_entropy(s[..., :V_S], IDS[0], mask)[0],
        "moved",
    )


def test_hybrid_of_odd_widths(meshes):
    check_hybrid(meshes[1:3], "relaxed", ODD, direction="jsd")


def test_cross_entropy(meshes):
    mask = RNG.random((B, T_S)) < 0.7

    def loss(mesh, student, _):
        values, found = vocab_parallel_cross_entropy(student, IDS[0], mask, mesh=mesh, size=V_S)
        return jnp.where(found, values, 0.0)

    def dense(student, _):
        values, found = next_token_cross_entropy(student[..., :V_S], IDS[0], mask)
        return jnp.where(found, values, 0.0)

    for widths in (PADDED, ODD):
        check(meshes, loss, dense, widths)


P_KL_OPTIONS = [
    {"merge": "mean_normalized", "direction": "reverse", "top_k": 11},
    {"merge": "first", "direction": "jsd", "beta": 0.3, "top_k": 30, "teacher_ids": IDS[1]},
    {"merge": "last", "top_k": V_T, "teacher_ids": IDS[1], "temperature": 0.8, "block": 1000},
]


@pytest.mark.parametrize("options", P_KL_OPTIONS, ids=lambda o: f"{o['merge']}-{o['top_k']}")
def test_p_kl_options(one_mesh, options):
    check_p_kl([one_mesh], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"merge": "first", "kind": "relaxed", "direction": "reverse"},
        {"merge": "last", "common_weight": None, "uncommon_weight": None, "block": 1000},
    ],
    ids=lambda o: o["merge"],
)
def test_hybrid_options(one_mesh, options):
    check_hybrid([one_mesh], **options, student_ids=IDS[0], teacher_ids=IDS[1])


def test_hybrid_parts_have_gradients_of_their_own(one_mesh):
    partition = Partition.strict(W)
    for part in (0, 1):
        check(
            [one_mesh],
            lambda m, s, t, i=part: vocab_parallel_hybrid_terms(s, t, ALIGNMENT, partition, mesh=m)[i],
            lambda s, t, i=part: hybrid_terms(s, t, ALIGNMENT, partition)[i],
        )


def test_every_form_of_w(one_mesh):
    """Rows as wide as the logits, fewer, more, and not split at all."""
    for w in (shard_projection(W, one_mesh, "tensor", rows=PADDED[0] + 8), W):
        check_p_kl([one_mesh], w=w, top_k=10)


@pytest.mark.slow
def test_axes_of_other_names_and_rows_that_are_not_split():
    mesh = jax.make_mesh((2, 4), ("rows", "vocabulary"), axis_types=(AxisType.Auto,) * 2)
    student, teacher = LOGITS[ODD]
    expected = projection_kl(student, teacher, ALIGNMENT, W, top_k=10)
    for data_axes in (("rows",), ()):
        found = vocab_parallel_projection_kl(
            student, teacher, ALIGNMENT, W, mesh=mesh, axis="vocabulary", data_axes=data_axes, top_k=10
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=3e-6)


def test_a_learnable_w_gets_its_gradient(one_mesh):
    student, teacher = LOGITS[PADDED]
    learnable = W.learnable()

    def plain(logits):
        return projection_kl(student, teacher, ALIGNMENT, dataclasses.replace(learnable, logits=logits))

    sharded = shard_projection(W, one_mesh, "tensor", rows=PADDED[0]).learnable()
    placed, placed_teacher = on(one_mesh, student), on(one_mesh, teacher)

    def parallel(logits):
        w = dataclasses.replace(sharded, logits=logits)
        return vocab_parallel_projection_kl(placed, placed_teacher, ALIGNMENT, w, mesh=one_mesh, block=5)

    expected, expected_gradient = value_and_gradient(plain, learnable.logits)
    logits = sharded.logits
    with jax.set_mesh(one_mesh):
        values, gradient = value_and_gradient(parallel, logits)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=3e-6)
    largest = np.abs(expected_gradient).max()
    assert largest > 1e-3
    np.testing.assert_allclose(gradient[:V_S], expected_gradient, rtol=1e-5, atol=1e-6 * largest)
    assert np.all(np.asarray(gradient[V_S:]) == 0)
    assert gradient.sharding.is_equivalent_to(logits.sharding, 2)


def p_kl_twin(student, teacher):
    rows = [dict(row) for row in rows_of(W)]
    return reference.projection_kl(
        student, teacher, ALIGNMENT.student_chunks, ALIGNMENT.teacher_chunks, ALIGNMENT.valid, rows, V_T,
        temperature=1.0, top_k=20, direction="forward", merge="mean",
    )  # fmt: skip


def gold_twin(student, teacher):
    pairs = reference_projection.strict_pairs([dict(row) for row in rows_of(W)])
    terms = reference.hybrid_terms(
        student, teacher, ALIGNMENT.student_chunks, ALIGNMENT.teacher_chunks, ALIGNMENT.valid, pairs,
        V_S, V_T, temperature=1.0, uncommon_top_k=9, direction="forward",
    )  # fmt: skip
    return [[None if v is None else sum(v) for v in row] for row in terms]


def alm_twin(student, teacher):
    return reference_likelihood.likelihood_matching(
        student, teacher, ALIGNMENT.student_chunks, ALIGNMENT.teacher_chunks, ALIGNMENT.valid, *IDS,
        *PADDED, likelihood_temperature=3.0,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["p_kl", pytest.param("gold", marks=pytest.mark.slow), "alm"])
def test_no_further_from_float64_than_the_plain_loss(one_mesh, kind, dtype):
    rng = np.random.default_rng(2)
    student, teacher = (
        jnp.asarray(rng.normal(0, 2, (B, length, width)), dtype)
        for length, width in zip((T_S, T_T), PADDED, strict=True)
    )
    if kind == "p_kl":
        twin, plain = p_kl_twin, lambda s: projection_kl(s, teacher, ALIGNMENT, W, top_k=20)
        w = shard_projection(W, one_mesh, "tensor")
        ours = functools.partial(vocab_parallel_projection_kl, top_k=20, projection=w, block=4)
    elif kind == "alm":
        options = {"student_ids": IDS[0], "teacher_ids": IDS[1], "likelihood_temperature": 3.0}
        twin, plain = alm_twin, lambda s: likelihood_matching(s, teacher, ALIGNMENT, **options)
        ours = functools.partial(vocab_parallel_likelihood_matching, **options)
    else:
        partition = Partition.strict(W)
        twin, plain = gold_twin, lambda s: hybrid_kl(s, teacher, ALIGNMENT, partition, uncommon_top_k=9)
        ours = functools.partial(vocab_parallel_hybrid_kl, uncommon_top_k=9, partition=partition, block=4)

    def weighted(values):
        pairs = zip(np.ravel(FACTORS), [v for row in values for v in row], strict=True)
        return sum(float(factor) * v for factor, v in pairs if v is not None)

    exact_student, exact_teacher = (np.asarray(x, np.float64).tolist() for x in (student, teacher))
    exact = np.array([[v or 0.0 for v in row] for row in twin(exact_student, exact_teacher)])
    coordinates = [(b, int(rng.integers(T_S)), int(rng.integers(V_S))) for b in (0, 1, 2, 4, 6, 7) * 3]
    coordinates += [(b, p, int(IDS[0][b, p + 1])) for b in range(B) for p in range(T_S - 1)]
    exact_slope = reference_gradient.differences(
        lambda z: weighted(twin(z, exact_teacher)), exact_student, coordinates
    )
    assert np.abs(exact_slope).max() > 1e-3

    def errors(loss, student):
        values, gradient = value_and_gradient(loss, student)
        assert values.dtype == jnp.float32
        assert gradient.dtype == dtype
        at = np.array([gradient[i] for i in coordinates], np.float64)
        return np.abs(values - exact).max() / exact.max(), np.abs(at - exact_slope).max()

    expected = errors(plain, student)
    with jax.set_mesh(one_mesh):
        placed, other = on(one_mesh, student), on(one_mesh, teacher)
        found = errors(lambda s: ours(s, other, ALIGNMENT, mesh=one_mesh), placed)
    # A float32 rounding or two are a matter of the order of sums.
    assert found[0] <= expected[0] + 4e-7
    assert found[1] <= expected[1] + 1e-6 * np.abs(exact_slope).max()


def test_nothing_aligned_is_zero_with_a_zero_gradient(one_mesh):
    nothing = Alignment(
        np.full((B, T_S), -1, np.int32), np.full((B, T_T), -1, np.int32), np.ones((B, C), bool)
    )
    student, teacher = LOGITS[PADDED]
    w = shard_projection(W, one_mesh, "tensor")
    for loss in (
        lambda s: vocab_parallel_projection_kl(s, teacher, nothing, w, mesh=one_mesh),
        lambda s: vocab_parallel_hybrid_kl(s, teacher, nothing, Partition.strict(W), mesh=one_mesh),
        lambda s: vocab_parallel_likelihood_matching(
            s, teacher, nothing, student_ids=IDS[0], teacher_ids=IDS[1], mesh=one_mesh
        ),
    ):
        with jax.set_mesh(one_mesh):
            values, gradient = value_and_gradient(loss, student)
        assert np.all(np.asarray(values) == 0)
        assert np.all(np.asarray(gradient) == 0)


def test_what_is_refused(one_mesh):
    student, teacher = LOGITS[PADDED]
    options = {"mesh": one_mesh}
    with pytest.raises(ValueError, match="merge='median'"):
        vocab_parallel_projection_kl(student, teacher, ALIGNMENT, W, merge="median", **options)
    with pytest.raises(ValueError, match="needs teacher_ids"):
        vocab_parallel_projection_kl(student, teacher, ALIGNMENT, W, merge="first", **options)
    with pytest.raises(ValueError, match="merge='mean_normalized'"):
        vocab_parallel_hybrid_kl(
            student, teacher, ALIGNMENT, Partition.strict(W), merge="mean_normalized", **options
        )
    with pytest.raises(ValueError, match="needs student_ids and teacher_ids"):
        vocab_parallel_hybrid_kl(student, teacher, ALIGNMENT, Partition.strict(W), merge="last", **options)
    with pytest.raises(ValueError, match=r"7 rows do not divide over data\*fsdp=2"):
        vocab_parallel_cross_entropy(student[:7], IDS[0][:7], np.ones((7, T_S), bool), **options)
