"""Losses from hidden states: block by block beside the plain way through [B, T, V] logits.

    python experiments/benchmarks/blockwise.py time --width 512 --length 512
    python experiments/benchmarks/blockwise.py memory --length 2048 --dtype bfloat16

`time` runs plain and blockwise in turn, round after round, in one process; a ratio compares medians
of the same rounds. `memory` compiles only, at the sizes of Llama-3.2-1B and Qwen3-4B: what the compiler
reserves for temporaries, which is exact and says nothing of arguments and results. Both are forward and
backward, by the student's hidden states and unembedding, of cross-entropy and the distillation term.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from prefix_case import fetched_pair, prefix_case

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import (
    LossConfig,
    LossKind,
    distillation_loss,
    loss_tables,
    masked_mean,
    next_token_cross_entropy,
    total_loss,
    valid_chunks,
)
from xtoken_jax.losses.blockwise import blockwise_loss
from xtoken_jax.projection.matrix import Projection

KINDS = ("p_kl", "gold", "h_kl", "uld", "alm", "prefix_kl", "none")
WAYS = ("plain", "blockwise", "plain, fixed weights", "blockwise, fixed weights")


@dataclass(frozen=True)
class Sizes:
    batch: int
    length: int
    student: int
    teacher: int
    student_width: int
    teacher_width: int
    dtype: str


def random_projection(rng: np.random.Generator, student: int, teacher: int) -> Projection:
    """A W of the shape that Llama 3.1 and Qwen3 have: 6 of 7 rows one to one, the others three pieces."""
    indices = np.full((student, 4), -1, np.int32)
    weights = np.zeros((student, 4), np.float32)
    one = rng.permutation(student) < min(0.86 * student, teacher)
    indices[one, 0] = rng.permutation(teacher)[: one.sum()]
    weights[one, 0] = 1
    indices[~one, :3] = rng.integers(teacher, size=((~one).sum(), 3))
    weights[~one, :3] = np.array([0.9, 0.09, 0.009]) / 0.999
    return Projection(indices, weights, teacher)


def alignment_of(rng: np.random.Generator, batch: int, length: int) -> Alignment:
    """Rows in which one chunk of eight has two teacher tokens."""
    student = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    teacher = np.stack(
        [np.repeat(np.arange(length), np.where(rng.random(length) < 1 / 8, 2, 1))[:length] for _ in student]
    )
    return Alignment(student, teacher.astype(np.int32), np.ones((batch, length), bool))


def objective(way: str, config: LossConfig, block: int, size: int) -> Callable[..., jax.Array]:
    """(student hidden and unembedding, teacher's, alignment, tables, ids, targets) -> the total."""

    def plain(
        hs: Any, us: Any, ht: Any, ut: Any, alignment: Any, tables: Any, ids: Any, targets: Any, others: Any
    ) -> Any:
        logits = jnp.einsum("btd,vd->btv", hs, us, preferred_element_type=jnp.float32)[..., :size]
        ce = masked_mean(*next_token_cross_entropy(logits, ids, targets))
        if config.kind is LossKind.none:
            return ce
        teacher = jnp.einsum("btd,vd->btv", ht, ut, preferred_element_type=jnp.float32)
        values = distillation_loss(config)(
            logits, teacher, alignment, tables, None, student_ids=ids, teacher_ids=others
        )
        kd = masked_mean(values, valid_chunks(alignment))
        return total_loss(ce, kd, dynamic_scaling="fixed" not in way)[0]

    def blockwise(*args: Any) -> Any:
        values = blockwise_loss(*args[:-1], config, teacher_ids=args[-1], block=block)
        return values.ce if config.kind is LossKind.none else total_loss(values.ce, values.kd)[0]

    def fixed(*args: Any) -> Any:
        return blockwise_loss(*args[:-1], config, teacher_ids=args[-1], block=block, weights=(1.0, 1.0)).total

    return plain if way.startswith("plain") else fixed if "fixed" in way else blockwise


def arguments(sizes: Sizes, kind: LossKind) -> tuple:
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(sizes.dtype)
    keys = jax.random.split(jax.random.key(0), 4)

    def normal(key: jax.Array, *shape: int) -> jax.Array:
        return (jax.random.normal(key, shape) * (3 / shape[-1] ** 0.5 if len(shape) == 2 else 1)).astype(
            dtype
        )

    rows = (sizes.batch, sizes.length)
    tables = None
    alignment = jax.tree.map(jnp.asarray, alignment_of(rng, *rows))
    ids, others = (jnp.asarray(rng.integers(v, size=rows), jnp.int32) for v in (sizes.student, sizes.teacher))
    if kind is LossKind.prefix_kl:
        pair = fetched_pair("llama3_1", "qwen3")
        if pair is None or (pair.student.size, pair.teacher.size) != (sizes.student, sizes.teacher):
            raise SystemExit("prefix_kl needs the tokenizers of `make tokenizers` and their sizes")
        tables, alignment, ids, others = prefix_case(pair, *rows)
    elif kind is not LossKind.none:
        projection = random_projection(rng, sizes.student, sizes.teacher)
        tables = jax.tree.map(jnp.asarray, loss_tables(kind, projection))
    return (
        normal(keys[0], *rows, sizes.student_width),
        normal(keys[1], sizes.student, sizes.student_width),
        normal(keys[2], *rows, sizes.teacher_width),
        normal(keys[3], sizes.teacher, sizes.teacher_width),
        alignment,
        tables,
        ids,
        jnp.ones(rows, bool),
        others,
    )


def lowered(way: str, kind: LossKind, args: tuple, sizes: Sizes, block: int) -> Any:
    function = objective(way, LossConfig(kind), block, sizes.student)
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*args).compile()


def memory(sizes: Sizes, kinds: list[str], ways: list[str], block: int) -> None:
    print(f"{'temporary memory, forward and backward':40}{'MiB':>10}{'ratio':>8}")
    for name in kinds:
        kind, base = LossKind(name), None
        args = jax.eval_shape(lambda kind=kind: arguments(sizes, kind)) if kind is LossKind.none else None
        if args is None:
            # The tables are made on the host, at their real sizes; nothing else is.
            small = Sizes(1, 2, sizes.student, sizes.teacher, 1, 1, sizes.dtype)
            tables = arguments(small, kind)[5]
            shapes = jax.eval_shape(lambda: arguments(sizes, LossKind.none))
            args = (*shapes[:5], jax.eval_shape(lambda t=tables: t), *shapes[6:])
        for way in ways:
            found = lowered(way, kind, args, sizes, block).memory_analysis().temp_size_in_bytes / 2**20
            base = base or found
            print(f"{name + ', ' + way:40}{found:>10.0f}{found / base:>8.3f}", flush=True)


def timing(sizes: Sizes, kinds: list[str], ways: list[str], block: int, rounds: int) -> None:
    print(f"{'time, forward and backward':40}{'ms':>10}{'ratio':>8}")
    for name in kinds:
        kind = LossKind(name)
        args = arguments(sizes, kind)
        compiled = {way: lowered(way, kind, args, sizes, block) for way in ways}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds + 1):
            for way in ways:
                start = time.perf_counter()
                jax.block_until_ready(compiled[way](*args))
                times[way].append(time.perf_counter() - start)
        medians = {way: statistics.median(values[1:]) for way, values in times.items()}
        for way in ways:
            base = medians[ways[0]]
            print(f"{name + ', ' + way:40}{medians[way] * 1e3:>10.0f}{medians[way] / base:>8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("time", "memory"))
    parser.add_argument("--student", type=int, default=128_256, help="V_s")
    parser.add_argument("--teacher", type=int, default=151_669, help="V_t")
    parser.add_argument("--width", type=int, help="D of both; default 256, or 2048 and 2560 for memory")
    parser.add_argument("--batch", type=int, help="rows; default 1, or 2 for memory")
    parser.add_argument("--length", type=int, help="T on both sides; default 512, or 2048 for memory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["p_kl", "h_kl"])
    parser.add_argument("--ways", nargs="+", type=int, default=list(range(len(WAYS))),
                        help="; ".join(f"{i}: {way}" for i, way in enumerate(WAYS)))  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    big = options.what == "memory"
    sizes = Sizes(
        options.batch or (2 if big else 1),
        options.length or (2048 if big else 512),
        options.student,
        options.teacher,
        options.width or (2048 if big else 256),
        options.width or (2560 if big else 256),
        options.dtype,
    )
    ways = [WAYS[i] for i in options.ways]
    print(f"{sizes}, block {options.block}, on {jax.devices()[0]}")
    if big:
        memory(sizes, options.kinds, ways, options.block)
    else:
        timing(sizes, options.kinds, ways, options.block, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
