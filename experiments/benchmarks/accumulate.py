"""Memory and time of a gradient by micro-batches, beside that of the batch at once.

    python experiments/benchmarks/accumulate.py --model smollm2_135m --batch 16 --length 512
    python experiments/benchmarks/accumulate.py --layers 6 --width 256 --batch 16 --length 128 --repeats 5

The first compiles only: what the compiler reserves for temporaries, the gradient included. The second runs,
on random weights of a small model. Student and teacher are of one size and vocabulary; float32, with dynamic
scaling.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.alignment.batch import Alignment, TokenRows
from xtoken_jax.data.batches import Batch, TeacherBatch
from xtoken_jax.losses import LossConfig, LossKind
from xtoken_jax.losses.total import VocabularySizes
from xtoken_jax.models import DecoderConfig, Model
from xtoken_jax.train.batch_loss import Objective, Teacher
from xtoken_jax.train.gradient import gradient_of

CONFIGS = Path(__file__).parents[2] / "tests" / "fixtures" / "hf_configs"


def rows(config: DecoderConfig, batch: int, length: int) -> Batch:
    """Random tokens, the same for student and teacher."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (batch, length)), jnp.int32)
    flags = jnp.ones((batch, length), bool)
    side = TokenRows(ids, flags, flags.at[:, 0].set(False), jnp.ones_like(ids))
    chunks = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return Batch(side, {"teacher": TeacherBatch(side, Alignment(chunks, chunks, flags))})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="compile only, a model of tests/fixtures/hf_configs")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.model:
        config = DecoderConfig.from_hf(json.loads((CONFIGS / f"{options.model}.json").read_text()))
    else:
        width = options.width
        config = DecoderConfig(
            vocab_size=4096, hidden_size=width, intermediate_size=4 * width, num_layers=options.layers,
            num_heads=width // 32, num_kv_heads=width // 32, head_dim=32,
        )  # fmt: skip
    model, size = Model(config, remat=options.remat), config.vocab_size
    teachers = {"teacher": Teacher(model, LossConfig(kind=LossKind.same_vocabulary, top_k=None))}
    objective = Objective(model, teachers, LossConfig(), size)
    tables = {"teacher": VocabularySizes(size, size)}
    batch = rows(config, options.batch, options.length)
    params = model.abstract() if options.model else jax.jit(model.init)(jax.random.key(0))
    arguments = (params, None, {"teacher": params}, tables, batch)
    programs = {}
    for parts in options.parts:
        programs[parts] = jax.jit(gradient_of(objective, parts)).lower(*arguments).compile()
        memory = programs[parts].memory_analysis().temp_size_in_bytes / 2**20
        print(f"{parts} parts: {memory:,.0f} MiB of temporaries", flush=True)
    if options.model:
        return
    best = dict.fromkeys(programs, np.inf)
    for _ in range(options.repeats):  # in turn, so that what else the machine does meets all alike
        for parts, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            best[parts] = min(best[parts], time.perf_counter() - start)
    for parts, seconds in best.items():
        print(f"{parts} parts: {seconds:.3f} s, {seconds / best[options.parts[0]]:.2f} of the first")


if __name__ == "__main__":
    main()
