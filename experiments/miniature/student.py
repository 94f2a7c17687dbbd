"""One run: a student, one loss, one regime, one seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import world

from xtoken_jax import build_projection
from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import (
    hybrid_kl,
    kd_scale_capped,
    likelihood_matching,
    masked_mean,
    next_token_cross_entropy,
    prefix_kl,
    projection_kl,
    rank_l1,
    total_loss,
    valid_chunks,
)
from xtoken_jax.models.decoder import logits
from xtoken_jax.projection.matrix import Partition
from xtoken_jax.projection.prefixes import prefix_tables

VERSION = 1  # of the losses: to be raised when one of them changes its values
STEPS, RATE, W_RATE = 2000, 3e-3, 1e-2


@dataclass(frozen=True)
class Run:
    """A loss and its scaling.

    Attributes:
        name: as in the tables.
        kind: none, uld, gold, h_kl, p_kl, prefix_kl or alm.
        merge: of P-KL.
        weight: of the term; None for dynamic scaling.
        learnt: whether W is trained too.
        max_scale: of dynamic scaling. The package's 10, and for ALM, whose term is a hundred times
            smaller, its 1,000.
    """

    name: str
    kind: str
    weight: float | None = None
    merge: str = "mean"
    learnt: bool = False
    max_scale: float = 10.0


RUNS = (
    Run("none", "none", 0.0),
    Run("prefix KL, dynamic", "prefix_kl"),
    Run("P-KL first, dynamic", "p_kl", merge="first"),
    Run("H-KL, dynamic", "h_kl"),
    Run("P-KL mean, dynamic", "p_kl"),
    Run("ALM, dynamic", "alm", max_scale=1000.0),
    Run("prefix KL, weight 1", "prefix_kl", 1.0),
    Run("GOLD, dynamic", "gold"),
    Run("ULD, dynamic", "uld"),
    Run("P-KL first, weight 0.3", "p_kl", 0.3, "first"),
    Run("P-KL mean, weight 0.3", "p_kl", 0.3),
    Run("P-KL mean, learned W, dynamic", "p_kl", learnt=True),
    Run("P-KL mean_normalized, dynamic", "p_kl", merge="mean_normalized"),
    Run("P-KL mean_normalized, weight 0.3", "p_kl", 0.3, "mean_normalized"),
    Run("ALM, weight 100", "alm", 100.0),
)
TELLING = tuple(run.name for run in RUNS[:4])  # also with 0% and 30% of the sums wrong


def settings(run: Run, regime: str, wrong_share: float) -> dict:
    """All that a result depends on but the seed."""
    teacher = asdict(world.TEACHERS[regime])
    sizes = [
        world.STUDENT_SIZE, world.WIDTH, world.SUMS, world.SUM_ROWS, world.ENGLISH_ROWS, world.BATCHES,
        world.STUDENT_LENGTH, world.TEACHER_LENGTH, world.ENGLISH_CHARACTERS, world.HELD_OUT,
    ]  # fmt: skip
    return {
        **asdict(run), "regime": regime, "wrong_share": wrong_share, "teacher": teacher, "sizes": sizes,
        "steps": STEPS, "rates": [RATE, W_RATE], "version": VERSION,
    }  # fmt: skip


def term_of(run: Run, pair) -> tuple[Callable, object]:
    """(student logits, teacher logits, batch, tables) -> [B, C], and the tables."""
    if run.kind == "none":
        return lambda s, t, batch, tables: jnp.zeros(batch["valid"].shape), None
    w = build_projection(pair)
    tables = {
        "uld": lambda: None,
        "gold": lambda: Partition.strict(w),
        "h_kl": lambda: Partition.relaxed(w),
        "p_kl": lambda: w.learnable() if run.learnt else w.split(),
        "prefix_kl": lambda: prefix_tables(pair),
        "alm": lambda: None,
    }[run.kind]()

    def term(s, t, batch, tables):
        alignment = Alignment(batch["student_chunks"], batch["teacher_chunks"], batch["valid"])
        ids = {"student_ids": batch["student_ids"], "teacher_ids": batch["teacher_ids"]}
        if run.kind == "uld":
            return rank_l1(s, t, alignment)
        if run.kind in ("gold", "h_kl"):
            return hybrid_kl(s, t, alignment, tables)
        if run.kind == "p_kl":
            return projection_kl(s, t, alignment, tables, merge=run.merge, **ids)
        if run.kind == "prefix_kl":
            return prefix_kl(s, t, alignment, tables, **ids)
        return likelihood_matching(s, t, alignment, **ids)

    return term, jax.tree.map(jnp.asarray, tables)


def train(
    work: Path, run: Run, regime: str, wrong_share: float, seed: int, report: Callable, *, steps: int = STEPS
) -> dict:
    """Train one student and measure it.

    Returns:
        accuracy of held-out sums ("sum", "digit1" to "digit3"), "bits_per_byte", the last means of
        cross-entropy and of the term, the mean factor of the term and how often it was capped,
        a "trace" of ten points (step, ce, kd), and seconds.
    """
    begin = time.perf_counter()
    pair = world.pair_of(work, regime)
    data = world.cached_batches(work, regime, wrong_share, report)
    _, teacher_params = world.train_teacher(work, regime, report)
    unembedding = jnp.asarray(teacher_params["embedding"])
    model = world.model_of(world.STUDENT_SIZE, 2)
    term, tables = term_of(run, pair)

    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, 100, steps, 1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    of_w = optax.adam(W_RATE)
    params = {"model": model.init(jax.random.key(seed)), "w": tables.logits if run.learnt else None}
    state = optimizer.init(params["model"]), of_w.init(params["w"])

    @jax.jit
    def step(params, state, batch, tables):
        def loss(params):
            own = logits(*model(params["model"], batch["student_ids"]))
            ce = masked_mean(*next_token_cross_entropy(own, batch["student_ids"], batch["targets"]))
            if run.kind == "none":
                return ce, (ce, jnp.float32(0), jnp.float32(0), jnp.float32(0))
            table = tables if params["w"] is None else _with_logits(tables, params["w"])
            teacher = logits(batch["hidden"].astype(jnp.float32), unembedding)
            alignment = Alignment(batch["student_chunks"], batch["teacher_chunks"], batch["valid"])
            kd = masked_mean(term(own, teacher, batch, table), valid_chunks(alignment))
            total, scale = total_loss(
                ce,
                kd,
                dynamic_scaling=run.weight is None,
                max_scale=run.max_scale,
                kd_weight=run.weight or 0.0,
            )
            capped = kd_scale_capped(ce, kd, run.max_scale) if run.weight is None else jnp.zeros((), bool)
            return total, (ce, kd, scale, capped.astype(jnp.float32))

        gradient, parts = jax.grad(loss, has_aux=True)(params)
        updates, first = optimizer.update(gradient["model"], state[0], params["model"])
        w_updates, second = of_w.update(gradient["w"], state[1])
        params = {
            "model": optax.apply_updates(params["model"], updates),
            "w": optax.apply_updates(params["w"], w_updates),
        }
        return params, (first, second), jnp.stack(parts)

    order = np.random.default_rng(seed).permutation
    places = np.concatenate([order(world.BATCHES) for _ in range(-(-steps // world.BATCHES))])[:steps]
    parts = []
    for number, place in enumerate(places):
        batch = {name: array[place] for name, array in data.items()}
        params, state, found = step(params, state, batch, tables)
        parts.append(found)
        if number % 100 == 99:
            ce, kd = np.asarray(found)[:2]
            report(f"step {number + 1}/{steps}  ce {ce:.3f}  kd {kd:.3f}")
            if not np.isfinite(ce + kd):
                raise SystemExit(f"{run.name}, {regime}, seed {seed}: not finite at step {number + 1}")
    means = np.stack(parts).reshape(10, -1, 4).mean(1)
    figures = world.accuracy(model, params["model"], pair.student)
    figures["bits_per_byte"] = world.bits_per_byte(model, params["model"], pair.student)
    figures |= dict(
        zip(("ce", "kd", "factor", "capped"), np.stack(parts)[-100:].mean(0).tolist(), strict=True)
    )
    figures["capped"] = float(np.stack(parts)[:, 3].mean())
    trace = [[round(x, 4) for x in point] for point in means[:, :2].tolist()]
    return {**figures, "trace": trace, "seconds": round(time.perf_counter() - begin, 1)}


def _with_logits(tables, values):
    return type(tables)(**{**vars(tables), "logits": values})
