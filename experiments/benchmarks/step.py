"""The distillation step: what it costs beside its own models, and what sharding leaves on each device.

    python experiments/benchmarks/step.py                   # both tables, a quarter of an hour on 2 cores
    python experiments/benchmarks/step.py memory --batch 32
    python experiments/benchmarks/step.py learned           # a W that trains beside a fixed one

Student and teacher have SmolLM2-135M's depth and width, random float32 weights, and the vocabularies of
Llama 3.1 and Qwen3, whose W is used where `make tokenizers` has fetched them. `overhead` times a whole step
(forward passes, cross-entropy and P-KL from blocks of logits, backward pass, clipping, AdamW) beside the
student's forward and backward pass under plain cross-entropy and the teacher's forward pass to its logits,
round after round in one run. `memory` asks the compiler what a device holds, on 1 and on 8 virtual devices
under fsdp with the same global batch: arguments and temporaries; nothing runs. `learned` times the gradient
of both models cut to 6 layers, of one row, with a fixed W and with one that trains, in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("NPROC", "32")  # collectives of 8 devices on few cores

import jax
import jax.numpy as jnp
import numpy as np
from losses import STUDENT, TEACHER, V_S, V_T, alignment_of, projection_of
from models import SMOLLM2

from xtoken_jax.alignment.batch import TokenRows
from xtoken_jax.data.batches import Batch, TeacherBatch
from xtoken_jax.distributed.mesh import MeshConfig, batch_sharding, make_mesh, replicated
from xtoken_jax.losses import LossConfig, LossKind, loss_tables, masked_mean, next_token_cross_entropy
from xtoken_jax.models import Model, logits
from xtoken_jax.models.decoder import Params
from xtoken_jax.projection.matrix import LearnableProjection
from xtoken_jax.train.batch_loss import Objective, Teacher
from xtoken_jax.train.gradient import gradient_of
from xtoken_jax.train.optimizer import OptimizerConfig, make_optimizer
from xtoken_jax.train.step import abstract_state, init_state, make_step


def batch_of(rows: int, length: int) -> Batch:
    """Random tokens; one chunk of eight has two teacher tokens."""
    rng = np.random.default_rng(0)

    def side(size: int) -> TokenRows:
        ids = rng.integers(0, size, (rows, length)).astype(np.int32)
        flags = np.ones((rows, length), bool)
        targets = flags & (np.arange(length) > 0)
        return TokenRows(ids, flags, targets, np.ones_like(ids))

    alignment = jax.tree.map(lambda x: np.repeat(np.asarray(x), rows, axis=0), alignment_of(length))
    return Batch(side(V_S), {"teacher": TeacherBatch(side(V_T), alignment)})


def models(remat: str) -> tuple[Model, Model]:
    student, teacher = (dataclasses.replace(SMOLLM2, vocab_size=size) for size in (V_S, V_T))
    return Model(student, remat=remat), Model(teacher)


def overhead(rows: int, length: int, rounds: int) -> None:
    student, teacher = models("none")
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    batch: Any = jax.device_put(batch_of(rows, length), batch_sharding(mesh))
    projection, which = projection_of(V_S, V_T)
    loss = LossConfig(kind=LossKind.p_kl)
    optimizer = make_optimizer(OptimizerConfig(), 100)

    def plain(params: Params, tokens: jax.Array) -> jax.Array:
        values = logits(*student(params, tokens))
        return masked_mean(*next_token_cross_entropy(values, tokens, jnp.ones(tokens.shape, bool)))

    with jax.set_mesh(mesh):
        params = jax.jit(student.init)(jax.random.key(0))
        of_teacher = {"teacher": jax.jit(teacher.init)(jax.random.key(1))}
        tables = {"teacher": jax.device_put(loss_tables(loss.kind, projection), replicated(mesh))}
        whole = make_step(student, {"teacher": Teacher(teacher, loss)}, loss, optimizer, student_size=V_S)
        step = jax.jit(whole, donate_argnums=0)
        backward = jax.jit(jax.value_and_grad(plain))
        forward = jax.jit(lambda params, tokens: logits(*teacher(params, tokens)))
        state = init_state(student, jax.tree.map(jnp.copy, params), optimizer, mesh)

        def run_step() -> None:
            nonlocal state
            state, metrics = step(state, of_teacher, tables, batch)
            float(metrics["loss"])

        runs = {
            "step": run_step,
            "student, forward + backward": lambda: jax.block_until_ready(backward(params, batch.student.ids)),
            "teacher, forward": lambda: jax.block_until_ready(
                forward(of_teacher["teacher"], batch.teachers["teacher"].rows.ids)
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if number:  # the first compiles
                    times[name].append(time.perf_counter() - start)
    step_times, *others = (np.array(seconds) for seconds in times.values())
    ratios = step_times / sum(others)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    print(f"B {rows}, T {length}, float32, W {which} of {STUDENT} and {TEACHER}, block {loss.block}")
    print("| | s |\n|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {statistics.median(seconds):.2f} |")
    print(f"| step / (student + teacher) | {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


def learned(rows: int, length: int, rounds: int) -> None:
    student, teacher = (Model(dataclasses.replace(model.config, num_layers=6)) for model in models("none"))
    batch, loss = batch_of(rows, length), LossConfig(kind=LossKind.p_kl)
    projection, which = projection_of(V_S, V_T)
    gradient = jax.jit(gradient_of(Objective(student, {"teacher": Teacher(teacher, loss)}, loss, V_S)))
    params = jax.jit(student.init)(jax.random.key(0))
    of_teacher = {"teacher": jax.jit(teacher.init)(jax.random.key(1))}
    cases = {}
    for name, w in (("fixed W", projection), ("learned W", projection.learnable())):
        tables = {"teacher": jax.tree.map(jnp.asarray, loss_tables(loss.kind, w))}
        of_w = {"teacher": w.logits} if isinstance(w, LearnableProjection) else {}
        cases[name] = params, None, of_teacher, tables, batch, of_w
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, args in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(gradient(*args))
            if number:  # the first compiles
                times[name].append(time.perf_counter() - start)
    fixed, with_w = (np.array(seconds) for seconds in times.values())
    low, middle, high = np.quantile(with_w / fixed, [0.25, 0.5, 0.75])
    print(f"B {rows}, T {length}, 6 layers, float32, W {which}, block {loss.block}")
    print("| gradient with | s |\n|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {statistics.median(seconds):.2f} |")
    print(f"| learned / fixed | {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


def memory(rows: int, length: int, remat: str) -> None:
    student, teacher = models(remat)
    loss = LossConfig(kind=LossKind.p_kl)
    optimizer = make_optimizer(OptimizerConfig(), 100)
    projection, _ = projection_of(V_S, V_T)
    print(f"B {rows}, T {length}, float32, remat {remat}, block {loss.block}")
    print("| devices | arguments, MiB a device | temporaries | together | falls |\n|---|---|---|---|---|")
    one = 0.0
    for count in (1, 8):
        mesh = make_mesh(MeshConfig(data=1, fsdp=count), devices=jax.devices()[:count])
        with jax.set_mesh(mesh):
            whole = make_step(student, {"teacher": Teacher(teacher, loss)}, loss, optimizer, student_size=V_S)
            by_row, everywhere = batch_sharding(mesh), replicated(mesh)
            batch, tables = (
                jax.tree.map(lambda x, s=s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree)
                for tree, s in (
                    (batch_of(rows, length), by_row),
                    (jax.tree.map(jnp.asarray, loss_tables(loss.kind, projection)), everywhere),
                )
            )
            lowered = jax.jit(whole, donate_argnums=0).lower(
                abstract_state(student, optimizer, mesh),
                {"teacher": teacher.abstract(mesh)}, {"teacher": tables}, batch,
            )  # fmt: skip
            analysis = lowered.compile().memory_analysis()
        sizes = [analysis.argument_size_in_bytes / 2**20, analysis.temp_size_in_bytes / 2**20]
        one = one or sum(sizes)
        shown = " | ".join(f"{size:,.0f}" for size in (*sizes, sum(sizes)))
        print(f"| {count} | {shown} | {one / sum(sizes):.2f} x |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=["overhead", "memory"])
    parser.add_argument("--batch", type=int, help="rows (default: 4, 128 for memory, 1 for learned)")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--remat", default="none", help="of the student, for memory (default: %(default)s)")
    options = parser.parse_args()
    if "overhead" in options.what:
        overhead(options.batch or 4, options.length, options.rounds)
    if "learned" in options.what:
        learned(options.batch or 1, options.length, options.rounds)
    if "memory" in options.what:
        memory(options.batch or 128, options.length, options.remat)


if __name__ == "__main__":
    main()
