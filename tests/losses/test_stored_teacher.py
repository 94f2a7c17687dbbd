"""Losses from a teacher's stored distributions, against those from its logits."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_blockwise import (
    ALIGNMENT,
    CASES,
    HIDDEN,
    IDS,
    SCALE,
    TARGETS,
    TEACHER,
    TEACHER_IDS,
    TEACHER_MASK,
    UNEMBEDDING,
    V_S,
    V_T,
    assert_close,
    logits,
    tables_of,
)

from xtoken_jax.alignment.batch import StoredRows
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.losses import (
    LossKind,
    distillation_loss,
    masked_mean,
    next_token_cross_entropy,
    total_loss,
    valid_chunks,
)
from xtoken_jax.losses.blockwise.loss import blockwise_loss
from xtoken_jax.losses.blockwise.teacher import stored_logits

KINDS = [
    name if name in ("p_kl", "alm") else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES
    if name != "none"
]
LOGITS = np.asarray(logits(*TEACHER), np.float64)
NORMALIZERS = {size: np.log(np.exp(LOGITS[..., :size]).sum(-1)) for size in (V_S, V_T)}


def size_of(config):
    return V_S if config.kind is LossKind.same_vocabulary else V_T


def everything(config, dtype=np.float32):
    """All log-probabilities, in the order of ids."""
    size = size_of(config)
    normalizers = NORMALIZERS[size]
    return StoredRows(
        None, jnp.asarray((LOGITS[..., :size] - normalizers[..., None]).astype(dtype)),
        jnp.zeros(normalizers.shape), jnp.asarray(normalizers, jnp.float32), size, 1.0,
    )  # fmt: skip


def likeliest(config, count):
    """The `count` likeliest and the token that comes, in float32; and float64 rows with the rest spread."""
    size, tau = size_of(config), config.logit_temperature
    log_p = LOGITS[..., :size] - NORMALIZERS[size][..., None]
    ids = np.full((*log_p.shape[:2], count + 1), size, np.int32)
    values = np.zeros(ids.shape)
    others = np.zeros(ids.shape[:2])
    rows = np.empty(log_p.shape)  # over tau, as the loss divides them
    for place in np.ndindex(ids.shape[:2]):
        row = log_p[place]
        kept = list(np.argsort(-row)[:count])
        label = int(TEACHER_IDS[place[0], (place[1] + 1) % ids.shape[1]])
        kept += [label] * (label not in kept)
        ids[place][: len(kept)], values[place][: len(kept)] = kept, row[kept]
        rest = [token for token in range(size) if token not in kept]
        others[place] = np.log(np.exp(row[rest] / tau).sum() / len(rest))
        rows[place] = others[place]
        rows[place][kept] = row[kept] / tau
    stored = StoredRows(
        jnp.asarray(ids), jnp.asarray(values, jnp.float32), jnp.asarray(others, jnp.float32),
        jnp.asarray(NORMALIZERS[size], jnp.float32), size, tau,
    )  # fmt: skip
    spread = rows * tau + NORMALIZERS[size][..., None]
    return stored, jnp.asarray(spread, jnp.float32)


def from_stored(config, tables, hidden, unembedding, stored, alignment=ALIGNMENT, **options):
    found = blockwise_loss(
        hidden, unembedding, None, None, alignment, tables, IDS, TARGETS, config, teacher_stored=stored,
        teacher_ids=TEACHER_IDS, teacher_mask=TEACHER_MASK, student_size=V_S, **options,
    )  # fmt: skip
    return found.ce, found.kd


def from_logits(config, tables, hidden, unembedding, teacher_logits):
    """The plain loss of these logits [B, T_t, V_t]."""
    student = logits(hidden, unembedding)[..., :V_S]
    values = distillation_loss(config)(
        student, teacher_logits, ALIGNMENT, tables, TEACHER_MASK, student_ids=IDS, teacher_ids=TEACHER_IDS
    )
    ce = masked_mean(*next_token_cross_entropy(student, IDS, TARGETS))
    return ce, masked_mean(values, valid_chunks(ALIGNMENT))


def slopes_of(function, config):
    """(the rows of a teacher) -> (CE, KD) and the gradients of the dynamically scaled total; one program."""

    def total(hidden, unembedding, tables, rows):
        ce, kd = function(config, tables, hidden, unembedding, rows)
        return total_loss(ce, kd, max_scale=SCALE)[0], (ce, kd)

    program = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))

    def found(rows, hidden=HIDDEN, unembedding=UNEMBEDDING):
        (_, values), slopes = program(hidden, unembedding, tables_of(config.kind), rows)
        return values, slopes

    return found


def blockwise(config, tables, hidden, unembedding, stored):
    return from_stored(config, tables, hidden, unembedding, stored, block=5)


def distance(found, expected):
    """The largest relative difference of a value and of a gradient as a whole."""
    ours, theirs = jax.tree.leaves(found), jax.tree.leaves(expected)
    pairs = zip(ours, theirs, strict=True)
    return max(float(jnp.linalg.norm((x - y).ravel()) / jnp.linalg.norm(y.ravel())) for x, y in pairs)


@pytest.mark.parametrize("name", KINDS)
def test_stored_is_live(name):
    """All tokens: as the live teacher, or rounded; some tokens: as rows in which the rest is spread."""
    config = CASES[name]
    plain = slopes_of(from_logits, config)
    live = plain(jnp.asarray(LOGITS, jnp.float32))
    stored = slopes_of(blockwise, config)
    assert_close(stored(everything(config)), live)
    for dtype, bound in ((ml_dtypes.bfloat16, 1e-2), (np.float16, 1e-3)):  # of rows as flat as these
        rounded = everything(config, dtype)
        values = rounded.log_probabilities.astype(jnp.float32)
        as_float32 = dataclasses.replace(rounded, log_probabilities=values)
        assert distance(stored(as_float32), live) < bound
    some, spread = likeliest(config, 4)
    found = stored(some)
    assert_close(found, plain(spread))
    assert (distance(found, live) < 3e-6) == (name == "alm")  # which reads what comes, and that is kept


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_rows_in_16_bits(dtype):
    config = CASES["p_kl-all-last"]
    stored = slopes_of(blockwise, config)
    for rows in (everything(config), likeliest(config, 4)[0]):
        narrow = dataclasses.replace(rows, log_probabilities=rows.log_probabilities.astype(dtype))
        wide = dataclasses.replace(narrow, log_probabilities=narrow.log_probabilities.astype(jnp.float32))
        assert_close(stored(narrow), stored(wide))


def test_whole_rows():
    config = CASES["p_kl"]
    stored, rows = likeliest(config, 3)
    np.testing.assert_allclose(stored_logits(stored, config.temperature), rows, rtol=1e-5, atol=1e-5)
    full = stored_logits(everything(config), 1.0)
    np.testing.assert_allclose(full, LOGITS[..., :V_T], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "name", "count"),
    [
        ((2, 2, 2), "p_kl", 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((2, 1, 4), "uld", None),
                ((8, 1, 1), "p_kl", None),
                ((1, 1, 8), "h_kl-first", 4),
                ((2, 1, 4), "alm", 4),
                ((2, 2, 2), "prefix_kl", 4),
                ((2, 2, 2), "same_vocabulary-all", 4),
                ((2, 2, 2), "uld", 4),
            )
        ),
    ],
)
def test_on_a_mesh(sizes, name, count):
    """Rows over devices, the student's vocabulary over others."""
    config = CASES[name]
    stored = everything(config) if count is None else likeliest(config, count)[0]
    expected = slopes_of(blockwise, config)(stored)
    mesh = make_mesh(MeshConfig(*sizes))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    by_vocabulary = NamedSharding(mesh, PartitionSpec("tensor"))
    with jax.set_mesh(mesh):
        split = jax.device_put(jnp.pad(UNEMBEDDING, ((0, 1), (0, 0))), by_vocabulary)
        found = slopes_of(blockwise, config)(
            jax.device_put(stored, rows), jax.device_put(HIDDEN, rows), split
        )
    slopes = found[1][0], found[1][1][: len(UNEMBEDDING)]
    assert_close((found[0], slopes), expected)


def test_what_does_not_fit_is_refused():
    config = CASES["gold"]
    stored, _ = likeliest(config, 4)
    arguments = config, tables_of(config.kind), HIDDEN, UNEMBEDDING
    with pytest.raises(ValueError, match=r"temperature=1\.7, but the rows are for 2\.0"):
        from_stored(*arguments, dataclasses.replace(stored, temperature=2.0))
    with pytest.raises(ValueError, match="rows of 16 tokens, but the tables are for 17"):
        from_stored(*arguments, dataclasses.replace(stored, size=16))
    with pytest.raises(ValueError, match="needs a teacher"):
        from_stored(*arguments, None)
