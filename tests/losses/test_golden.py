"""The 24 cases of the official implementation: value, parts, partition and gradient."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import (
    hybrid_terms,
    masked_mean,
    next_token_cross_entropy,
    projection_kl,
    total_loss,
    valid_chunks,
)
from xtoken_jax.projection.matrix import Partition, Projection

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())


def load(case):
    arrays = dict(np.load(GOLDEN / f"{case['name']}.npz"))
    projection = Projection(
        arrays["projection_indices"].astype(np.int32),
        arrays["projection_weights"],
        case["shape"]["teacher_vocab"],
    )
    valid = arrays["pair_valid"] & (arrays["sample_mask"][:, None] > 0)
    if case["correct_chunks_only"]:
        valid &= arrays["pair_is_correct"]
    alignment = Alignment(
        arrays["student_chunk_id"].astype(np.int32), arrays["teacher_chunk_id"].astype(np.int32), valid
    )
    return arrays, projection, alignment


def partition_of(case, projection):
    return Partition.strict(projection) if case["loss"] == "gold" else Partition.relaxed(projection)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_value_and_gradient(case):
    arrays, projection, alignment = load(case)
    direction = "reverse" if case["reverse_kl"] else "forward"
    tau = case["temperature"]

    def loss(student_logits):
        chunks = valid_chunks(alignment)
        if case["loss"] == "p_kl":
            values = projection_kl(
                student_logits, arrays["teacher_logits"], alignment, projection,
                temperature=tau, top_k=case["vocab_topk"], direction=direction,
            )  # fmt: skip
            parts = {}
        else:
            terms = hybrid_terms(
                student_logits, arrays["teacher_logits"], alignment, partition_of(case, projection),
                temperature=tau, uncommon_top_k=case["uncommon_topk"], direction=direction,
            )  # fmt: skip
            values = terms.common + terms.uncommon
            parts = {
                "kl_common_t0": masked_mean(terms.common, chunks) / tau**2,
                "l1_uncommon_t0": masked_mean(terms.uncommon, chunks) / tau**2,
            }
        kd = masked_mean(values, chunks)
        mask = (arrays["token_mask"] > 0) & (arrays["sample_mask"][:, None] > 0)
        ce = masked_mean(*next_token_cross_entropy(student_logits, arrays["input_ids"], mask))
        total, scale = total_loss(
            ce, kd, dynamic_scaling=case["dynamic_scaling"],
            kd_weight=case["kd_weight"], ce_weight=case["ce_weight"],
        )  # fmt: skip
        return total, {"kl_loss": kd, "ce_loss": ce, "kl_loss_scale": scale, **parts}

    (total, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        jnp.asarray(arrays["student_logits"])
    )
    expected = case["expected"]
    if not case["dynamic_scaling"]:
        metrics.pop("kl_loss_scale")
    for name, value in {"loss": total, **metrics}.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)
    reference = arrays["grad_student_logits"]
    np.testing.assert_allclose(gradient, reference, rtol=1e-5, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize("case", [c for c in CASES if c["loss"] != "p_kl"], ids=lambda c: c["name"])
def test_partition(case):
    arrays, projection, _ = load(case)
    ours = partition_of(case, projection)
    pairs = {tuple(p) for p in zip(ours.common_student.tolist(), ours.common_teacher.tolist(), strict=True)}
    official = zip(arrays["partition_common_student"], arrays["partition_common_teacher"], strict=True)
    assert pairs == {(int(s), int(t)) for s, t in official}
    assert set(ours.uncommon_student.tolist()) == set(arrays["partition_uncommon_student"].tolist())
    assert set(ours.uncommon_teacher.tolist()) == set(arrays["partition_uncommon_teacher"].tolist())
