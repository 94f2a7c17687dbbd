"""Time and memory of the losses, forward and backward, beside an ordinary full-vocabulary KL.

    python experiments/benchmarks/losses.py                    # a vocabulary of 32,000 on each side
    python experiments/benchmarks/losses.py --student 128256 --teacher 151669 --positions 256

All losses run in turn, round after round, in one process; a ratio compares medians of the same
rounds. Memory is what the compiler reserves for temporaries, which is exact.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import hybrid_kl, masked_mean, projection_kl, valid_chunks
from xtoken_jax.losses.divergence import kl_terms
from xtoken_jax.projection.matrix import Partition, Projection, SplitProjection


def random_projection(rng: np.random.Generator, student: int, teacher: int, exact: float) -> Projection:
    """A W of the usual shape: `exact` of the rows one to one, the others three pieces."""
    indices = np.full((student, 4), -1, np.int32)
    weights = np.zeros((student, 4), np.float32)
    one = rng.random(student) < exact
    indices[one, 0] = rng.permutation(teacher)[: one.sum()]
    weights[one, 0] = 1
    indices[~one, :3] = rng.integers(teacher, size=((~one).sum(), 3))
    weights[~one, :3] = np.array([0.9, 0.09, 0.009]) / 0.999
    return Projection(indices, weights, teacher)


def alignment_of(rng: np.random.Generator, positions: int) -> Alignment:
    """One row in which one chunk of eight has two teacher tokens."""
    lengths = np.where(rng.random(positions) < 1 / 8, 2, 1)
    teacher = np.repeat(np.arange(positions), lengths)[:positions]
    student = np.arange(positions)
    chunks = [jnp.asarray(c[None], jnp.int32) for c in (student, teacher)]
    return Alignment(*chunks, jnp.ones((1, positions), bool))


def full_kl(logits: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL over one vocabulary, position by position: what distillation costs without two tokenizers."""
    terms = kl_terms(jax.nn.log_softmax(teacher, axis=-1), jax.nn.log_softmax(logits, axis=-1))
    return terms.sum(-1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=int, default=32_000, help="V_s")
    parser.add_argument("--teacher", type=int, default=32_000, help="V_t")
    parser.add_argument("--positions", type=int, default=256, help="T on both sides")
    parser.add_argument("--top-k", type=int, default=8192, help="columns of P-KL, entries of the sorted part")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    exact = min(0.85, options.teacher / options.student)
    projection = random_projection(rng, options.student, options.teacher, exact)
    alignment = alignment_of(rng, options.positions)
    key_s, key_t = jax.random.split(jax.random.key(0))
    student = jax.random.normal(key_s, (1, options.positions, options.student)) * 3
    teacher = jax.random.normal(key_t, (1, options.positions, options.teacher)) * 3

    def p_kl(s: jax.Array, t: jax.Array, w: Projection | SplitProjection, a: Alignment) -> jax.Array:
        return masked_mean(projection_kl(s, t, a, w, top_k=options.top_k), valid_chunks(a))

    def hybrid(s: jax.Array, t: jax.Array, partition: Partition, a: Alignment) -> jax.Array:
        return masked_mean(hybrid_kl(s, t, a, partition, uncommon_top_k=options.top_k), valid_chunks(a))

    partitions = (Partition.strict(projection), Partition.relaxed(projection))
    on_device = jax.tree.map(jnp.asarray, (projection, *partitions, projection.split()))
    cases: dict[str, tuple[Callable[..., jax.Array], tuple]] = {
        "ordinary KL over V_t": (full_kl, (teacher + 1, teacher)),
        "P-KL, W as rows": (p_kl, (student, teacher, on_device[0], alignment)),
        "P-KL, W split (as in training)": (p_kl, (student, teacher, on_device[3], alignment)),
        "GOLD": (hybrid, (student, teacher, on_device[1], alignment)),
        "H-KL": (hybrid, (student, teacher, on_device[2], alignment)),
    }
    jitted = {name: jax.jit(jax.value_and_grad(f)) for name, (f, _) in cases.items()}
    compiled = {name: jitted[name].lower(*args).compile() for name, (_, args) in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds + 1):
        for name, (_, args) in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*args))
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    memory = {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}
    base = next(iter(cases))
    sizes = f"V_s {options.student:,}  V_t {options.teacher:,}  positions {options.positions}"
    print(f"{sizes}  on {jax.devices()[0]}")
    print(f"{'loss, forward and backward':32}{'time':>10}{'ratio':>8}{'temporary':>14}{'ratio':>8}")
    for name in cases:
        print(
            f"{name:32}{medians[name] * 1e3:>7.0f} ms{medians[name] / medians[base]:>8.2f}"
            f"{memory[name] / 2**20:>10.0f} MiB{memory[name] / memory[base]:>8.2f}"
        )


if __name__ == "__main__":
    main()
