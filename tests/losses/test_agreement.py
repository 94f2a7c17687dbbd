"""What a step reports of a term beside its value, against loops: agreement, and the mass that W loses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import LossConfig, LossKind, loss_tables
from xtoken_jax.losses.agreement import top_token_agreement
from xtoken_jax.losses.total import distillation_parts
from xtoken_jax.projection.build import build_projection
from xtoken_jax.projection.matrix import Projection
from xtoken_jax.projection.partners import partners_of_teacher
from xtoken_jax.tokens.tokenizer import TokenizerPair

B, T_S, T_T, C, V_S, V_T = 8, 12, 14, 10, 13, 17
RNG = np.random.default_rng(2)


def chunks(length):
    """Mostly of one token, some of several; -1 in between."""
    found = np.cumsum(RNG.random((B, length)) < 0.8, axis=1) - 1
    found = np.where(RNG.random((B, length)) < 0.1, -1, found)
    return np.where(found < C, found, -1).astype(np.int32)


ALIGNMENT = Alignment(chunks(T_S), chunks(T_T), RNG.random((B, C)) < 0.9)
# more rows than the tokenizers have tokens; the rest would win everywhere
STUDENT, TEACHER = (
    (RNG.normal(size=(B, t, d)).astype(np.float32), RNG.normal(size=(rows, d)).astype(np.float32))
    for t, d, rows in ((T_S, 5, 16), (T_T, 6, 20))
)
STUDENT[1][V_S:] *= 100
TEACHER[1][V_T:] *= 100
PARTNERS = np.where(RNG.random(V_T) < 0.8, RNG.integers(0, V_S, V_T), -1).astype(np.int32)


def singles():
    """(row, student position, teacher position) of the chunks of one token on each side."""
    for b in range(B):
        for c in range(C):
            rows = (ALIGNMENT.student_chunks[b], ALIGNMENT.teacher_chunks[b])
            places = [[p - 1 for p in range(1, len(row)) if row[p] == c] for row in rows]
            if ALIGNMENT.valid[b, c] and [len(p) for p in places] == [1, 1]:
                yield b, places[0][0], places[1][0]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("shape", "block"),
    [(None, 7), (None, 500), ((2, 2, 2), 3), pytest.param((8, 1, 1), 7, marks=pytest.mark.slow)],
)
def test_agreement_is_what_loops_count(shape, block, known):
    hidden_s, hidden_t = STUDENT[0].copy(), TEACHER[0]
    expected = []
    for number, (b, p, q) in enumerate(singles()):
        partner = PARTNERS[np.argmax(TEACHER[1][:V_T] @ hidden_t[b, q])]
        if number % 2 and partner >= 0:  # made to agree, which chance seldom does
            hidden_s[b, p] = np.linalg.lstsq(STUDENT[1][:V_S], 50.0 * np.eye(V_S)[partner], rcond=None)[0]
    for b, p, q in singles():
        partner = PARTNERS[np.argmax(TEACHER[1][:V_T] @ hidden_t[b, q])]
        expected.append(partner == np.argmax(STUDENT[1][:V_S] @ hidden_s[b, p]))
    assert len(expected) > 20
    assert 0.2 < np.mean(expected) < 0.9
    rows = [jnp.asarray(hidden_s), jnp.asarray(hidden_t), jax.tree.map(jnp.asarray, ALIGNMENT)]
    unembeddings = [jnp.asarray(side[1]) for side in (STUDENT, TEACHER)]

    if known:
        rows[1] = jnp.asarray((TEACHER[0] @ TEACHER[1][:V_T].T).argmax(-1), jnp.int32)

    def agreement(rows, unembeddings):
        teacher = rows[1] if known else (rows[1], unembeddings[1])
        sides = rows[0], unembeddings[0], teacher, rows[2]
        return top_token_agreement(*sides, PARTNERS, student_size=V_S, block=block)

    if shape is None:
        found = agreement(rows, unembeddings)
    else:
        mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            rows = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
            unembeddings = jax.device_put(unembeddings, NamedSharding(mesh, PartitionSpec("tensor")))
            found = jax.jit(agreement)(rows, unembeddings)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-6)


def test_no_chunk_to_agree_on_is_no_number():
    nothing = Alignment(ALIGNMENT.student_chunks, ALIGNMENT.teacher_chunks, np.zeros((B, C), bool))
    student, teacher = (tuple(map(jnp.asarray, side)) for side in (STUDENT, TEACHER))
    found = top_token_agreement(*student, teacher, nothing, PARTNERS, student_size=V_S)
    assert np.isnan(found)


def test_partners_are_tokens_of_the_same_bytes_or_role(pair_folders):
    pair = TokenizerPair.load(*pair_folders)
    partners = partners_of_teacher(pair)
    student, teacher = (tokenizer.token_bytes.table for tokenizer in (pair.student, pair.teacher))
    assert (partners >= 0).sum() > 100
    for j, i in enumerate(partners):
        if i >= 0 and teacher[j] and student[i]:
            assert student[i] == teacher[j]
    w = build_projection(pair)
    for i in np.flatnonzero((w.weights[:, 0] == 1) & (w.indices[:, 0] >= 0)):
        j = w.indices[i, 0]
        if student[i] and student[i] == teacher[j]:
            assert student[partners[j]] == teacher[j]
    assert partners[pair.teacher.roles["eos"]] == pair.student.roles["eos"]


@pytest.mark.parametrize("top_k", [6, None])
def test_the_mass_that_w_loses(top_k):
    indices = RNG.integers(0, V_T, (V_S, 2)).astype(np.int32)
    indices[:, 1] = (indices[:, 0] + 1) % V_T
    weights = np.tile(np.float32([0.75, 0.25]), (V_S, 1))
    indices[::4], weights[::4] = -1, 0  # rows that send their mass nowhere
    w = Projection(indices, weights, V_T)
    z_s = RNG.normal(size=(B, T_S, V_S))
    z_t = RNG.normal(size=(B, T_T, V_T))
    config = LossConfig(LossKind.p_kl, top_k=top_k)
    _, (lost,) = distillation_parts(config)(
        jnp.asarray(z_s, jnp.float32),
        jnp.asarray(z_t, jnp.float32),
        ALIGNMENT,
        loss_tables(config.kind, w),
        None,
    )
    columns = np.argsort(-z_t.max((0, 1)))[: V_T if top_k is None else top_k]
    dense = np.zeros((V_S, V_T))
    for i in range(V_S):
        for j, x in zip(indices[i], weights[i], strict=True):
            dense[i, j] += x if j >= 0 else 0
    p = np.exp(z_s) / np.exp(z_s).sum(-1, keepdims=True)
    for b, s, _ in singles():
        c = ALIGNMENT.student_chunks[b, s + 1]
        np.testing.assert_allclose(lost[b, c], 1 - (p[b, s] @ dense)[columns].sum(), rtol=1e-5)
