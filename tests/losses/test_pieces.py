"""What the losses are made of, each by itself: merging, sorting, the choice of columns, fast projection."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import losses as reference
from reference import merging as reference_merging
from reference import projection as reference_projection

from xtoken_jax.losses.math.chunks import MERGES, Merging, next_tokens
from xtoken_jax.losses.math.sorting import largest, largest_with_places
from xtoken_jax.losses.terms.projection_kl import highest, projected_softmax, top_columns
from xtoken_jax.projection.matrix import Projection, SplitProjection

B, T, C, N = 3, 9, 6, 5
# Ids past C and below 0 are in no chunk; chunk 0 has a gap inside, 4 and 5 are empty in some rows.
CHUNKS = np.array(
    [[0, 0, 1, 1, 1, 2, 3, 9, 5], [-1, 0, -1, 0, 1, 2, 2, -1, 4], [3, 3, 3, 3, 3, 3, 3, 3, 3]], np.int32
)
RNG = np.random.default_rng(31)
VALUES = RNG.normal(size=(B * T, N)).astype(np.float32)
MERGINGS = pytest.mark.parametrize("merge", MERGES)


def positions_of(chunks, c):
    return [p for p in range(len(chunks) - 1) if chunks[p + 1] == c]


def merging(merge):
    return Merging.of(CHUNKS, C, merge)


def inner(one, other):
    return float(np.sum(np.float64(one) * np.float64(other)))


@MERGINGS
def test_merge_is_the_mean_or_the_chosen_position(merge):
    merged = np.asarray(merging(merge).merge(VALUES)).reshape(B, C, N)
    for b, c in np.ndindex(B, C):
        chosen, _ = reference_merging.split_chunk(positions_of(CHUNKS[b], c), merge)
        rows = np.float64(VALUES.reshape(B, T, N)[b, chosen])
        expected = rows.mean(0) if chosen else np.zeros(N)
        np.testing.assert_allclose(merged[b, c], expected, rtol=1e-6, atol=1e-7)


@MERGINGS
def test_spread_is_the_transpose_of_merge(merge):
    m, back = merging(merge), RNG.normal(size=(B * C, N)).astype(np.float32)
    merged, spread = jax.jit(lambda x, y: (m.merge(x), m.spread(y)))(VALUES, back)
    assert spread.shape == VALUES.shape
    np.testing.assert_allclose(inner(merged, back), inner(VALUES, spread), rtol=1e-5)
    (by_autodiff,) = jax.vjp(m.merge, jnp.asarray(VALUES))[1](back)
    np.testing.assert_allclose(spread, by_autodiff, rtol=1e-6, atol=1e-7)


@MERGINGS
def test_other_tokens_are_those_not_chosen_and_spread_other_is_its_transpose(merge):
    m, values, back = merging(merge), VALUES[:, 0], RNG.normal(size=B * C).astype(np.float32)
    others, spread = jax.jit(lambda x, y: (m.other_tokens(x), m.spread_other(y)))(values, back)
    for b, c in np.ndindex(B, C):
        _, rest = reference_merging.split_chunk(positions_of(CHUNKS[b], c), merge)
        expected = np.float64(values.reshape(B, T)[b, rest]).sum()
        np.testing.assert_allclose(others.reshape(B, C)[b, c], expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(inner(others, back), inner(values, spread), rtol=1e-5, atol=1e-6)
    if merge.startswith("mean"):
        assert not np.any(others)
        assert not np.any(spread)


@MERGINGS
def test_merge_wide_is_merge(merge):
    """Also of -inf, where a position of no weight must not make NaN of it."""
    values = VALUES.copy()
    values[::4, 1] = -np.inf
    m = merging(merge)
    wide, plain = jax.jit(lambda x: (m.merge_wide(x), m.merge(x)))(values)
    np.testing.assert_allclose(wide, plain, rtol=1e-6, atol=1e-7)
    assert not np.any(np.isnan(plain))
    assert np.any(np.isneginf(plain))


@MERGINGS
@pytest.mark.parametrize("chunks", [np.full((2, 4), -1), np.zeros((2, 1)), [[-1, 0, 0, 0]]], ids=str)
def test_merge_wide_of_few_and_of_no_chunks(merge, chunks):
    m = Merging.of(np.array(chunks, np.int32), 1, merge)
    values = VALUES[: m.segments.size]
    wide, plain = jax.jit(lambda x: (m.merge_wide(x), m.merge(x)))(values)
    np.testing.assert_allclose(wide, plain, rtol=1e-6)
    assert np.all(np.asarray(plain) == 0) == (np.max(chunks, initial=-1) < 0 or len(chunks[0]) == 1)


@MERGINGS
def test_rows_do_not_see_each_other(merge):
    other = CHUNKS.copy()
    other[1:] = RNG.permutation(other[1:], axis=1)
    values = VALUES.reshape(B, T, N).copy()
    values[1:] = np.nan
    changed = Merging.of(other, C, merge)
    for name in ("merge", "merge_wide"):
        before = getattr(merging(merge), name)(jnp.asarray(VALUES)).reshape(B, C, N)
        after = getattr(changed, name)(jnp.asarray(values.reshape(B * T, N))).reshape(B, C, N)
        np.testing.assert_array_equal(after[0], before[0])
    back = np.ones((B * C, N), np.float32)
    back[C:] = np.nan
    spread = changed.spread(jnp.asarray(back)).reshape(B, T, N)[0]
    np.testing.assert_array_equal(spread, merging(merge).spread(np.ones_like(back)).reshape(B, T, N)[0])


def test_a_sum_is_the_mean_times_the_number_of_positions():
    """Each position once, so that parts of a chunk add up."""
    m = merging("sum")
    number = [len(positions_of(CHUNKS[b], c)) for b, c in np.ndindex(B, C)]
    expected = np.asarray(merging("mean").merge(VALUES)) * np.array(number)[:, None]
    assert max(number) > 2
    merged, pull = jax.vjp(m.merge, jnp.asarray(VALUES))
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(m.merge_wide(jnp.asarray(VALUES)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(m.spread(merged), pull(merged)[0])


def test_next_tokens_are_those_that_positions_predict():
    ids = RNG.integers(0, 50, (B, T))
    found = next_tokens(ids).reshape(B, T)
    np.testing.assert_array_equal(found[:, :-1], ids[:, 1:])


TINY = np.float32(1e-45)  # the smallest subnormal
NUMBERS = {
    "random": RNG.exponential(size=(3, 17)),
    "ties": RNG.integers(0, 4, (3, 17)),
    "zeros": np.where(RNG.random((3, 17)) < 0.6, 0, RNG.random((3, 17))),
    "infinite": np.where(RNG.random((3, 17)) < 0.3, np.inf, RNG.random((3, 17))),
    "all equal": np.full((3, 17), 0.25),
    "all zero": np.zeros((3, 17)),
    "subnormal": RNG.permuted(np.tile(np.arange(17, dtype=np.float32) * TINY, (3, 1)), axis=1),
    "a negative zero": np.where(RNG.random((3, 17)) < 0.5, -0.0, RNG.random((3, 17))),
    "one": np.ones((3, 1)),
    "none": np.ones((3, 0)),
    "one row": RNG.random(17),
    "three axes": RNG.random((2, 3, 17)),
}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("name", NUMBERS)
def test_the_largest_against_numpy(name, share):
    values = np.asarray(NUMBERS[name], np.float32)
    count = round(share * values.shape[-1])
    expected = -np.sort(-values, axis=-1)[..., :count]
    found, (top, places) = jax.jit(lambda x: (largest(x, count), largest_with_places(x, count)))(values)
    assert found.dtype == top.dtype == jnp.float32
    assert places.dtype == jnp.int32
    # By bits, which do not take a subnormal number for 0; adding 0 makes -0 a 0.
    found, top, places = (np.asarray(x) for x in (found, top, places))
    for one in (found, top, np.take_along_axis(values, places, axis=-1)):
        np.testing.assert_array_equal((one + np.float32(0)).view(np.int32), (expected + 0).view(np.int32))
    ordered = np.sort(places, axis=-1)
    assert np.all(ordered[..., 1:] > ordered[..., :-1]), "no place twice"


def test_sorting_leaves_the_width_of_numbers_alone():
    """The 64-bit keys of the CPU's sort do not leak, with or without `jax_enable_x64`."""
    values = jnp.asarray(NUMBERS["random"], jnp.float32)
    for wide in (False, True):
        with jax.enable_x64(wide):
            top, places = jax.jit(lambda x: largest_with_places(x, 3))(values)
            assert (top.dtype, places.dtype) == (jnp.float32, jnp.int32)
            assert jnp.arange(3).dtype == (jnp.int64 if wide else jnp.int32)


@pytest.mark.parametrize("positions", [1, 2, 3, 7, 64])
def test_the_highest_of_all_positions(positions):
    logits = RNG.normal(size=(positions, 11)).astype(np.float32)
    logits[RNG.random(logits.shape) < 0.2] = -np.inf
    np.testing.assert_array_equal(jax.jit(highest)(logits), logits.max(0))


@pytest.mark.parametrize("count", [1, 4, 10, 11])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_columns_against_the_loop(ties, masked, count):
    rng = np.random.default_rng(count)
    logits = rng.integers(0, 3, (2, 5, 11)) if ties else rng.normal(size=(2, 5, 11))
    logits = logits.astype(np.float32)
    logits[..., 6] = -np.inf
    mask = rng.random((2, 5)) < 0.5 if masked else None
    expected = reference.top_columns(logits.tolist(), mask, 11, count)
    found, faulty = top_columns(jnp.asarray(logits), mask, count)
    assert not faulty.any()
    assert found.dtype == jnp.int32
    assert found.tolist() == expected


def test_columns_where_no_position_is_real():
    found, _ = top_columns(jnp.ones((1, 4, 6)), jnp.zeros((1, 4), bool), 3)
    assert len(set(found.tolist())) == 3


V_S, V_T, WIDTH = 12, 15, 18


def random_projection(seed, teacher_size=V_T):
    """One-to-one rows, two and more for one teacher token, pieces, a padded single of less than 1, empty."""
    rng = np.random.default_rng(seed)
    indices, weights = np.full((V_S, 3), -1, np.int32), np.zeros((V_S, 3), np.float32)
    for i in range(V_S):
        count = [1, 1, 1, 2, 3, 0][rng.integers(6)]
        indices[i, :count] = rng.choice(V_T, count, replace=False)
        weights[i, :count] = np.sort(rng.dirichlet(np.ones(count)))[::-1] if count else 0
    indices[:3, 0], indices[:3, 1:], weights[:3] = [4, 4, 9], -1, [[1, 0, 0], [1, 0, 0], [0.5, 0, 0]]
    return Projection(indices, weights, teacher_size)


COLUMNS = {
    "all": None,
    "some": jnp.array([9, 4, 0, 14, 7], jnp.int32),
    "past": jnp.array([16, 4, 2], jnp.int32),
    "one": jnp.array([4], jnp.int32),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "width"),
    [(name, width) for name in COLUMNS for width in (V_T, WIDTH) if name != "past" or width == WIDTH],
)
def test_the_split_projection_is_the_projection(name, width, seed):
    """project, project_softmax and pull_back, whose inner products agree, against the loop."""
    w, columns = random_projection(seed), COLUMNS[name]
    split = w.split()
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (4, V_S)).astype(np.float32)
    logits[0, :4] = -np.inf
    at = list(range(width)) if columns is None else columns.tolist()
    back = rng.normal(size=(4, len(at))).astype(np.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    p = np.exp(logits - np.asarray(normalizer)[:, None])

    @jax.jit
    def found(w, split, p, logits, back):
        plain, pull = jax.vjp(lambda x: w.project(x, columns, width), p)
        return (
            (plain, split.project(p, columns, width)),
            split.project_softmax(logits, normalizer, columns, width),
            (pull(back)[0], split.pull_back(back, columns, width)),
        )

    projected, of_logits, pulled = found(w, split, p, logits, back)
    rows = [
        [(int(j), float(x)) for j, x in zip(*both, strict=True) if j >= 0]
        for both in zip(w.indices, w.weights, strict=True)
    ]
    expected = [reference_projection.project(vector, rows, at) for vector in p]
    for one in (*projected, of_logits):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-7)
    whole = np.zeros((4, width))
    whole[:, at] = back
    expected_back = [reference_projection.project_back(vector, rows) for vector in whole]
    for one in pulled:
        np.testing.assert_allclose(one, expected_back, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(inner(projected[1], back), inner(p, pulled[1]), rtol=1e-5)


def test_a_split_projection_without_the_teachers_size():
    w = random_projection(4, teacher_size=None)
    p = RNG.random((2, V_S)).astype(np.float32)
    for columns, width in itertools.product((None, COLUMNS["some"]), (V_T, WIDTH)):
        np.testing.assert_allclose(
            w.split().project(p, columns, width), w.project(p, columns, width), rtol=1e-5, atol=1e-7
        )
    with pytest.raises(ValueError, match="width is needed"):
        w.split().project(p)


def test_the_gradient_of_the_fast_softmax_is_that_of_the_plain_one():
    w = random_projection(5)
    logits = RNG.normal(0, 2, (4, V_S)).astype(np.float32)
    back = RNG.normal(size=(4, 5)).astype(np.float32)

    def loss(logits, w):
        return jnp.sum(back * projected_softmax(logits, w, COLUMNS["some"], V_T))

    forms = (w, w.split(), w.learnable())
    plain, fast, learnable = (jax.jit(jax.value_and_grad(loss))(logits, form) for form in forms)
    assert isinstance(forms[1], SplitProjection)
    for value, gradient in (fast, learnable):
        if value is not learnable[0]:
            np.testing.assert_allclose(value, plain[0], rtol=1e-5)
            np.testing.assert_allclose(gradient, plain[1], rtol=1e-5, atol=1e-7)


def test_a_large_offset_costs_the_fast_softmax_no_digits():
    """What float32 leaves of the logits is the same distribution, wherever it lies."""
    w = random_projection(5).split()
    logits = (np.round(RNG.normal(0, 2, (4, V_S)) * 64) / 64).astype(np.float32)
    back = RNG.normal(size=(4, 5)).astype(np.float32)
    evaluate = jax.jit(
        jax.value_and_grad(lambda z: jnp.sum(back * projected_softmax(z, w, COLUMNS["some"], V_T)))
    )
    (value, gradient), (moved, moved_gradient) = (evaluate(logits + np.float32(o)) for o in (0, 4096))
    np.testing.assert_allclose(moved, value, rtol=1e-6)
    np.testing.assert_allclose(moved_gradient, gradient, atol=1e-6 * np.abs(gradient).max())
