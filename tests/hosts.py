"""Programs as several processes on this machine, which find one another on a port of their own."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEVICES = 8  # in all


def start(command, count, log, *, devices=DEVICES, folders=None, more=(), variables=()):
    """The processes, started.

    Args:
        command: (index, count, port) -> the words behind the interpreter.
        count: of processes.
        log: their output goes to log-0.txt and so on.
        devices: virtual ones, of all processes together.
        folders: the working folder of each.
        more: further words of each.
        variables: further ones of the environment of each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": re.sub(r"(device_count=)\d+", rf"\g<1>{devices // count}", os.environ["XLA_FLAGS"]),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    processes = []
    for index in range(count):
        words = [*command(index, count, port), *(more[index] if more else ())]
        with open(f"{log}-{index}.txt", "w") as output:
            started = subprocess.Popen(
                [sys.executable, *words],
                env=environment | (variables[index] if variables else {}),
                cwd=folders[index] if folders else None,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        processes.append(started)
    return processes


def distill(words, name="distill"):
    """The command of `start` for `xtoken distill`, or for another that several processes share."""

    def command(index, count, port):
        keys = [f"hosts.coordinator=127.0.0.1:{port}", f"hosts.count={count}", f"hosts.index={index}"]
        return ["-m", "xtoken_jax", name, *words, *(keys if count > 1 else [])]

    return command


def toy(folder, **options):
    """The command of `start` for tests/hosts_toy.py."""

    def command(index, count, port):
        words = index, count, port, folder, json.dumps(options)
        return [str(ROOT / "tests" / "hosts_toy.py"), *map(str, words)]

    return command


def finish(processes, log, seconds=300):
    """Exit code and output of each, without what the CPU's collectives print."""
    try:
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = [Path(f"{log}-{index}.txt").read_text() for index in range(len(codes))]
    said = ["\n".join(x for x in text.splitlines() if not x.startswith("[Gloo]")) for text in texts]
    return [*zip(codes, said, strict=True)]


def run(command, count, log, **options):
    """Exit code and output of each process, at its end."""
    return finish(start(command, count, log, **options), log)


def wait_for_step(folder, step, seconds=240):
    """Until a run has logged a step."""
    until = time.monotonic() + seconds
    while not any(row["step"] >= step for row in rows_of(folder)):
        assert time.monotonic() < until, f"no step {step} in {folder}"
        time.sleep(0.1)


def rows_of(folder):
    """The whole lines of metrics.jsonl, without the time."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]
