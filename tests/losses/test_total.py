"""Which settings go together, and the term that they name."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.errors import UserError
from xtoken_jax.losses import (
    LossConfig,
    LossKind,
    TeachersConfig,
    distillation_loss,
    hybrid_kl,
    kd_scale_capped,
    likelihood_matching,
    loss_tables,
    masked_mean,
    prefix_kl,
    projection_kl,
    rank_l1,
    same_vocabulary_kl,
    valid_chunks,
)
from xtoken_jax.losses.config import Direction, Merge, Score, TeachersMode
from xtoken_jax.projection.matrix import Partition, Projection
from xtoken_jax.projection.prefixes import tables_of_pieces

AUTO, P_KL, H_KL, GOLD, ULD, ALM, SAME, NONE = (
    LossKind[name] for name in ("auto", "p_kl", "h_kl", "gold", "uld", "alm", "same_vocabulary", "none")
)
PREFIX = LossKind.prefix_kl
TERMS = [P_KL, H_KL, GOLD, ULD, ALM, SAME]
JSD, REVERSE = Direction.jsd, Direction.reverse

REFUSED = [
    # One value by itself.
    ({"temperature": 0.0}, r"loss\.temperature=0\.0: must be above 0"),
    ({"temperature": -1.0}, r"loss\.temperature=-1\.0"),
    ({"temperature": float("nan")}, r"loss\.temperature=nan"),
    ({"temperature": float("inf")}, r"loss\.temperature=inf"),
    ({"temperature": 0.0, "kind": NONE}, r"loss\.temperature=0\.0"),
    ({"likelihood_temperature": 0.0, "kind": ALM}, r"loss\.likelihood_temperature=0\.0: must be above 0"),
    ({"likelihood_temperature": float("inf"), "kind": ALM}, r"loss\.likelihood_temperature=inf"),
    # Logits have a temperature, or chunks.
    ({"temperature": 2.0, "kind": ALM}, r"loss\.temperature=2\.0: loss\.kind=alm does not read it; p_kl"),
    *(
        (
            {"likelihood_temperature": 50.0, "kind": kind},
            rf"loss\.likelihood_temperature=50\.0: loss\.kind={kind.value} does not read it; alm would",
        )
        for kind in (AUTO, P_KL, H_KL, GOLD, ULD, SAME)
    ),
    ({"top_k": 0}, r"loss\.top_k=0: must be at least 1"),
    ({"uncommon_top_k": 0, "kind": GOLD}, r"loss\.uncommon_top_k=0"),
    ({"max_scale": 0.0}, r"loss\.max_scale=0\.0: must be above 0, or null"),
    ({"kd_weight": -1.0}, r"loss\.kd_weight=-1\.0: must not be negative"),
    ({"ce_weight": -1.0}, r"loss\.ce_weight=-1\.0"),
    ({"common_weight": -0.1, "kind": GOLD}, r"loss\.common_weight=-0\.1"),
    ({"beta": 1.5, "direction": JSD}, r"loss\.beta=1\.5: must be between 0"),
    ({"beta": -0.1, "direction": JSD}, r"loss\.beta=-0\.1"),
    # beta without the mixture that it is of.
    ({"beta": 0.3}, r"loss\.beta=0\.3: only loss\.direction=jsd reads it"),
    ({"beta": 0.3, "direction": REVERSE, "kind": GOLD}, r"loss\.beta=0\.3"),
    # Columns, for the terms that compare single columns.
    ({"top_k": 100, "kind": H_KL}, r"loss\.top_k=100: loss\.kind=h_kl does not read it; p_kl, same_vocab"),
    ({"top_k": None, "kind": GOLD}, r"loss\.top_k=null: loss\.kind=gold"),
    ({"top_k": 100, "kind": ULD}, r"loss\.top_k=100: loss\.kind=uld"),
    ({"top_k": 100, "kind": ALM}, r"loss\.top_k=100: loss\.kind=alm"),
    ({"uncommon_top_k": 100, "kind": ALM}, r"loss\.uncommon_top_k=100: loss\.kind=alm"),
    ({"uncommon_top_k": 100, "kind": P_KL}, r"loss\.uncommon_top_k=100: loss\.kind=p_kl"),
    ({"uncommon_top_k": 100, "kind": ULD}, r"loss\.uncommon_top_k=100: loss\.kind=uld"),
    ({"uncommon_top_k": 100, "kind": SAME}, r"loss\.uncommon_top_k=100: loss\.kind=same_vocabulary"),
    # Weights of two parts, for the terms that have two.
    ({"uncommon_weight": 0.5, "kind": P_KL}, r"loss\.uncommon_weight=0\.5: loss\.kind=p_kl does not read it"),
    ({"common_weight": None, "kind": P_KL}, r"loss\.common_weight=null: loss\.kind=p_kl"),
    ({"common_weight": 2.0, "kind": ULD}, r"loss\.common_weight=2\.0"),
    ({"uncommon_weight": 0.0, "kind": SAME}, r"loss\.uncommon_weight=0\.0"),
    ({"common_weight": 0.0, "uncommon_weight": 0.0, "kind": GOLD}, r"leave nothing to learn from"),
    # Merges.
    ({"merge": Merge.mean_normalized, "kind": H_KL}, r"not for loss\.kind=h_kl; choose mean, first, last"),
    ({"merge": Merge.mean_normalized, "kind": GOLD}, r"not for loss\.kind=gold"),
    ({"merge": Merge.mean_normalized}, r"not for loss\.kind=h_kl, which auto may choose"),
    ({"merge": Merge.first, "kind": ULD}, r"loss\.merge=first: not for loss\.kind=uld; choose mean"),
    ({"merge": Merge.first, "kind": PREFIX}, r"loss\.merge=first: not for loss\.kind=prefix_kl; choose mean"),
    ({"top_k": 100, "kind": PREFIX}, r"loss\.top_k=100: loss\.kind=prefix_kl does not read it; p_kl"),
    ({"merge": Merge.first, "kind": ALM}, r"loss\.merge=first: not for loss\.kind=alm; choose mean"),
    ({"merge": Merge.last, "kind": SAME}, r"loss\.merge=last: not for loss\.kind=same_vocabulary"),
    # A rank has no direction, nor has the text.
    ({"direction": REVERSE, "kind": ALM}, r"loss\.direction=reverse: loss\.kind=alm does not read it"),
    ({"direction": REVERSE, "kind": ULD}, r"loss\.direction=reverse: loss\.kind=uld does not read it"),
    ({"direction": JSD, "kind": ULD}, r"loss\.direction=jsd"),
    ({"kd_weight": 0.0, "ce_weight": 0.0, "dynamic_scaling": False}, r"leave nothing to learn from"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_settings_that_make_no_sense_are_refused_by_name(settings, words):
    with pytest.raises(UserError, match=words) as error:
        LossConfig(**settings).validate()
    assert "\n" not in str(error.value)


ACCEPTED = [
    *({"kind": kind} for kind in LossKind),
    *({"kind": P_KL, "merge": merge, "direction": d} for merge, d in itertools.product(Merge, Direction)),
    *(
        {"kind": kind, "merge": Merge.first, "direction": JSD, "beta": 0.1}
        for kind in (P_KL, H_KL, GOLD, AUTO)
    ),
    {"kind": GOLD, "direction": JSD, "common_weight": None, "uncommon_weight": None},
    {"kind": GOLD, "uncommon_weight": 0.0},
    {"kind": H_KL, "uncommon_top_k": 10},
    {"kind": ALM, "likelihood_temperature": 1.0, "max_scale": None},
    *({"kind": kind, "temperature": 2.0} for kind in LossKind if kind is not ALM),
    {"kind": SAME, "top_k": None, "direction": REVERSE},
    {"kind": AUTO, "top_k": 100, "uncommon_top_k": 100, "common_weight": 0.5},  # whichever it will be
    {"kind": P_KL, "top_k": None, "direction": JSD, "beta": 0.0},
    {"kind": NONE, "merge": Merge.first, "top_k": 5, "beta": 0.2},  # a sweep's run without a teacher
    {"max_scale": None, "dynamic_scaling": False, "kd_weight": 0.0},
]


@pytest.mark.parametrize("settings", ACCEPTED)
def test_settings_that_make_sense_pass(settings):
    LossConfig(**settings).validate()


FULL = {"kind": SAME, "top_k": None}
MODE = TeachersMode
TEACHERS = [
    (
        {"score": Score.max_probability},
        "teachers_score=max_probability: only teachers_mode=adaptive reads it",
    ),
    ({"mode": MODE.select, "score": Score.negative_entropy}, "teachers_score=negative_entropy: only"),
    ({"sharpness": 2.0}, "teachers_sharpness=2: only teachers_mode=adaptive reads it"),
    ({"mode": MODE.adaptive, "sharpness": 0.0}, "teachers_sharpness=0: must be above 0"),
    ({"mode": MODE.adaptive, "sharpness": float("inf")}, "teachers_sharpness=inf: must be above 0"),
    ({"mode": MODE.averaged_logits, "scale_by_vocabulary": True}, "teachers_scale_by_vocabulary=true"),
]


@pytest.mark.parametrize(("settings", "words"), TEACHERS)
def test_a_mode_of_teachers_that_makes_no_sense_is_refused(settings, words):
    with pytest.raises(UserError, match=words) as error:
        TeachersConfig(**settings).validate()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([FULL, {"kind": P_KL}], r"twin has loss\.kind=p_kl"),
        ([FULL, {"kind": SAME}], r"twin has loss\.top_k=8192"),
        ([FULL, FULL | {"temperature": 2.0}], "give teacher, twin the same loss settings"),
    ],
)
def test_logits_that_cannot_be_averaged_are_refused(losses, words):
    named = {n: LossConfig(**loss) for n, loss in zip(("teacher", "twin"), losses, strict=True)}
    with pytest.raises(UserError, match=words):
        TeachersConfig(MODE.averaged_logits).validate_averaged(named)


def test_modes_of_teachers_that_make_sense_pass():
    TeachersConfig().validate()
    TeachersConfig(scale_by_vocabulary=True).validate()
    TeachersConfig(MODE.adaptive, Score.negative_entropy, 3.0).validate()
    TeachersConfig(MODE.select, scale_by_vocabulary=True).validate()
    TeachersConfig(MODE.averaged_logits).validate_averaged(dict.fromkeys("ab", LossConfig(**FULL)))


B, T, V_S, V_T = 3, 6, 9, 12
RNG = np.random.default_rng(0)
STUDENT = RNG.normal(0, 2, (B, T, V_S + 2)).astype(np.float32)
TEACHER = RNG.normal(0, 2, (B, T, V_T + 3)).astype(np.float32)
CHUNKS = [np.array([[0, 1, 1, 2, 3, 4]] * B, np.int32), np.array([[0, 0, 1, 2, 2, 3]] * B, np.int32)]
ALIGNMENT = Alignment(*CHUNKS, np.arange(B * 5).reshape(B, 5) % 7 != 3)
IDS = {"student_ids": RNG.integers(0, V_S, (B, T)), "teacher_ids": RNG.integers(0, V_T, (B, T))}
REAL = np.arange(T) < np.array([[6], [5], [3]])


def some_projection():
    indices = np.stack([RNG.choice(V_T, 2, replace=False) for _ in range(V_S)]).astype(np.int32)
    weights = np.tile(np.float32([0.9, 0.1]), (V_S, 1))
    indices[:5, 1], weights[:5] = -1, [1.0, 0.0]
    return Projection(indices, weights, V_T)


PROJECTION = some_projection()
IDENTITY = Projection(np.arange(V_S, dtype=np.int32)[:, None], np.ones((V_S, 1), np.float32), V_S)


def term(projection, teacher_logits=TEACHER, **settings):
    config = LossConfig(**settings)
    config.validate()
    tables = loss_tables(config.kind, projection)
    return jax.jit(distillation_loss(config))(STUDENT, teacher_logits, ALIGNMENT, tables, REAL, **IDS)


@pytest.mark.parametrize("merge", ["mean", "mean_normalized", "first", "last"])
def test_p_kl_gets_what_is_configured(merge):
    options = {"temperature": 2.0, "direction": "jsd", "beta": 0.3, "merge": merge}
    expected = projection_kl(
        STUDENT, TEACHER, ALIGNMENT, PROJECTION, top_k=5, teacher_mask=REAL, **options, **IDS
    )
    settings = {"temperature": 2.0, "direction": JSD, "beta": 0.3, "merge": Merge(merge)}
    np.testing.assert_allclose(
        term(PROJECTION, kind=P_KL, top_k=5, **settings), expected, rtol=1e-5, atol=1e-6
    )
    every = projection_kl(STUDENT, TEACHER, ALIGNMENT, PROJECTION, top_k=V_T, **options, **IDS)
    np.testing.assert_allclose(
        term(PROJECTION, kind=P_KL, top_k=None, **settings), every, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("kind", "partition"), [(GOLD, Partition.strict), (H_KL, Partition.relaxed)])
@pytest.mark.parametrize(
    "merge", ["mean", *(pytest.param(m, marks=pytest.mark.slow) for m in ("first", "last"))]
)
def test_gold_and_h_kl_get_what_is_configured(kind, partition, merge):
    for weights in ((0.7, 0.2), (None, None)):
        expected = hybrid_kl(
            STUDENT, TEACHER, ALIGNMENT, partition(PROJECTION),
            temperature=2.0, uncommon_top_k=2, direction="jsd", beta=0.3, merge=merge,
            common_weight=weights[0], uncommon_weight=weights[1], **IDS,
        )  # fmt: skip
        found = term(
            PROJECTION, kind=kind, temperature=2.0, uncommon_top_k=2, direction=JSD, beta=0.3,
            merge=Merge(merge), common_weight=weights[0], uncommon_weight=weights[1],
        )  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_trl_weights_are_the_matched_share_of_the_teacher():
    partition = Partition.strict(PROJECTION)
    matched = len(partition.common_teacher) / V_T
    expected = hybrid_kl(
        STUDENT, TEACHER, ALIGNMENT, partition, common_weight=matched, uncommon_weight=1 - matched
    )
    found = term(PROJECTION, kind=GOLD, common_weight=None, uncommon_weight=None)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_uld_gets_what_is_configured():
    expected = rank_l1(STUDENT, TEACHER, ALIGNMENT, temperature=2.0, student_size=V_S, teacher_size=V_T)
    np.testing.assert_allclose(term(PROJECTION, kind=ULD, temperature=2.0), expected, rtol=1e-5)


def test_prefix_kl_gets_what_is_configured():
    pieces = {i: [i] for i in range(V_S - 1)} | {V_S - 1: [0, 1]}
    tables = tables_of_pieces(pieces, {i: [i] for i in range(V_S - 1)}, {}, V_S, V_T)
    expected = prefix_kl(STUDENT, TEACHER, ALIGNMENT, tables, temperature=2.0, direction="reverse", **IDS)
    assert float(expected.max()) > 1e-2
    config = LossConfig(kind=PREFIX, temperature=2.0, direction=REVERSE)
    found = distillation_loss(config)(STUDENT, TEACHER, ALIGNMENT, tables, REAL, **IDS)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="prefix_kl needs student_ids and teacher_ids"):
        distillation_loss(config)(STUDENT, TEACHER, ALIGNMENT, tables, REAL)
    with pytest.raises(ValueError, match=r"prefix_tables\(pair\), not W"):
        loss_tables(PREFIX, PROJECTION)


def test_alm_gets_what_is_configured():
    expected = likelihood_matching(
        STUDENT, TEACHER, ALIGNMENT, likelihood_temperature=3.0, student_size=V_S, teacher_size=V_T, **IDS
    )
    assert float(expected.max()) > 1e-2
    found = term(PROJECTION, kind=ALM, likelihood_temperature=3.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert not np.allclose(found, term(PROJECTION, kind=ALM), atol=1e-4)
    with pytest.raises(ValueError, match="alm needs student_ids and teacher_ids"):
        distillation_loss(LossConfig(kind=ALM))(
            STUDENT, TEACHER, ALIGNMENT, loss_tables(ALM, PROJECTION), REAL, student_ids=IDS["student_ids"]
        )


@pytest.mark.parametrize("kind", TERMS)
def test_what_needs_ids_is_what_fails_without(kind):
    for merge in Merge:
        config = LossConfig(kind=kind, merge=merge)
        try:
            config.validate_merge()
        except UserError:
            continue
        tables = loss_tables(kind, IDENTITY if kind is SAME else PROJECTION)
        teacher = TEACHER[..., :V_S] if kind is SAME else TEACHER

        def values(config=config, tables=tables, teacher=teacher):
            return distillation_loss(config)(STUDENT, teacher, ALIGNMENT, tables, REAL)

        if config.needs_ids:
            with pytest.raises(ValueError, match="_ids"):
                values()
        else:
            values()


@pytest.mark.parametrize("top_k", [None, 4])
def test_same_vocabulary_finds_the_teachers_position_of_every_token(top_k):
    """The teacher's rows begin with two tokens more, and go on longer."""
    config = LossConfig(kind=SAME, temperature=2.0, top_k=top_k, direction=REVERSE)
    mask = RNG.random((B, T)) < 0.8
    teacher = TEACHER[..., : V_S + 1]
    longer = np.concatenate([np.full_like(teacher[:, :2], 7.0), teacher, teacher[:, :1] + 1], axis=1)
    real = np.concatenate([np.zeros((B, 2), bool), REAL, np.zeros((B, 1), bool)], axis=1)
    chunks = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    shifted = np.concatenate([np.full((B, 2), -1, np.int32), chunks, np.full((B, 1), -1, np.int32)], axis=1)
    alignment = Alignment(chunks, shifted, mask)
    tables = loss_tables(SAME, IDENTITY)

    def by_chunk(student):
        values = distillation_loss(config)(student, longer, alignment, tables, real)
        return masked_mean(values, valid_chunks(alignment)), values

    def by_position(student):
        values, counted = same_vocabulary_kl(
            student, teacher, mask,
            temperature=2.0, top_k=top_k, direction="reverse", size=V_S, teacher_mask=REAL,
        )  # fmt: skip
        return masked_mean(values, counted), values

    (mean, values), slope = jax.jit(jax.value_and_grad(by_chunk, has_aux=True))(STUDENT)
    (expected_mean, expected), expected_slope = jax.value_and_grad(by_position, has_aux=True)(STUDENT)
    np.testing.assert_allclose(values[:, 1:], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-6)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-5, atol=1e-6)


def test_same_vocabulary_refuses_another_tokenizer():
    assert loss_tables(SAME, IDENTITY).student == V_S
    doubles = np.arange(V_S, dtype=np.int32)[:, None]
    doubles[4], doubles[7] = 2, -1  # two tokens of one text; a special token without a role
    weights = (doubles >= 0).astype(np.float32)
    loss_tables(SAME, Projection(doubles, weights, V_S))
    with pytest.raises(UserError, match="has 9 tokens and the teacher's 12; use auto, p_kl or h_kl"):
        loss_tables(SAME, PROJECTION)
    for change, words in (
        (5, "1 student tokens, the first of them 3"),
        (2, "2 student tokens, the first of"),
    ):
        indices = np.arange(V_S, dtype=np.int32)[:, None]
        indices[3] = change
        if change == 2:
            indices[2] = 1
            indices[1] = 0
        with pytest.raises(UserError, match=words):
            loss_tables(SAME, Projection(indices, np.ones((V_S, 1), np.float32), V_S))


def test_a_learnable_projection_is_for_p_kl_alone():
    learnable = PROJECTION.learnable()
    found = term(learnable, kind=P_KL)
    np.testing.assert_allclose(found, term(PROJECTION, kind=P_KL), rtol=1e-4, atol=1e-5)
    for kind in TERMS[1:]:
        with pytest.raises(UserError, match=rf"loss\.kind={kind.value}: a learnable W"):
            loss_tables(kind, learnable)


def test_what_names_no_term_is_refused():
    for kind in (AUTO, NONE):
        with pytest.raises(ValueError, match="is not a distillation term"):
            distillation_loss(LossConfig(kind=kind))
    # What auto became need not read every setting, but cannot do without the merge.
    distillation_loss(LossConfig(kind=H_KL, top_k=100))
    with pytest.raises(UserError, match="merge=mean_normalized"):
        distillation_loss(LossConfig(kind=H_KL, merge=Merge.mean_normalized))
    for kind in (P_KL, H_KL):
        with pytest.raises(ValueError, match="_ids"):
            distillation_loss(LossConfig(kind=kind, merge=Merge.first))(
                STUDENT, TEACHER, ALIGNMENT, loss_tables(kind, PROJECTION), REAL
            )


@pytest.mark.parametrize(
    ("ce", "kd", "max_scale", "capped"),
    [
        (3.0, 6.0, 10.0, False),
        (3.0, 0.3, 10.0, False),
        (3.0, 0.2, 10.0, True),
        (3.0, -0.5, 10.0, True),
        (3.0, 0.0, 10.0, False),  # the factor is 1 there
        (3.0, 0.2, None, False),
        (3.0, -0.5, None, True),
        (3.0, float("nan"), 10.0, False),
    ],
)
def test_whether_the_factor_was_capped(ce, kd, max_scale, capped):
    assert (
        bool(jax.jit(kd_scale_capped, static_argnums=2)(jnp.float32(ce), jnp.float32(kd), max_scale))
        == capped
    )
