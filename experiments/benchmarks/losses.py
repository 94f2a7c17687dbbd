"""Time and memory of the losses, forward and backward, beside an ordinary full-vocabulary KL.

    python experiments/benchmarks/losses.py                    # Llama 3.1 -> Qwen3, 256 and 1,024 positions
    python experiments/benchmarks/losses.py --positions 256 --rounds 3
    python experiments/benchmarks/losses.py --student 32000 --teacher 32000

W and the partitions are those of the two tokenizers where `make tokenizers` has fetched them and the sizes
are theirs, else made up. All losses run in turn, round after round, in one process; a ratio compares
medians of the same rounds. Memory is what the compiler reserves for temporaries, which is exact.
A dense W of these vocabularies would take 78 GB: a second table has it at a small part of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from prefix_case import fetched_pair, prefix_case

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import (
    hybrid_kl,
    likelihood_matching,
    masked_mean,
    next_token_cross_entropy,
    prefix_kl,
    projection_kl,
    rank_l1,
    valid_chunks,
)
from xtoken_jax.losses.math.chunks import Merging
from xtoken_jax.losses.terms.projection_kl import chunk_values, top_columns
from xtoken_jax.projection.cache import cached_projection
from xtoken_jax.projection.events import PrefixTables
from xtoken_jax.projection.matrix import LearnableProjection, Partition, Projection

STUDENT, TEACHER = "llama3_1", "qwen3"
V_S, V_T = 128_256, 151_669
PARTS_OF_DENSE = 16

Case = tuple[Callable[..., jax.Array], tuple]


def projection_of(student: int, teacher: int) -> tuple[Projection, str]:
    """W of the two sizes and what it is."""
    pair = fetched_pair(STUDENT, TEACHER)
    if (student, teacher) == (V_S, V_T) and pair is not None:
        projection = cached_projection(pair)
        if (projection.student_size, projection.teacher_size) == (V_S, V_T):
            return projection, f"{STUDENT} -> {TEACHER}"
    return made_up(student, teacher), "made up"


def made_up(student: int, teacher: int) -> Projection:
    """A W of the usual shape: 85% of the rows one to one, the others three pieces.

    One-to-one rows keep the order of ids, as merges of similar texts nearly do; that makes a gather fast.
    """
    rng = np.random.default_rng(0)
    indices = np.full((student, 4), -1, np.int32)
    weights = np.zeros((student, 4), np.float32)
    count = int(0.85 * min(student, teacher))
    one = np.sort(rng.permutation(student)[:count])
    indices[one, 0] = np.sort(rng.permutation(teacher)[:count])
    weights[one, 0] = 1
    rest = np.setdiff1d(np.arange(student), one)
    # Pieces are short and common, so that their ids are low.
    indices[rest, :3] = (teacher * rng.random((len(rest), 3)) ** 3).astype(np.int32)
    weights[rest, :3] = np.array([0.9, 0.09, 0.009]) / 0.999
    return Projection(indices, weights, teacher)


def alignment_of(positions: int) -> Alignment:
    """One row in which one chunk of eight has two teacher tokens."""
    lengths = np.where(np.random.default_rng(1).random(positions) < 1 / 8, 2, 1)
    teacher = np.repeat(np.arange(positions), lengths)[:positions]
    chunks = [jnp.asarray(c[None], jnp.int32) for c in (np.arange(positions), teacher)]
    return Alignment(*chunks, jnp.ones((1, positions), bool))


def full_kl(logits: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL over one vocabulary, position by position: what distillation costs without two tokenizers."""
    wanted, own = (jax.nn.log_softmax(z, axis=-1) for z in (teacher, logits))
    return (jnp.exp(wanted) * (wanted - own)).sum(-1).mean()


def dense_p_kl(
    student: jax.Array, teacher: jax.Array, dense: jax.Array, alignment: Alignment, top_k: int
) -> jax.Array:
    """P-KL as the formula says it, by a product with all of W."""
    count = alignment.valid.shape[1]
    columns, _ = top_columns(teacher, None, top_k)
    student, teacher = (z.reshape(-1, z.shape[-1]) for z in (student, teacher))
    merged = Merging.of(alignment.teacher_chunks, count, "mean")
    target = merged.merge(jax.nn.log_softmax(teacher[:, columns], axis=-1))
    projected = (jax.nn.softmax(student, axis=-1) @ dense)[:, columns]
    projected = Merging.of(alignment.student_chunks, count, "mean").merge(projected)
    values = chunk_values(projected, target, "forward", 0.5).reshape(alignment.valid.shape)
    return masked_mean(values, valid_chunks(alignment))


def logits_of(positions: int, student: int, teacher: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    sizes = (student, teacher)
    return [jax.random.normal(k, (1, positions, v)) * 3 for k, v in zip(keys, sizes, strict=True)]


def main_cases(projection: Projection, positions: int, top_k: int) -> dict[str, Case]:
    """Name -> a loss of its first argument, and the arguments; the first is what others compare with."""
    assert projection.teacher_size is not None
    width = projection.teacher_size
    student, teacher = logits_of(positions, projection.student_size, width)
    alignment = alignment_of(positions)
    rows, split, learnable, strict, relaxed = jax.tree.map(
        jnp.asarray,
        (
            projection,
            projection.split(),
            projection.learnable(),
            Partition.strict(projection),
            Partition.relaxed(projection),
        ),
    )
    ids = jnp.arange(positions, dtype=jnp.int32)[None]

    def p_kl(columns: int) -> Callable[..., jax.Array]:
        return lambda s, t, w, a: masked_mean(projection_kl(s, t, a, w, top_k=columns), valid_chunks(a))

    def learned(both: tuple, t: jax.Array, w: LearnableProjection, a: Alignment) -> jax.Array:
        """Its gradient goes to W's logits too."""
        return p_kl(top_k)(both[0], t, replace(w, logits=both[1]), a)

    def hybrid(s: jax.Array, t: jax.Array, partition: Partition, a: Alignment) -> jax.Array:
        return masked_mean(hybrid_kl(s, t, a, partition, uncommon_top_k=top_k), valid_chunks(a))

    def uld(s: jax.Array, t: jax.Array, a: Alignment) -> jax.Array:
        return masked_mean(rank_l1(s, t, a), valid_chunks(a))

    def alm(s: jax.Array, t: jax.Array, a: Alignment, ids: jax.Array) -> jax.Array:
        values = likelihood_matching(s, t, a, student_ids=ids, teacher_ids=ids)
        return masked_mean(values, valid_chunks(a))

    def prefix(s: jax.Array, t: jax.Array, tables: PrefixTables, a: Alignment, *ids: jax.Array) -> jax.Array:
        values = prefix_kl(s, t, a, tables, student_ids=ids[0], teacher_ids=ids[1])
        return masked_mean(values, valid_chunks(a))

    def ce(s: jax.Array, ids: jax.Array) -> jax.Array:
        return masked_mean(*next_token_cross_entropy(s, ids, jnp.ones(ids.shape, bool)))

    # Prefix KL needs tokens that are pieces of each other: those of real text.
    of_prefix = {}
    pair = fetched_pair(STUDENT, TEACHER)
    if pair is not None and (pair.student.size, pair.teacher.size) == (projection.student_size, width):
        tables, of_text, *both = prefix_case(pair, 1, positions)
        of_prefix = {"prefix KL": (prefix, (student, teacher, tables, of_text, *both))}
    return {
        "ordinary KL over V_t": (full_kl, (teacher + 1, teacher)),
        "P-KL, W split (as in training)": (p_kl(top_k), (student, teacher, split, alignment)),
        "P-KL, W learned": (learned, ((student, learnable.logits), teacher, learnable, alignment)),
        "P-KL, W as rows": (p_kl(top_k), (student, teacher, rows, alignment)),
        "P-KL, W split, all V_t columns": (p_kl(width), (student, teacher, split, alignment)),
        "GOLD": (hybrid, (student, teacher, strict, alignment)),
        "H-KL": (hybrid, (student, teacher, relaxed, alignment)),
        **of_prefix,
        "ALM": (alm, (student, teacher, alignment, ids)),
        "ULD": (uld, (student, teacher, alignment)),
        "cross-entropy alone": (ce, (student, ids)),
    }


def dense_cases(positions: int, student: int, teacher: int, top_k: int) -> dict[str, Case]:
    projection = made_up(student, teacher)
    cases = main_cases(projection, positions, top_k)
    dense = jnp.asarray(np.asarray(projection.project(jnp.eye(student))))
    base, split = list(cases)[:2]
    s, t, _, alignment = cases[split][1]
    return {
        base: cases[base],
        split: cases[split],
        "P-KL, W dense": (lambda s, t, w, a: dense_p_kl(s, t, w, a, top_k), (s, t, dense, alignment)),
    }


def measure(cases: dict[str, Case], rounds: int) -> None:
    """Prints a table: milliseconds and MiB, and the ratios to the first case."""
    compiled = {
        name: jax.jit(jax.value_and_grad(f)).lower(*args).compile() for name, (f, args) in cases.items()
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, (_, args) in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*args))
            times[name].append(time.perf_counter() - start)
    # The first round warms up.
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    memory = {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}
    base = next(iter(cases))
    print(f"{'loss, forward and backward':32}{'time':>10}{'ratio':>8}{'temporary':>14}{'ratio':>8}")
    for name in cases:
        print(
            f"{name:32}{medians[name] * 1e3:>7.0f} ms{medians[name] / medians[base]:>8.2f}"
            f"{memory[name] / 2**20:>10.0f} MiB{memory[name] / memory[base]:>8.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=int, default=V_S, help="V_s (default: %(default)s)")
    parser.add_argument("--teacher", type=int, default=V_T, help="V_t (default: %(default)s)")
    parser.add_argument(
        "--positions", type=int, nargs="+", default=[256, 1024], help="T on both sides, a table each"
    )
    parser.add_argument(
        "--top-k", type=int, default=8192, help="columns of P-KL, entries of the sorted part (default: 8192)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    projection, origin = projection_of(options.student, options.teacher)
    indices = np.asarray(projection.indices)
    entries = (indices >= 0).sum(1)
    sizes = f"V_s {options.student:,}  V_t {options.teacher:,}"
    print(f"{sizes}  K {indices.shape[1]}  top_k {options.top_k:,}  on {jax.devices()[0]}, {load()}")
    print(f"W {origin}: {np.sum(entries == 1):,} rows of one entry, {np.sum(entries > 1):,} of more")
    print("aims: P-KL within 1.5 times the ordinary KL, GOLD and H-KL within 3")
    for positions in options.positions:
        print(f"\npositions {positions:,}")
        measure(main_cases(projection, positions, min(options.top_k, options.teacher)), options.rounds)
    small = [n // PARTS_OF_DENSE for n in (options.student, options.teacher, options.top_k)]
    small[2] = min(small[1:])
    positions = options.positions[0]
    print(f"\none {PARTS_OF_DENSE}th: V_s {small[0]:,}  V_t {small[1]:,}  top_k {small[2]:,}", end="")
    print(f"  W made up  positions {positions:,}")
    measure(dense_cases(positions, *small), options.rounds)
    print(f"\nat the end: {load()}")


def load() -> str:
    """How busy the machine is, which the times depend on."""
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return f"{os.cpu_count()} cores, load {busy:.1f}"


if __name__ == "__main__":
    main()
