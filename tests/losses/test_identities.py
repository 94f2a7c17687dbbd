"""What must hold whatever the numbers are."""

import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import (
    dynamic_scale,
    hybrid_kl,
    hybrid_terms,
    likelihood_matching,
    masked_mean,
    next_token_cross_entropy,
    prefix_kl,
    projection_kl,
    rank_l1,
    same_vocabulary_kl,
    total_loss,
    valid_chunks,
)
from xtoken_jax.projection.matrix import Partition, Projection
from xtoken_jax.projection.prefixes import tables_of_pieces

B, T, V_S, V_T = 8, 6, 11, 14


def random_logits(seed, *shape):
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


def random_alignment(seed):
    """Chunks of one to three tokens on either side, with gaps, and some that are not valid."""
    rng = np.random.default_rng(seed)
    sides = []
    for _ in range(2):
        chunks = np.cumsum(rng.random((B, T)) < 0.6, axis=1) - 1
        sides.append(np.where(rng.random((B, T)) < 0.1, -1, chunks).astype(np.int32))
    return Alignment(*sides, rng.random((B, T)) < 0.9)


def random_projection(seed):
    rng = np.random.default_rng(seed)
    indices = np.array([rng.choice(V_T, 3, replace=False) for _ in range(V_S)], np.int32)
    weights = np.tile(np.float32([0.9, 0.09, 0.01]), (V_S, 1))
    exact = rng.random(V_S) < 0.6
    indices[exact, 1:], weights[exact] = -1, [1.0, 0.0, 0.0]
    return Projection(indices, weights, V_T)


def one_chunk_a_token(batch=B, length=T):
    chunks = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    return Alignment(chunks, chunks, np.ones((batch, length), bool))


@pytest.mark.parametrize("merge", ["mean", "mean_normalized", "first", "last"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_one_tokenizer_makes_projection_kl_the_ordinary_kl(merge, direction):
    tau = 2.0
    student, teacher = random_logits(0, B, T, V_S), random_logits(1, B, T, V_S)
    identity = Projection(np.arange(V_S, dtype=np.int32)[:, None], np.ones((V_S, 1), np.float32), V_S)
    values = projection_kl(
        student, teacher, one_chunk_a_token(), identity,
        temperature=tau, direction=direction, merge=merge, teacher_ids=np.zeros((B, T), np.int32),
    )  # fmt: skip
    s, t = (np.float64(z) / tau for z in (student, teacher))
    s, t = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (s, t))
    kl = (np.exp(t) * (t - s) if direction == "forward" else np.exp(s) * (s - t)).sum(-1) * tau**2
    # Chunk k holds token k, which position k - 1 predicts; nothing predicts the first token.
    np.testing.assert_allclose(values[:, 1:], kl[:, :-1], rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(values[:, 0]) == 0)


@pytest.mark.parametrize("merge", ["mean_normalized", "first", "last"])
def test_one_tokenizer_and_chunks_of_two_tokens(merge):
    """A KL at one position, or of the geometric and the arithmetic mean, at the probability of the rest."""
    student, teacher = random_logits(20, B, T, V_S), random_logits(21, B, T, V_S)
    ids = np.random.default_rng(22).integers(0, V_S, (B, T))
    chunks = np.tile(np.array([-1, 0, 0, 1, 1, -1], np.int32), (B, 1))  # positions 0, 1 and 2, 3
    identity = Projection(np.arange(V_S, dtype=np.int32)[:, None], np.ones((V_S, 1), np.float32), V_S)
    alignment = Alignment(chunks, chunks, np.ones((B, 2), bool))
    values = projection_kl(student, teacher, alignment, identity, merge=merge, teacher_ids=ids)
    s, t = (np.array(jax.nn.log_softmax(z)).astype(np.float64) for z in (student, teacher))
    for c in range(2):
        one, two = 2 * c, 2 * c + 1
        if merge == "mean_normalized":
            lead = (t[:, one] + t[:, two]) / 2
            lead -= np.log(np.exp(lead).sum(-1, keepdims=True))
            other, rest = np.log((np.exp(s[:, one]) + np.exp(s[:, two])) / 2), np.zeros(B)
        else:
            chosen, left = (one, two) if merge == "first" else (two, one)
            lead, other = t[:, chosen], s[:, chosen]
            rest = t[np.arange(B), left, ids[:, left + 1]]
        kl = (np.exp(lead) * (lead - other)).sum(-1)
        np.testing.assert_allclose(values[:, c], np.exp(rest) * (kl + rest), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("merge", ["mean", "mean_normalized", "first", "last"])
@pytest.mark.parametrize("split", [False, True])
def test_the_order_of_the_students_vocabulary_does_not_matter(merge, split):
    """Values and gradients of the permuted student are those of the student, permuted."""
    student, teacher, alignment = (
        random_logits(23, B, T, V_S),
        random_logits(24, B, T, V_T),
        random_alignment(25),
    )
    rng = np.random.default_rng(26)
    projection, permutation = random_projection(27), rng.permutation(V_S)
    student_ids, teacher_ids = rng.integers(0, V_S, (B, T)), rng.integers(0, V_T, (B, T))
    other = Projection(projection.indices[permutation], projection.weights[permutation], V_T)
    place = np.argsort(permutation).astype(np.int32)
    partition = Partition.strict(projection)
    # Of two student tokens for one teacher token the lower id has it, so the pairs are kept as they are.
    moved_partition = Partition(
        place[partition.common_student],
        partition.common_teacher,
        place[partition.uncommon_student],
        partition.uncommon_teacher,
    )

    def p_kl(student, w, ids):
        w = w.split() if split else w
        return projection_kl(student, teacher, alignment, w, top_k=9, merge=merge, teacher_ids=teacher_ids)

    def hybrid(student, partition, ids):
        return hybrid_kl(
            student, teacher, alignment, partition, merge=merge, student_ids=ids, teacher_ids=teacher_ids
        )

    cases = [(p_kl, projection, other)]
    if merge != "mean_normalized" and not split:
        cases.append((hybrid, partition, moved_partition))
    for loss, tables, moved_tables in cases:
        (value, gradient), (moved, moved_gradient) = (
            jax.jit(jax.value_and_grad(lambda s, w=w, ids=ids, f=loss: f(s, w, ids).sum()))(s)
            for s, w, ids in (
                (student, tables, student_ids),
                (student[..., permutation], moved_tables, place[student_ids]),
            )
        )
        np.testing.assert_allclose(moved, value, rtol=1e-5)
        np.testing.assert_allclose(moved_gradient, gradient[..., permutation], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_k", [8192, 5])
def test_the_order_of_the_teachers_vocabulary_does_not_matter(top_k):
    student, teacher, alignment = (
        random_logits(2, B, T, V_S),
        random_logits(3, B, T, V_T),
        random_alignment(4),
    )
    projection = random_projection(5)
    permutation = np.random.default_rng(6).permutation(V_T)
    moved = np.append(permutation, -1)[projection.indices].astype(np.int32)
    other = Projection(moved, projection.weights, V_T)
    shuffled = np.empty_like(teacher)
    shuffled[..., permutation] = teacher
    for loss in (
        lambda t, w: projection_kl(student, t, alignment, w, top_k=top_k),
        lambda t, w: hybrid_kl(student, t, alignment, Partition.strict(w), uncommon_top_k=top_k),
        lambda t, w: hybrid_kl(student, t, alignment, Partition.relaxed(w), uncommon_top_k=top_k),
    ):
        np.testing.assert_allclose(loss(shuffled, other), loss(teacher, projection), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_normalized_projection_kl_is_never_negative(direction):
    """Also with student and teacher alike, where rounding decides; "mean" does fall below 0."""
    projection = random_projection(7)
    lowest, lowest_mean = np.inf, np.inf
    for seed in range(20):
        spread = [0.01, 1.0, 10.0][seed % 3]
        args = (
            spread * random_logits(seed, B, T, V_S),
            spread * random_logits(100 + seed, B, T, V_T),
            random_alignment(seed),
            projection,
        )
        lowest = min(lowest, *np.ravel(projection_kl(*args, direction=direction, merge="mean_normalized")))
        lowest_mean = min(lowest_mean, *np.ravel(projection_kl(*args, direction=direction)))
    assert lowest > -1e-6
    if direction == "forward":
        assert lowest_mean < -0.01


def test_gold_pushes_every_uncommon_student_token_down():
    """X-Token, Proposition 1: d common / d z_j = p_S[j] * (teacher's mass on the common set) >= 0."""
    student, teacher = jnp.asarray(random_logits(8, B, T, V_S)), random_logits(9, B, T, V_T)
    partition = Partition.strict(random_projection(10))
    uncommon = partition.uncommon_student
    assert 2 < len(uncommon) < V_S - 2
    gradient = jax.grad(
        lambda s: hybrid_terms(s, teacher, one_chunk_a_token(), partition).common.sum()
    )(student)  # fmt: skip
    teacher_mass = jax.nn.softmax(teacher)[..., partition.common_teacher].sum(-1, keepdims=True)
    expected = (jax.nn.softmax(student) * teacher_mass)[..., uncommon]
    np.testing.assert_allclose(gradient[:, :-1, uncommon], expected[:, :-1], rtol=1e-4)
    assert np.all(np.asarray(gradient[:, :-1, uncommon]) > 0)
    assert np.all(np.asarray(gradient[:, -1]) == 0)


@pytest.mark.parametrize("merge", ["mean", "mean_normalized", "first", "last"])
def test_projection_kl_can_push_an_uncommon_student_token_up(merge):
    """Proposition 1 does not hold there: `201` rises where the teacher writes `2`, which GOLD cannot do."""
    indices = np.array([[0, -1, -1], [1, -1, -1], [2, 0, 1], [3, -1, -1]], np.int32)  # "0", "1", "201", " "
    weights = np.float32([[1, 0, 0], [1, 0, 0], [0.9, 0.09, 0.01], [1, 0, 0]])
    projection = Projection(indices, weights, 4)
    partition = Partition.strict(projection)
    numeral = int(partition.uncommon_student[0])
    assert (numeral, partition.uncommon_teacher.tolist()) == (2, [2])
    alignment = Alignment(*(np.array([[-1, 0]], np.int32),) * 2, np.ones((1, 1), bool))
    ids = {"student_ids": np.array([[0, 2]]), "teacher_ids": np.array([[0, 2]])}
    student, two = jnp.zeros((1, 2, 4)), jnp.zeros((1, 2, 4)).at[0, 0, 2].set(4.0)

    @jax.jit
    @jax.grad
    def slope(student, teacher):
        return projection_kl(student, teacher, alignment, projection, merge=merge, **ids).sum()

    assert slope(student, two)[0, 0, numeral] < -0.1
    # It falls where the teacher writes something else.
    assert slope(student, jnp.roll(two, 1, axis=-1))[0, 0, numeral] > 0.1
    if merge == "mean_normalized":
        return

    @jax.jit
    @jax.grad
    def common(student, teacher):
        return hybrid_terms(student, teacher, alignment, partition, merge=merge, **ids).common.sum()

    for teacher in (two, jnp.roll(two, 1, axis=-1)):
        assert common(student, teacher)[0, 0, numeral] > 0


# Even tokens of the student are teacher tokens, odd ones begin with them.
PREFIXES = tables_of_pieces(
    {i: [i // 2] if i % 2 == 0 else [i // 2, i] for i in range(V_S)}, {i: [2 * i] for i in range(V_S // 2)},
    {}, V_S, V_T,
)  # fmt: skip
IN_FLOAT64 = {
    "p_kl": lambda s, t, a, w, ids, merge: projection_kl(s, t, a, w, merge=merge, top_k=9, **ids),
    "p_kl split": lambda s, t, a, w, ids, merge: projection_kl(
        s, t, a, w.split(), direction="reverse", merge=merge, top_k=9, **ids
    ),
    "p_kl jsd": lambda s, t, a, w, ids, merge: projection_kl(
        s, t, a, w.learnable(), direction="jsd", beta=0.3, merge=merge, **ids
    ),
    "gold": lambda s, t, a, w, ids, merge: hybrid_kl(
        s, t, a, Partition.strict(w), merge=merge, uncommon_top_k=3, temperature=1.7, **ids
    ),
    "h_kl": lambda s, t, a, w, ids, merge: hybrid_kl(
        s, t, a, Partition.relaxed(w), direction="jsd", merge=merge, uncommon_weight=None, **ids
    ),
    "uld": lambda s, t, a, w, ids, merge: rank_l1(s, t, a),
    "alm": lambda s, t, a, w, ids, merge: likelihood_matching(s, t, a, likelihood_temperature=3.0, **ids),
    "prefix": lambda s, t, a, w, ids, merge: prefix_kl(s, t, a, PREFIXES, temperature=1.3, **ids),
    "same vocabulary": lambda s, t, a, w, ids, merge: same_vocabulary_kl(
        s, t, np.ones((B, T), bool), size=V_S, top_k=9
    )[0],
    "ce": lambda s, t, a, w, ids, merge: next_token_cross_entropy(
        s, ids["student_ids"], np.ones((B, T), bool)
    )[0],
}
LOSSES_AND_MERGES = [
    (name, merge)
    for name in IN_FLOAT64
    for merge in ("mean", "first", "last")
    if merge == "mean" or "kl" in name or name == "gold"
]


@pytest.fixture
def everything_in_float64(monkeypatch):
    """The losses as they are, with float64 where they say float32."""
    wide = SimpleNamespace(**{**vars(jnp), "float32": jnp.float64})
    names = (
        "math.chunks",
        "math.divergence",
        "math.reduce",
        "math.softmax",
        "terms.alm",
        "terms.hybrid_kl",
        "terms.prefix_kl",
        "terms.prefix_steps",
        "terms.projection_kl",
        "terms.same_vocabulary",
        "terms.uld",
    )
    modules = [importlib.import_module(f"xtoken_jax.losses.{name}") for name in names]
    for module in modules:
        monkeypatch.setattr(module, "jnp", wide)
        # Sorting by bits knows one width only.
        if hasattr(module, "largest"):
            monkeypatch.setattr(module, "largest", lambda x, n: jax.lax.top_k(x, n)[0])
            monkeypatch.setattr(module, "largest_with_places", lambda x, n: tuple(jax.lax.top_k(x, n)))
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("everything_in_float64")
@pytest.mark.parametrize(("name", "merge"), LOSSES_AND_MERGES)
def test_gradients_are_the_finite_differences_of_the_same_code(name, merge):
    """Those written by hand too, along random directions, in float64."""
    rng = np.random.default_rng(30)
    student, teacher = rng.normal(0, 2, (B, T, V_S)), rng.normal(0, 2, (B, T, V_T))
    ids = {"student_ids": rng.integers(0, V_S, (B, T)), "teacher_ids": rng.integers(0, V_T, (B, T))}
    alignment, projection = random_alignment(31), random_projection(32)

    @jax.jit
    def values(student):
        found = IN_FLOAT64[name](student, jnp.asarray(teacher), alignment, projection, ids, merge)
        assert found.dtype == jnp.float64
        return found

    weights = rng.uniform(0.5, 1.5, jax.eval_shape(values, student).shape)
    gradient = np.asarray(jax.jit(jax.grad(lambda s: jnp.sum(weights * values(s))))(student))
    assert gradient.dtype == np.float64
    for _ in range(6):
        direction = rng.normal(size=student.shape)
        up, down = (np.sum(weights * np.asarray(values(student + h * direction))) for h in (1e-5, -1e-5))
        np.testing.assert_allclose(np.sum(gradient * direction), (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


def test_masked_mean_does_not_look_outside_the_mask():
    values = jnp.array([[1.0, jnp.nan], [jnp.inf, 4.0]])
    mask = jnp.array([[True, False], [False, True]])
    value, gradient = jax.value_and_grad(masked_mean)(values, mask)
    assert value == 2.5
    np.testing.assert_array_equal(gradient, [[0.5, 0.0], [0.0, 0.5]])
    assert masked_mean(values, jnp.zeros((2, 2), bool)) == 0


@pytest.mark.parametrize(
    ("ce", "kd", "max_scale", "expected"),
    [
        (3.0, 6.0, None, 0.5),
        (3.0, 6.0, 10.0, 0.5),
        (3.0, 0.3, 10.0, 10.0),  # exactly at the bound
        (3.0, 1e-6, 10.0, 10.0),
        (3.0, 1e-6, None, 3e6),
        (30.0, 2e-38, 10.0, 10.0),  # the ratio would overflow
        (3.0, 0.0, 10.0, 1.0),
        (3.0, 0.0, None, 1.0),
        (3.0, -0.5, 10.0, 10.0),  # a negative ratio would turn the gradient around
        (3.0, -0.5, None, -6.0),
        (0.0, 0.0, 10.0, 1.0),
    ],
)
def test_dynamic_scale(ce, kd, max_scale, expected):
    scale, slopes = jax.value_and_grad(dynamic_scale, argnums=(0, 1))(
        jnp.float32(ce), jnp.float32(kd), max_scale
    )
    np.testing.assert_allclose(scale, expected, rtol=1e-6)
    assert slopes == (0.0, 0.0)


def test_total_loss_with_fixed_and_dynamic_weights():
    ce, kd = jnp.float32(3.0), jnp.float32(-0.5)
    assert total_loss(ce, kd, dynamic_scaling=False, kd_weight=2.0, ce_weight=0.1)[0] == pytest.approx(-0.7)
    slope = jax.grad(lambda kd: total_loss(ce, kd, max_scale=10.0)[0])(kd)
    assert slope == 10.0


@pytest.mark.parametrize("kind", ["p_kl", "h_kl"])
def test_eight_devices_give_the_loss_of_one(kind):
    """The batch axis is sharded unevenly in what counts: the mean is over the global batch."""
    student, teacher = random_logits(12, B, T, V_S), random_logits(13, B, T, V_T)
    alignment = random_alignment(14)
    alignment = Alignment(
        alignment.student_chunks,
        alignment.teacher_chunks,
        np.asarray(alignment.valid) & (np.arange(B) != 2)[:, None] & (np.arange(T) <= np.arange(B)[:, None]),
    )
    rng = np.random.default_rng(15)
    ids, mask = rng.integers(0, V_S, (B, T)), rng.random((B, T)) < 0.5
    projection = random_projection(16)
    tables = projection if kind == "p_kl" else Partition.relaxed(projection)

    @jax.jit
    def objective(student, teacher, alignment, ids, mask, tables):
        def loss(student):
            if kind == "p_kl":
                values = projection_kl(student, teacher, alignment, tables, top_k=9)
            else:
                values = hybrid_kl(student, teacher, alignment, tables)
            kd = masked_mean(values, valid_chunks(alignment))
            return total_loss(masked_mean(*next_token_cross_entropy(student, ids, mask)), kd)[0]

        return jax.value_and_grad(loss)(student)

    value, gradient = objective(student, teacher, alignment, ids, mask, tables)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    batch = jax.device_put((jnp.asarray(student), teacher, alignment, ids, mask), rows)
    sharded_value, sharded_gradient = objective(*batch, jax.device_put(tables, everywhere))
    assert len(sharded_value.sharding.device_set) == 8
    np.testing.assert_allclose(sharded_value, value, rtol=1e-6)
    np.testing.assert_allclose(
        sharded_gradient, gradient, rtol=1e-6, atol=1e-6 * np.abs(np.asarray(gradient)).max()
    )
    assert np.abs(np.asarray(gradient)).max() > 1e-3
