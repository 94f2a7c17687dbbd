"""Which loss teaches sums across tokenizers? Trains small students and writes one line a run.

    python experiments/miniature/run.py                 # everything, two processes of one core each
    python experiments/miniature/run.py --seeds 1       # a first look
    python experiments/miniature/run.py --only "prefix KL, dynamic" --regime digits
    python experiments/miniature/run.py --wrong 70      # the main text in all seeds before the others
    python experiments/miniature/run.py --report        # tables and plot from the results so far

Interrupted, the same command goes on: finished runs are in results.jsonl and are not repeated. Seeds are
the outermost loop, so that all losses have equally many when it is stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"
# A step's temporary memory stays with the process: glibc would give it back and take it anew, page by page,
# at every step, a quarter of the time. It reads these when a process starts.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}


def tasks(seeds: int) -> list[tuple[int, str, float, int]]:
    """(seed, regime, share of wrong sums, place in RUNS), in the order they are run."""
    from student import RUNS, TELLING
    from world import REGIMES

    return [
        (seed, regime, share, place)
        for seed in range(seeds)
        for share in (0.7, 0.0, 0.3)
        for place, run in enumerate(RUNS)
        for regime in REGIMES
        if share == 0.7 or run.name in TELLING
        if run.kind != "none" or regime == REGIMES[0]  # without a teacher its regime changes nothing
    ]


def key_of(task: tuple[int, str, float, int]) -> str:
    """A fingerprint of all that the result depends on."""
    from student import RUNS, settings

    seed, regime, share, place = task
    text = json.dumps([settings(RUNS[place], regime, share), seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(path: Path = RESULTS) -> dict[str, dict]:
    """Results by fingerprint; a line that a kill cut short is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[result["key"]] = result
    return found


def current(results: list[dict]) -> list[dict]:
    """Those that today's settings give; what older settings left is not mixed with them."""
    from student import RUNS

    places = {run.name: place for place, run in enumerate(RUNS)}
    return [
        result
        for result in results
        if result["name"] in places
        and result["key"]
        == key_of((result["seed"], result["regime"], result["wrong_share"], places[result["name"]]))
    ]


def append(result: dict, path: Path = RESULTS) -> None:
    """One line more, in one write; behind a line that a kill cut short, on a line of its own."""
    cut = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(result) + "\n")


def end_with_parent() -> None:
    """From now on this process ends when the one that started it does, however that ends."""
    from multiprocessing import parent_process

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def work_while_asked(*arguments) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes to all; the one that started this ends it
    end_with_parent()
    work_on(*arguments)


def work_on(core: int | None, work: Path, todo: list, messages) -> None:
    """A process of one thread; `todo` is shared with the other."""
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(HERE))
    import jax
    from student import RUNS, train

    jax.config.update("jax_compilation_cache_dir", str(work / "compiled"))
    while True:
        try:
            task = todo.get_nowait()
        except queue.Empty:
            return
        seed, regime, share, place = task
        run = RUNS[place]
        label = f"{run.name}, {regime}, {share:.0%} wrong, seed {seed}"
        figures = train(
            work, run, regime, share, seed, lambda text, label=label: messages.put((label, text, None))
        )
        result = {
            "key": key_of(task), "name": run.name, "regime": regime, "wrong_share": share, "seed": seed,
            **figures,
        }  # fmt: skip
        messages.put((label, "done", result))


def prepare(work: Path, wanted: list, say) -> None:
    """Teachers and batches, before several processes need them."""
    import world

    for regime, share in sorted({task[1:3] for task in wanted}):
        world.cached_batches(work, regime, share, say)


def run_all(options: argparse.Namespace) -> None:
    import multiprocessing

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from student import RUNS

    done = finished()
    wanted = [task for task in tasks(options.seeds) if key_of(task) not in done]
    wanted = [task for task in wanted if options.only in (None, RUNS[task[3]].name)]
    wanted = [task for task in wanted if options.regime in (None, task[1])]
    wanted = [task for task in wanted if options.wrong in (None, round(100 * task[2]))]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("teachers and text", total=len(wanted))
        prepare(options.work, wanted, progress.console.print)
        os.environ.update(KEEP_MEMORY)
        context = multiprocessing.get_context("spawn")
        todo, messages = context.Queue(), context.Queue()
        for task in wanted:
            todo.put(task)
        workers = [
            context.Process(
                target=work_while_asked,
                args=(core if options.workers > 1 else None, options.work, todo, messages),
                daemon=True,  # else this process waits for them on Ctrl-C
            )
            for core in range(min(options.workers, max(1, len(wanted))))
        ]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers) or not messages.empty():
            try:
                label, text, result = messages.get(timeout=1)
            except queue.Empty:
                continue
            progress.update(bar, description=f"{label}: {text}")
            if result is not None:
                append(result)
                progress.advance(bar)
                progress.console.print(
                    f"{label}: sum {result['sum']:.3f}, first digit {result['digit1']:.3f}, "
                    f"{result['bits_per_byte']:.3f} bits per byte, {result['seconds']:.0f} s"
                )
        if any(worker.exitcode for worker in workers):
            raise SystemExit("a run failed; its message is above. The same command goes on with the rest.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="of each run (5)")
    parser.add_argument("--only", help='one loss, by its name in the table, such as "P-KL mean, dynamic"')
    parser.add_argument("--regime", choices=("digits", "whole"), help="one regime")
    parser.add_argument("--wrong", type=int, choices=(0, 30, 70), help="percent of the sums wrong, one text")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (2)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/miniature"), help="for teachers and batches, 2.5 GB"
    )
    parser.add_argument("--report", action="store_true", help="write tables and plot, train nothing")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if not options.report:
        try:
            run_all(options)
        except KeyboardInterrupt:
            print("stopped; the same command goes on with the rest")
            raise SystemExit(130) from None
    import tables

    tables.write(current(list(finished().values())))


if __name__ == "__main__":
    main()
