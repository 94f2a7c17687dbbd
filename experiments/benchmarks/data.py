"""Batches made beside the step that takes them: what the step waits, what the pipeline can, what is padding.

    make tokenizers                                            # once, for the pairs of real tokenizers
    python experiments/benchmarks/data.py
    python experiments/benchmarks/data.py --steps 0.1 0.3 --batch-size 16 --length 2048

Text is tokenized, aligned, cut, packed and stacked in threads that run ahead. The stand-in for a step sleeps,
as the host does while an accelerator computes. A case is one pair and one layout, on the text that every
Python carries. The quickstart's is cut up front; with real tokenizers it is streamed, as much text is, though
it is little.

- first: seconds to the first batch
- free: student tokens a second when nothing but the pipeline runs, and as many of its processor seconds
- at each step's length: the share of the time that the loop waits for `next(batches)`
- padding: the share of all places in the student's and in the teacher's rows, and segments a row
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizer_folders

from xtoken_jax.data import encode
from xtoken_jax.data.batches import Batch, Batches, training_batches
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.sources import SourceConfig, SourceKind, read_sources
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.tokens.tokenizer import TokenizerPair

WARM = 8  # batches before anything is timed: more than run ahead


@dataclass(frozen=True)
class Case:
    """A pair and the shape of its batches."""

    name: str
    pair: TokenizerPair
    config: DataConfig
    documents: dict[str, list[str]]

    def batches(self, pack: bool, threads: int | None) -> Batches:
        config = DataConfig(**{**vars(self.config), "pack": pack})
        return training_batches({"teacher": self.pair}, self.documents, config, threads=threads)


def quickstart() -> Case:
    experiment = load_experiment(["experiment=quickstart"])
    pair = TokenizerPair.load(experiment.student.path, experiment.teacher.path)
    return Case("quickstart", pair, experiment.data, read_sources(experiment.data.train))


def of_real_tokenizers(options: argparse.Namespace) -> list[Case]:
    kinds = (SourceKind.python_docs, SourceKind.python_docstrings)
    documents = read_sources({kind.value: SourceConfig(kind=kind) for kind in kinds})
    config = DataConfig(
        student_length=options.length, teacher_length=options.length, batch_size=options.batch_size
    )
    folders = options.tokenizers
    encode.LITTLE = 0
    there = [n for n in options.teachers if (folders / n / "tokenizer.json").is_file()]
    if not (folders / options.student / "tokenizer.json").is_file():
        print(f"{folders / options.student}: no tokenizer.json; `make tokenizers` fetches real tokenizers")
        return []
    return [
        Case(
            f"{options.student} -> {name}",
            TokenizerPair.load(folders / options.student, folders / name),
            config,
            documents,
        )
        for name in there
    ]


def free(batches: Batches, seconds: float) -> tuple[float, float]:
    """Student tokens a second of time, and a second of processor time."""
    for _ in range(WARM):
        next(batches)
    tokens, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        tokens += int(next(batches).student.mask.sum())
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


def first(case: Case, pack: bool, threads: int | None) -> float:
    """Seconds to the first batch."""
    begun = time.perf_counter()
    next(case.batches(pack, threads))
    return time.perf_counter() - begun


def waiting(batches: Batches, step: float, seconds: float) -> float:
    """The share of a loop's time that it waits for its batches, with a step of so many seconds."""
    for _ in range(WARM):
        next(batches)
        time.sleep(step)
    waited, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(step)
    return waited / (time.perf_counter() - begun)


def padding(batches: Batches, count: int) -> tuple[float, float, float]:
    """Shares of the student's and the teacher's places, and segments a row."""

    def of(batch: Batch) -> tuple[float, float, float]:
        student, teacher = batch.student, batch.teachers["teacher"].rows
        segments = np.asarray(student.segments).max(axis=1).mean()
        return 1 - float(student.mask.mean()), 1 - float(teacher.mask.mean()), float(segments)

    found = np.mean([of(next(batches)) for _ in range(count)], axis=0)
    return float(found[0]), float(found[1]), float(found[2])


def report(case: Case, options: argparse.Namespace) -> None:
    config = case.config
    counts = sum(map(len, case.documents.values()))
    print(
        f"{case.name}: {counts:,} documents, B {config.batch_size}, "
        f"T_s {config.student_length}, T_t {config.teacher_length}"
    )
    print(
        f"{'':11}{'first s':>8}{'tokens/s':>10}{'per cpu s':>11}"
        + "".join(f"{f'wait {s * 1e3:g} ms':>13}" for s in options.steps)
        + f"{'pad student':>13}{'pad teacher':>13}{'segments':>10}"
    )
    for pack in (True, False):
        soon = first(case, pack, options.threads)
        rate, of_cpu = free(case.batches(pack, options.threads), options.seconds)
        waits = [waiting(case.batches(pack, options.threads), s, options.seconds) for s in options.steps]
        student, teacher, segments = padding(case.batches(pack, options.threads), options.batches)
        print(
            f"{'packed' if pack else 'one a row':11}{soon:>8.1f}{rate:>10,.0f}{of_cpu:>11,.0f}"
            + "".join(f"{wait:>13.2%}" for wait in waits)
            + f"{student:>13.1%}{teacher:>13.1%}{segments:>10.1f}"
        )
    print()
    sys.stdout.flush()


def main(words: Sequence[str] | None = None) -> None:
    parser = tokenizer_folders.parser(__doc__, ["qwen3", "gemma3"])
    parser.add_argument("--steps", type=float, nargs="+", default=[0.1, 0.5], help="seconds of the stand-in")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens a row, on either side")
    parser.add_argument("--threads", type=int, help="that make rows (default: as in training)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each figure")
    parser.add_argument("--batches", type=int, default=60, help="that padding is measured on")
    options = parser.parse_args(words)
    report(quickstart(), options)
    for case in of_real_tokenizers(options):
        report(case, options)


if __name__ == "__main__":
    main()
