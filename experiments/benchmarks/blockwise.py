"""Losses from hidden states: block by block beside the plain way through [B, T, V] logits.

    python experiments/benchmarks/blockwise.py time --width 512 --length 512
    python experiments/benchmarks/blockwise.py time --kinds p_kl --ways 1 4    # with a learned W
    python experiments/benchmarks/blockwise.py memory --length 2048 --dtype bfloat16

`time` runs plain and blockwise in turn, round after round, in one process; a ratio compares medians
of the same rounds. `memory` compiles only, at the sizes of Llama-3.2-1B and Qwen3-4B: what the compiler
reserves for temporaries, which is exact and says nothing of arguments and results. Both are forward and
backward, by the student's hidden states and unembedding (and by a learned W's logits), of cross-entropy and
the distillation term.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from losses import projection_of
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
from xtoken_jax.losses.blockwise.loss import blockwise_loss

KINDS = ("p_kl", "gold", "h_kl", "uld", "alm", "prefix_kl", "none")
WAYS = ("plain", "blockwise", "plain, fixed weights", "blockwise, fixed weights")
LEARNED = ("blockwise, learned W", "blockwise, fixed weights, learned W")  # P-KL
EVERY_WAY = WAYS + LEARNED


@dataclass(frozen=True)
class Sizes:
    batch: int
    length: int
    student: int
    teacher: int
    student_width: int
    teacher_width: int
    dtype: str


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


def arguments(sizes: Sizes, kind: LossKind, learned: bool = False) -> tuple:
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
        projection, _ = projection_of(sizes.student, sizes.teacher)
        made = projection.learnable() if learned else projection
        tables = jax.tree.map(jnp.asarray, loss_tables(kind, made))
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
    """The compiled gradient; a learned W's logits are the last argument."""
    function = objective(way, LossConfig(kind), block, sizes.student)
    if way not in LEARNED:
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*args).compile()

    def of_w(*args: Any) -> Any:
        return function(*args[:5], replace(args[5], logits=args[-1]), *args[6:-1])

    return jax.jit(jax.value_and_grad(of_w, argnums=(0, 1, len(args) - 1))).lower(*args).compile()


def arguments_of(way: str, sizes: Sizes, kind: LossKind) -> tuple:
    args = arguments(sizes, kind, way in LEARNED)
    return (*args, args[5].logits) if way in LEARNED else args


def memory(sizes: Sizes, kinds: list[str], ways: list[str], block: int) -> None:
    print(f"{'temporary memory, forward and backward':44}{'MiB':>10}{'ratio':>8}")
    for name in kinds:
        kind, base = LossKind(name), None
        for way in ways:
            # The tables are made on the host, at their real sizes; nothing else is.
            small = Sizes(1, 2, sizes.student, sizes.teacher, 1, 1, sizes.dtype)
            made = arguments_of(way, small, kind)[5:]
            tables = jax.eval_shape(lambda made=made: made)
            shapes = jax.eval_shape(lambda: arguments(sizes, LossKind.none))
            args = (*shapes[:5], tables[0], *shapes[6:], *tables[4:])
            found = lowered(way, kind, args, sizes, block).memory_analysis().temp_size_in_bytes / 2**20
            base = base or found
            print(f"{name + ', ' + way:44}{found:>10.1f}{found / base:>8.3f}", flush=True)


def timing(sizes: Sizes, kinds: list[str], ways: list[str], block: int, rounds: int) -> None:
    print(f"{'time, forward and backward':44}{'ms':>10}{'ratio':>8}")
    for name in kinds:
        kind = LossKind(name)
        args = {way: arguments_of(way, sizes, kind) for way in ways}
        compiled = {way: lowered(way, kind, args[way], sizes, block) for way in ways}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds + 1):
            for way in ways:
                start = time.perf_counter()
                jax.block_until_ready(compiled[way](*args[way]))
                times[way].append(time.perf_counter() - start)
        medians = {way: statistics.median(values[1:]) for way, values in times.items()}
        for way in ways:
            base = medians[ways[0]]
            print(f"{name + ', ' + way:44}{medians[way] * 1e3:>10.0f}{medians[way] / base:>8.2f}", flush=True)


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
                        help="; ".join(f"{i}: {way}" for i, way in enumerate(EVERY_WAY)))  # fmt: skip
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
    ways = [EVERY_WAY[i] for i in options.ways]
    if set(ways) & set(LEARNED) and options.kinds != ["p_kl"]:
        parser.error("a learned W is P-KL's: --kinds p_kl")
    print(f"{sizes}, block {options.block}, on {jax.devices()[0]}")
    if big:
        memory(sizes, options.kinds, ways, options.block)
    else:
        timing(sizes, options.kinds, ways, options.block, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
