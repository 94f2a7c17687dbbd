"""Time and memory of building W, beside loading the two tokenizers.

    make tokenizers                                            # once
    python experiments/benchmarks/projection.py
    python experiments/benchmarks/projection.py --student qwen3 --teachers gemma3 --rounds 5

Every pair, in both directions, is loaded and built in a fresh process, pair after pair, round after
round; a figure is the median of the rounds. Memory is the resident set at its peak during the build,
above what it was after loading. Files are the same if the builds of all rounds save the same bytes.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizer_folders

from xtoken_jax import TokenizerPair, build_projection, save_projection


@dataclass(frozen=True)
class Run:
    """One build in one process: seconds, bytes, rows of W by their number of entries."""

    load: float
    build: float
    peak: int
    one: int
    several: int
    empty: int
    sha256: str


def main() -> None:
    parser = tokenizer_folders.parser(__doc__, ["qwen3", "gemma3", "gptoss", "deepseek_v3", "smollm2"])
    parser.add_argument("--rounds", type=int, default=3, help="at least 2 (default: 3)")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: files are compared between rounds, so at least 2")
    if not present(options.tokenizers, options.student):
        parser.error(f"{options.tokenizers / options.student}: no tokenizer.json; run `make tokenizers`")
    teachers = [name for name in options.teachers if present(options.tokenizers, name)]
    pairs = [pair for t in teachers for pair in ((options.student, t), (t, options.student))]
    runs: dict[tuple[str, str], list[Run]] = {pair: [] for pair in pairs}
    # The first round fills the system's file cache and is dropped.
    for number in range(options.rounds + 1):
        for place, pair in enumerate(pairs, start=1):
            where = f"round {number} of {options.rounds}, pair {place} of {len(pairs)}"
            print(f"\r{where}: {' -> '.join(pair):30}", end="", file=sys.stderr, flush=True)
            run = in_fresh_process(*(options.tokenizers / name for name in pair))
            if number:
                runs[pair].append(run)
    print(file=sys.stderr)
    print(
        f"{'student -> teacher':24}{'load':>8}{'build':>8}{'ratio':>7}{'peak':>10}"
        f"{'one entry':>11}{'several':>9}{'empty':>7}  files"
    )
    for pair in pairs:
        load, build, peak = (
            statistics.median(values)
            for values in zip(*((r.load, r.build, r.peak) for r in runs[pair]), strict=True)
        )
        first = runs[pair][0]
        files = "same" if len({run.sha256 for run in runs[pair]}) == 1 else "DIFFERENT"
        print(
            f"{' -> '.join(pair):24}{load:>6.2f} s{build:>6.2f} s{build / load:>7.2f}{peak / 2**20:>6.0f} MiB"
            f"{first.one:>11,}{first.several:>9,}{first.empty:>7,}  {files}"
        )


def present(folder: Path, name: str) -> bool:
    """Whether there is such a tokenizer; says so if not."""
    if (folder / name / "tokenizer.json").is_file():
        return True
    print(f"{name}: not in {folder}, skipped")
    return False


def in_fresh_process(student: Path, teacher: Path) -> Run:
    # Spawned: nothing of what this process holds or has cached is shared.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, student, teacher).result()


def measure(student: Path, teacher: Path) -> Run:
    """Load, build and save one pair."""
    _ = build_projection, save_projection  # imported when first named, and not to be timed
    start = time.perf_counter()
    pair = TokenizerPair.load(student, teacher)
    load = time.perf_counter() - start
    before = settle()
    start = time.perf_counter()
    projection = build_projection(pair)
    build = time.perf_counter() - start
    peak = memory()[1] - before
    entries = (projection.indices >= 0).sum(-1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "W.safetensors"
        save_projection(path, projection, pair)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    one, empty = (int(np.count_nonzero(entries == n)) for n in (1, 0))
    return Run(load, build, peak, one, len(entries) - one - empty, empty, sha256)


def settle() -> int:
    """The resident set now, after what loading freed went back and its peak was forgotten."""
    gc.collect()
    if sys.platform == "linux":
        # Else the build would grow into memory that loading left behind, and seem to need none.
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            print(f"the peak cannot be reset ({error}): it is that of loading at least", file=sys.stderr)
    return memory()[0]


def memory() -> tuple[int, int]:
    """Bytes of the resident set, now and at its peak; outside Linux, the peak twice."""
    status = Path("/proc/self/status")
    if not status.is_file():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (peak, peak)
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    now, peak = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return now, peak


if __name__ == "__main__":
    main()
