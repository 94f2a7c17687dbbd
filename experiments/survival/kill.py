"""Kill `xtoken distill` again and again, go on each time, and compare with a run that nobody touched.

    python experiments/survival/kill.py --kills 40
    python experiments/survival/kill.py --kills 10 --meshes mesh.data=8 "mesh.fsdp=4 mesh.tensor=2"
    python experiments/survival/kill.py --kills 50 --each 25 --kinds term int --until 10 --cold \\
        --words experiment=quickstart

A round is a run's folder: killed some times, each time gone on with by the same command, at last let run
to its end, and compared. A kill comes at a random moment of the process's life (`any`), or as soon as a
checkpoint is being written and a moment more (`save`), or it is a SIGTERM or a Ctrl-C at a random moment
(`term`, `int`). Every start is a new process. `--until` draws the moments from the first seconds alone, and
`--cold` lets every start compile, which it otherwise takes from a cache.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

WORDS = (
    "experiment=quickstart", "train.steps=40", "train.save_every=4", "train.log_every=1",
    "train.evaluate_every=10", "data.batch_size=8", "data.train.arithmetic.documents=100",
    "data.train.english.limit=40", "data.validation.english.limit=10",
    "data.validation.arithmetic.documents=8",
)  # fmt: skip
RUNS = {"distilled": Path(), "without a teacher": Path("no_teacher")}
SIGNALS = {"any": signal.SIGKILL, "save": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
CODES = {"term": 0, "int": 130}  # that a signal ends with
EARLY = 2.0  # seconds after a start in which Python may not have run the command's first line yet
AFTER = 0.15  # seconds behind the begin of a save, at most: some saves are over by then


@dataclass
class Found:
    """What became of all rounds.

    Attributes:
        kills: kind -> how many.
        early: signals that ended a process before Python ran the command's first line.
        in_save: kills that left a half-written checkpoint behind.
        steps_lost: of each kill, steps that had to be done again.
        faults: what differed, with the round it differed in; none is what is hoped for.
        largest: largest relative difference of a loss.
        rounds: finished and compared.
    """

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    early: int = 0
    in_save: int = 0
    steps_lost: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    largest: float = 0.0
    rounds: int = 0


def study(
    words: list[str],
    work: Path,
    kills: int,
    *,
    each: int,
    seed: int,
    meshes: list[str],
    kinds: tuple[str, ...],
    until: float | None = None,
    cold: bool = False,
) -> Found:
    """Rounds until there were so many kills.

    Args:
        words: of `xtoken distill`, without run_dir.
        work: a folder for the runs.
        kills: in all.
        each: kills a round, at most.
        seed: of kinds and moments.
        meshes: words of the meshes, which the processes of a round take in turn; the untouched run has the
            first. With more than one, losses are compared to 1e-5, else all to the bit.
        kinds: of kills.
        until: seconds after a start in which moments are drawn; None for the whole life of a process.
        cold: every start compiles.
    """
    rng, found = random.Random(seed), Found()
    environment = dict(os.environ)
    if not cold:
        # Compiling takes most of a start; the untouched run fills the cache, and no one else writes it.
        environment["JAX_COMPILATION_CACHE_DIR"] = str(work / "compiled")
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def command(folder: Path, mesh: str) -> list[str]:
        return [sys.executable, "-m", "xtoken_jax", "distill", *words, *mesh.split(), f"run_dir={folder}"]

    def finish(folder: Path, mesh: str) -> float:
        begun = time.perf_counter()
        done = subprocess.run(
            command(folder, mesh), env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            found.faults.append(f"{folder.name}: ended with {done.returncode}: {done.stderr[-300:]}")
        return time.perf_counter() - begun

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    whole = work / "whole"
    seconds = max(finish(whole if i == 0 else work / f"warm-{i}", mesh) for i, mesh in enumerate(meshes))
    if not cold:
        seconds = min(seconds, finish(work / "again", meshes[0]))  # with all compiled
        compare(whole, work / "again", found, exact=True)
    seconds = seconds if until is None else until
    while sum(found.kills.values()) < kills and not found.faults:
        folder = work / f"round-{found.rounds}"
        for start in range(each):
            kind, mesh = rng.choice(kinds), meshes[start % len(meshes)]
            before = _half_written(folder)
            log = (work / "log").open("a")
            begun = time.perf_counter()
            process = subprocess.Popen(command(folder, mesh), env=environment, stdout=log, stderr=log)
            ended = _kill(process, folder, kind, rng, seconds)
            if ended:
                break
            code = process.returncode
            if kind in CODES and code == -SIGNALS[kind] and time.perf_counter() - begun < EARLY:
                found.early += 1
            elif kind in CODES and code != CODES[kind]:
                found.faults.append(f"{folder.name}: {SIGNALS[kind].name} ended with {code}")
            found.kills[kind] += 1
            found.in_save += bool(_half_written(folder) - before)
            found.steps_lost.append(_lost(folder))
            if sum(found.kills.values()) == kills:
                break
        finish(folder, meshes[each % len(meshes)])
        compare(whole, folder, found, exact=len(meshes) == 1)
        found.rounds += 1
        print(
            f"round {found.rounds}: {dict(found.kills)}, {found.in_save} in a save, {found.faults}",
            flush=True,
        )
        shutil.rmtree(folder, ignore_errors=bool(found.faults))
    return found


def _kill(
    process: subprocess.Popen[bytes], folder: Path, kind: str, rng: random.Random, seconds: float
) -> bool:
    """Kill it; True if it had ended by itself before."""
    begun, moment = time.perf_counter(), rng.uniform(0, seconds)
    skipped = rng.randrange(4)  # saves, so that not the first one is always hit
    seen = before = _half_written(folder)
    while process.poll() is None:
        if kind != "save" and time.perf_counter() - begun > moment:
            break
        if kind == "save":
            seen = seen | _half_written(folder)
            if len(seen - before) > skipped:
                time.sleep(rng.uniform(0, AFTER))
                break
        time.sleep(0.001)
    if process.poll() is not None:
        return True
    process.send_signal(SIGNALS[kind])
    process.wait()
    return False


def _half_written(folder: Path) -> set[tuple[str, int]]:
    """Folders of saves under way, or killed: path and inode."""
    found = set()
    for run in RUNS.values():
        with contextlib.suppress(FileNotFoundError):  # not made yet, or renamed meanwhile
            for entry in os.scandir(folder / run / "checkpoints"):
                if "tmp" in entry.name:
                    found.add((entry.path, entry.inode()))
    return found


def _lost(folder: Path) -> int:
    """Steps that are logged and in no checkpoint, of the run that was under way."""
    lost = 0
    for run in RUNS.values():
        path = folder / run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        steps = [json.loads(line)["step"] for line in lines]
        kept = folder / run / "checkpoints"
        saved = [int(name) for name in os.listdir(kept) if name.isdigit()] if kept.is_dir() else []
        lost += max(steps, default=0) - max(saved, default=0)
    return lost


def compare(whole: Path, folder: Path, found: Found, *, exact: bool) -> None:
    """Note each difference of a run from the untouched one."""

    def rows(root: Path) -> list[dict[str, object]]:
        lines = (root / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]

    for name, run in RUNS.items():
        if not (whole / run / "metrics.jsonl").is_file():
            continue
        ours, theirs = rows(folder / run), rows(whole / run)
        if [row["step"] for row in ours] != [row["step"] for row in theirs]:
            found.faults.append(f"{folder.name}: other rows, {name}")
            continue
        for mine, other in zip(ours, theirs, strict=True):
            if "loss" in mine:
                apart = abs(mine["loss"] - other["loss"]) / abs(other["loss"])  # type: ignore[operator]
                found.largest = max(found.largest, apart)
                if apart > 1e-5:
                    found.faults.append(f"{folder.name}: step {mine['step']} is {apart} apart, {name}")
            if exact and mine != other:
                found.faults.append(f"{folder.name}: {mine} is not {other}, {name}")
    left = [p for p in folder.rglob("*") if "tmp" in p.name or p.name.endswith((".partial", ".old"))]
    if left:
        found.faults.append(f"{folder.name}: left {left[0]} behind")
    for file in ("student/model.safetensors", "result.json") if exact else ():
        digests = [hashlib.sha256((root / file).read_bytes()).hexdigest() for root in (whole, folder)]
        if digests[0] != digests[1]:
            found.faults.append(f"{folder.name}: another {file}")


def main() -> None:
    """Run the study and print what came of it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--each", type=int, default=4, help="kills a round, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/survival"))
    parser.add_argument(
        "--meshes", nargs="+", default=[""], help="taken in turn; several need as many devices"
    )
    parser.add_argument("--kinds", nargs="+", choices=SIGNALS, default=("any", "save", "term"))
    parser.add_argument(
        "--words", nargs="+", default=WORDS, help="of xtoken distill, instead of the quickstart's"
    )
    parser.add_argument("--until", type=float, metavar="SECONDS", help="kills come within them after a start")
    parser.add_argument("--cold", action="store_true", help="every start compiles")
    options = parser.parse_args()
    if len(options.meshes) > 1:
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        os.environ.setdefault("NPROC", "32")  # threads for the collectives of 8 devices
    found = study(
        list(options.words), options.work.resolve(), options.kills, each=options.each, seed=options.seed,
        meshes=options.meshes, kinds=tuple(options.kinds), until=options.until, cold=options.cold,
    )  # fmt: skip
    lost = found.steps_lost
    summary = {
        "kills": dict(found.kills), "before the first line": found.early,
        "in a save": found.in_save, "rounds": found.rounds,
        "steps done again": {"mean": round(sum(lost) / max(len(lost), 1), 2), "most": max(lost, default=0)},
        "largest relative difference of a loss": found.largest, "faults": found.faults,
    }  # fmt: skip
    print(json.dumps(summary, indent=2))
    sys.exit(bool(found.faults))


if __name__ == "__main__":
    main()
