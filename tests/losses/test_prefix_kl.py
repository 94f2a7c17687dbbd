"""Prefix KL: against a float64 twin, and against probabilities of texts counted one by one."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import gradient as reference_gradient
from reference import prefix as reference

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import (
    LossConfig,
    LossKind,
    blockwise_loss,
    masked_mean,
    next_token_cross_entropy,
    prefix_kl,
    total_loss,
    valid_chunks,
)
from xtoken_jax.projection.events import log_masses
from xtoken_jax.projection.prefixes import tables_of_pieces

# Both sides have longer tokens than the other somewhere. The student's 9 cannot be written by the
# teacher, nor its 10 by the student; 11 and 12 are special tokens with a common role.
BY_STUDENT = {0: [0], 1: [1], 2: [2], 3: [0, 1], 4: [0, 1, 2], 5: [0, 2], 6: [3], 7: [1, 1, 1], 8: [4, 0]}
BY_TEACHER = {0: [0], 1: [1], 2: [2], 3: [6], 4: [6, 2], 5: [6, 2, 0], 6: [2, 2], 7: [6, 0], 8: [1]}
ROLES = {11: 12}
V_S, V_T = 12, 13
TABLES = (BY_STUDENT, BY_TEACHER, ROLES, (V_S, V_T))
# One row a case: (student's ids, teacher's ids) of each chunk.
ROWS = [
    [([11], [12]), ([4], [0, 1, 2]), ([3], [0, 1]), ([0], [0]), ([6, 2, 0], [5]), ([0, 1], [0, 1])],
    [([2], [2]), ([5], [0, 2]), ([2, 2], [6]), ([6], [3]), ([6, 2], [4]), ([7], [1, 1, 1])],
    [([0, 1], [0, 1]), ([8], [4, 0]), ([4], [0, 1, 4]), ([9], [10]), ([6, 1], [5]), ([1], [8])],
]


def batch(rows, width_s=V_S, width_t=V_T, seed=0, scale=2.0):
    length = [max(sum(len(chunk[side]) for chunk in row) for row in rows) + 2 for side in (0, 1)]
    ids = [np.zeros((len(rows), n), np.int32) for n in length]
    chunks = [np.full((len(rows), n), -1, np.int32) for n in length]
    places = []
    for b, row in enumerate(rows):
        at = [0, 0]
        for c, chunk in enumerate(row):
            ends = []
            for side in (0, 1):
                end = at[side] + len(chunk[side])
                ids[side][b, at[side] : end], chunks[side][b, at[side] : end] = chunk[side], c
                ends.append((at[side], end))
                at[side] = end
            places.append((b, c, *ends))
    count = max(map(len, rows))
    rng = np.random.default_rng(seed)
    logits = [
        rng.normal(0, scale, (len(rows), n, v)).astype(np.float32)
        for n, v in zip(length, (width_s, width_t), strict=True)
    ]
    return ids, Alignment(*chunks, np.ones((len(rows), count), bool)), places, logits


def twin(ids, places, logits, counted, depth, tau, open_ends=((), ())):
    values = np.zeros(counted.shape)
    for row in range(len(counted)):
        chunks = [place[1:] for place in places if place[0] == row and counted[place[:2]]]
        pair = logits[0][row], logits[1][row]
        rows = ids[0][row], ids[1][row]
        found = reference.row_values(*pair, rows, chunks, TABLES, depth, tau, open_ends)
        for number, value in found.items():
            values[row, number] = value
    return values


OPEN = ({(0, 2), (3, 2)}, {(3, 0)})


@pytest.mark.parametrize(
    ("tau", "depth", "width", "open_ends"),
    [(1.0, 8, 0, ((), ())), (2.0, 8, 3, ((), ())), (1.0, 1, 0, ((), ())), (1.0, 8, 0, OPEN)],
)
def test_values_and_gradients_equal_the_twin(tau, depth, width, open_ends):
    ids, alignment, places, logits = batch(ROWS, V_S + width, V_T + width)
    alignment.valid[1, 2] = False
    tables = tables_of_pieces(
        BY_STUDENT, BY_TEACHER, ROLES, V_S, V_T, depth=depth, student_open=open_ends[0],
        teacher_open=open_ends[1],
    )  # fmt: skip
    keys = {"student_ids": ids[0], "teacher_ids": ids[1], "temperature": tau}

    def value(student):
        return prefix_kl(student, jnp.asarray(logits[1]), alignment, tables, **keys)

    counted = np.asarray(valid_chunks(alignment))
    wanted = twin(ids, places, [z.tolist() for z in logits], counted, depth, tau, open_ends)
    np.testing.assert_allclose(value(jnp.asarray(logits[0])), wanted, rtol=2e-6, atol=2e-6)
    assert (wanted > 0).sum() >= 13

    found = np.asarray(jax.jit(jax.grad(lambda z: value(z).sum()))(jnp.asarray(logits[0])))
    assert not found[..., V_S:].any()
    coordinates = list(itertools.product(*map(range, (*logits[0].shape[:2], V_S))))[::3]

    def total(student):
        return twin(ids, places, [student, logits[1].tolist()], counted, depth, tau, open_ends).sum()

    by_twin = reference_gradient.differences(total, logits[0], coordinates)
    np.testing.assert_allclose([found[i] for i in coordinates], by_twin, atol=5e-6)


# Texts of one or two words of at most four letters a and b, each ended by ".", in canonical tokens: the
# student has two and three letters a as one token, the teacher two letters b.
LETTERS = "ab."
STUDENT_TOKENS = ["a", "b", ".", "aa", "aaa"]
TEACHER_TOKENS = ["a", "b", ".", "bb"]


def canonical(text, tokens):
    found = []
    while text:
        token = max((t for t in tokens if text.startswith(t)), key=len)
        found.append(tokens.index(token))
        text = text[len(token) :]
    return found


def texts_of(weights):
    """All texts with their probability."""
    words = ["".join(t) + "." for n in range(5) for t in itertools.product("ab", repeat=n)]
    texts = [first + second for first in words for second in ("", *words[:15])]
    return dict(zip(texts, np.exp(weights[: len(texts)]) / np.exp(weights[: len(texts)]).sum(), strict=True))


def next_token(texts, prefix, tokens):
    """The probabilities of the next token that an exact model of these texts gives."""
    mass = np.zeros(len(tokens))
    for text, probability in texts.items():
        ids = canonical(text, tokens)
        if ids[: len(prefix)] == prefix and len(ids) > len(prefix):
            mass[ids[len(prefix)]] += probability
    return mass / mass.sum() if mass.sum() else np.full(len(tokens), 1 / len(tokens))


def starts(texts, beginning):
    return math.fsum(p for text, p in texts.items() if text.startswith(beginning))


PIECES_S = {i: canonical(t, TEACHER_TOKENS) for i, t in enumerate(STUDENT_TOKENS)}
PIECES_T = {i: canonical(t, STUDENT_TOKENS) for i, t in enumerate(TEACHER_TOKENS)}


@pytest.fixture(scope="module")
def worlds():
    rng = np.random.default_rng(3)
    return texts_of(rng.normal(0, 1, 31 * 16)), texts_of(rng.normal(0, 1, 31 * 16))


def test_events_are_beginnings_of_texts(worlds):
    """Masses and conditionals of the twin are probabilities of texts, to 1e-12."""
    groups = reference.events(PIECES_S, PIECES_T, {})
    for texts, before in itertools.product(worlds, ("", "a.", "bba.", "abbb.")):
        contexts = [canonical(before, tokens) for tokens in (STUDENT_TOKENS, TEACHER_TOKENS)]
        p = next_token(texts, contexts[0], STUDENT_TOKENS)
        whole = sum(x for text, x in texts.items() if text.startswith(before) and text != before)
        for side, tokens, model in (
            ("s", STUDENT_TOKENS, p),
            ("t", TEACHER_TOKENS, next_token(texts, contexts[1], TEACHER_TOKENS)),
        ):
            for group, mass in reference.masses(groups, model, side).items():
                (letter,) = {tokens[i][0] for s, i in groups[group] if s == side}
                assert mass == pytest.approx(starts(texts, before + letter) / whole, abs=1e-12)
        for d in (1, 2):
            q = next_token(texts, contexts[1] + [0] * d, TEACHER_TOKENS)
            truth = starts(texts, before + "a" * (d + 1)) / starts(texts, before + "a" * d)
            for side in reference.step([0] * d, PIECES_S, p, q):
                assert side[0] / sum(side.values()) == pytest.approx(truth, abs=1e-12)
                assert side[reference.END] / sum(side.values()) == pytest.approx(1 - truth, abs=1e-12)
        assert reference.step([0] * 3, PIECES_S, p, q) is None  # no token is longer


def models_of(texts, ids, tokens):
    """log-probabilities [1, T, V] of an exact model, for a row that begins with a mark."""
    rows = [next_token(texts, list(ids[: i + 1]), tokens) for i in range(-1, len(ids) - 1)]
    rows.append(np.full(len(tokens), 1 / len(tokens)))
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows))[None]


def text_row(text):
    """ids with a mark in front, as token 0, and the chunks where both sides have a boundary."""
    sides = []
    for tokens in (STUDENT_TOKENS, TEACHER_TOKENS):
        ids = canonical(text, tokens)
        sides.append((ids, np.cumsum([len(tokens[i]) for i in ids])))
    common = sorted(set(sides[0][1]) & set(sides[1][1]))
    return [(np.array([0, *ids]), np.array([-1, *np.searchsorted(common, ends)])) for ids, ends in sides]


def test_zero_when_both_models_know_the_same_texts(worlds):
    tables = tables_of_pieces(PIECES_S, PIECES_T, {}, len(STUDENT_TOKENS), len(TEACHER_TOKENS))
    texts, other = worlds
    different, jitted = [], jax.jit(prefix_kl)
    for text in ("aaab.", "abba.", "bb.aa.", "aab.bab."):
        (s, s_chunks), (t, t_chunks) = text_row(text)
        alignment = Alignment(s_chunks[None], t_chunks[None], np.ones((1, s_chunks.max() + 1), bool))
        keys = {"student_ids": s[None], "teacher_ids": t[None]}
        teacher = models_of(texts, t[1:], TEACHER_TOKENS)
        same = jitted(models_of(texts, s[1:], STUDENT_TOKENS), teacher, alignment, tables, **keys)
        np.testing.assert_allclose(same, 0, atol=1e-6)
        value = jitted(models_of(other, s[1:], STUDENT_TOKENS), teacher, alignment, tables, **keys)
        assert (np.asarray(value) > -1e-6).all()
        different.append(float(value.sum()))
    assert min(different) > 0.01


def test_one_token_against_its_pieces_is_the_kl_of_all_beginnings(worlds):
    """The chunk "aaa" against "a", "a", "a": the KL of how far a text's letters a go, by the chain rule."""
    tables = tables_of_pieces(PIECES_S, PIECES_T, {}, len(STUDENT_TOKENS), len(TEACHER_TOKENS))
    texts, other = worlds
    (s, s_chunks), (t, t_chunks) = text_row("aaab.")
    alignment = Alignment(s_chunks[None], t_chunks[None], np.ones((1, s_chunks.max() + 1), bool))
    value = prefix_kl(
        models_of(other, s[1:], STUDENT_TOKENS), models_of(texts, t[1:], TEACHER_TOKENS), alignment, tables,
        student_ids=s[None], teacher_ids=t[None],
    )[0, 0]  # fmt: skip
    wanted = sum(starts(texts, x) * math.log(starts(texts, x) / starts(other, x)) for x in LETTERS)
    for d in (1, 2):
        p, q = (starts(w, "a" * (d + 1)) / starts(w, "a" * d) for w in (texts, other))
        wanted += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(value) == pytest.approx(wanted, rel=1e-5)


def test_one_tokenizer_makes_it_ordinary_kl():
    pieces = {i: [i] for i in range(7)}
    tables = tables_of_pieces(pieces, pieces, {}, 7, 7)
    assert (tables.student.count, tables.student_pieces.longest) == (7, 1)
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 2, (2, 1, 6, 7)).astype(np.float32)
    ids = rng.integers(0, 7, (1, 6)).astype(np.int32)
    chunks = np.array([[-1, 0, 1, 2, 3, 4]], np.int32)
    value = prefix_kl(
        student, teacher, Alignment(chunks, chunks, np.ones((1, 5), bool)), tables,
        student_ids=ids, teacher_ids=ids,
    )  # fmt: skip
    t, s = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    np.testing.assert_allclose(value[0], (jnp.exp(t) * (t - s)).sum(-1)[0, :5], atol=1e-6)


def test_unchanged_by_renaming_either_vocabulary():
    rng = np.random.default_rng(1)
    names = [rng.permutation(V_S), rng.permutation(V_T)]
    ids, alignment, _, logits = batch(ROWS)
    plain = tables_of_pieces(BY_STUDENT, BY_TEACHER, ROLES, V_S, V_T)

    def renamed(pieces_of, own, other):
        return {int(own[i]): [int(other[j]) for j in pieces] for i, pieces in pieces_of.items()}

    tables = tables_of_pieces(
        renamed(BY_STUDENT, *names), renamed(BY_TEACHER, *names[::-1]),
        {int(names[0][11]): int(names[1][12])}, V_S, V_T,
    )  # fmt: skip
    moved = [z[..., np.argsort(name)] for z, name in zip(logits, names, strict=True)]
    new_ids = [name[i].astype(np.int32) for name, i in zip(names, ids, strict=True)]
    value = prefix_kl(*logits, alignment, plain, student_ids=ids[0], teacher_ids=ids[1])
    again = prefix_kl(*moved, alignment, tables, student_ids=new_ids[0], teacher_ids=new_ids[1])
    np.testing.assert_allclose(value, again, atol=2e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_never_below_zero(direction):
    tables = tables_of_pieces(BY_STUDENT, BY_TEACHER, ROLES, V_S, V_T)
    for seed in range(5):
        ids, alignment, _, logits = batch(ROWS, seed=seed, scale=0.01 if seed == 0 else 5.0)
        value = prefix_kl(
            *logits, alignment, tables, student_ids=ids[0], teacher_ids=ids[1], direction=direction
        )
        assert float(value.min()) > -1e-6


def test_excluded_tokens_and_huge_logits_keep_gradients_finite():
    tables = tables_of_pieces(BY_STUDENT, BY_TEACHER, ROLES, V_S, V_T)
    ids, alignment, _, (student, teacher) = batch(ROWS)
    student, teacher = student * 5e3, teacher * 5e3
    teacher[:, :, 7] = student[:, :, 5] = -np.inf
    student[:, :, [1, 7]] = -np.inf  # all tokens of one event

    def value(student):
        return prefix_kl(student, teacher, alignment, tables, student_ids=ids[0], teacher_ids=ids[1])

    gradient = jax.grad(lambda z: value(z).sum())(student)
    assert np.isfinite(value(student)).all()
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[:, :, [1, 5, 7]].any()
    assert np.asarray(gradient).any()


def test_masses_of_events_have_their_gradient():
    tables = tables_of_pieces(BY_STUDENT, BY_TEACHER, ROLES, V_S, V_T)
    with jax.enable_x64(True):
        logits = np.random.default_rng(0).normal(0, 2, (3, V_S))
        weights = np.random.default_rng(1).normal(0, 1, (3, tables.student.count))

        def total(z):
            return (log_masses(jnp.asarray(z), tables.student) * weights).sum()

        found = np.asarray(jax.grad(total)(logits))
        coordinates = list(np.ndindex(*logits.shape))
        by_steps = reference_gradient.differences(lambda z: float(total(np.array(z))), logits, coordinates)
    np.testing.assert_allclose([found[i] for i in coordinates], by_steps, atol=1e-8)


@pytest.mark.parametrize(
    ("block", "weights"),
    [
        (3, (0.5, 2.0)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, None), (64, (1.0, 1.0)))),
    ],
)
def test_blockwise_equals_plain_where_tokens_are_pieces(block, weights):
    """Ids of real chunks, so that every kind of step is there."""
    ids, alignment, _, _ = batch(ROWS)
    alignment.valid[1, 2] = False
    tables = tables_of_pieces(BY_STUDENT, BY_TEACHER, ROLES, V_S, V_T)
    rng = np.random.default_rng(2)
    hidden = [jnp.asarray(rng.normal(0, 1, (*i.shape, 5)), jnp.float32) for i in ids]
    unembedding = [jnp.asarray(rng.normal(0, 1, (v + 2, 5)), jnp.float32) for v in (V_S, V_T)]
    targets = jnp.ones(ids[0].shape, bool).at[0, 3:].set(False)
    config = LossConfig(LossKind.prefix_kl, temperature=1.5)
    scaling = {"max_scale": 10.0} if weights is None else {
        "dynamic_scaling": False, "ce_weight": weights[0], "kd_weight": weights[1]
    }  # fmt: skip

    def plain(h, u):
        logits = [jnp.einsum("btd,vd->btv", *pair) for pair in ((h, u), (hidden[1], unembedding[1]))]
        keys = {"student_ids": ids[0], "teacher_ids": ids[1], "temperature": 1.5}
        kd = masked_mean(prefix_kl(*logits, alignment, tables, **keys), valid_chunks(alignment))
        ce = masked_mean(*next_token_cross_entropy(logits[0][..., :V_S], ids[0], targets))
        return total_loss(ce, kd, **scaling)[0], (ce, kd)

    def blocks(h, u):
        found = blockwise_loss(
            h, u, hidden[1], unembedding[1], alignment, tables, ids[0], targets, config,
            teacher_ids=ids[1], block=block, weights=weights,
        )  # fmt: skip
        total = total_loss(found.ce, found.kd, **scaling)[0] if weights is None else found.total
        return total, (found.ce, found.kd)

    wanted, found = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden[0], unembedding[0])
        for f in (plain, blocks)
    )
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=3e-6, atol=3e-6 * float(jnp.abs(theirs).max()))


def test_a_large_offset_costs_no_digits():
    tables = tables_of_pieces(BY_STUDENT, BY_TEACHER, ROLES, V_S, V_T)
    ids, alignment, _, logits = batch(ROWS)
    student, teacher = (np.round(8 * z) / 8 for z in logits)  # which float32 holds beside 65536

    @jax.jit
    def total(student, teacher):
        return prefix_kl(student, teacher, alignment, tables, student_ids=ids[0], teacher_ids=ids[1]).sum()

    wanted = jax.value_and_grad(total)(student, teacher)
    for offsets in ((65536, 0), (0, 65536)):
        moved = jax.value_and_grad(total)(student + np.float32(offsets[0]), teacher + np.float32(offsets[1]))
        for ours, theirs in zip(moved, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=3e-6, atol=3e-6)
