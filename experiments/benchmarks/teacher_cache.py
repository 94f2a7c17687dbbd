"""What a teacher cache gains and what it loses, measured on the models of the quickstart and on a larger one.

    python experiments/benchmarks/teacher_cache.py equal    # each loss from a cache beside the live teacher
    python experiments/benchmarks/teacher_cache.py speed    # a step of the quickstart with each of the two
    python experiments/benchmarks/teacher_cache.py large    # the same with a teacher of SmolLM2-135M's shape
    python experiments/benchmarks/teacher_cache.py sizes CACHE   # bytes a token by order and compression

The first takes one batch of the quickstart's and compares loss and gradient; "spread" and "left out" are what
can be done with the tokens that are not kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from xtoken_jax.alignment.batch import Alignment, StoredRows, TokenRows
from xtoken_jax.data.batches import Batch, TeacherBatch, training_batches
from xtoken_jax.data.sources import read_sources
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.losses import LossConfig, LossKind, loss_tables
from xtoken_jax.losses.total import VocabularySizes
from xtoken_jax.models import DecoderConfig, Model
from xtoken_jax.models.load import open_model
from xtoken_jax.projection.build import build_projection
from xtoken_jax.projection.prefixes import prefix_tables
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.teacher_cache.distributions import Keep, Kept, distributions
from xtoken_jax.teacher_cache.reader import TeacherCache
from xtoken_jax.teacher_cache.shards import unpacked
from xtoken_jax.tokens.tokenizer import TokenizerPair
from xtoken_jax.train.batch_loss import Objective, Teacher
from xtoken_jax.train.gradient import gradient_of

CONFIGS = Path(__file__).parents[2] / "tests" / "fixtures" / "hf_configs"
KINDS = ("p_kl", "h_kl", "gold", "uld", "alm", "prefix_kl")


def stored(kept: Kept, shape: tuple[int, int], size: int) -> StoredRows:
    """What `distributions` kept, as a batch holds it, at temperature 1."""
    others = kept.tails[:, 0]
    if kept.ids is not None:
        others = others - jnp.log(jnp.float32(size) - (kept.ids < size).sum(-1))
    rows = StoredRows(kept.ids, kept.log_probabilities, others, kept.normalizers, size, 1.0)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), rows)


class Quickstart:
    """Its models and one batch, with the teacher's outputs kept in some ways."""

    def __init__(self, rows: int | None = None) -> None:
        words = ["experiment=quickstart", *([f"data.batch_size={rows}"] if rows else [])]
        self.experiment = experiment = load_experiment(words)
        self.pair = TokenizerPair.load(str(experiment.student.path), str(experiment.teacher.path))
        mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
        key = jax.random.key(0)
        self.student, self.params = open_model(experiment.student, 0, mesh=mesh, key=key)
        self.teacher, self.teacher_params = open_model(experiment.teacher, 0, mesh=mesh, key=key)
        documents = read_sources(experiment.data.train)
        self.batch = next(training_batches({"teacher": self.pair}, documents, experiment.data))
        self.batch = jax.tree.map(jnp.asarray, self.batch)
        self.projection = build_projection(self.pair)

    def tables(self, kind: LossKind) -> Any:
        """What a loss reads."""
        sizes = VocabularySizes(self.pair.student.size, self.pair.teacher.size)
        made: dict[LossKind, Callable[[], Any]] = {
            LossKind.prefix_kl: lambda: prefix_tables(self.pair),
            LossKind.uld: lambda: sizes,
            LossKind.alm: lambda: sizes,
        }
        found = made[kind]() if kind in made else loss_tables(kind, self.projection)
        return jax.tree.map(jnp.asarray, found)

    def kept(self, keep: Keep) -> StoredRows:
        """The teacher's outputs of the batch: of its segments, as the cache has them."""
        rows = self.batch.teachers["teacher"].rows
        size = self.pair.teacher.size
        kept, _ = distributions(
            self.teacher, self.teacher_params, rows.ids, keep=keep, size=size, segments=rows.segments
        )
        # Values as they are kept; in one format, so that one program takes all of them.
        kept = kept._replace(log_probabilities=kept.log_probabilities.astype(jnp.float32))
        return stored(kept, rows.ids.shape, size)

    def with_rows(self, rows: StoredRows | None) -> Batch:
        """The batch with what was stored."""
        teacher = dataclasses.replace(self.batch.teachers["teacher"], stored=rows)
        return dataclasses.replace(self.batch, teachers={"teacher": teacher})

    def objective(self, loss: LossConfig, live: bool) -> Objective:
        """Of one teacher."""
        teachers = {"teacher": Teacher(self.teacher if live else None, loss)}
        return Objective(self.student, teachers, loss, self.pair.student.size)


def equal(options: argparse.Namespace) -> None:
    """Relative differences of the loss and of the whole gradient, by loss and by what is kept."""
    quick = Quickstart(options.rows)
    ways = {
        "all float32": Keep(None, 1.0, "float32", (1.0,)),
        "all float16": Keep(None, 1.0, "float16", (1.0,)),
        "all bfloat16": Keep(None, 1.0, "bfloat16", (1.0,)),
        "64 float16": Keep(64, 1.0, "float16", (1.0,)),
        "top-p .99 float16": Keep(1024, 0.99, "float16", (1.0,)),
    }
    rows: dict[str, StoredRows | None] = {name: quick.kept(keep) for name, keep in ways.items()}
    some = rows["64 float16"]
    assert some is not None
    rows["64 left out"] = dataclasses.replace(some, others=jnp.full_like(some.others, -jnp.inf))
    print(f"{'':12}{'live kd':>10}", *(f"{name:>19}" for name in rows))
    for kind in options.kinds:
        loss = LossConfig(kind=LossKind(kind), dynamic_scaling=False, kd_weight=1.0, ce_weight=0.0, block=128)
        tables = {"teacher": quick.tables(loss.kind)}
        live, cached = (jax.jit(gradient_of(quick.objective(loss, way))) for way in (True, False))
        params = {"teacher": quick.teacher_params}
        (value, metrics), slope = live(quick.params, None, params, tables, quick.with_rows(None))
        size = optax.tree.norm(slope)
        shown = [f"{float(metrics['kd']):10.4f}"]
        for found in rows.values():
            (ours, _), our_slope = cached(quick.params, None, {}, tables, quick.with_rows(found))
            apart = optax.tree.norm(jax.tree.map(jnp.subtract, our_slope, slope)) / size
            shown.append(f"{abs(float(ours / value) - 1):9.1e} {float(apart):9.1e}")
        print(f"{kind:12}", *shown, flush=True)


def best_of(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each at its best, taken in turn."""
    best = dict.fromkeys(programs, math.inf)
    for repeat in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            if repeat:  # the first one compiles
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def speed(options: argparse.Namespace) -> None:
    """A gradient of the quickstart, its loss and batch, with the teacher and from caches."""
    quick = Quickstart()
    loss = dataclasses.replace(quick.experiment.loss, kind=LossKind.p_kl)
    tables = {"teacher": quick.tables(LossKind.p_kl)}
    live = jax.jit(gradient_of(quick.objective(loss, True)))
    cached = jax.jit(gradient_of(quick.objective(loss, False)))
    params = {"teacher": quick.teacher_params}
    plain = jax.jit(gradient_of(Objective(quick.student, {}, loss, quick.pair.student.size)))
    programs: dict[str, Callable[[], Any]] = {
        "live teacher": lambda: live(quick.params, None, params, tables, quick.with_rows(None)),
        "no teacher": lambda: plain(quick.params, None, {}, {}, quick.batch),
    }
    for name, keep in (("64", Keep(64, 1.0, "float16", (1.0,))), ("all", Keep(None, 1.0, "float16", (1.0,)))):
        batch = quick.with_rows(quick.kept(keep))
        programs[f"cache of {name}"] = lambda batch=batch: cached(quick.params, None, {}, tables, batch)
    _show(best_of(programs, options.repeats))


def large(options: argparse.Namespace) -> None:
    """A teacher of SmolLM2-135M's shape and vocabulary, a student a sixth as deep, random weights."""
    config = DecoderConfig.from_hf(json.loads((CONFIGS / "smollm2_135m.json").read_text()))
    teacher, student = Model(config), Model(dataclasses.replace(config, num_layers=config.num_layers // 6))
    size = config.vocab_size
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, size, (options.batch, options.length)), jnp.int32)
    flags = jnp.ones(ids.shape, bool)
    side = TokenRows(ids, flags, flags.at[:, 0].set(False), jnp.ones_like(ids))
    chunks = jnp.broadcast_to(jnp.arange(options.length, dtype=jnp.int32), ids.shape)
    alignment = Alignment(chunks, chunks, flags)
    params = {"teacher": jax.jit(teacher.init)(jax.random.key(1))}
    own = jax.jit(student.init)(jax.random.key(0))
    loss = LossConfig(kind=LossKind.same_vocabulary, dynamic_scaling=False, top_k=None)
    tables = {"teacher": VocabularySizes(size, size)}

    def program(model: Model | None, rows: StoredRows | None) -> Callable[[], Any]:
        of = jax.jit(
            gradient_of(Objective(student, {"teacher": Teacher(model, loss)}, loss, size, packed=False))
        )
        batch = Batch(side, {"teacher": TeacherBatch(side, alignment, rows)})
        return lambda: of(own, None, {} if model is None else params, tables, batch)

    keep = Keep(64, 1.0, "float16", (1.0,))
    start = time.perf_counter()
    kept, _ = jax.block_until_ready(distributions(teacher, params["teacher"], ids, keep=keep, size=size))
    print(
        f"keeping 64 of {size:,} (with compiling): {time.perf_counter() - start:.1f} s for {ids.size} tokens"
    )
    plain = jax.jit(gradient_of(Objective(student, {}, loss, size, packed=False)))
    _show(
        best_of(
            {
                "live teacher": program(teacher, None),
                "no teacher": lambda: plain(own, None, {}, {}, Batch(side, {})),
                "cache of 64": program(None, stored(kept, ids.shape, size)),
            },
            options.repeats,
        )
    )


def _show(best: dict[str, float]) -> None:
    for name, seconds in best.items():
        print(f"{name:14} {seconds:8.3f} s  {best['live teacher'] / seconds:5.2f} times as fast as live")


def sizes(options: argparse.Namespace) -> None:
    """Bytes a token of a cache: tokens by probability or by id, bytes of a number together or in planes."""
    cache = TeacherCache(options.cache)
    form, info = cache.index.form, cache.index.shards[0]
    shard = load_file(options.cache / info.file)
    totals: dict[str, int] = {}
    tokens = 0
    for place in range(min(400, info.parts)):
        begin, end = shard["offsets"][place : place + 2]
        count = int(shard["tokens"][place])
        rows = unpacked(shard["content"][begin:end].tobytes(), count, form)
        if rows.ids is None or rows.counts is None:
            sys.exit(f"{options.cache}: keeps all tokens, which have one order")
        tokens += count
        owner = np.repeat(np.arange(count), rows.counts)
        falling = np.lexsort((-rows.log_probabilities.astype(np.float32), owner))
        steps = np.diff(rows.ids.astype(np.int64), prepend=0)
        first = np.searchsorted(owner, np.arange(count))
        steps[first] = rows.ids[first]
        orders = {
            "by probability": (rows.ids[falling], rows.log_probabilities[falling]),
            "steps by id": (steps.astype(form.id_dtype), rows.log_probabilities),
        }
        for order, (ids, values) in orders.items():
            arrays = [ids, values, rows.counts, rows.tails, rows.normalizers]
            together = b"".join(x.tobytes() for x in arrays)
            planes = b"".join(x.reshape(-1).view(np.uint8).reshape(x.size, -1).T.tobytes() for x in arrays)
            totals["raw"] = totals.get("raw", 0) + len(together) // len(orders)
            for name, content in ((order, together), (f"{order}, in planes", planes)):
                totals[name] = totals.get(name, 0) + len(zlib.compress(content, 6))
    for name, total in totals.items():
        print(f"{name:28} {total / tokens:8.1f} bytes a token")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for function in (equal, speed, large, sizes):
        sub = commands.add_parser(function.__name__, help=function.__doc__)
        sub.set_defaults(run=function)
        if function is equal:
            sub.add_argument("--kinds", nargs="+", default=KINDS)
            sub.add_argument("--rows", type=int, help="of the batch; the quickstart's own by default")
        if function in (speed, large):
            sub.add_argument("--repeats", type=int, default=5)
        if function is large:
            sub.add_argument("--batch", type=int, default=2)
            sub.add_argument("--length", type=int, default=256)
        if function is sizes:
            sub.add_argument("cache", type=Path)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
