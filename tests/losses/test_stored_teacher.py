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
    QUICK,
    TARGETS,
    TEACHER,
    TEACHER_IDS,
    TEACHER_MASK,
    UNEMBEDDING,
    V_S,
    V_T,
    assert_close,
    expected_of,
    gradients,
    logits,
    tables_of,
)

from xtoken_jax.alignment.batch import StoredRows
from xtoken_jax.losses import LossKind, distillation_loss, masked_mean, next_token_cross_entropy, valid_chunks
from xtoken_jax.losses.blockwise import blockwise_loss
from xtoken_jax.losses.blockwise_teacher import stored_logits
from xtoken_jax.mesh import MeshConfig, make_mesh

KINDS = [name for name in CASES if name != "none"]
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


@pytest.mark.parametrize("name", KINDS)
def test_all_tokens_in_float32_are_the_live_teacher(name):
    config = CASES[name]
    stored = everything(config)
    found = gradients(from_stored, config, tables_of(config.kind), stored=stored, block=5)
    assert_close(found, expected_of(name))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(ml_dtypes.bfloat16, 2e-2), (np.float16, 2e-3)])
def test_all_tokens_in_16_bits_are_near_the_live_teacher(name, dtype, bound):
    """Rounding as such: these rows of random logits are far from a language model's."""
    config = CASES[name]
    tables = tables_of(config.kind)
    options = {"compiler_options": QUICK, "block": 200}
    found = gradients(from_stored, config, tables, stored=everything(config, dtype), **options)
    assert_close(found, expected_of(name), bound)
    again = jnp.asarray(stored_logits(everything(config, dtype), config.logit_temperature))
    assert_close(found, gradients(from_logits, config, tables, teacher_logits=again))


@pytest.mark.parametrize("name", KINDS)
def test_the_likeliest_tokens_with_the_rest_spread(name):
    config = CASES[name]
    tables = tables_of(config.kind)
    stored, rows = likeliest(config, 4)
    expected = gradients(from_logits, config, tables, compiler_options=QUICK, teacher_logits=rows)
    found = gradients(from_stored, config, tables, compiler_options=QUICK, stored=stored, block=5)
    assert_close(found, expected)
    distance = [float(jnp.abs(x - y).max()) for x, y in zip(found[1], expected_of(name)[1], strict=True)]
    assert max(distance) > 1e-6 or name == "alm"  # it is not the live teacher, but ALM reads the label alone


def test_what_comes_is_always_kept():
    """ALM reads nothing else."""
    config = CASES["alm"]
    stored, _ = likeliest(config, 1)
    found = gradients(from_stored, config, tables_of(config.kind), stored=stored, block=5)
    assert_close(found, expected_of("alm"))


def test_whole_rows():
    config = CASES["p_kl"]
    stored, rows = likeliest(config, 3)
    np.testing.assert_allclose(stored_logits(stored, config.temperature), rows, rtol=1e-5, atol=1e-5)
    full = stored_logits(everything(config), 1.0)
    np.testing.assert_allclose(full, LOGITS[..., :V_T], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((8, 1, 1), "p_kl"),
        ((2, 2, 2), "p_kl"),
        ((1, 1, 8), "h_kl-first"),
        ((2, 1, 4), "uld"),
        ((2, 1, 4), "alm"),
        ((2, 2, 2), "prefix_kl"),
        ((2, 2, 2), "same_vocabulary-all"),
    ],
)
@pytest.mark.parametrize("count", [4, None])
def test_on_a_mesh(sizes, name, count):
    """Rows over devices, the student's vocabulary over others."""
    config = CASES[name]
    tables = tables_of(config.kind)
    stored = everything(config) if count is None else likeliest(config, count)[0]
    options = {"compiler_options": QUICK, "block": 5}
    expected = gradients(from_stored, config, tables, stored=stored, **options)
    mesh = make_mesh(MeshConfig(*sizes))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        hidden = jax.device_put(HIDDEN, rows)
        split = jax.device_put(
            jnp.pad(UNEMBEDDING, ((0, 1), (0, 0))), NamedSharding(mesh, PartitionSpec("tensor"))
        )
        found = gradients(
            from_stored, config, tables, hidden, split, stored=jax.device_put(stored, rows), **options
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
