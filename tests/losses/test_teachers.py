"""Several teachers: scores, weights, selection, averaged logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from reference import gradient as reference_gradient
from reference import losses as reference

from xtoken_jax.alignment.batch import StoredRows
from xtoken_jax.losses import (
    TeacherScores,
    TeacherTerm,
    average_logits,
    blockwise_teacher_scores,
    combine_teachers,
    masked_mean,
    same_vocabulary_kl,
    teacher_scores,
    total_loss,
)
from xtoken_jax.losses.teachers import SCORES

B, T, V = 3, 6, 10
RNG = np.random.default_rng(4)
LOGITS = RNG.normal(0, 2, (B, T, V + 3)).astype(np.float32)
LOGITS[..., V:] += 5  # what lies past the tokenizer would dominate if it were read
IDS = RNG.integers(0, V, (B, T)).astype(np.int32)
MASK = RNG.random((B, T)) < 0.7
MASK[1] = False

KDS = [2.0, -0.1, 5.0]
NEGATIVE_CE = [-3.0, -2.5, -4.0]
WEIGHTS = [0.8, 0.2, 0.5]
SIZES = [128256, 200019, 151669]


def terms(kds, **changes):
    scores = [TeacherScores(*(jnp.float32(s) * k for k in (1.0, 2.0, 0.1))) for s in NEGATIVE_CE]
    fields = {"weight": WEIGHTS, "scores": scores, "vocabulary_size": SIZES} | changes
    return [
        TeacherTerm(kd, **{name: values[m] for name, values in fields.items()}) for m, kd in enumerate(kds)
    ]


def scored(logits, ids=IDS, mask=MASK, size=V):
    found = jax.jit(teacher_scores, static_argnames="size")(logits, ids, mask, size=size)
    expected = reference.teacher_scores(logits.tolist(), ids.tolist(), mask, size)
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-7)
    return found


def test_scores_against_float64():
    scored(LOGITS)
    huge = LOGITS.copy()
    huge[RNG.random(huge.shape) < 0.05] *= 5e3
    scored(huge)
    scored(LOGITS, ids=IDS * 0, size=1)
    assert list(scored(LOGITS, mask=MASK & False)) == [0.0, 0.0, 0.0]


def test_scores_of_excluded_tokens():
    logits = LOGITS.copy()
    logits[..., [0, 4]] = -np.inf
    ids = np.where(np.isin(IDS, [0, 4]), 1, IDS)
    assert np.all(np.isfinite(scored(logits, ids=ids)))
    # A teacher that excludes the text itself gets no weight and is never chosen.
    ids[0, 1], mask = 4, MASK.copy()
    mask[0, 1] = True
    scores = scored(logits, ids=ids, mask=mask)
    assert np.isneginf(scores.negative_ce)
    pair = [
        TeacherTerm(jnp.float32(1.0), scores=scores),
        TeacherTerm(jnp.float32(2.0), scores=scored(LOGITS)),
    ]
    for options in ({"score": "negative_ce"}, {"combine": "select_teacher"}):
        kd, alphas = combine_teachers(pair, **options)
        assert (kd, *alphas) == (2.0, 0.0, 1.0)


def test_scores_are_those_of_the_global_batch():
    whole = teacher_scores(LOGITS, IDS, MASK, size=V)
    count = MASK[:, 1:].sum()
    parts = [teacher_scores(LOGITS[b], IDS[b], MASK[b], size=V, count=count) for b in ([0], [1, 2])]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)


WAYS = [
    {},
    {"scale_by_vocabulary": True},
    *({"score": score, "sharpness": a} for score in SCORES for a in (0.5, 4.0)),
    {"score": "negative_ce", "scale_by_vocabulary": True},
    {"combine": "select_teacher"},
    {"combine": "select_teacher", "scale_by_vocabulary": True},
]


@pytest.mark.parametrize("options", WAYS)
def test_combination_against_float64(options):
    def ours(kds):
        return combine_teachers(terms(list(kds)), **options)

    def twin(kds):
        select = options.get("combine") == "select_teacher"
        fixed = "score" not in options and not select
        factor = {"negative_entropy": 2.0, "max_probability": 0.1}.get(options.get("score"), 1.0)
        return reference.combined_teachers(
            kds, [factor * s for s in NEGATIVE_CE], SIZES,
            weights=WEIGHTS if fixed else None, sharpness=options.get("sharpness", 1.0),
            select=select, scale=options.get("scale_by_vocabulary", False),
        )  # fmt: skip

    (kd, alphas), slope = jax.jit(jax.value_and_grad(ours, has_aux=True))(jnp.array(KDS))
    expected_kd, expected_alphas = twin(KDS)
    np.testing.assert_allclose(kd, expected_kd, rtol=1e-6)
    np.testing.assert_allclose(alphas, expected_alphas, rtol=1e-6, atol=1e-9)
    numeric = reference_gradient.differences(lambda k: twin(k)[0], KDS, [(0,), (1,), (2,)])
    np.testing.assert_allclose(slope, numeric, rtol=1e-5, atol=1e-8)


def test_one_teacher_is_itself():
    for options in (
        {},
        {"score": "max_probability"},
        {"combine": "select_teacher"},
        {"scale_by_vocabulary": True},
    ):
        kd, alphas = combine_teachers(terms([3.0], weight=[1.0]), **options)
        assert kd == 3.0
        assert alphas.tolist() == [1.0]


def test_a_sharpness_of_0_weighs_equally_and_a_large_one_selects():
    np.testing.assert_allclose(combine_teachers(terms(KDS), score="negative_ce", sharpness=0.0)[1], 1 / 3)
    sharp, selected = (
        combine_teachers(terms(KDS), **options)[1]
        for options in ({"score": "negative_ce", "sharpness": 1e4}, {"combine": "select_teacher"})
    )
    np.testing.assert_allclose(sharp, selected)
    assert selected.tolist() == [0.0, 1.0, 0.0]


def test_a_teacher_without_weight_does_not_enter():
    for options in ({"combine": "select_teacher"}, {}):
        kds = [jnp.float32(np.inf), jnp.float32(1.5), jnp.float32(np.nan)]
        kd, _ = combine_teachers(terms(kds, weight=[0.0, 1.0, 0.0]), **options)
        assert kd == 1.5


def test_a_nan_is_not_hidden_by_a_weight_that_scores_make_0():
    """At this sharpness the softmax gives the second teacher a weight of exactly 0."""
    scores = [TeacherScores(*[jnp.float32(value)] * 3) for value in (-1.0, -900.0)]
    pair = [TeacherTerm(jnp.float32(kd), scores=s) for kd, s in zip((2.0, np.nan), scores, strict=True)]
    for score in ("negative_ce", "negative_entropy", "max_probability"):
        kd, alphas = combine_teachers(pair, score=score, sharpness=10.0)
        assert alphas.tolist() == [1.0, 0.0]
        assert np.isnan(kd)


def test_scores_have_no_gradient():
    def kd(logits):
        scores = teacher_scores(logits, IDS, MASK, size=V)
        mean = jnp.float32(1.0)
        pair = [
            TeacherTerm(mean, scores=scores),
            TeacherTerm(2 * mean, scores=TeacherScores(mean, mean, mean)),
        ]
        return combine_teachers(pair, score="negative_entropy")[0]

    assert np.all(np.asarray(jax.grad(kd)(LOGITS)) == 0)


def test_dynamic_scaling_is_of_the_combined_term():
    ce = jnp.float32(3.0)
    total, scale = total_loss(ce, combine_teachers(terms(KDS))[0], max_scale=10.0)
    expected = 3.0 / sum(a * kd for a, kd in zip(WEIGHTS, KDS, strict=True))
    np.testing.assert_allclose([total, scale], [6.0, expected], rtol=1e-6)


def test_averaged_logits_are_one_teacher():
    student = RNG.normal(0, 2, (B, T, V)).astype(np.float32)
    other = RNG.normal(0, 2, (B, T, V + 1)).astype(np.float32)
    average = average_logits([LOGITS, other], [3.0, 1.0], size=V)
    expected = 0.75 * LOGITS[..., :V].astype(np.float64) + 0.25 * other[..., :V]
    np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6)
    assert average.dtype == jnp.float32

    value, slope = jax.value_and_grad(lambda s: masked_mean(*same_vocabulary_kl(s, average, MASK)))(student)

    def twin(z):
        return reference.mean_of(
            reference.same_vocabulary_kl(
                z, expected.tolist(), MASK, V, temperature=1.0, top_k=None, direction="forward"
            )
        )

    np.testing.assert_allclose(value, twin(student.tolist()), rtol=3e-6)
    places = [tuple(int(RNG.integers(n)) for n in (B, T, V)) for _ in range(30)]
    numeric = reference_gradient.differences(twin, student, places)
    np.testing.assert_allclose([slope[i] for i in places], numeric, rtol=3e-5, atol=3e-6)


def test_a_teacher_without_weight_may_exclude_tokens():
    excluded = np.full_like(LOGITS, -np.inf)
    np.testing.assert_array_equal(average_logits([LOGITS, excluded], [1.0, 0.0]), LOGITS)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: combine_teachers([]), "at least one teacher"),
        (lambda: combine_teachers(terms(KDS), combine="vote"), "combine='vote'"),
        (lambda: combine_teachers(terms(KDS), score="luck"), "score='luck'"),
        (lambda: combine_teachers([TeacherTerm(1.0)], score="negative_ce"), r"teachers \[0\] come without"),
        (lambda: combine_teachers([TeacherTerm(1.0)], combine="select_teacher"), r"teachers \[0\] come"),
        (lambda: combine_teachers([TeacherTerm(1.0)], scale_by_vocabulary=True), r"sizes \[None\]"),
        (
            lambda: combine_teachers(terms([1.0], vocabulary_size=[1]), scale_by_vocabulary=True),
            r"sizes \[1\]",
        ),
        (lambda: average_logits([], []), "0 teachers and 0 weights"),
        (lambda: average_logits([LOGITS], [1.0, 2.0]), "1 teachers and 2 weights"),
        (lambda: average_logits([LOGITS] * 2, [0.0, 0.0]), "nor all 0"),
        (lambda: average_logits([LOGITS] * 2, [2.0, -1.0]), "must not be negative"),
        (lambda: average_logits([LOGITS, LOGITS[..., :V]], [1.0, 1.0]), "share the student's tokenizer"),
        (
            lambda: average_logits([LOGITS, LOGITS[:, 1:]], [1.0, 1.0], size=V),
            "share the student's tokenizer",
        ),
        (lambda: average_logits([LOGITS[..., :4]] * 2, [1.0, 1.0], size=V), "share the student's tokenizer"),
    ],
)
def test_what_makes_no_sense_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


HIDDEN = RNG.normal(0, 1, (4, T, 5)).astype(np.float32)
UNEMBEDDING = RNG.normal(0, 1, (V + 3, 5)).astype(np.float32)
LABELS = RNG.integers(0, V, (4, T)).astype(np.int32)
COUNTED = RNG.random((4, T)) < 0.7
COUNTED[2] = False


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("block", [3, 64])
def test_scores_from_hidden_states_are_those_of_the_logits(block, softcap):
    logits = HIDDEN @ UNEMBEDDING.T
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    expected = reference.teacher_scores(logits.tolist(), LABELS.tolist(), COUNTED, V)
    teacher = HIDDEN, UNEMBEDDING
    options = {"size": V, "softcap": softcap, "block": block}
    found = jax.jit(lambda *x: blockwise_teacher_scores(x, LABELS, COUNTED, **options))(*teacher)
    np.testing.assert_allclose(found, expected, rtol=3e-6)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        split = jax.jit(lambda *x: blockwise_teacher_scores(x, LABELS, COUNTED, **options))(*teacher)
    np.testing.assert_allclose(split, expected, rtol=3e-6)


def test_scores_from_cached_distributions():
    """Every token, in log-probabilities; and two tokens with the rest spread over the others."""
    log_p = np.asarray(jax.nn.log_softmax(LOGITS[..., :V], axis=-1))
    zeros = np.zeros((B, T), np.float32)
    stored = StoredRows(None, log_p, zeros, zeros, V, 1.0)
    expected = reference.teacher_scores(LOGITS.tolist(), IDS.tolist(), MASK, V)
    np.testing.assert_allclose(blockwise_teacher_scores(stored, IDS, MASK, size=V), expected, rtol=3e-6)
    ids = np.stack([IDS * 0 + 3, IDS * 0 + 7], axis=-1)
    kept = np.take_along_axis(log_p, ids, axis=-1)
    others = np.log((1 - np.exp(kept).sum(-1)) / (V - 2)).astype(np.float32)
    spread = np.repeat(others[..., None], V, axis=-1)
    np.put_along_axis(spread, ids, kept, axis=-1)
    stored = StoredRows(ids, kept, others, zeros, V, 1.0)
    expected = reference.teacher_scores(spread.tolist(), IDS.tolist(), MASK, V)
    found = blockwise_teacher_scores(stored, IDS, MASK, size=V, block=4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_scores_of_outputs_that_are_not_finite_are_nan():
    hidden = HIDDEN.copy()
    place = np.argwhere(COUNTED[:, 1:])[0]
    hidden[tuple(place)] = np.nan
    found = blockwise_teacher_scores((hidden, UNEMBEDDING), LABELS, COUNTED, size=V)
    assert np.isnan(found).all()
